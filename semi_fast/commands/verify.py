"""Hash a prepared data set again and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from semi_fast.commands import PATH


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=PATH, metavar="DATA")


def run(*, data: str | Path) -> None:
    """Hash manifest, arrays, containers and splits; ValueError names the first fault."""
    from semi_fast.data_prep.long_tail import split_files
    from semi_fast.prepared.manifest import load_manifest, load_split, verify_manifest

    manifest = load_manifest(data)
    verify_manifest(manifest)
    splits = [load_split(path, manifest) for path in split_files(manifest)]
    kinds = {"arrays": manifest.files, "container files": manifest.containers}
    held = [f"{len(one)} {kind} ({sum(e['bytes'] for e in one.values())} bytes)" for kind, one in kinds.items() if one]
    print(f"ok: {', '.join(held)}, {len(splits)} splits, manifest {manifest.sha256}")
