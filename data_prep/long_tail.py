"""Long-tailed splits: how many images of each class are labeled, unlabeled and held out, and which."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from semi_fast import philox
from semi_fast.prepared.manifest import Manifest, Split, find_split, load_split, true_counts
from semi_fast.schema.ranges import must_hold
from semi_fast.schema.split import RULES, Rule, SplitConfig, rules

SHOWN_SPLITS = 3
"""In a message."""


def class_counts(maximum: int, num_classes: int, ratio: float) -> list[int]:
    """int(maximum * r**k), r = (1/ratio)**(1/(K-1)) in float64; the last int(maximum / ratio) (as SeMi and ACR)."""
    if num_classes < 2:
        raise ValueError(f"a long tail needs at least 2 classes; got {num_classes}")
    if not 1 <= ratio < math.inf:
        raise ValueError(f"an imbalance ratio must be at least 1 (largest over smallest class); got {ratio}")
    r = (1 / ratio) ** (1 / (num_classes - 1))
    return [int(maximum * r**k) for k in range(num_classes - 1)] + [int(maximum / ratio)]


def split_for(manifest: Manifest, name: str, config: SplitConfig) -> Split:
    """The split a training config asks for: the file it names, else one made from its keys."""
    if config.file is None:
        return make_split(manifest, name, config)
    path = find_split(manifest, config.file)
    if not path.is_file():
        raise ValueError(f"{path}: no such split file{splits_there(manifest)}; make one with `semi-fast split`")
    return load_split(path, manifest)


def split_files(manifest: Manifest) -> list[Path]:
    """Those of a prepared data set, by name."""
    return sorted(path for path in (manifest.root / "splits").glob("*.json") if not path.name.startswith("."))


def splits_there(manifest: Manifest) -> str:
    """How the first splits under DATA/splits are taken, for a message; empty if there is none."""
    names = [path.stem for path in split_files(manifest)]
    taken = ", ".join(f"--split.file={name}" for name in names[:SHOWN_SPLITS])
    return f"; {manifest.root} has {taken}{', ...' if len(names) > SHOWN_SPLITS else ''}" if names else ""


def make_split(manifest: Manifest, name: str, config: SplitConfig) -> Split:
    """Cut a split by `config` (its `file` is not looked at); ids class by class, in the rule's order within.

    Per class, in that order: the last `validation_per_class` rows are held out, the first N_k are labeled, the next M_k
    unlabeled; N_k or M_k without a maximum is whatever remains. `labeled_fraction` makes N_k that share of what is not
    held out, rounded half to even. With `labeled_in_unlabeled` the labeled rows come before the M_k in the unlabeled
    set. `unlabeled_max=0` keeps all train rows out of the unlabeled set, labeled ones
    too. The manifest's unlabeled part, where there is one, is always added whole (STL-10: semi with unlabeled_max=0).
    """
    must_hold(rules(config))
    rule, labels, num_classes = RULES[config.rule], manifest.labels("train"), manifest.num_classes
    order = _class_orders(labels, num_classes, rule, config.seed)
    held = config.validation_per_class
    available = [len(rows) - held for rows in order]
    labeled_counts = _labeled_counts(config, available)
    unlabeled_counts = (
        [a - n for a, n in zip(available, labeled_counts, strict=True)]
        if config.unlabeled_max is None
        else _unlabeled_counts(config, num_classes)
    )
    _check_available(manifest, config, labeled_counts, unlabeled_counts, available)

    labeled = _join([rows[:n] for rows, n in zip(order, labeled_counts, strict=True)])
    unlabeled_parts = [np.zeros(0, np.int64)]
    if config.unlabeled_max != 0:
        for rows, n, m in zip(order, labeled_counts, unlabeled_counts, strict=True):
            unlabeled_parts.append(rows[0 if rule.labeled_in_unlabeled else n : n + m])
    unlabeled_parts.append(np.arange(len(labels), len(labels) + manifest.length("unlabeled")))
    unlabeled = _join(unlabeled_parts)
    if config.unlabeled_max != 0 and len(unlabeled) == 0:
        raise ValueError(
            f"split.rule={config.rule} keeps labeled images out of the unlabeled set, and no other is left; set "
            f"split.{_labeled_key(config)}, use split.rule=semi, or split.unlabeled_max=0 for supervised training alone"
        )
    counts = true_counts(manifest, labeled, unlabeled)
    return Split(
        name=name,
        rule=config.rule,
        parameters=_parameters(config),
        data_sha256=manifest.data_sha256,
        labeled=labeled,
        unlabeled=unlabeled,
        validation=_join([rows[len(rows) - held :] for rows in order]),
        labeled_counts=counts[0],
        unlabeled_counts=counts[1],
    )


def _parameters(config: SplitConfig) -> dict[str, Any]:
    """Every key but `file`; 100 and 100.0 from a flag and a YAML file give one digest.

    `labeled_fraction` is left out where it is not given, so that splits without it keep the digest that they had
    before there was such a key.
    """
    parameters = {key: value for key, value in asdict(config).items() if key != "file"}
    if config.labeled_fraction is None:
        del parameters["labeled_fraction"]
    return parameters | {key: float(parameters[key]) for key in ("imbalance_labeled", "imbalance_unlabeled")}


def _class_orders(labels: np.ndarray, num_classes: int, rule: Rule, seed: int) -> list[np.ndarray]:
    """Train rows of each class, int64 [n_k], in the order in which the rule takes them."""
    orders = [np.flatnonzero(labels == k) for k in range(num_classes)]
    if rule.shuffle == "never" or (rule.shuffle == "unless seed is 0" and seed == 0):
        return orders
    return [philox.shuffled(rows, seed, philox.SPLIT, 0) for rows in orders]


def _labeled_counts(config: SplitConfig, available: list[int]) -> list[int]:
    if config.labeled_fraction is not None:
        return [round(config.labeled_fraction * n) for n in available]  # round() takes halves to even
    if config.labeled_max is None:
        return available
    return class_counts(config.labeled_max, len(available), config.imbalance_labeled)


def _unlabeled_counts(config: SplitConfig, num_classes: int) -> list[int]:
    assert config.unlabeled_max is not None
    if config.unlabeled_shape == "uniform":
        return [config.unlabeled_max] * num_classes
    counts = class_counts(config.unlabeled_max, num_classes, config.imbalance_unlabeled)
    return counts[::-1] if config.unlabeled_shape == "reversed" else counts


def _labeled_key(config: SplitConfig) -> str:
    """The key that decides how many images are labeled."""
    return "labeled_max" if config.labeled_fraction is None else "labeled_fraction"


def _join(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows).astype(np.int64)


def _check_available(
    manifest: Manifest, config: SplitConfig, labeled: list[int], unlabeled: list[int], available: list[int]
) -> None:
    for name, n, m, a in zip(manifest.class_names, labeled, unlabeled, available, strict=True):
        if n <= 0 and a > 0:
            way_out = (
                f"raise split.labeled_max (now {config.labeled_max}) or lower split.imbalance_labeled "
                f"(now {config.imbalance_labeled})"
                if config.labeled_fraction is None
                else f"raise split.labeled_fraction (now {config.labeled_fraction})"
            )
            raise ValueError(f"every class needs a labeled image; {name!r} gets {n} of {a}: {way_out}")
        if a <= 0 or n > a or n + m > a:
            held = config.validation_per_class
            raise ValueError(
                f"class {name!r} has {a + held} train images, but {max(n, 0)} labeled + {max(m, 0)} unlabeled + {held} "
                f"held out are asked for; lower split.{_labeled_key(config)}, split.unlabeled_max or "
                f"split.validation_per_class{splits_there(manifest)}"
            )
