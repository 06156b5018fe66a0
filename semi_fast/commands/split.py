"""Write a hashed split file: labeled, unlabeled and validation samples."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from semi_fast.commands import PATH
from semi_fast.commands.inspect import class_rows, print_split, print_table
from semi_fast.schema.split import SplitConfig

NAME_LIMIT_BYTES = 200


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=PATH, metavar="DATA")
    parser.add_argument("--name", required=True, help="the file is DATA/splits/NAME.json")
    add_split_flags(parser)


def add_split_flags(parser: Any) -> None:
    """The keys of a split as flags."""
    parser.add_argument("--labeled-max", type=int, metavar="N1", help="labeled images of the largest class")
    parser.add_argument("--unlabeled-max", type=int, metavar="M1", help="unlabeled images of the largest class")
    parser.add_argument("--imbalance-labeled", type=float, default=1.0, metavar="G", help="largest over smallest class")
    parser.add_argument(
        "--imbalance-unlabeled", type=float, default=1.0, metavar="G", help="largest over smallest class"
    )
    parser.add_argument("--unlabeled-shape", choices=["consistent", "uniform", "reversed"], default="consistent")
    parser.add_argument("--rule", choices=["semi", "daso", "cossl", "usb"], default="semi", help="whose protocol")
    parser.add_argument("--labeled-fraction", type=float, metavar="F", help="labeled share of every class; not with N1")
    parser.add_argument("--validation-per-class", type=int, default=0, metavar="V")
    parser.add_argument("--seed", type=int, default=0)


def run(*, data: str | Path, name: str, **keys: Any) -> None:
    """Write DATA/splits/NAME.json, never over another split; `keys` are those of a split."""
    from semi_fast.data_prep.long_tail import make_split
    from semi_fast.prepared.manifest import load_manifest, save_split

    if not is_plain(name):
        raise ValueError(
            f"--name must be a plain file name (no /, no leading dot, no control characters); got {name!r}"
        )
    manifest = load_manifest(data)
    path = manifest.root / "splits" / f"{name}.json"
    saved = save_split(make_split(manifest, name, SplitConfig(**keys)), path)
    print_table(("class", "labeled", "unlabeled"), class_rows(manifest, [saved]))
    print_split(saved)
    print(f"train on it with --split.file={shlex.quote(name)}")
    print(path)


def is_plain(name: str) -> bool:
    return (
        bool(name.strip())
        and name.isprintable()
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and len(name.encode("utf-8", "surrogateescape")) <= NAME_LIMIT_BYTES
    )
