"""What a run leaves in its directory beside checkpoints: metrics, provenance, status; and its lines on the screen."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from semi_fast.disk import no_link, sync, writing
from semi_fast.ops.door import backend
from semi_fast.prepared.manifest import Manifest, Split
from semi_fast.schema.config import Config, leaves

PACKAGES = (
    "semi-fast", "torch", "torchvision", "timm", "numpy", "accelerate", "safetensors", "pillow", "triton", "numba",
    "ffcv", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
)  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")
DECISIVE = ("commit", "device", "processor", "operations", "processes", "threads", "versions")
"""Of an environment: what a run must keep to go on bit for bit."""


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with the cores this process may use."""
    if device.type == "cuda":
        return processor(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor(device)}, {cores} cores"


def commit() -> str:
    """The commit of the checkout that runs, with `+changes` where files differ from it; `unknown` outside one."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", __file__)
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "") if tracked else "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(device: torch.device) -> dict[str, str]:
    """Installed versions of what decides results, by distribution; on a GPU of CUDA, cuDNN and the driver too."""
    found = {"python": platform.python_version()}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        if DRIVER.exists() and (number := re.search(r"\d+\.[\d.]+", DRIVER.read_text())):
            found["driver"] = number[0]
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(device: torch.device, precision: str, processes: int, classes: int) -> dict[str, Any]:
    """What `env.json` holds."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "device": device.type,
        "hardware": hardware(device),
        "operations": backend(device, classes),
        "platform": platform.platform(),
        "precision": precision,
        "processor": processor(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions(device),
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`torch was 2.12, is 2.13` for each DECISIVE entry in which two environments differ."""
    was, has = leaves(before), leaves(now)
    return [
        f"{key.removeprefix('versions.')} was {was.get(key, 'absent')}, is {has.get(key, 'absent')}"
        for key in sorted(was.keys() | has.keys())
        if key.split(".")[0] in DECISIVE and was.get(key) != has.get(key)
    ]


@dataclass
class Clock:
    """Seconds of this run, with those from before a resume."""

    total: float = 0.0
    cpu: float = 0.0
    """Of this process, over its threads."""
    training: float = 0.0
    interval: float = 0.0
    """Of training, since the last progress line."""
    started: float = field(default_factory=time.monotonic)
    cpu_started: float = field(default_factory=time.process_time)

    def lap(self) -> float:
        """Seconds since the last lap, now part of the total."""
        now = time.monotonic()
        seconds, self.started = now - self.started, now
        cpu_now = time.process_time()
        self.cpu, self.cpu_started = self.cpu + cpu_now - self.cpu_started, cpu_now
        self.total += seconds
        return seconds


class MetricsFile:
    """`metrics.jsonl`: one record a line, appended; a resumed run cuts it back to where its checkpoint was made."""

    def __init__(self, path: Path):
        self.path = path

    def check(self, offset: int) -> None:
        """Raise ValueError if there are fewer bytes than that to go on from."""
        if offset and (not self.path.exists() or self.path.stat().st_size < offset):
            raise ValueError(f"{self.path} is shorter than the checkpoint says ({offset} bytes); start a new run_dir")

    def cut(self, offset: int) -> None:
        """Begin, or go on, at `offset` bytes."""
        with writing(self.path), open(self.path, "ab", opener=no_link) as file:
            file.truncate(offset)

    def append(self, record: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self, kind: str) -> list[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        return [record for record in found if record["kind"] == kind]

    def flush(self) -> int:
        """Force the file to the disk; returns its length in bytes."""
        with writing(self.path), self.path.open("rb") as file:
            sync(file.fileno(), self.path)
            return file.seek(0, os.SEEK_END)


class Screen:
    """Progress of a run: a bar with rate and time left on a terminal, one plain line per interval elsewhere."""

    def __init__(self, title: str, *, steps: int, quiet: bool):
        self.title, self.steps, self.quiet = title, steps, quiet
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    def begin(self, start: int) -> None:
        """Start counting at step `start`."""
        self.began, self.start = time.monotonic(), start
        if self.console.is_terminal and not self.quiet:
            news = TextColumn("{task.fields[news]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
            progress = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(12),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
            )
            self.bar = Progress(*progress, news, console=self.console, expand=True)  # a narrow terminal cuts the news
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.steps, completed=start, news="")

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def news(self, step: int, text: str) -> None:
        """Where the run is."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, news=text)
            return
        left = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.steps - step)
        self.line(f"step {step}/{self.steps}  {text}  left {int(left) // 60}:{int(left) % 60:02d}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def opening(
    config: Config, manifest: Manifest, split: Split, env: dict[str, Any], *, parameters: int, rows: int
) -> str:
    """What a run says first; `rows` of one forward of a process."""
    truth = "unknown classes" if split.unlabeled_counts is None else f"{sum(split.unlabeled_counts)} not labeled too"
    return "\n".join(
        [
            f"{config.method.name} on {manifest.dataset}: {len(split.labeled)} labeled, {len(split.unlabeled)} "
            f"unlabeled ({truth}), {manifest.length('test')} test images, {manifest.num_classes} classes",
            f"{config.model.name}, {parameters:,} parameters; {env['precision']} on {env['hardware']}; "
            f"{env['processes']} process(es), {rows} rows each; {config.optim.steps} steps",
            env["operations"],
            f"run: {config.run_dir}",
        ]
    )
