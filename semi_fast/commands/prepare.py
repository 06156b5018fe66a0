"""The data commands as functions: prepare, split, inspect and verify, each printing a compact result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semi_fast.data_prep.formats import Formats
from semi_fast.data_prep.long_tail import make_split
from semi_fast.data_prep.prepare import (
    BAD_FILE,
    DIGITS_RESOLUTION,
    FOLDER_RESOLUTION,
    STL10_RESOLUTION,
    prepare_cifar10,
    prepare_cifar100,
    prepare_digits,
    prepare_folder,
    prepare_imagenet127,
    prepare_stl10,
)
from semi_fast.data_prep.readers.image_file import REFUSED, Accepted
from semi_fast.data_prep.subset import inputs_digest, prepare_subset
from semi_fast.prepared.manifest import Manifest, Split, load_manifest, load_split, save_split, verify_manifest
from semi_fast.schema.split import SplitConfig

DATASETS = ("cifar10", "cifar100", "stl10", "imagenet127", "folder", "digits")
NAME_LIMIT_BYTES = 200
SHOWN_DIGEST = 12


def prepare(
    *,
    dataset: str,
    out: str | Path,
    raw: str | Path | None = None,
    resolution: int | None = None,
    formats: str = "resident",
    image_format: str = "raw",
    quality: int = 95,
    on_bad: str = "fail",
    scale16: bool = False,
    first_frame: bool = False,
    follow: bool = False,
    **split_options: Any,
) -> None:
    """`semi-fast prepare DATASET [--raw RAW] --out OUT [--resolution R] [--formats F,F] [keys of a split]`.

    What images are accepted (`on_bad` to `follow`) is for raw data that is files of images. With keys of a split the
    data set holds that split's rows alone, and the split.
    """
    if dataset not in DATASETS:
        raise ValueError(f"prepare knows {', '.join(DATASETS)}; got {dataset!r}")
    if (raw is None) != (dataset == "digits"):
        rule = "comes with scikit-learn and takes no --raw" if dataset == "digits" else "needs --raw, the raw data"
        raise ValueError(f"prepare {dataset} {rule}; got {raw or 'none'}")
    if resolution is not None and dataset in ("cifar10", "cifar100"):
        raise ValueError(f"prepare {dataset} keeps the published 32x32 pixels; leave out --resolution {resolution}")
    if raw is not None and not Path(raw).is_dir():
        raise ValueError(f"--raw must be a directory; {raw} is not")
    accepted = Accepted(on_bad, scale16, first_frame, follow)
    if accepted != REFUSED and dataset not in ("folder", "imagenet127"):
        raise ValueError(f"prepare {dataset} reads no image files; leave out{accepted.arguments}")
    chosen, split_config = Formats(tuple(formats.split(",")), image_format, quality), SplitConfig(**split_options)

    def whole(target: Path, formats: Formats) -> Manifest:
        if dataset == "digits":
            return prepare_digits(target, DIGITS_RESOLUTION if resolution is None else resolution, formats)
        assert raw is not None
        folder = Path(raw)
        if dataset == "cifar10":
            return prepare_cifar10(folder, target, formats)
        if dataset == "cifar100":
            return prepare_cifar100(folder, target, formats)
        if dataset == "stl10":
            return prepare_stl10(folder, target, STL10_RESOLUTION if resolution is None else resolution, formats)
        if dataset == "imagenet127":
            return prepare_imagenet127(folder, target, resolution, formats, accepted)
        return prepare_folder(
            folder, target, FOLDER_RESOLUTION if resolution is None else resolution, formats, accepted
        )

    if split_config == SplitConfig():
        manifest = whole(Path(out), chosen)
    else:
        inputs = inputs_digest(f"{dataset} {resolution} {accepted}", None if raw is None else Path(raw))
        manifest = prepare_subset(whole, inputs, split_config, Path(out), chosen)
    _print_data(manifest)
    if "subset" in manifest.source:
        print(f"note: a subset of ImageNet-127, {manifest.source['subset']}", file=sys.stderr)
    hidden, repeated = manifest.source.get("hidden_files_ignored"), manifest.source["repeated_test_images"]
    if modes := manifest.source.get("converted_to_rgb"):
        listed = ", ".join(f"{mode} {count}" for mode, count in modes.items())
        print(f"note: {sum(modes.values())} images were converted to RGB ({listed})", file=sys.stderr)
    if hidden:
        print(f"note: {hidden} hidden files, or leftovers of file managers, were ignored", file=sys.stderr)
    if left_out := manifest.source.get("left_out"):
        print(f"warning: {left_out} files were left out, see {manifest.root / BAD_FILE}", file=sys.stderr)
    if repeated:
        print(f"warning: {repeated} test images have the pixels of a train or unlabeled image", file=sys.stderr)


def split(
    *,
    data: str | Path,
    name: str,
    labeled_max: int | None = None,
    unlabeled_max: int | None = None,
    imbalance_labeled: float = 1.0,
    imbalance_unlabeled: float = 1.0,
    unlabeled_shape: str = "consistent",
    rule: str = "semi",
    validation_per_class: int = 0,
    seed: int = 0,
    labeled_fraction: float | None = None,
) -> None:
    """`semi-fast split DATA --name NAME ...`: writes DATA/splits/NAME.json, never over another split."""
    if not _is_plain(name):
        raise ValueError(
            f"--name must be a plain file name (no /, no leading dot, no control characters); got {name!r}"
        )
    manifest = load_manifest(data)
    config = SplitConfig(
        labeled_max=labeled_max,
        unlabeled_max=unlabeled_max,
        imbalance_labeled=imbalance_labeled,
        imbalance_unlabeled=imbalance_unlabeled,
        unlabeled_shape=unlabeled_shape,  # type: ignore[arg-type]  # make_split checks both
        rule=rule,  # type: ignore[arg-type]
        validation_per_class=validation_per_class,
        seed=seed,
        labeled_fraction=labeled_fraction,
    )
    path = manifest.root / "splits" / f"{name}.json"
    saved = save_split(make_split(manifest, name, config), path)
    _print_table(("class", "labeled", "unlabeled"), _class_rows(manifest, [saved]))
    _print_split(saved)
    print(f"train on it with --split.file={shlex.quote(name)}")
    print(path)


def inspect(*, data: str | Path) -> None:
    """`semi-fast inspect DATA`: classes, counts, and each split's labeled/unlabeled counts per class."""
    manifest = load_manifest(data)
    splits = [load_split(path, manifest) for path in _split_files(manifest)]
    _print_data(manifest)
    train, test = (manifest.counts[part] for part in ("train", "test"))
    assert isinstance(train, tuple)
    assert isinstance(test, tuple)
    names = [f"{s.name} {kind}" for s in splits for kind in ("labeled", "unlabeled")]
    counted = [[str(n), str(m), *row[1:]] for n, m, row in zip(train, test, _class_rows(manifest, splits), strict=True)]
    rows = [[_shown(name), *counts] for name, counts in zip(manifest.class_names, counted, strict=True)]
    _print_table(("class", "train", "test", *names), rows)
    for one in splits:
        _print_split(one)


