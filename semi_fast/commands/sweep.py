"""Train several configurations with several seeds, one process each, on all devices."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semi_fast.commands import PATH, add_seeds, check_free, parse_seeds
from semi_fast.disk import check_directory, locked
from semi_fast.launch import LAUNCHED, check_environment
from semi_fast.report import check_page, write_report
from semi_fast.rundir.trackers import check_trackers
from semi_fast.schema.arguments import key_of, ordered, parse_config, read_arguments
from semi_fast.schema.config import Config, check
from semi_fast.schema.effects import without_effect
from semi_fast.sealed_json import read_json

OWNED = {"seed": "--seeds", "run_dir": "--out", "resume": "nothing: an unfinished run is always resumed"}
PAGE = "report.html"
POLL_SECONDS = 0.2
ENDING_SECONDS = 30.0
"""What a run may take to end when it is told to."""


@dataclass(frozen=True)
class SweepRun:
    """One run."""

    name: str
    config: Config
    arguments: tuple[str, ...]
    """Of `semi-fast train`."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir or "")

    @property
    def output(self) -> Path:
        """What its process prints."""
        return self.run_dir.with_suffix(".log")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=PATH, metavar="FILE", help="configurations; a run is OUT/<name of FILE>/seed_K"
    )
    add_seeds(parser)
    parser.add_argument("--out", required=True, type=PATH, metavar="DIR", help="where the runs and their comparison go")
    parser.add_argument("--per-device", type=int, default=1, metavar="N", help="runs at a time on a GPU, or on the CPU")
    parser.set_defaults(keys=[])
    parser.epilog = "Further flags are keys of the configuration, --key=value, for all runs."


def run(
    *, files: Sequence[str], seeds: str | None, out: str | Path, per_device: int = 1, keys: Sequence[str] = ()
) -> int:
    """Train every configuration with every seed under `out`, then compare them; 1 if a run failed, as launchers do.

    A run is OUT/<file's name>/seed_K, its output OUT/<file's name>/seed_K.log. Finished ones are taken as they are,
    others are resumed. Every CUDA device, or the CPU, has `per_device` runs at a time. If this is interrupted the runs
    are told to end. `keys` are of all configurations. Raises ValueError for configurations that cannot be, and if
    another sweep is at work under `out`.
    """
    more, flags = ordered(keys)
    numbers, out = parse_seeds(seeds), Path(out)
    check_environment()
    cells = list(cells_of([*files, *more], seeds=numbers, out=out, flags=flags))
    for cell in cells:
        check(cell.config)
        check_trackers(cell.config.log.track)
    if per_device < 1:
        raise ValueError(f"--per-device must be at least 1; got {per_device}")
    check_directory(out, "--out")
    check_page(out / PAGE)
    with locked(out / "sweep.lock", f"--out {out}"):
        return 1 if train_and_compare(cells, out, per_device=per_device) else 0


def train_and_compare(cells: Sequence[SweepRun], out: Path, *, per_device: int) -> int:
    """Train what is not finished, and compare all; returns how many runs failed."""
    summaries = {cell.name: found for cell in cells if (found := summary_of(cell)) is not None}
    for name in summaries:
        print(f"{name}: finished before, and taken as it is")
    slots = deque(device for _ in range(per_device) for device in devices(cells))
    waiting = deque(cell for cell in cells if cell.name not in summaries)
    print(f"{len(waiting)} runs, {min(len(slots), len(waiting))} at a time")
    codes = carry_out(waiting, slots)
    failed = [name for name, code in codes.items() if code]
    done = [cell for cell in cells if cell.name not in failed]
    if done:
        from semi_fast.report.compare import comparison
        from semi_fast.report.run import read_run

        run_dirs = [cell.run_dir for cell in done]
        page = write_report(run_dirs, out / PAGE)
        print(comparison([read_run(run_dir) for run_dir in run_dirs]).text())
        print(f"report: {page}")
    return len(failed)


