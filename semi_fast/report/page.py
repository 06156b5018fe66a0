"""The page: figures inlined, tables filled in, the numbers behind them as CSV beside it, every file replaced whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from semi_fast.disk import make_directory, write_text
from semi_fast.report import NOTE, SAYS, check_page, compare, data_folder, figures
from semi_fast.report.compare import MISSING, Table, show
from semi_fast.report.run import Run, number, read_run
from semi_fast.report.style import inline_svg
from semi_fast.rundir.scores import AVERAGED

PROTOCOL = ("protocol", "dataset", "split_sha256", "manifest_sha256", "steps", "precision", "hardware")
GROUPED = "Many and few are the thirds of the classes with most and fewest labeled images, medium the rest."
DIAGNOSTIC = (
    "The true classes of unlabeled images are looked up for these diagnostics only; no method sees them. "
    "Labeled copies and images of unknown truth are not counted."
)


@dataclass(frozen=True)
class Plot:
    """A figure (None: there is nothing to draw), what to know about it, and the file with its numbers."""

    title: str
    caption: str
    svg: Markup | None
    data: str


class _Output:
    """Collects the plots of one page and the CSV files behind them, by path below its folder `data`."""

    def __init__(self, data: str) -> None:
        self.data = data
        self.files: dict[str, str] = {}
        self.figures = 0

    def plot(self, data: str, title: str, caption: str, draw: Callable[[], Figure] | None, table: Table) -> Plot:
        """Draw one figure and keep its table; without `draw` the caption says why there is none."""
        if draw is None:
            return Plot(title, caption, None, "")
        self.files[data] = table.csv()
        self.figures += 1
        return Plot(title, caption, inline_svg(draw(), f"f{self.figures}", title), f"{self.data}/{data}")


def write_page(run_dirs: Sequence[Path], out: Path) -> Path:
    """Read all runs and render everything first; then write the data files and, last, the page."""
    out = Path(out)
    if not run_dirs:
        raise ValueError("a report needs at least one run directory; got none; name one that a training wrote")
    check_page(out)
    data = data_folder(out)
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    names, output, several = compare.labels(runs), _Output(data.name), len(runs) > 1
    compared = _comparison(runs, output) if several else None
    sections = [
        _section(run, name, f"{index}_{_slug(name)}/" if several else "", output)
        for index, (run, name) in enumerate(zip(runs, names, strict=True), start=1)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    title = f"{len(runs)} runs compared" if several else names[0]
    page = environment.get_template("page.html")
    text = page.render(title=title, compared=compared, runs=sections, data=data.name, files=len(output.files))
    note = f"The numbers behind {out.name}, {SAYS}.\n"
    files = {NOTE: note, **output.files}
    for name, content in files.items():
        make_directory((data / name).parent)
        write_text(data / name, content, errors="replace", alone=False)  # of paths that are no text
    write_text(out, text, errors="replace", alone=False)
    _clear(data, {data / name for name in files})
    return out


def _clear(data: Path, kept: set[Path]) -> None:
    """Delete the numbers of an earlier page, and the folders that are empty then."""
    for folder, _, names in os.walk(data, topdown=False):
        for path in (Path(folder, name) for name in names):
            if path.suffix == ".csv" and path not in kept:
                path.unlink()
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40] or "run"


def _comparison(runs: Sequence[Run], output: _Output) -> dict[str, Any]:
    table = compare.comparison(runs)
    output.files["comparison.csv"] = table.csv()
    evaluated = any(run.of("test") for run in runs)
    differing = [key for key in PROTOCOL if len({str(run.summary.get(key)) for run in runs}) > 1]
    accuracy, classes = compare.compared_accuracy(runs), compare.compared_classes(runs)
    plots = (
        output.plot(
            "compared_accuracy.csv",
            "Balanced accuracy against the step",
            "Test set, each run by the head it predicts with." if evaluated else "No test evaluation yet.",
            (lambda: figures.compared_accuracy(runs)) if evaluated else None,
            accuracy,
        ),
        output.plot(
            "compared_classes.csv",
            "Recall by class against labeled images",
            "Small points are classes (mean of the last evaluations), lines the mean of classes of like frequency."
            if evaluated
            else "No test evaluation yet.",
            (lambda: figures.compared_classes(runs)) if evaluated else None,
            classes,
        ),
    )
    return {"table": table, "differing": [key.removesuffix("_sha256") for key in differing], "plots": plots}


def _section(run: Run, name: str, folder: str, output: _Output) -> dict[str, Any]:
    classes = compare.classes(run)
    output.files[f"{folder}results.csv"] = compare.results(run, "test").csv()
    headline = compare.head_values(run, run.predicts or "", "last20")
    n = compare.averaged(run)
    mean = f"test, mean of the last {n} evaluations" if n else "no test evaluation yet"
    return {
        "name": name,
        "finished": run.summary.get("status") == "finished",
        "protocol": run.summary.get("protocol") or MISSING,
        "tiles": (
            ("balanced accuracy, %", show(headline["balanced_accuracy"], "percent"), mean),
            ("top-1, %", show(headline["top1"], "percent"), mean),
            ("few classes, %", show(headline["few"], "percent"), mean),
            ("images/s", show(number(run.summary.get("images_per_second")), "rate"), "distinct images, training time"),
        ),
        "facts": _facts(run),
        "results": [
            (split, compare.results(run, split)) for split in ("test", "validation") if split == "test" or run.of(split)
        ],
        "grouped": GROUPED,
        "shortened": _shortened(run),
        "plots": _plots(run, folder, output),
        "classes": classes,
        "config": run.config_text,
        "env": json.dumps(run.env, indent=2, ensure_ascii=False),
    }


def _plots(run: Run, folder: str, output: _Output) -> list[Plot]:
    tested, pseudo = bool(run.of("test")), compare.pseudo_labels(run)
    n = compare.averaged(run) or min(AVERAGED, len(run.of("test")))
    none = "No test evaluation yet."
    if pseudo:
        no_truth = "Use: share of the rows that pass the mask. No unlabeled image that was drawn has a known class."
    else:
        no_truth = "This run counted no pseudo-labels."
    known = any((labels.seen > 0).any() for _, labels in pseudo)
    matrix = compare.confusion(run)
    pseudo_table = compare.pseudo_label_table(run)
    entries: list[tuple[str, str, str, Callable[[], Figure] | None, Table]] = [
        (
            "evaluations.csv",
            "Accuracy against the step",
            "Every evaluation of every head." if run.evaluations else "No evaluation yet.",
            (lambda: figures.evaluation_curves(run)) if run.evaluations else None,
            compare.evaluations(run),
        ),
        (
            "classes.csv",
            "Recall by class, most labeled images first",
            f"Test set, mean of the last {n} evaluations. Unlabeled images count by their truth, if known. {GROUPED}"
            if tested
            else none,
            (lambda: figures.class_accuracy(run)) if tested else None,
            compare.classes(run),
        ),
        (
            "confusion.csv",
            "Confusion matrix",
            "Last test evaluation, each row in percent of its true class, most labeled images first."
            if matrix is not None
            else "No confusion matrix: the last test evaluation keeps it.",
            (lambda: figures.confusion_matrix(run)) if matrix is not None else None,
            compare.confusion_table(run),
        ),
        (
            "pseudo_labels.csv",
            "Pseudo-labels over time" + (", by frequency group" if known else ""),
            "Use: share of a class's images that pass the mask. Precision: share of a class's pseudo-labels that are "
            "right. Recall: share of a class's images that pass with the right pseudo-label. A group pools its counts. "
            + DIAGNOSTIC
            if known
            else no_truth,
            (lambda: figures.pseudo_label_groups(run)) if pseudo else None,
            pseudo_table,
        ),
        (
            "pseudo_labels.csv",
            "Pseudo-labels over time, by class",
            f"Most labeled images on top; hatched where an interval had nothing to count. {DIAGNOSTIC}",
            (lambda: figures.pseudo_label_classes(run)) if known else None,
            pseudo_table,
        ),
    ]
    for part, title, caption in (
        ("terms", "Loss terms", "Mean over each log interval; every term on its own scale."),
        ("rates", "Learning rate and speed", "Images are distinct images, rows are all views of a forward pass."),
        ("stats", "Inside the method", "What the method reports of itself, by log interval."),
    ):
        table = compare.series(run, part)
        if table.rows or part != "stats":
            draw = (lambda table=table: figures.curves(table)) if table.rows else None
            entries.append((f"{part}.csv", title, caption if table.rows else "Nothing logged yet.", draw, table))
    if not known:
        entries.pop(4)
    return [output.plot(folder + name, title, caption, draw, table) for name, title, caption, draw, table in entries]


def _facts(run: Run) -> list[tuple[str, str]]:
    of = run.summary.get
    counts = [np.nansum(c) if np.isfinite(c).any() else None for c in (run.labeled_counts, run.unlabeled_counts)]
    images = f"{show(counts[0], 'count')} labeled, {show(counts[1], 'count')} unlabeled of known class"
    reached = max([record.step for record in (*run.train, *run.evaluations)], default=None)
    steps = show(number(of("steps")), "count") if of("steps") else f"{show(reached, 'count')} so far"
    facts = (
        ("dataset", _plain(of("dataset"))),
        ("classes, images", f"{len(run.class_names) or MISSING}; {images}"),
        ("steps", steps),
        ("seed", _plain(of("seed", run.config.get("seed")))),
        ("wall-clock", _duration(number(of("seconds")))),
        ("training time", _duration(number(of("training_seconds")))),
        ("images/s", show(number(of("images_per_second")), "rate")),
        ("rows/s", show(number(of("rows_per_second")), "rate")),
        ("hardware", _plain(of("hardware"))),
        ("device, precision", f"{_plain(of('device'))}, {_plain(of('precision', run.config.get('precision')))}"),
        ("split", _short(of("split_sha256") or run.split.get("sha256"))),
        ("manifest", _short(of("manifest_sha256"))),
        ("commit", _short(of("commit") or run.env.get("commit"))),
        ("run directory", run.path.resolve().name),
    )
    return list(facts)


def _shortened(run: Run) -> Table | None:
    if "shortened" not in run.summary:
        return None
    columns = (("key", "key", "text"), ("run", "this run", "plain"), ("paper", "published", "plain"))
    rows = tuple(tuple(_loose(entry.get(key)) for key, _, _ in columns) for entry in run.summary["shortened"] or ())
    return Table(columns, rows)


def _loose(value: Any) -> Any:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain or value is None else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items()) or MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or MISSING
    if isinstance(value, bool):
        return str(value).lower()
    return MISSING if value is None or value == "" else str(value)


def _short(digest: Any) -> str:
    return _plain(digest)[:12]


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
