"""Writes configs/paper/ from the table of cells: `python -m semi_fast.reproduce.generate`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from semi_fast.reproduce.cells import CONFIGS, RUNS, Cell, cells
from semi_fast.rundir.scores import AVERAGED
from semi_fast.schema.config import Config

WIDTH = 120


def configuration(cell: Cell) -> str:
    """The cell's configuration: what it is, then every key that is not the default."""
    assert cell.keys is not None
    default = Config()
    runs = "" if cell.paper.std is None else f", {RUNS} runs"
    entries = {
        "Command:": f"semi-fast reproduce {cell.name}",
        "": f"one seed: semi-fast train --config configs/paper/{cell.name}.yaml",
        "Expected:": f"the paper prints {cell.paper} % ({cell.metric}{runs}); not measured here yet.",
        "Duration:": "not measured yet, on any hardware.",
        "Protocol:": f"mean of the last {AVERAGED} evaluations of the averaged weights on the test set, by "
        f"{cell.head}; {default.optim.steps:,} steps, an evaluation every {default.eval.every}; seeds 0 to {RUNS - 1}.",
    }
    lines = [*wrapped("", f"{cell.title}: a cell of {cell.source} of the SeMi paper.", indent=0), "#"]
    for key, text in entries.items():
        lines += wrapped(f"{key:10}", text, indent=10)
    lines.append("# Caveats:")
    for caveat in cell.caveats:
        lines += wrapped("  - ", caveat, indent=4)
    lines.append(
        "# Written by python -m semi_fast.reproduce.generate from semi_fast/reproduce/cells.yaml: change it there."
    )
    return "\n".join(lines) + "\n" + yaml.safe_dump(nested(cell.keys), sort_keys=False)


def wrapped(first: str, text: str, *, indent: int) -> list[str]:
    """Comment lines that begin with `first`; the others are indented."""
    return textwrap.wrap(
        f"{first}{text}",
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


def configurations() -> dict[Path, str]:
    """Every file under configs/paper/ and its content."""
    return {cell.file: configuration(cell) for cell in cells().values() if cell.keys is not None}


def main() -> None:
    """Write every configuration, and remove those of cells that are no more."""
    wanted = configurations()
    for path in set(CONFIGS.rglob("*.yaml")) - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(wanted)} configurations under {CONFIGS.parent.name}/{CONFIGS.name}")


if __name__ == "__main__":
    main()