def cells_of(files: Sequence[str], *, seeds: Sequence[int], out: Path, flags: Sequence[str]) -> Iterator[SweepRun]:
    """Every file with every seed; ValueError for two files of one name, and for flags that the sweep sets or that have
    an effect in none of its configurations. Where a flag has one, the others go without."""
    check_free(flags, OWNED, "sweep")
    stems = [Path(file).stem for file in files]
    if len(set(stems)) < len(stems):
        raise ValueError(f"the files of a sweep must have different names, which name their runs; got {stems}")
    configs = [read_arguments([f"--config={file}", *flags])[0] for file in files]
    idle = [without_effect(config, [key_of(flag) for flag in flags]) for config in configs]
    for key, reason in idle[0].items():
        if all(key in one for one in idle):
            raise ValueError(reason)
    for file, stem, unused in zip(files, stems, idle, strict=True):
        used = [flag for flag in flags if key_of(flag) not in unused]
        for seed in seeds:
            run_dir = out / stem / f"seed_{seed}"
            resume = "auto" if run_dir.exists() else "none"
            own = (f"--seed={seed}", f"--run_dir={run_dir}", f"--resume={resume}")
            arguments = (f"--config={file}", *used, *own)
            yield SweepRun(f"{stem}/seed_{seed}", parse_config(arguments), arguments)


def summary_of(cell: SweepRun) -> dict[str, Any] | None:
    """The summary of the run if it is finished; ValueError if another one is in its place."""
    from semi_fast.commands.reproduce import finished
    from semi_fast.data_prep.long_tail import split_for
    from semi_fast.prepared.manifest import load_manifest, seal_split

    if not (cell.run_dir / "summary.json").is_file():
        return None
    manifest = load_manifest(cell.config.data.path)
    return finished(cell.config, seal_split(split_for(manifest, "run", cell.config.split)).sha256)


def devices(cells: Sequence[SweepRun]) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for a run on each of the devices; None alone for the CPU."""
    if all(cell.config.device == "cpu" for cell in cells):
        return [None]
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(named.split(",") if named else map(str, range(count))) if count else [None]


def carry_out(waiting: deque[SweepRun], slots: deque[str | None]) -> dict[str, int]:
    """Exit codes by name; at most one run on each of the `slots` at a time. Running ones are ended with this call."""
    codes: dict[str, int] = {}
    threads = max(1, (os.cpu_count() or 1) // max(1, min(len(slots), len(waiting))))
    running: dict[str, tuple[SweepRun, subprocess.Popen[bytes], str | None, float]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                cell, slot = waiting.popleft(), slots.popleft()
                running[cell.name] = cell, start(cell, slot, threads), slot, time.monotonic()
                print(f"{cell.name}: started{'' if slot is None else f' on GPU {slot}'}", flush=True)
            for name, (cell, process, slot, began) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    slots.append(slot)
                    codes[name] = code
                    print(outcome(cell, code, time.monotonic() - began), flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        end(process for _, process, _, _ in running.values())
    return codes


def start(cell: SweepRun, slot: str | None, threads: int) -> subprocess.Popen[bytes]:
    """The run's process; it sees its device and has its share of the cores alone, and writes to its log."""
    cell.output.parent.mkdir(parents=True, exist_ok=True)
    share = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    environment = share | {LAUNCHED: "sweep"} | os.environ
    if slot is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot
    command = [sys.executable, "-m", "semi_fast.train", *cell.arguments]
    with cell.output.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells its runs once
        )


def outcome(cell: SweepRun, code: int, seconds: float) -> str:
    """How a run ended, in one line."""
    minutes = f"{seconds / 60:.1f} min"
    if code == 75:
        return f"{cell.name}: interrupted after {minutes}, and saved; the same sweep goes on with it"
    if code == 0:
        found = read_json(cell.run_dir / "summary.json")
        return f"{cell.name}: {found['balanced_accuracy_last20']:.1f}% balanced accuracy, {minutes}"
    lines = [line for line in cell.output.read_text(errors="replace").splitlines() if line.strip()]
    return f"{cell.name}: FAILED with code {code} after {minutes}: {lines[-1] if lines else ''} ({cell.output})"


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Tell processes to end, and see to it."""
    left = list(processes)
    for process in left:
        process.terminate()
    deadline = time.monotonic() + ENDING_SECONDS
    for process in left:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
