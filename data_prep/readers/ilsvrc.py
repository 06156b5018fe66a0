"""ILSVRC-2012 as folders of images, `train/<synset>/*` and `val/`, each image resized whole to a square (Pillow's box).

`val/` has the same folders, or the 50,000 files as published, whose labels then stand in one of `LABEL_LISTS`.
A folder may also be named by a super-class (`n01861778`, `086_n01861778`), as in subsets that keep one for each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semi_fast import philox
from semi_fast.data_prep.readers import Raw, name_of
from semi_fast.data_prep.readers.decoding import decoded_blocks
from semi_fast.data_prep.readers.image_file import REFUSED, Accepted, Recipe
from semi_fast.data_prep.readers.image_folder import Listing, check_regular, check_same, listed
from semi_fast.data_prep.readers.imagenet_classes import STATISTICS, class_by_wnid, load_table, subset_note
from semi_fast.data_prep.readers.kept_chunks import scratch_bytes

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"
LABEL_LISTS = (GROUND_TRUTH, f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}", SOLUTION)
LIST_LIMIT_BYTES = 2**26
ORDER_KEY = 0


def read_ilsvrc(
    raw: Path,
    resolution: int,
    kept: Path | None = None,
    accepted: Accepted = REFUSED,
    left_out: Collection[Path] = (),
) -> Raw:
    """Files in a fixed mixed order; names are checked here, pixels as `blocks` are read.

    With `kept`, a path beside the output, what a killed run had decoded is taken from there.

    Mixed, because a split takes the first images of a class: in the order of names they would all show one synset of
    it. Classes without a folder are left out; that is said in the source.
    """
    listing = Listing(raw, follow=accepted.follow, left_out=left_out)
    train, val = _labeled(listing, "train"), _val_files(listing)
    check_same(raw, "synsets", {name for name, _ in train}, "val", {name for name, _ in val})
    found = {"train": train, "test": val}
    class_of, table = class_by_wnid(), load_table()
    classes = {part: np.array([class_of[name] for name, _ in files]) for part, files in found.items()}
    present, labels = np.unique(classes["train"], return_inverse=True)
    order = {part: philox.shuffled(np.arange(len(files)), ORDER_KEY, philox.FILE_ORDER, 0)
             for part, files in found.items()}  # fmt: skip
    files = {part: [of_part[i][1] for i in order[part].tolist()] for part, of_part in found.items()}
    test_labels = np.searchsorted(present, classes["test"])
    source: dict[str, Any] = {
        "reader": "ilsvrc folders",
        "name": name_of(Path(os.path.abspath(raw))),
        "files": sum(map(len, files.values())),
        "hidden_files_ignored": listing.hidden,
    }
    note = subset_note(len(labels), len(present))
    source |= note
    return Raw(
        dataset="imagenet127",
        class_names=tuple(table.class_names[k] for k in present),
        resolution=(resolution, resolution),
        labels={"train": labels[order["train"]].astype(np.int64), "test": test_labels[order["test"]]},
        num_unlabeled=0,
        blocks=decoded_blocks(raw, files, Recipe(boxed, resolution, accepted), source, kept),
        source=source,
        statistics=None if note else STATISTICS,
        scratch_bytes=scratch_bytes(kept, source["files"], resolution) if kept else 0,
    )


def boxed(rgb: Image.Image, resolution: int) -> Image.Image:
    """The whole image, its sides resized each on its own."""
    return rgb.resize((resolution, resolution), Image.Resampling.BOX)


def _labeled(listing: Listing, part: str) -> list[tuple[str, str]]:
    """(WordNet id, path under the root) of every file of `part`, sorted by name."""
    folders = listing.visible(listing.raw / part)
    if stray := [path for path in folders if not path.is_dir()]:
        raise ValueError(f"{listing.raw / part} must hold one folder per synset; {listed(stray)} are files")
    files: list[tuple[str, str]] = []
    for folder in folders:
        wnid, paths = _wnid(folder), listing.visible(folder)
        if not paths:
            raise ValueError(f"{folder}: holds no image; add some, or remove the folder from train/ and val/")
        check_regular(paths)
        files += [(wnid, os.path.join(part, folder.name, path.name)) for path in paths]
    return files


def _wnid(folder: Path) -> str:
    match, classes = re.fullmatch(r"(?:(\d+)_)?(n\d{8})", folder.name), class_by_wnid()
    if match is None or match[2] not in classes:
        raise ValueError(f"{folder}: must be named by a synset of ILSVRC-2012 or a class of ImageNet-127 (n01440764)")
    if match[1] is not None and int(match[1]) != classes[match[2]]:
        raise ValueError(f"{folder}: {match[2]} belongs to class {classes[match[2]]}, not {match[1]}; rename it")
    return match[2]


def _val_files(listing: Listing) -> list[tuple[str, str]]:
    """As `_labeled`, of val/ with or without folders."""
    raw = listing.raw
    if not (raw / "val").is_dir():
        raise ValueError(f"--raw must hold train/ and val/; {raw} has no val/")
    paths = listing.visible(raw / "val")
    if any(path.is_dir() for path in paths):
        return _labeled(listing, "val")
    check_regular(paths)
    lists = [raw / name for name in LABEL_LISTS if (raw / name).is_file()]
    if not lists:
        raise ValueError(
            f"{raw / 'val'} must hold one folder per synset, or plain files with their labels in one of "
            f"{', '.join(LABEL_LISTS)} under {raw}; it has no such list"
        )
    wnids = _listed_wnids(lists[0])
    if unknown := [path for path in paths if path.stem not in wnids]:
        raise ValueError(f"{lists[0]}: must name every image of val/; it lacks {listed(unknown)}")
    if len(wnids) != len(paths) + sum(path.parent == raw / "val" for path in listing.left_out):
        raise ValueError(f"{raw / 'val'}: must hold the {len(wnids)} images of {lists[0].name}; it has {len(paths)}")
    return [(wnids[path.stem], os.path.join("val", path.name)) for path in paths]


def _listed_wnids(path: Path) -> dict[str, str]:
    """Image name without extension -> WordNet id, from a list of labels."""
    if path.stat().st_size > LIST_LIMIT_BYTES:
        raise ValueError(f"{path}: must be at most {LIST_LIMIT_BYTES} bytes; it has {path.stat().st_size}")
    lines, table = path.read_text(encoding="utf-8", errors="replace").split("\n"), load_table()
    rows = [line.strip() for line in lines if line.strip()]
    if path.name == SOLUTION:
        cells = [row.replace(",", " ").split() for row in rows[1:]]  # a head; then image, synset and boxes
        named = {cell[0]: cell[1] if len(cell) > 1 else "" for cell in cells}
    else:
        synsets = {str(label): wnid for label, wnid in enumerate(table.synsets, 1)}
        named = {f"ILSVRC2012_val_{row:08d}": synsets.get(text, text) for row, text in enumerate(rows, 1)}
    known = set(table.synsets)
    if bad := [f"{name}: {wnid!r:.40}" for name, wnid in named.items() if wnid not in known]:
        raise ValueError(f"{path}: must give a synset of each image; {len(bad)} are none ({'; '.join(bad[:5])})")
    return named
