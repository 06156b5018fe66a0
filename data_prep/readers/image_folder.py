"""An image folder: `train/<class>/*`, `test/<class>/*` or `val/<class>/*`, and optionally `unlabeled/**`.

Every image becomes uint8 RGB of resolution x resolution: EXIF orientation applied, transparency over black, the short
side resized to the resolution with Pillow's antialiased bicubic filter, the centre kept.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semi_fast.data_prep.readers import Raw, name_of
from semi_fast.data_prep.readers.decoding import SHOWN, decoded_blocks
from semi_fast.data_prep.readers.image_file import REFUSED, Accepted, Recipe

LEFTOVERS = {
    "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "thumbs.db", "$recycle.bin", "system volume information",
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "@eadir", "@recently-snapshot", "@recycle", "#recycle", "#snapshot", "lost+found", "picasa.ini",
}  # fmt: skip
"""What file managers, network drives and archives put among pictures, in lower case."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name was not put there by who made the data set."""
    return name.startswith(".") or name.lower() in LEFTOVERS


class Listing:
    """The files under a folder, sorted, without ignored ones, which are counted, and without those left out."""

    def __init__(self, raw: Path, *, follow: bool = False, left_out: Collection[Path] = ()) -> None:
        self.raw, self.follow, self.left_out = raw, follow, frozenset(left_out)
        self.hidden = 0

    def visible(self, folder: Path) -> list[Path]:
        """What is in `folder`; links must lead to something, inside `raw` unless they are followed."""
        everything = sorted(folder.iterdir(), key=os.fsencode)  # as UTF-8 has it, whatever the locale
        paths = [path for path in everything if not is_ignored(path.name)]
        self.hidden += len(everything) - len(paths)
        outside = [p for p in paths if p.is_symlink() and not self._leads_inside(p)]
        if outside:
            if self.follow:
                raise ValueError(f"links must lead to files; these do not: {listed(outside)}")
            raise ValueError(
                f"links must lead to files inside {self.raw}, or be followed out of it with --follow; "
                f"these do not: {listed(outside)}"
            )
        return [path for path in paths if path not in self.left_out]

    def _leads_inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self.raw.resolve()) or self.follow
        except (OSError, RuntimeError):  # broken, or a circle
            return False


def read_image_folder(raw: Path, resolution: int, accepted: Accepted = REFUSED, left_out: Collection[Path] = ()) -> Raw:
    """Classes and files sorted by name. Names are checked here, pixels as `blocks` are read."""
    listing, test = Listing(raw, follow=accepted.follow, left_out=left_out), _test_folder(raw)
    classes = {part: _class_files(listing, folder) for part, folder in (("train", raw / "train"), ("test", test))}
    names = tuple(classes["train"])
    check_same(raw, "classes", names, test.name, classes["test"])
    files = {part: [path for k in names for path in of_class[k]] for part, of_class in classes.items()}
    labels = {p: np.repeat(np.arange(len(names)), [len(c[k]) for k in names]) for p, c in classes.items()}
    files["unlabeled"] = _unlabeled_files(listing)
    names_of = {part: [str(path.relative_to(raw)) for path in paths] for part, paths in files.items()}
    source: dict[str, Any] = {
        "reader": "folder",
        "name": name_of(Path(os.path.abspath(raw))),
        "files": sum(map(len, files.values())),
        "hidden_files_ignored": listing.hidden,
    }
    return Raw(
        dataset="folder",
        class_names=names,
        resolution=(resolution, resolution),
        labels=labels,
        num_unlabeled=len(files["unlabeled"]),
        blocks=decoded_blocks(raw, names_of, Recipe(cropped, resolution, accepted), source),
        source=source,
    )


def cropped(rgb: Image.Image, resolution: int) -> Image.Image:
    """The centre, with the short side resized."""
    width, height = rgb.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    size, box = (resolution, resolution), (left, top, left + side, top + side)
    return rgb.resize(size, Image.Resampling.BICUBIC, box=box)


def _test_folder(raw: Path) -> Path:
    if not (raw / "train").is_dir():
        raise ValueError(f"--raw must hold train/<class>/ folders; {raw} has no train/")
    found = [raw / name for name in ("test", "val") if (raw / name).is_dir()]
    if len(found) != 1:
        state = "has both" if found else "has neither"
        raise ValueError(f"--raw must hold either test/ or val/; {raw} {state}, keep the one to report on")
    return found[0]


def _class_files(listing: Listing, part: Path) -> dict[str, list[Path]]:
    """Class name -> its files, both sorted by name."""
    folders = listing.visible(part)
    stray = [path for path in folders if not path.is_dir()]
    if stray:
        raise ValueError(f"{part} must hold one folder per class; {listed(stray)} are files")
    seen: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    for folder in folders:
        name = class_name(folder)
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ValueError(f"{part}: class names must differ in more than case; {listed([other, name])}")
        files[name] = listing.visible(folder)
    for name, paths in files.items():
        if not paths:
            raise ValueError(f"{part}/{name}: class {name!r} has no image; add some or remove the class everywhere")
        check_regular(paths)
    return files


def class_name(folder: Path) -> str:
    """The folder's name, read as UTF-8 whatever the locale: it is part of the data's digest."""
    try:
        return os.fsencode(folder.name).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(folder)!r}: the name of a class must be UTF-8; rename the folder everywhere") from None


def _unlabeled_files(listing: Listing) -> list[Path]:
    """Files under `unlabeled/` at any depth, folder by folder in the order of their names."""
    root = listing.raw / "unlabeled"
    if not root.is_dir():
        return []

    def walk(folder: Path) -> Iterator[Path]:
        for path in listing.visible(folder):
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path

    paths = list(walk(root))
    if not paths:
        raise ValueError(f"{root} holds no image; add some or remove it")
    check_regular(paths)
    return paths


def check_same(raw: Path, what: str, train: Collection[str], other: str, others: Collection[str]) -> None:
    """ValueError unless train/ and the folder `other` hold the same `what`."""
    lacking = [("train", set(others) - set(train)), (other, set(train) - set(others))]
    if found := [f"{part}/ lacks {listed(sorted(names))}" for part, names in lacking if names]:
        raise ValueError(f"{raw}: train/ and {other}/ must hold the same {what}; {'; '.join(found)}")


def check_regular(paths: list[Path]) -> None:
    odd = [path for path in paths if not stat.S_ISREG(path.stat().st_mode)]
    if odd:
        raise ValueError(f"images must be regular files; {len(odd)} are folders or devices: {listed(odd)}")


def listed(items: list[Any]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(repr(str(item)) for item in items[:SHOWN]) + more
