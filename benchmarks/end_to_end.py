"""Accuracy and seconds of runs beside the released loop: `python -m benchmarks.end_to_end --data D --out FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch

from benchmarks import measure, ops, trainers
from benchmarks.case import PAPER_EVALUATIONS, PAPER_STEPS, Goal
from benchmarks.measure import Spread, paired_ratio, quartiles
from benchmarks.reference.loop import ReferenceLoop
from benchmarks.trainers import OURS, REFERENCE, TRAINERS, OurLoop, Seconds, Setting, Trainer, run_steps, timed
from semi_fast.rundir.scores import AVERAGED
from semi_fast.screen import tolerate_closed_pipes
from semi_fast.table import aligned

GOALS = (Goal("cuda", "paper_minutes", 12, False),)
CLOCK = (
    "seconds without another name: CPU time of the process, its threads and its loaders' processes on a CPU, wall on a "
    "GPU; wall_seconds: wall. A chunk is the steps between two evaluations, from an idle device and full queues to the "
    "same. Seconds to an accuracy and in all: start, steps, evaluations. Start: data, network, loaders and the first "
    "step; ready_seconds of it, wall: compilation and capture. loading_seconds, part of the steps: wall that the "
    "reference's steps take to make their images or wait for them; ours are made by the step itself"
)
KEY = ("kind", "trainer", "seed", "step")
SCORES = ("top1", "balanced_accuracy", "top1_last20", "balanced_accuracy_last20", "balanced_accuracy_spread")
PARTS = ("start_seconds", "ready_seconds", "step_seconds", "evaluation_seconds", "loading_seconds")
SPREADS = ("seconds_per_step", "chunk_ratio", "same_over_same_ratio", "paper_minutes")
PAPER = ("paper_step_minutes", "paper_evaluation_minutes", "paper_start_minutes")
Row = dict[str, Any]


@dataclass
class Course:
    """What one trainer has done and taken with one seed."""

    name: str
    seed: int
    trainer: Trainer
    start: Seconds
    chunks: list[Seconds] = field(default_factory=list)  # seconds per step
    evaluations: list[Seconds] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    at: list[Seconds] = field(default_factory=list)
    """Everything, up to the end of each evaluation."""
    steps: int = 0

    def advance(self, steps: int, device: torch.device) -> None:
        """Train so many steps, then evaluate."""
        trained = timed(lambda: run_steps(self.trainer, steps), device)
        evaluated = timed(lambda: self.scores.append(self.trainer.evaluate()), device)
        self.chunks.append(Seconds(trained.wall / steps, trained.cpu / steps))
        self.evaluations.append(evaluated)
        self.at.append((self.at[-1] if self.at else self.start) + trained + evaluated)
        self.steps += steps

    def ready_seconds(self) -> float:
        """Of the start: compilation and capture, by the clock on the wall."""
        return self.trainer.run.program.prepared.get("seconds", 0.0) if isinstance(self.trainer, OurLoop) else 0.0

    def loading_seconds(self) -> float | None:
        return self.trainer.loading_seconds if isinstance(self.trainer, ReferenceLoop) else None

    def seconds_to(self, threshold: float, device: torch.device) -> float | None:
        """Until the first evaluation at this balanced accuracy in percent; None if there is none."""
        for found, taken in zip(self.scores, self.at, strict=True):
            if found["balanced_accuracy"] >= threshold:
                return taken.of(device)
        return None


def opened(setting: Setting, seed: int, stack: ExitStack) -> dict[str, Course]:
    """Both trainers at the start of a run, the first step done and counted; the reference first, as it forks."""
    seeded = setting._replace(config=replace(setting.config, seed=seed))
    courses: dict[str, Course] = {}
    for name in TRAINERS:
        made: list[Trainer] = []
        start = timed(lambda name=name, made=made: made.append(seeded.open(name)), setting.device)
        stack.callback(made[0].close)
        courses[name] = Course(name, seed, made[0], start)
    for course in courses.values():
        first = timed(course.trainer.step, setting.device)  # which makes the step ready: no time of a step
        course.start, course.steps = course.start + first, 1
    return courses


def train_in_turns(setting: Setting, seeds: Sequence[int], write: Any) -> list[dict[str, Course]]:
    """Both trainers of every seed, chunk by chunk; `write` is given a row after every evaluation."""
    every, steps, ends = setting.config.eval.every, setting.config.optim.steps, []
    for seed in seeds:
        with ExitStack() as stack:
            courses = opened(setting, seed, stack)
            for turn, end in enumerate([*range(every, steps, every), steps]):
                for name in TRAINERS if turn % 2 else reversed(TRAINERS):
                    course = courses[name]
                    course.advance(end - course.steps, setting.device)
                    write(evaluation_row(course, setting.device))
            ends.append(courses)
    return ends


def evaluation_row(course: Course, device: torch.device) -> Row:
    """What is known after an evaluation."""
    row: Row = {"kind": "evaluation", "trainer": course.name, "seed": course.seed, "step": course.steps}
    row |= {name: f"{value:.2f}" for name, value in course.scores[-1].items()}
    row |= in_cells(parts(course, device))
    return row | {"seconds": ops.digits(course.at[-1].of(device)), "wall_seconds": ops.digits(course.at[-1].wall)}


def parts(course: Course, device: torch.device) -> dict[str, float]:
    """Where the seconds went, as far as the trainer tells."""
    everything, evaluations = course.at[-1].of(device), sum(one.of(device) for one in course.evaluations)
    loading = course.loading_seconds()
    values = {
        "start_seconds": course.start.of(device),
        "ready_seconds": course.ready_seconds(),
        "step_seconds": everything - course.start.of(device) - evaluations,
        "evaluation_seconds": evaluations,
        "loading_seconds": loading,
    }
    return {name: value for name, value in values.items() if value is not None}


def in_cells(values: Mapping[str, float]) -> Row:
    return {name: f"{values[name]:.3f}" if name in values else "" for name in PARTS}


def summary_row(name: str, ends: Sequence[Mapping[str, Course]], thresholds: Sequence[float], setting: Setting) -> Row:
    """A trainer over all seeds: means, medians, and the minutes of the paper's run."""
    device, mine = setting.device, [courses[name] for courses in ends]
    row: Row = {"kind": "summary", "trainer": name, "seed": " ".join(str(c.seed) for c in mine), "step": mine[0].steps}
    for score in ("top1", "balanced_accuracy"):
        last = [mean(found[score] for found in course.scores[-AVERAGED:]) for course in mine]
        row[score] = f"{mean(course.scores[-1][score] for course in mine):.2f}"
        row[f"{score}_last20"] = f"{mean(last):.2f}"
        row[f"{score}_spread"] = f"{pstdev(last):.2f}"
    del row["top1_spread"]
    taken = [parts(course, device) for course in mine]
    row |= in_cells({part: mean(values[part] for values in taken) for part in taken[0]})
    row["seconds"] = ops.digits(mean(course.at[-1].of(device) for course in mine))
    row["wall_seconds"] = ops.digits(mean(course.at[-1].wall for course in mine))
    row |= {threshold_column(t): reached(mine, t, device) for t in thresholds}

    found = spreads(name, ends, device)
    row |= ops.spread_cells(SPREADS, found)
    row |= {column: f"{minutes:.3f}" for column, minutes in zip(PAPER, paper_minutes(mine, device), strict=True)}
    row["goal"], row["verdict"] = ops.judge(GOALS if name == OURS else (), found, device)
    return row | {"n": sum(len(course.chunks) for course in mine)}


