"""Print classes, counts and splits of a prepared data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semi_fast.commands import PATH
from semi_fast.table import aligned

if TYPE_CHECKING:
    from semi_fast.prepared.manifest import Manifest, Split

SHOWN_DIGEST = 12


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=PATH, metavar="DATA")


def run(*, data: str | Path) -> None:
    """Print the classes with their counts, in each split too."""
    from semi_fast.data_prep.long_tail import split_files
    from semi_fast.prepared.manifest import load_manifest, load_split

    manifest = load_manifest(data)
    splits = [load_split(path, manifest) for path in split_files(manifest)]
    print_data(manifest)
    train, test = (manifest.counts[part] for part in ("train", "test"))
    assert isinstance(train, tuple)
    assert isinstance(test, tuple)
    names = [f"{s.name} {kind}" for s in splits for kind in ("labeled", "unlabeled")]
    rows = [
        [name, str(n), str(m), *row]
        for (name, *row), n, m in zip(class_rows(manifest, splits), train, test, strict=True)
    ]
    print_table(("class", "train", "test", *names), rows)
    for one in splits:
        print_split(one)


def class_rows(manifest: Manifest, splits: Sequence[Split]) -> list[list[str]]:
    """Per class: its name, then labeled and unlabeled of each split (a dash where the truth is unknown)."""
    rows = [[shown(name)] for name in manifest.class_names]
    for one in splits:
        unlabeled = one.unlabeled_counts or ("-",) * manifest.num_classes
        for row, n, m in zip(rows, one.labeled_counts, unlabeled, strict=True):
            row += [str(n), str(m)]
    return rows


def print_data(manifest: Manifest) -> None:
    height, width = manifest.resolution
    counts = ", ".join(f"{manifest.length(part)} {part}" for part in ("train", "test", "unlabeled"))
    print(f"{manifest.dataset}: {manifest.num_classes} classes, {height}x{width}, {counts}")
    print(f"{shown(str(manifest.root))}  manifest {manifest.sha256[:SHOWN_DIGEST]}")


def print_split(one: Split) -> None:
    parts = f"{len(one.labeled)} labeled, {len(one.unlabeled)} unlabeled rows, {len(one.validation)} validation"
    print(f"{shown(one.name)}: {parts}, rule {one.rule}, sha256 {one.sha256[:SHOWN_DIGEST]}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others numbers: a rich table on a terminal, aligned text elsewhere."""
    head = [shown(cell) for cell in head]
    if not sys.stdout.isatty():
        print(aligned([head, *rows]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, head))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def shown(text: str) -> str:
    """Any file name as one printable line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
