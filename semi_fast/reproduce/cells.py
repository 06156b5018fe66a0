"""The table of cells: every value that the paper prints, and the configuration of each that this version can train."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from semi_fast.schema.config import Config, leaves, plain
from semi_fast.schema.yaml_file import check_keys
from semi_fast.table import aligned

TABLE = Path(__file__).parent / "cells.yaml"
SEMI = "method.semi."
RUNS = 3
"""Runs behind a value that the paper prints with a spread; seeds 0, 1, ... stand for them."""


@dataclass(frozen=True)
class Paper:
    """What the paper prints in a cell, in percent."""

    mean: float
    std: float | None
    """Spread of its runs; None where it prints none."""
    note: str | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Data:
    """The prepared data set that a cell is trained on."""

    dataset: str
    classes: int
    resolution: int
    prepare: str
    """The command up to `--out`."""


@dataclass(frozen=True)
class Cell:
    """One method in one setting of one table."""

    table: str
    method: str
    setting: str
    """`dataset/name`."""
    title: str
    paper: Paper
    data: Data
    keys: dict[str, Any] | None
    """Dotted keys of the configuration that differ from the defaults; None where the method does not exist here."""
    head: str
    """What the method predicts with."""
    caveats: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.table}/{self.method}/{self.setting}"

    @property
    def source(self) -> str:
        """`Table 1` of `table1`."""
        return f"Table {self.table.removeprefix('table')}"

    @property
    def metric(self) -> Literal["top-1", "accuracy"]:
        """`accuracy` where the paper does not say which: the test set of ImageNet-127 is not balanced."""
        return "accuracy" if self.setting.startswith("imagenet127") else "top-1"


@cache
def document() -> dict[str, Any]:
    """`cells.yaml` as it stands."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@cache
def cells() -> dict[str, Cell]:
    """Every cell by its name, in the paper's order; a second reading of a row follows that row."""
    found: dict[str, Cell] = {}
    tables, methods = document()["tables"], document()["methods"]
    for table, content in tables.items():
        for row, values in content["rows"].items():
            readings = [row, *(name for name, method in methods.items() if method.get("row") == row)]
            for method in readings:
                for setting, value in zip(content["settings"], values, strict=True):
                    cell = make_cell(table, method, setting, parsed(value))
                    found[cell.name] = cell
    return found


def make_cell(table: str, method: str, setting: str, paper: Paper) -> Cell:
    """The cell of these names, with its configuration."""
    content = document()
    how, where, numbers = content["methods"][method], content["settings"][setting], setting.split("/")[0]
    dataset = content["datasets"][numbers]
    name = f"{table}/{method}/{setting}"
    keys = None
    if "keys" in how:
        keys = dataset["keys"] | split_keys(where) | where.get("keys", {}) | how["keys"]
        if how["keys"]["method.name"] != "semi":
            keys = {key: value for key, value in keys.items() if not key.startswith(SEMI)}
        keys = differing(keys)
    balanced = "keys" in how and how["keys"]["method.name"] == "semi" and how["keys"].get(f"{SEMI}balanced_head", True)
    return Cell(
        table=table,
        method=method,
        setting=setting,
        title=f"{how['title']} on {dataset['title']}, {setting_title(where)}",
        paper=paper,
        data=Data(**dataset["prepared"], prepare=dataset["prepare"]),
        keys=keys,
        head="balanced_head" if balanced else "head",
        caveats=tuple(
            entry["text"]
            for entry in content["caveats"]
            if any(fnmatchcase(name, pattern) for pattern in entry["cells"])
        ),
    )


def parsed(value: str | float) -> Paper:
    """`80.3 ± 0.41`, `79.7 ± 0.49 *` or `56.1` as numbers."""
    match = re.fullmatch(r"(\d+\.\d)(?: ± (\d+\.\d\d))?( \*)?", str(value))
    if match is None:
        raise ValueError(f"{TABLE}: a value is like `80.3 ± 0.41`, or `56.1`; got {value!r}")
    mean, std, star = match.groups()
    return Paper(float(mean), None if std is None else float(std), document()["asterisk"] if star else None)


def split_keys(setting: dict[str, Any]) -> dict[str, Any]:
    """The keys under `split.` that the paper's symbols stand for."""
    if "labeled" in setting:
        return {"split.labeled_fraction": setting["labeled"]}
    gamma_l, gamma_u = setting["gamma_l"], setting["gamma_u"]
    keys = {
        "split.labeled_max": setting["N1"],
        "split.unlabeled_max": setting["M1"],
        "split.imbalance_labeled": gamma_l,
    }
    if gamma_u == "unknown":
        return keys
    if gamma_u == 1:
        return keys | {"split.unlabeled_shape": "uniform"}
    inverse = re.fullmatch(r"1/(\d+)", str(gamma_u))
    if inverse:
        return keys | {"split.imbalance_unlabeled": int(inverse[1]), "split.unlabeled_shape": "reversed"}
    return keys | {"split.imbalance_unlabeled": gamma_u}


def setting_title(setting: dict[str, Any]) -> str:
    """The setting in the paper's symbols."""
    if "labeled" in setting:
        return f"{setting['labeled']:.0%} of every class labeled"
    gamma_l, gamma_u = setting["gamma_l"], setting["gamma_u"]
    images = f"N1 = {setting['N1']}" + (f", M1 = {setting['M1']}" if setting["M1"] else "")
    if gamma_u == gamma_l:
        return f"{images}, gamma_l = gamma_u = {gamma_l}"
    return f"{images}, gamma_l = {gamma_l}, gamma_u {gamma_u if gamma_u == 'unknown' else f'= {gamma_u}'}"


def differing(keys: dict[str, Any]) -> dict[str, Any]:
    """Those keys whose value is not the default, in the order of the configuration."""
    check_keys(list(keys), str(TABLE))
    defaults = leaves(plain(Config()))
    return {key: keys[key] for key, default in defaults.items() if key in keys and keys[key] != default}


def find(name: str) -> Cell:
    """The cell of this name; ValueError, with the nearest names, if the tables or this version do not have it."""
    table = cells()
    if name not in table:
        here = [one for one, cell in table.items() if cell.keys is not None]
        near = difflib.get_close_matches(name, here, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "semi-fast reproduce --list shows them"
        raise ValueError(f"there is no cell {name}; {hint}")
    if table[name].keys is None:
        title = document()["methods"][table[name].method]["title"]
        raise ValueError(
            f"{name}: the paper prints {table[name].paper}, but this version does not have the method {title}; "
            "semi-fast reproduce --list shows the cells that it can train"
        )
    return table[name]


def listing() -> str:
    """Every cell by table: its name, the paper's value, and whether it can be trained here."""
    here = {True: "yes", False: "no: the method is not in this version"}
    rows = [(f"  {cell.name}", str(cell.paper), here[cell.keys is not None]) for cell in cells().values()]
    texts = dict(zip(cells(), aligned(rows, left=(0, 1, 2)).splitlines(), strict=True))
    lines = []
    for table, content in document()["tables"].items():
        inside = [cell for cell in cells().values() if cell.table == table]
        lines += ["", f"Table {table.removeprefix('table')}: {content['title']}; {inside[0].metric}, %"]
        lines += [texts[cell.name] for cell in inside]
    known = sum(cell.keys is not None for cell in cells().values())
    lines += ["", f"{len(cells())} cells, {known} of them can be trained: semi-fast reproduce CELL"]
    return "\n".join(lines[1:])