def verify(*, data: str | Path) -> None:
    """`semi-fast verify DATA`: re-hashes manifest, arrays, containers and splits; ValueError names the first fault."""
    manifest = load_manifest(data)
    verify_manifest(manifest)
    splits = [load_split(path, manifest) for path in _split_files(manifest)]
    kinds = {"arrays": manifest.files, "container files": manifest.containers}
    held = [f"{len(one)} {kind} ({sum(e['bytes'] for e in one.values())} bytes)" for kind, one in kinds.items() if one]
    print(f"ok: {', '.join(held)}, {len(splits)} splits, manifest {manifest.sha256}")


def _split_files(manifest: Manifest) -> list[Path]:
    return sorted(path for path in (manifest.root / "splits").glob("*.json") if not path.name.startswith("."))


def _is_plain(name: str) -> bool:
    return (
        bool(name.strip())
        and name.isprintable()
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and len(name.encode("utf-8", "surrogateescape")) <= NAME_LIMIT_BYTES
    )


def _class_rows(manifest: Manifest, splits: list[Split]) -> list[list[str]]:
    """Per class: its name, then labeled and unlabeled of each split (a dash where the truth is unknown)."""
    rows = [[_shown(name)] for name in manifest.class_names]
    for one in splits:
        unlabeled = one.unlabeled_counts or ("-",) * manifest.num_classes
        for row, n, m in zip(rows, one.labeled_counts, unlabeled, strict=True):
            row += [str(n), str(m)]
    return rows


def _print_data(manifest: Manifest) -> None:
    height, width = manifest.resolution
    counts = ", ".join(f"{manifest.length(part)} {part}" for part in ("train", "test", "unlabeled"))
    print(f"{manifest.dataset}: {manifest.num_classes} classes, {height}x{width}, {counts}")
    print(f"{_shown(str(manifest.root))}  manifest {manifest.sha256[:SHOWN_DIGEST]}")


def _print_split(one: Split) -> None:
    parts = f"{len(one.labeled)} labeled, {len(one.unlabeled)} unlabeled rows, {len(one.validation)} validation"
    print(f"{_shown(one.name)}: {parts}, rule {one.rule}, sha256 {one.sha256[:SHOWN_DIGEST]}")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others numbers: a rich table on a terminal, aligned text elsewhere."""
    if sys.stdout.isatty():
        table = Table(*(escape(_shown(cell)) for cell in head))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        Console().print(table)
        return
    lines = [[_shown(cell) for cell in head], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *numbers]))


def _shown(text: str) -> str:
    """Any file name as one printable line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
