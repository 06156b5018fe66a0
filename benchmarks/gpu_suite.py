"""All that needs a GPU, checked and timed in one command of at most 9 minutes: `python -m benchmarks.gpu_suite`.

Sections run in the order of their weight, each within its own seconds, in a process that is replaced after a failure.
Rows are written after every section. A section whose rows are there, from the same sources and the same device, is not
repeated. Ends with 1 if a check failed.

Compilers are the slow part. The ladder comes in two groups, so that a slow one costs the second alone; a ResNet-50 is
timed captured without a compiler first, and compiled only if two minutes are left then.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_cells, gpu_checks, gpu_kernels, gpu_machine, gpu_parts, measure
from benchmarks.gpu_rows import FAILED, NO_TIME, NOT_RUN, OK, Row, Setting, failed, not_run
from benchmarks.gpu_worker import Worker
from benchmarks.step_cases import PARTS
from semi_fast.disk import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("semi_fast", "pipelines", "data_prep", "benchmarks")
TOTAL = 515
"""Seconds of the whole suite; what is not begun by then is not run."""
LEAST = 15
"""A section is not begun with less left."""
HIDDEN = tuple(f", {part}_ms" for part in PARTS)
SHOWN = ("ms", "us", "s", "minutes", "percent", "steps/s", "times")
LOCAL_FLAGS = ("--out", "--data", "--commit")
Rows = list[dict[str, Any]]


class Section(NamedTuple):
    """A part of the suite."""

    seconds: int
    run: Callable[[Setting], Iterator[Row]]
    alone: bool = False
    """In a process of its own: its memory and its clocks are not others'."""


SECTIONS: dict[str, Section] = {
    "kernels": Section(80, gpu_kernels.kernels),
    "capture": Section(30, gpu_checks.capture),
    "ladder": Section(200, gpu_cells.ladder, alone=True),
    "reference": Section(80, gpu_cells.reference, alone=True),
    "sync": Section(50, gpu_checks.sync),
    "resume": Section(50, gpu_checks.resume),
    "packing": Section(60, gpu_parts.packed, alone=True),
    "operations": Section(50, gpu_parts.operations),
    "parity": Section(90, gpu_checks.parity),
    "machine": Section(30, gpu_machine.machine),
    "resnet": Section(150, gpu_cells.resnet, alone=True),
    "end_to_end": Section(90, gpu_parts.end_to_end, alone=True),
}
"""By name, the weightiest first."""


def run_section(name: str, section: Section, setting: Setting, worker: Worker) -> Iterator[Row]:
    """The rows of a section; the last says why there are no more if it failed or its time was spent."""
    if section.alone:
        worker.end()
    yield from worker.rows(name, section.run, setting)
    if section.alone:
        worker.end()


def run_sections(
    sections: Mapping[str, Section], setting: Setting, take: Callable[[str, list[Row], float], None]
) -> None:
    """All of them, in order; `take` is given the name, the rows and the seconds of each. `setting` ends all."""
    worker = Worker()
    try:
        for name, section in sections.items():
            began = time.monotonic()
            if setting.left < LEAST:
                take(name, [not_run(name, NO_TIME)], 0.0)
                continue
            seconds = min(section.seconds, setting.left)
            own = setting._replace(until=began + seconds, seconds=seconds)
            take(name, list(run_section(name, section, own, worker)), time.monotonic() - began)
    finally:
        worker.end()


