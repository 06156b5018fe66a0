"""A long-tailed split as a data set of its own: what can be shipped by itself."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from semi_fast.data_prep.formats import RESIDENT, Formats
from semi_fast.data_prep.long_tail import make_split
from semi_fast.data_prep.prepare import BAD_FILE, check_absent, hidden_directory, publish, versions, write_bad
from semi_fast.data_prep.readers.image_folder import is_ignored
from semi_fast.data_prep.readers.prepared import read_prepared, renumbered
from semi_fast.disk import make_directory
from semi_fast.prepared.manifest import MANIFEST_FILE, Manifest, load_manifest, save_split, seal_split, verify_manifest
from semi_fast.schema.split import SplitConfig

SPLIT_NAME = "prepared"
NAME_DIGITS = 32


def prepare_subset(
    whole: Callable[[Path, Formats], Manifest], inputs: str, config: SplitConfig, out: Path, formats: Formats
) -> Manifest:
    """Prepare the rows of a split alone, with the split as splits/prepared.json.

    The whole data set, which `whole` prepares at a path in formats, lies in `.<name>.whole` beside `out` meanwhile.
    What a killed run has left of it is taken up where `inputs`, a digest of what it is made from, is the same.
    """
    out = Path(os.path.abspath(out))
    hidden = out.parent / f".{out.name}.whole"
    if (out / MANIFEST_FILE).is_file() and hidden.is_dir():  # killed once all was there, before it was cleared away
        with hidden_directory(hidden):
            pass
    check_absent(out)
    make_directory(out.parent)
    with hidden_directory(hidden) as scratch:
        for path in [path for path in scratch.iterdir() if inputs not in path.name]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        everything = _verified(scratch / inputs) or whole(scratch / inputs, RESIDENT)
        split = seal_split(make_split(everything, SPLIT_NAME, config))
        command = everything.command.removeprefix("semi-fast prepare ").removesuffix(f" --out {inputs}")

        def save(smaller: Manifest) -> None:
            if (everything.root / BAD_FILE).is_file():
                write_bad(smaller.root, (everything.root / BAD_FILE).read_bytes())
            save_split(renumbered(split, everything, smaller), smaller.root / "splits" / f"{SPLIT_NAME}.json")

        return publish(lambda: read_prepared(everything, split), out, command + flags(config), formats, last=save)


def inputs_digest(arguments: str, raw: Path | None) -> str:
    """Digest over the arguments of a preparation, versions, and names, sizes and times of the files under `raw`."""
    digest = hashlib.sha256(f"{arguments} {sorted(versions().items())}".encode())
    for path in _visible(raw) if raw else []:
        found = path.stat() if path.exists() else path.lstat()
        about = os.path.realpath(path) if path.is_dir() else f"{found.st_size} {found.st_mtime_ns}"
        digest.update(os.fsencode(f"{path}\0{about}\0"))
    return digest.hexdigest()[:NAME_DIGITS]


def _visible(raw: Path) -> Iterator[Path]:
    """Every folder and file in order, through links; what is under a folder once, wherever links lead to it."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(raw, followlinks=True):
        yield Path(folder)
        real = os.path.realpath(folder)
        again = real in seen
        seen.add(real)
        folders[:] = [] if again else sorted((name for name in folders if not is_ignored(name)), key=os.fsencode)
        names = sorted(files, key=os.fsencode)
        yield from (Path(folder, name) for name in names if not (again or is_ignored(name)))


def _verified(root: Path) -> Manifest | None:
    """The whole data set of a killed run, if it was finished."""
    if not root.exists():
        return None
    manifest = load_manifest(root)
    verify_manifest(manifest)
    print(f"note: going on with all {manifest.length('train')} train images, prepared before", file=sys.stderr)
    return manifest


def flags(config: SplitConfig) -> str:
    """The keys that are not the defaults, as flags of the command."""
    given = [(field.name, getattr(config, field.name)) for field in fields(config)]
    return "".join(
        f" --{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f" --{name.replace('_', '-')} {value}"
        for name, value in given
        if value != getattr(SplitConfig(), name)
    )