def reached(courses: Sequence[Course], threshold: float, device: torch.device) -> str:
    """The median over seeds, if all of them came so far."""
    seconds = [taken for c in courses if (taken := c.seconds_to(threshold, device)) is not None]
    return ops.digits(median(seconds)) if len(seconds) == len(courses) else ""


def spreads(name: str, ends: Sequence[Mapping[str, Course]], device: torch.device) -> dict[str, Spread]:
    """Of the seconds per step, chunk by chunk; ours to itself: each second chunk to the one before it."""

    def of(one: str) -> list[float]:
        return [chunk.of(device) for courses in ends for chunk in courses[one].chunks]

    mine, (_, *rest) = of(name), paper_minutes([courses[name] for courses in ends], device)
    found = {
        "seconds_per_step": quartiles(mine),
        "chunk_ratio": paired_ratio(of(REFERENCE), mine),
        "paper_minutes": quartiles([seconds * PAPER_STEPS / 60 + sum(rest) for seconds in mine]),
        "same_over_same_ratio": Spread(float("inf"), float("inf"), float("inf")),
    }
    before, after = of(OURS)[:-1:2], of(OURS)[1::2]
    return found | ({"same_over_same_ratio": paired_ratio(after, before)} if before else {})


def paper_minutes(courses: Sequence[Course], device: torch.device) -> tuple[float, float, float]:
    """Of 250,000 median steps, 500 median evaluations, and the start."""
    step = median(chunk.of(device) for course in courses for chunk in course.chunks)
    evaluation = median(one.of(device) for course in courses for one in course.evaluations)
    start = mean(course.start.of(device) for course in courses)
    return step * PAPER_STEPS / 60, evaluation * PAPER_EVALUATIONS / 60, start / 60


