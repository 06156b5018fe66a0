"""Tables of runs: the comparison, the results, and the numbers behind each figure, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semi_fast.report.run import COUNTS, HeadResult, PseudoLabels, Run, number
from semi_fast.rundir.scores import AVERAGED, SCORES, headline
from semi_fast.table import aligned

MISSING = "\N{EN DASH}"
TITLES = {
    "top1": "top-1",
    "balanced_accuracy": "bal.\N{NO-BREAK SPACE}acc.",
    "geometric_mean": "G-mean",
    "many": "many",
    "medium": "medium",
    "few": "few",
}
GROUPS = ("many", "medium", "few")
MAX_COLUMNS = 200  # log intervals a figure shows; more are pooled


@dataclass(frozen=True)
class Table:
    """Rows under columns (key, title, kind); a kind is text, percent, count, rate or plain, and says how to print."""

    columns: tuple[tuple[str, str, str], ...]
    rows: tuple[tuple[Any, ...], ...]

    def cells(self) -> list[list[str]]:
        """Every value as it is printed, a missing one as an en dash."""
        kinds = [kind for _, _, kind in self.columns]
        return [[show(value, kind) for value, kind in zip(row, kinds, strict=True)] for row in self.rows]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [[title for _, title, _ in self.columns], *self.cells()]
        left = [i for i, (_, _, kind) in enumerate(self.columns) if kind == "text"]
        return aligned(lines, left=left, rule=True).replace("\N{NO-BREAK SPACE}", " ") + "\n"

    def markdown(self) -> str:
        """A pipe table."""
        rule = [":---" if kind == "text" else "---:" for _, _, kind in self.columns]
        lines = [[title for _, title, _ in self.columns], rule, *self.cells()]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def csv(self) -> str:
        """Full precision under the column keys; a missing value is an empty cell."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([key for key, _, _ in self.columns])
        writer.writerows([["" if _missing(value) else _exact(value) for value in row] for row in self.rows])
        return buffer.getvalue()


def show(value: Any, kind: str) -> str:
    """`value` as a reader sees it: percentages with one decimal, rates with three digits at least."""
    if _missing(value):
        return MISSING
    if isinstance(value, str) or kind == "text":
        return str(value)
    if kind == "percent":
        return f"{value:.1f}"
    if kind == "count" or (kind == "rate" and abs(value) >= 100):
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if kind == "rate" else f"{value:.4g}"


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, (float, np.floating)) and not math.isfinite(value))


def _exact(value: Any) -> Any:
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return int(value) if whole else float(value) if isinstance(value, np.floating) else value


def labels(runs: Sequence[Run]) -> list[str]:
    """One distinct name a run: the method, then seed, directory and place where those before do not tell runs apart."""
    names = [run.method for run in runs]
    for suffix in (lambda run: f"seed {run.summary.get('seed', run.config.get('seed'))}", lambda run: run.path.name):
        common = {name for name, uses in Counter(names).items() if uses > 1}
        names = [f"{n}, {suffix(run)}" if n in common else n for n, run in zip(names, runs, strict=True)]
    repeated = {name for name, uses in Counter(names).items() if uses > 1}
    return [f"{n}, run {i}" if n in repeated else n for i, n in enumerate(names, start=1)]


def head_values(run: Run, head: str, which: str, split: str = "test") -> dict[str, float]:
    """SCORES of one head: `final`, or `last20`, the headline; the summary's value comes first."""
    kept = run.last(head, split)[-1 if which == "final" else 0 :]
    values = {key: number(headline([result.metrics[key] for result in kept])) for key in SCORES}
    if split == "test":
        holder = run.summary.get("heads", {}).get(head) or {}
        own = run.summary if head == run.predicts else {}
        for key in SCORES:
            summarised = number(holder.get(f"{key}_{which}", own.get(f"{key}_{which}")))
            values[key] = values[key] if math.isnan(summarised) else summarised
    return values


def averaged(run: Run, split: str = "test") -> int:
    """The number of evaluations behind the headline."""
    if split == "test" and run.summary:
        return int(run.summary.get("averaged") or 0)
    return min(AVERAGED, len(run.of(split)))


def comparison(runs: Sequence[Run]) -> Table:
    """One row a run, by the head it predicts with: percent, mean of the last `n` test evaluations unless `final`."""
    order = ("top1", "balanced_accuracy", *GROUPS, "geometric_mean")
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        mean, final = (head_values(run, run.predicts or "", which) for which in ("last20", "final"))
        rows.append(
            (
                label,
                *(mean[key] for key in order),
                final["top1"],
                final["balanced_accuracy"],
                averaged(run),
                number(run.summary.get("images_per_second")),
                number(run.summary.get("seconds")),
                run.summary.get("seed", run.config.get("seed")),
            )
        )
    columns = (
        ("method", "method", "text"),
        *((f"{key}_last20", TITLES[key], "percent") for key in order),
        ("top1_final", "final top-1", "percent"),
        ("balanced_accuracy_final", "final bal.\N{NO-BREAK SPACE}acc.", "percent"),
        ("averaged", "n", "count"),
        ("images_per_second", "images/s", "rate"),
        ("seconds", "seconds", "rate"),
        ("seed", "seed", "plain"),
    )
    return Table(columns, tuple(rows))


def results(run: Run, split: str) -> Table:
    """Each head on `split`: mean of the last evaluations, final, and the evaluation with the best top-1."""
    rows = []
    for head in run.heads:
        there = [evaluation for evaluation in run.of(split) if head in evaluation.heads]
        mark = " ◂ predicts" if head == run.predicts else ""
        best = max(there, key=lambda e, head=head: np.nan_to_num(e.heads[head].metrics["top1"], nan=-1), default=None)
        n = averaged(run, split)
        span = f"{there[-n:][0].step:,}{MISSING}{there[-1].step:,}" if n and there else None
        chosen = f"best, selected on {split}"
        for title, step, values in (
            (f"mean of last {n}" if n else "mean of last evaluations", span, head_values(run, head, "last20", split)),
            ("final", there[-1].step if there else None, head_values(run, head, "final", split)),
            (chosen, best.step if best else None, best.heads[head].metrics if best else dict.fromkeys(SCORES)),
        ):
            rows.append((head + mark, title, step, *(values[key] for key in SCORES)))
    percent = ((key, title, "percent") for key, title in TITLES.items())
    return Table(
        (("head", "head", "text"), ("value", "value", "text"), ("step", "at step", "count"), *percent), tuple(rows)
    )


def evaluations(run: Run) -> Table:
    """Every evaluation of every head."""
    rows = tuple(
        (e.step, e.split, name, *(head.metrics[key] for key in SCORES))
        for e in run.evaluations
        for name, head in e.heads.items()
    )
    fixed = (("step", "step", "count"), ("split", "split", "text"), ("head", "head", "text"))
    return Table((*fixed, *((key, TITLES[key], "percent") for key in SCORES)), rows)


def mean_recall(results: Sequence[HeadResult], classes: int) -> np.ndarray:
    """Recall [C] in percent, mean over `results`; NaN where there is none."""
    return np.mean([result.recall for result in results], axis=0) if results else np.full(classes, np.nan)


def classes(run: Run) -> Table:
    """Classes from most to fewest labeled images: counts, and each head's recall, mean of the last test evaluations."""
    recalls = [mean_recall(run.last(head, "test"), len(run.class_names)) for head in run.heads]
    group = {int(index): name for name, members in run.groups.items() for index in members}
    rows = tuple(
        (
            run.class_names[k],
            group[k],
            run.labeled_counts[k],
            run.unlabeled_counts[k],
            run.test_counts[k],
            *(r[k] for r in recalls),
        )
        for k in map(int, run.order)
    )
    counts = ((f"{part}_images", f"{part} images", "count") for part in ("labeled", "unlabeled", "test"))
    recall = ((f"recall_{head}", f"recall of {head}, %", "percent") for head in run.heads)
    return Table((("class", "class", "text"), ("group", "group", "text"), *counts, *recall), rows)


def confusion(run: Run) -> np.ndarray | None:
    """Share of each true class that is predicted as each class, percent [C, C], classes in `run.order`."""
    there = [e.heads[run.predicts].confusion for e in run.of("test") if run.predicts in e.heads]
    counts = next((matrix for matrix in reversed(there) if matrix is not None), None)
    if counts is None:
        return None
    counts = counts[np.ix_(run.order, run.order)]
    return 100 * ratio(counts, counts.sum(axis=1, keepdims=True))


def confusion_table(run: Run) -> Table:
    """The confusion matrix with its class names."""
    matrix, names = confusion(run), [run.class_names[k] for k in run.order]
    rows = () if matrix is None else tuple((name, *row) for name, row in zip(names, matrix, strict=True))
    return Table((("truth", "truth", "text"), *((name, name, "percent") for name in names)), rows)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, NaN where `whole` is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def rates(counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Use, precision and recall of pseudo-labels in percent, from counts of any shape."""
    return {
        "use": 100 * ratio(counts["used"], counts["seen"]),
        "precision": 100 * ratio(counts["correct"], counts["predicted"]),
        "recall": 100 * ratio(counts["correct"], counts["seen"]),
    }


def pseudo_labels(run: Run) -> list[tuple[int, PseudoLabels]]:
    """The log intervals that counted pseudo-labels, by step."""
    return [(record.step, record.pseudo_labels) for record in run.train if record.pseudo_labels is not None]


def pooled(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Steps [T], counts {name: [T, C]} and used fraction in percent [T], T <= MAX_COLUMNS: neighbours are summed."""
    there = pseudo_labels(run)
    parts = np.array_split(np.arange(len(there)), min(MAX_COLUMNS, len(there)))
    steps = np.array([there[part[-1]][0] for part in parts])
    counts = {key: np.array([sum(getattr(there[i][1], key) for i in part) for part in parts]) for key in COUNTS}
    return steps, counts, 100 * np.array([np.mean([there[i][1].used_fraction for i in part]) for part in parts])


def pseudo_label_table(run: Run) -> Table:
    """Counts and rates by log interval and class."""
    rows = []
    for step, labels in pseudo_labels(run):
        counts = {key: getattr(labels, key) for key in COUNTS}
        columns = (*counts.values(), *rates(counts).values())
        rows += [(step, run.class_names[k], *(column[k] for column in columns)) for k in run.order]
    keys = (*((key, "count") for key in COUNTS), ("use", "percent"), ("precision", "percent"), ("recall", "percent"))
    fixed = (("step", "step", "count"), ("class", "class", "text"))
    return Table((*fixed, *((key, key, kind) for key, kind in keys)), tuple(rows))


def series(run: Run, part: str) -> Table:
    """Every log interval's `terms`, `stats` or `rates`, one column each; a column without any value is left out."""
    records = [(record.step, getattr(record, part)) for record in run.train]
    keys = dict.fromkeys(key for _, values in records for key, value in values.items() if not math.isnan(value))
    rows = tuple((step, *(values.get(key, math.nan) for key in keys)) for step, values in records)
    titles = {key: "learning rate" if key == "lr" else key.replace("_", " ") for key in keys}
    columns = (("step", "step", "count"), *((key, title, "plain") for key, title in titles.items()))
    return Table(columns, rows if keys else ())


def compared_accuracy(runs: Sequence[Run]) -> Table:
    """Every test evaluation of every run, by the head it predicts with."""
    rows = tuple(
        (label, e.step, *(e.heads[run.predicts].metrics[key] for key in SCORES))
        for run, label in zip(runs, labels(runs), strict=True)
        for e in run.of("test")
        if run.predicts in e.heads
    )
    fixed = (("run", "run", "text"), ("step", "step", "count"))
    return Table((*fixed, *((key, TITLES[key], "percent") for key in SCORES)), rows)


def compared_classes(runs: Sequence[Run]) -> Table:
    """Labeled images and recall of every class of every run, by the head it predicts with."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        recall = mean_recall(run.last(run.predicts or "", "test"), len(run.class_names))
        rows += [(label, run.class_names[k], run.labeled_counts[k], recall[k]) for k in run.order]
    columns = ("run", "text"), ("class", "text"), ("labeled_images", "count"), ("recall", "percent")
    return Table(tuple((key, key, kind) for key, kind in columns), tuple(rows))
