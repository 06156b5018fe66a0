"""A run directory as one frozen value, checked at the door; a number that is missing is NaN inside the report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from semi_fast.rundir.scores import AVERAGED, SCORES, class_groups
from semi_fast.schema.arguments import CONFIG_FILE

COUNTS = ("seen", "used", "correct", "predicted")


@dataclass(frozen=True)
class PseudoLabels:
    """Counts of one log interval by class, float [C]: unlabeled images of known truth, labeled copies left out."""

    used_fraction: float
    seen: np.ndarray
    used: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class TrainRecord:
    """Means over one log interval that ends at `step`."""

    step: int
    rates: dict[str, float]  # lr, images_per_second, rows_per_second
    terms: dict[str, float]
    stats: dict[str, float]
    pseudo_labels: PseudoLabels | None


@dataclass(frozen=True)
class HeadResult:
    """One head at one evaluation: SCORES and recall [C] in percent, confusion [C, C] (rows: truth) where kept."""

    metrics: dict[str, float]
    recall: np.ndarray
    confusion: np.ndarray | None


@dataclass(frozen=True)
class EvaluationRecord:
    step: int
    split: str
    predicts: str
    heads: dict[str, HeadResult]


@dataclass(frozen=True)
class Run:
    """What one run directory holds; `summary` is empty for a run that has not finished."""

    path: Path
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    env: dict[str, Any]
    split: dict[str, Any]
    class_names: tuple[str, ...]
    labeled_counts: np.ndarray  # float [C]
    unlabeled_counts: np.ndarray  # float [C], by the truth; NaN where it is unknown
    test_counts: np.ndarray  # float [C]
    train: tuple[TrainRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]

    @property
    def method(self) -> str:
        """The method's name with its plug-ins, as `fixmatch + la`."""
        config = self.config.get("method")
        config = config if isinstance(config, dict) else {"name": config}
        name = self.summary.get("method") or config.get("name") or "\N{EN DASH}"
        return " + ".join(str(part) for part in (name, *(self.summary.get("plugins") or config.get("plugins") or ())))

    @property
    def predicts(self) -> str | None:
        """The head that the method predicts with."""
        return self.summary.get("predicts") or (self.evaluations[-1].predicts if self.evaluations else None)

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads, the one that predicts first."""
        names = dict.fromkeys(name for evaluation in self.evaluations for name in evaluation.heads)
        return tuple(sorted(names | dict.fromkeys(self.summary.get("heads") or ()), key=lambda n: n != self.predicts))

    @cached_property
    def order(self) -> np.ndarray:
        """Class ids [C] from most to fewest labeled images, ties by id."""
        return np.argsort(-np.nan_to_num(self.labeled_counts), kind="stable")

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Class ids of the third with most labeled images, the third with fewest, and the rest between them."""
        groups = class_groups(np.nan_to_num(self.labeled_counts).tolist())
        return {name: np.array(classes, dtype=np.int64) for name, classes in groups.items()}

    def of(self, split: str) -> tuple[EvaluationRecord, ...]:
        """The evaluations on `test` or `validation`, by step."""
        return tuple(evaluation for evaluation in self.evaluations if evaluation.split == split)

    def last(self, head: str, split: str) -> list[HeadResult]:
        """The head's results that the headline averages: the last AVERAGED evaluations, or those there are."""
        return [evaluation.heads[head] for evaluation in self.of(split) if head in evaluation.heads][-AVERAGED:]


def read_run(path: Path) -> Run:
    """Read and check a run directory, finished or not.

    A run without `summary.json` has not finished; then, and only then, a torn last line of `metrics.jsonl` is left out.
    Of records that a resumed run wrote twice the later counts. Raises ValueError for a missing or damaged file.
    """
    path = Path(path)
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(
            f"a report needs a run directory with metrics.jsonl; {path} has none; name one a training wrote"
        )
    summary = _json(path / "summary.json") if (path / "summary.json").exists() else {}
    split = _json(path / "split.json") if (path / "split.json").exists() else {}
    file = path / CONFIG_FILE
    config_text = _text(file)
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise _damaged(file, "must be YAML", str(error).splitlines()[0]) from None
    if not isinstance(config, dict):
        raise _damaged(file, "must be a mapping", config)
    records = _records(path / "metrics.jsonl", torn_allowed=summary.get("status") != "finished")
    names = _class_names(path, summary, split, records)
    counts = {
        key: _vector(summary.get(key) or split.get(key) or [None] * len(names), len(names), f"{path}: {key}")
        for key in ("labeled_counts", "unlabeled_counts", "test_counts")
    }
    train, evaluations = {}, {}
    for where, record in records:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise _damaged(where, "step must be an integer", step)
        if record.get("kind") == "train":
            train[step] = _train_record(record, len(names), where)
        elif record.get("kind") == "eval":
            evaluation = _evaluation(record, len(names), where)
            evaluations[evaluation.split, step] = evaluation
        else:
            raise _damaged(where, "kind must be train or eval", record.get("kind"))
    return Run(
        path=path,
        summary=_checked_summary(summary, path / "summary.json"),
        config_text=config_text,
        config=config,
        env=_json(path / "env.json"),
        split=split,
        class_names=names,
        **counts,
        train=tuple(train[step] for step in sorted(train)),
        evaluations=tuple(sorted(evaluations.values(), key=lambda evaluation: evaluation.step)),
    )


def number(value: Any, where: str | Path = "value") -> float:
    """`value` as a float, NaN for null and for what is not finite; ValueError for anything that is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _damaged(where, "must be a number or null", value)
    return float(value) if math.isfinite(value) else math.nan


def _damaged(where: str | Path, rule: str, value: Any) -> ValueError:
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{where}: {rule}; got {shown}; restore the file or leave this run out")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"a run directory holds {path.name}; {path} is missing; restore it or leave this run out"
        ) from None
    except UnicodeDecodeError as error:
        raise _damaged(path, "must be UTF-8 text", error.reason) from None


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"must be JSON (line {error.lineno}: {error.msg})", text[:40]) from None
    if not isinstance(content, dict):
        raise _damaged(path, "must be a JSON object", content)
    return content


def _records(path: Path, *, torn_allowed: bool) -> list[tuple[str, dict[str, Any]]]:
    records = []
    lines = path.read_bytes().split(b"\n")
    for index, line in enumerate(lines):
        where = f"{path} line {index + 1}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if torn_allowed and not any(later.strip() for later in lines[index + 1 :]):
                break
            raise _damaged(where, "must be JSON", line.decode(errors="replace")) from None
        if not isinstance(record, dict):
            raise _damaged(where, "must be a JSON object", record)
        records.append((where, record))
    return records


def _class_names(path: Path, summary: dict, split: dict, records: list[tuple[str, dict]]) -> tuple[str, ...]:
    names = summary.get("class_names")
    if names is not None:
        if not isinstance(names, list) or not names:
            raise _damaged(path / "summary.json", "class_names must be a list of names", names)
        return tuple(str(name) for name in names)
    counts = split.get("labeled_counts") or next(
        (head.get("recall") for _, r in records for head in _mapping(r.get("heads"), path).values()), None
    )
    return tuple(f"class {index}" for index in range(len(counts or ())))


def _mapping(value: Any, where: str | Path) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise _damaged(where, "must be an object", value)
    return value or {}


def _numbers(value: Any, where: str) -> dict[str, float]:
    return {str(key): number(entry, f"{where}.{key}") for key, entry in _mapping(value, where).items()}


def _vector(value: Any, length: int, where: str) -> np.ndarray:
    if not isinstance(value, list) or len(value) != length:
        raise _damaged(where, f"must be a list of {length} numbers, one a class", value)
    return np.array([number(entry, where) for entry in value], dtype=np.float64)


def _train_record(record: dict, classes: int, where: str) -> TrainRecord:
    pseudo = record.get("pseudo_labels")
    return TrainRecord(
        step=record["step"],
        rates={
            key: number(record.get(key), f"{where}: {key}") for key in ("lr", "images_per_second", "rows_per_second")
        },
        terms=_numbers(record.get("terms"), f"{where}: terms"),
        stats=_numbers(record.get("stats"), f"{where}: stats"),
        pseudo_labels=None
        if pseudo is None
        else PseudoLabels(
            number(_mapping(pseudo, where).get("used_fraction"), f"{where}: used_fraction"),
            *(_vector(pseudo.get(key), classes, f"{where}: pseudo_labels.{key}") for key in COUNTS),
        ),
    )


def _evaluation(record: dict, classes: int, where: str) -> EvaluationRecord:
    heads = {}
    for name, head in _mapping(record.get("heads"), where).items():
        at = f"{where}: heads.{name}"
        rows = _mapping(head, at).get("confusion")
        heads[name] = HeadResult(
            metrics={key: number(head.get(key), f"{at}.{key}") for key in SCORES},
            recall=_vector(head.get("recall"), classes, f"{at}.recall"),
            confusion=None
            if rows is None
            else np.array([_vector(row, classes, f"{at}.confusion") for row in rows]).reshape(len(rows), classes),
        )
        if rows is not None and len(rows) != classes:
            raise _damaged(f"{at}.confusion", f"must have {classes} rows, one a class", len(rows))
    if record.get("split") not in ("test", "validation"):
        raise _damaged(where, "split must be test or validation", record.get("split"))
    return EvaluationRecord(record["step"], record["split"], str(record.get("predicts")), heads)


def _checked_summary(summary: dict[str, Any], where: Path) -> dict[str, Any]:
    plain = ("steps", "seconds", "training_seconds", "images_per_second", "rows_per_second", "evaluations", "averaged")
    for holder in (summary, *_mapping(summary.get("heads"), where).values()):
        for key in _mapping(holder, where):
            if key in plain or key.endswith(("_final", "_last20")):
                number(holder[key], f"{where}: {key}")
    shortened = summary.get("shortened") or []
    if not isinstance(shortened, list) or not all(isinstance(entry, dict) for entry in shortened):
        raise _damaged(where, "shortened must be a list of objects", shortened)
    return summary