def threshold_column(threshold: float) -> str:
    return f"seconds_to_{threshold:g}"


def columns(thresholds: Sequence[float], rest: Sequence[str]) -> list[str]:
    """Of the CSV."""
    spread = list(ops.spread_cells(SPREADS, {}))
    to = [threshold_column(threshold) for threshold in thresholds]
    return [*KEY, *SCORES, "seconds", "wall_seconds", *to, *PARTS, *spread, *PAPER, "goal", "verdict", "n", *rest]


def screen(rows: Sequence[Row], thresholds: Sequence[float]) -> str:
    """The summaries for a terminal, and what the goal says."""
    names = {"balanced_accuracy": "balanced", "balanced_accuracy_last20": "of last 20", "seconds": "seconds"}
    names |= {threshold_column(t): f"to {t:g} %" for t in thresholds}
    names |= dict.fromkeys(PARTS, "") | {name: name.removesuffix("_seconds") for name in PARTS}
    spread = {"seconds_per_step": "s/step", "chunk_ratio": f"{REFERENCE}/this", "paper_minutes": "250,000 steps, min"}
    table, lines = [["", *names.values(), *spread.values()]], []
    for row in rows:
        table.append([row["trainer"], *(row[name] or "-" for name in names), *(ops.interval(row, s) for s in spread)])
        if row["goal"]:
            lines.append(f"{row['verdict']}: {row['goal']}, {ops.interval(row, 'paper_minutes')}")
        if row["trainer"] == OURS:
            lines.append(f"ours to itself, chunk by chunk {ops.interval(row, 'same_over_same_ratio')}")
    ours, base = (next(row for row in rows if row["trainer"] == name) for name in (OURS, REFERENCE))
    ahead = float(ours["balanced_accuracy_last20"]) - float(base["balanced_accuracy_last20"])
    spreads_of_both = " and ".join(row["balanced_accuracy_spread"] for row in (ours, base))
    lines.append(
        f"balanced accuracy, ours less the reference's: {ahead:+.2f}; over seeds they spread {spreads_of_both}"
    )
    return "\n\n".join([aligned(table), "\n".join(lines)])


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def seeds_of(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=f"{__doc__} {trainers.HELP}", allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="the CSV, written row by row")
    parser.add_argument("--seeds", type=seeds_of, default=[0], help="of the runs: 0,1,2")
    parser.add_argument("--thresholds", type=numbers, default=[60, 70, 75], help="balanced accuracies in percent")
    parser.add_argument("--workers", type=int, help="processes of each of the reference's loaders; 0 on a CPU, else 4")
    arguments, flags = parser.parse_known_args(words)
    try:
        setting = trainers.settings(arguments.data, flags, arguments.workers)
    except ValueError as error:
        parser.error(str(error))
    if setting.config.eval.every < 2:
        parser.error("--eval.every must be at least 2: the first step belongs to the start")
    torch.set_num_threads(1)

    origin = measure.provenance(setting.device, trainers.repeated("benchmarks.end_to_end", words)) | {"clock": CLOCK}
    origin = {**setting.columns, "precision": setting.config.precision, "steps": setting.config.optim.steps, **origin}
    with measure.table(arguments.out, columns(arguments.thresholds, list(origin))) as append:

        def write(row: Row) -> None:
            append(row | origin)
            shown = f"{row['trainer']} seed {row['seed']} step {row['step']}: {row['balanced_accuracy']} %"
            print(f"{shown}, {row['seconds']} s", file=sys.stderr)

        ends = train_in_turns(setting, arguments.seeds, write)
        rows = [summary_row(name, ends, arguments.thresholds, setting) for name in TRAINERS]
        for row in rows:
            write(row)
    print(screen(rows, arguments.thresholds))
    print(f"{origin['hardware']}, {origin['threads']} thread, seeds {arguments.seeds}; {origin['spread']}")


if __name__ == "__main__":
    with tolerate_closed_pipes():
        main()
