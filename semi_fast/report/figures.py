"""The figures of the report: functions from runs, or a table, to matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from semi_fast.report.compare import GROUPS, MAX_COLUMNS, Table, confusion, labels, mean_recall, pooled, rates
from semi_fast.report.run import Run
from semi_fast.report.style import (
    COLORS,
    GROUP_STYLE,
    MARKERS,
    NAMED,
    SERIES,
    WIDTH,
    class_axis,
    class_ticks,
    heat,
    legend,
    line,
    log_ticks,
    marker,
    panels,
    percent_axis,
    shorten,
    step_axis,
    styled,
)


@styled
def evaluation_curves(run: Run) -> Figure:
    """Top-1 and balanced accuracy of every head against the step; validation, where there is any, dotted."""
    figure, axes = panels(2, 2, 2.7)
    for axis, (key, title) in zip(axes, (("top1", "Top-1"), ("balanced_accuracy", "Balanced accuracy")), strict=True):
        for index, head in enumerate(run.heads):
            for split, dash in (("test", "-"), ("validation", (0, (1.5, 1)))):
                there = [e for e in run.of(split) if head in e.heads]
                if there:
                    steps, values = [e.step for e in there], [e.heads[head].metrics[key] for e in there]
                    label = f"{shorten(head)}, {split}" + (" (predicts)" if head == run.predicts else "")
                    line(axis, np.array(steps), np.array(values), index, label=label, linestyle=dash)
        percent_axis(axis, title)
        step_axis(axis)
    legend(figure, axes[0])
    return figure


@styled
def class_accuracy(run: Run) -> Figure:
    """Recall by class above, labeled and unlabeled images by class on a log scale below, most labeled images first."""
    order, count = run.order, len(run.order)
    names = [run.class_names[k] for k in order]
    size = min(1.2, 0.1 * max(len(shorten(name)) for name in names)) if count <= NAMED else 0
    figure = Figure(figsize=(WIDTH, 4.2 + size), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    x = np.arange(count)
    for index, head in enumerate(run.heads):
        recall = mean_recall(run.last(head, "test"), count)[order]
        label = shorten(head)
        if head == run.predicts:
            upper.bar(
                x, recall, width=min(0.72, 0.12 * count), color=SERIES[0], label=f"{label} (predicts)", linewidth=0
            )
        else:
            look = marker(index, count, hollow=True) | ({"linestyle": ""} if count <= NAMED else {})
            upper.plot(x, recall, color=SERIES[index % 6], label=label, **look)
        if head == run.predicts and count <= 20:
            for at, value in zip(x, recall, strict=True):
                if np.isfinite(value):  # within the bar where there is room, else above it
                    color, height = ("paper", 2) if value > 10 else ("muted", value + 1.5)
                    upper.text(at, height, f"{value:.1f}", ha="center", fontsize=7, color=COLORS[color])
    percent_axis(upper, "")
    upper.set_ylim(bottom=0)  # where bars begin
    upper.set_ylabel("recall, %")
    for values, index, label in (
        (run.labeled_counts, 2, "labeled images"),
        (run.unlabeled_counts, 3, "unlabeled images"),
    ):
        shown = np.where(values > 0, values, np.nan)[order]
        if np.isfinite(shown).any():
            look = marker(index, count, hollow=index == 3)
            lower.plot(x, shown, color=SERIES[index], label=label, **look)
    lower.set_yscale("log")
    lower.set_ylabel("images (log scale)")
    log_ticks(lower.yaxis)
    class_axis(lower, names)
    for axis in (upper, lower):
        axis.grid(visible=False, axis="x")
    _group_borders(upper, lower, run)
    legend(figure, upper, lower)
    figure.align_ylabels()
    return figure


@styled
def confusion_matrix(run: Run) -> Figure:
    """Row-normalised confusion of the last test evaluation, most labeled images first; figures up to 20 classes."""
    matrix = confusion(run)
    assert matrix is not None  # the page asks first
    count = len(matrix)
    figure = Figure(figsize=(6.9, 6.0), layout="constrained")
    axis = figure.subplots()
    heat(figure, axis, matrix, (-0.5, count - 0.5, count - 0.5, -0.5), "share of the true class, %")
    if count <= 20:
        for row, column in np.ndindex(matrix.shape):
            value = matrix[row, column]
            if np.isfinite(value):
                text = f"{value:.1f}" if count <= 10 and value else f"{value:.0f}"
                color = "paper" if value > 55 else "ink" if value else "muted"
                look = {"fontsize": 7.5 if count <= 10 else 6.5, "color": COLORS[color]}
                axis.text(column, row, text, ha="center", va="center", **look)
    names = [run.class_names[k] for k in run.order]
    class_axis(axis, names)
    axis.set_xlabel("predicted class" + ("" if count <= NAMED else ", rank by labeled images"))
    axis.set_ylabel("true class" + ("" if count <= NAMED else ", rank by labeled images"))
    axis.set_yticks(axis.get_xticks(), [label.get_text() for label in axis.get_xticklabels()])
    axis.set_ylim(count - 0.5, -0.5)
    return figure


@styled
def pseudo_label_groups(run: Run) -> Figure:
    """Use, precision and recall of pseudo-labels over time, images pooled over many, medium and few classes.

    Precision and recall have a panel only where they have a value.
    """
    steps, counts, used = pooled(run)
    of_group = {
        group: rates({key: table[:, run.groups[group]].sum(axis=1) for key, table in counts.items()})
        for group in GROUPS
    }
    rest = [key for key in ("precision", "recall") if any(np.isfinite(of[key]).any() for of in of_group.values())]
    figure, axes = panels(1 + len(rest), 3, 2.6)
    for axis, key in zip(axes, ("use", *rest), strict=True):
        for group, of in of_group.items():
            color, dash = GROUP_STYLE[group]
            if np.isfinite(of[key]).any():
                line(axis, steps, of[key], 0, label=group, color=color, linestyle=dash)
        percent_axis(axis, key.capitalize())
        step_axis(axis)
    if np.isfinite(used).any():
        line(axes[0], steps, used, 0, label="all rows of the batch", color=COLORS["muted"], linewidth=0.9)
    legend(figure, axes[0])
    return figure


@styled
def pseudo_label_classes(run: Run) -> Figure:
    """Use, precision and recall of pseudo-labels by class over time; hatched where there was nothing to count.

    What has no value at all has no panel; the page asks first whether images of known truth were counted.
    """
    steps, counts, _ = pooled(run)
    count = len(run.order)
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    shares = {key: table for key, table in rates(counts).items() if np.isfinite(table).any()}
    figure = Figure(figsize=(WIDTH, 2.4 + min(0.13 * count, 3.2)), layout="constrained")
    axes = figure.subplots(1, len(shares), sharey=True)
    for axis, (key, table) in zip(axes, shares.items(), strict=True):
        last = axis is axes[-1]
        extent = (first, steps[-1], count - 0.5, -0.5)
        heat(figure, axis, table[:, run.order].T, extent, "%" if last else None, axes=list(axes))
        axis.set_title(key.capitalize())
        step_axis(axis)
    ticks, names = class_ticks([run.class_names[k] for k in run.order])
    axes[0].set_yticks(ticks, names)
    axes[0].set_ylabel("class" if count <= NAMED else "class, rank by labeled images")
    return figure


@styled
def curves(table: Table) -> Figure:
    """One small panel for every column of `table` after the step, each with its own scale."""
    steps = np.array([row[0] for row in table.rows], dtype=np.float64)
    keys = table.columns[1:]
    figure, axes = panels(len(keys), 3, 1.9)
    for index, (axis, (_, title, _)) in enumerate(zip(axes, keys, strict=True), start=1):
        line(axis, *_thinned(steps, np.array([row[index] for row in table.rows], dtype=np.float64)), 0)
        axis.set_title(shorten(title, 34))
        axis.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        step_axis(axis)
    return figure


@styled
def compared_accuracy(runs: Sequence[Run]) -> Figure:
    """Balanced test accuracy of all runs against the step, each by the head it predicts with."""
    figure, (axis,) = panels(1, 1, 3.4)
    for index, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        there = [e for e in run.of("test") if run.predicts in e.heads]
        steps = np.array([e.step for e in there])
        values = np.array([e.heads[run.predicts or ""].metrics["balanced_accuracy"] for e in there])
        if there:
            line(axis, steps, values, index, label=shorten(label, 48), marker=MARKERS[index % 6])
    percent_axis(axis, "Balanced accuracy on the test set")
    step_axis(axis)
    legend(figure, axis)
    return figure


@styled
def compared_classes(runs: Sequence[Run]) -> Figure:
    """Recall of every class against its labeled images, and the mean over classes of like frequency as a line."""
    figure, (axis,) = panels(1, 1, 3.4)
    for index, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        recall = mean_recall(run.last(run.predicts or "", "test"), len(run.class_names))
        there = np.isfinite(recall) & (run.labeled_counts > 0)
        x, y = run.labeled_counts[there], recall[there]
        if not len(x):
            continue
        bins = np.unique(x) if len(np.unique(x)) <= 12 else np.geomspace(x.min(), x.max() + 1, 11)
        which = np.digitize(x, bins)
        means = np.array([(np.exp(np.log(x[which == b]).mean()), y[which == b].mean()) for b in np.unique(which)]).T
        shape, dodge = MARKERS[index % 6], 1.012 ** (index - (len(runs) - 1) / 2)
        axis.plot(x * dodge, y, shape, color=SERIES[index % 6], alpha=0.5, markeredgewidth=0, markersize=4)
        line(axis, means[0], means[1], index, label=shorten(label, 48), marker=shape)
    axis.set_xscale("log")
    log_ticks(axis.xaxis)
    axis.set_xlabel("labeled images of the class (log scale)")
    percent_axis(axis, "Recall by class")
    legend(figure, axis)
    return figure


def _group_borders(upper: Axes, lower: Axes, run: Run) -> None:
    start = 0
    for name, members in run.groups.items():
        if len(members) in (0, len(run.order)):
            continue
        for axis in (upper, lower) if start else ():
            axis.axvline(start - 0.5, color=COLORS["muted"], linewidth=0.6)
        middle = (start + len(members) / 2) / len(run.order)
        upper.text(middle, 1.01, name, transform=upper.transAxes, ha="center", va="bottom", color=COLORS["muted"])
        start += len(members)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(np.arange(len(x)), min(2 * MAX_COLUMNS, len(x)))
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])
