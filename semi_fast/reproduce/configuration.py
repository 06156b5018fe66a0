"""The configuration of a cell: as text to print, with what to expect of it, and resolved."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from semi_fast.reproduce.cells import RUNS, Cell
from semi_fast.rundir.scores import AVERAGED
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.config import Config

WIDTH = 120


def resolved(cell: Cell, flags: Sequence[str]) -> Config:
    """What `semi-fast train` makes of the cell's configuration and `flags`; ValueError if these do not fit."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "cell.yaml"
        file.write_text(text(cell), encoding="utf-8")
        return parse_config([f"--config={file}", *flags])


def text(cell: Cell) -> str:
    """What the cell is, then every key that is not the default; in ASCII, which files of every locale hold."""
    assert cell.keys is not None
    default = Config()
    printed = str(cell.paper).replace("±", "+-")
    runs = "" if cell.paper.std is None else f", {RUNS} runs"
    entries = {
        "Command:": f"semi-fast reproduce {cell.name}",
        "": "one seed: semi-fast train --config FILE, with this text in FILE",
        "Data:": f"{cell.data.prepare} {cell.keys['data.path']}",
        "Expected:": f"the paper prints {printed} % ({cell.metric}{runs}); not measured here.",
        "Duration:": "not measured, on any hardware.",
        "Protocol:": f"mean of the last {AVERAGED} evaluations of the averaged weights on the test set, by "
        f"{cell.head}; {default.optim.steps:,} steps, an evaluation every {default.eval.every}; seeds 0 to {RUNS - 1}.",
    }
    lines = [*wrapped("", f"{cell.title}: a cell of {cell.source} of the SeMi paper.", indent=0), "#"]
    for key, words in entries.items():
        lines += wrapped(f"{key:10}", words, indent=10)
    lines.append("# Caveats:")
    for caveat in cell.caveats:
        lines += wrapped("  - ", caveat, indent=4)
    return "\n".join(lines) + "\n" + yaml.safe_dump(nested(cell.keys), sort_keys=False)


def wrapped(first: str, words: str, *, indent: int) -> list[str]:
    """Comment lines that begin with `first`; the others are indented."""
    return textwrap.wrap(
        f"{first}{words}",
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# " + " " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dictionaries."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree
