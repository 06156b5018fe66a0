"""Our runs of a cell beside the paper's value, and what stands between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from semi_fast.report.compare import Table
from semi_fast.reproduce.cells import RUNS, Cell
from semi_fast.schema.config import Config, identity, leaves

COLUMNS = (
    ("what", "", "text"),
    ("mean", "%", "percent"),
    ("std", "±", "plain"),
    ("runs", "runs", "count"),
    ("difference", "difference", "percent"),
)
UNFIT = ": not comparable with the paper"
HARMLESS = ("precision", "data.source", "eval.batch", "model.bn")
"""Keys that change how a number is computed and not what it means."""


def against_paper(cell: Cell, summaries: Sequence[dict[str, Any]]) -> Table:
    """The paper's value, ours by the same rule, and our best evaluation; in percent, over seeds."""
    averaged = mean_of(summaries[0]["averaged"])
    measured = [(f"ours: top-1, {averaged}", [one["top1_last20"] for one in summaries])]
    if cell.metric == "accuracy":
        balanced = [one["balanced_accuracy_last20"] for one in summaries]
        measured.append((f"ours: balanced accuracy, {averaged}", balanced))
    best = [one["best"]["top1"] for one in summaries]
    measured.append(("ours: top-1, best evaluation, selected on the test set", best))
    printed = cell.paper
    runs = None if printed.std is None else RUNS
    rows: list[tuple[Any, ...]] = [(f"paper: {cell.metric}, {cell.source}", printed.mean, printed.std, runs, None)]
    for what, values in measured:
        ours = mean(values)
        rows.append(
            (what, ours, round(stdev(values), 2) if len(values) > 1 else None, len(values), ours - printed.mean)
        )
    return Table(COLUMNS, tuple(rows))


def mean_of(evaluations: int) -> str:
    """What `*_last20` is of a run that was evaluated so often."""
    return "the one evaluation" if evaluations == 1 else f"mean of the last {evaluations} evaluations"


def verdict(
    cell: Cell, published: Config, config: Config, *, short: Mapping[str, Any], runs: int
) -> tuple[bool, list[str]]:
    """(comparable, one line for everything that keeps the result from being the paper's cell).

    `short` are the keys that follow from the number of steps.
    """
    lines = []
    if short:
        fitted = [f"{key} {value}" for key, value in short.items() if key != "optim.steps"]
        lines.append(f"{short['optim.steps']:,} of {published.optim.steps:,} steps{UNFIT}")
        if fitted:
            lines.append(f"fitted to the steps: {', '.join(fitted)}")
        span = 1 / (1 - config.ema.decay)
        if not config.ema.ramp and config.optim.steps < 10 * span:
            lines.append(
                f"the averages of weights and of statistics reach back some {span:,.0f} steps, as in the cell: in so "
                "few steps they hold initial values; see --ema.ramp=true, --model.bn_momentum=0.05"
            )
    before, after = leaves(identity(published)), leaves(identity(config))
    for key in after:
        if key not in short and before[key] != after[key]:
            lines.append(f"{key} is {after[key]}, in the cell {before[key]}{'' if key in HARMLESS else UNFIT}")
    comparable = not any(UNFIT in line for line in lines)
    if cell.paper.std is not None and runs != RUNS:
        lines.append(f"{runs} of the paper's {RUNS} runs")
    if cell.paper.note is not None:
        lines.append(f"the paper's value: {cell.paper.note}")
    return comparable, lines