def digest_of_sources() -> str:
    """Of every source file that decides a row, in a checkout with or without its history."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows) -> None:
    """Replace the file whole, the rows in the order of the sections."""
    order = list(SECTIONS)
    known = [row for row in rows if row["section"] in order]
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for row in reversed(known) for column in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(known, key=lambda row: order.index(row["section"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def finished(rows: Rows, origin: Mapping[str, Any]) -> set[str]:
    """Sections of which every row is there, from the same sources and device; none failed or lacked the time."""
    same = [row for row in rows if all(row.get(key) == str(origin[key]) for key in ("sources", "hardware", "small"))]
    late = [row for row in same if row["verdict"] == NOT_RUN and row["note"].startswith(NO_TIME)]
    open_ones = {row["section"] for row in (*rows, *late) if row not in same or row["verdict"] == FAILED or row in late}
    return {row["section"] for row in same} - open_ones


def chosen(text: str | None) -> list[str]:
    names = text.split(",") if text else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ValueError(f"--section must be some of {','.join(SECTIONS)}; got {','.join(unknown)}")
    return [name for name in SECTIONS if name in names]


def screen(rows: Rows, names: Sequence[str]) -> str:
    """A short table: what has a goal or failed, how many checks hold, and the other times in one line a section."""
    table, lines = [["", "value", "unit", "goal", "verdict"]], []
    for name in names:
        mine = [row for row in rows if row["section"] == name]
        held = sum(row["verdict"] == OK for row in mine)
        if held:
            table.append([f"{name}: checks that hold", str(held), "", "", OK])
        for row in mine:
            if row["verdict"] not in ("", OK):
                value = f"{row['value']} ({row['low']}..{row['high']})" if row["low"] != row["high"] else row["value"]
                table.append([f"{name}: {row['quantity']}", value, row["unit"], row["goal"], row["verdict"]])
                if not row["goal"] or row["verdict"] == FAILED:
                    lines.append(f"{row['verdict']}: {name}: {row['quantity']}: {row['note']}")
        plain = [row for row in mine if not row["verdict"] and row["unit"] in SHOWN]
        timed = [f"{row['quantity']} {row['value']}" for row in plain if not row["quantity"].endswith(HIDDEN)]
        lines += [f"{name}: {'; '.join(timed)}"] if timed else []
    seconds = {row["section"]: row["section_seconds"] for row in rows if row["section"] in names}
    lines.append("seconds: " + ", ".join(f"{name} {taken}" for name, taken in seconds.items()))
    return f"{measure.aligned(table)}\n" + "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--section", help="some of the sections, with commas; else all")
    parser.add_argument("--list", action="store_true", help="print the sections and their seconds")
    parser.add_argument("--again", action="store_true", help="repeat what is there already")
    parser.add_argument("--out", type=Path, help="the CSV; default: benchmarks/results/gpu_<device>.csv")
    parser.add_argument("--data", type=Path, help="a prepared data set for parity and end_to_end; else digits, noise")
    parser.add_argument("--commit", help="of a copy without its history")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole suite")
    parser.add_argument("--small", action="store_true", help="small sizes, for trying it out; what a CPU always has")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(words)
    began = time.monotonic()
    try:
        names = chosen(arguments.section)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        print(measure.aligned([["", "seconds"], *([name, str(SECTIONS[name].seconds)] for name in SECTIONS)]))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    small = arguments.small or not cuda
    torch.set_num_threads(1)

    origin = measure.provenance(device, measure.command("benchmarks.gpu_suite", words, LOCAL_FLAGS))
    if arguments.commit and origin["commit"] == "unknown":
        origin["commit"] = arguments.commit
    origin |= {"sources": digest_of_sources(), "small": small}
    if not cuda and not arguments.out:
        parser.error("--out must name a file on a CPU, whose rows are for trying it out")
    path = arguments.out or RESULTS / f"gpu_{slug(origin['hardware'])}.csv"
    rows = read(path)
    there = set() if arguments.again else finished(rows, origin) & set(names)
    for name in there:
        print(f"{name}: its rows are there, --again repeats it", file=sys.stderr)

    def take(name: str, found: list[Row], seconds: float) -> None:
        found = found or [failed(name, "it gave no rows")]
        print(f"{name}: {len(found)} rows in {seconds:.0f} s", file=sys.stderr, flush=True)
        rows[:] = [row for row in rows if row["section"] != name]
        own = {"section_seconds": f"{seconds:.1f}", **origin}
        rows.extend({"section": name, **row._asdict(), **own} for row in found)
        write(path, rows)

    setting = Setting(device, arguments.data, small, began + arguments.seconds)
    run_sections({name: SECTIONS[name] for name in names if name not in there}, setting, take)
    print(screen(rows, names))
    print(f"{origin['hardware']}, torch {origin['torch']}, commit {origin['commit']}; {origin['spread']}")
    return int(any(row["verdict"] == FAILED for row in rows if row["section"] in names))


if __name__ == "__main__":
    sys.exit(main())
