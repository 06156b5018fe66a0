"""Run directories: which one, whether it may be used, and what to go on from."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semi_fast import disk
from semi_fast.disk import fresh_directory, write_json
from semi_fast.errors import described, exit_code
from semi_fast.launch import check_environment
from semi_fast.prepared.manifest import Manifest, Split, formats
from semi_fast.rundir.trackers import check_trackers
from semi_fast.schema.arguments import CHECKPOINTS, CONFIG_FILE, run_of
from semi_fast.schema.config import Config, check, identity, leaves
from semi_fast.sealed_json import digest

if TYPE_CHECKING:  # with torch, which takes seconds; whether a directory may be used is asked before
    from semi_fast.rundir import checkpoint

LOCK, STATUS, TRACKERS = "run.lock", "status.json", "trackers"
BEFORE = re.compile(rf"{re.escape(LOCK)}.*|{re.escape(STATUS)}|{TRACKERS}|\..+\.tmp")
"""Of a run directory: what there is before a run begins, or a kill leaves of a file that it had begun to write, so that
one with nothing else is as good as empty."""

OF_THE_LOOP = {
    "step", "level", "seconds", "cpu_seconds", "training_seconds", "interval_seconds", "interval_steps",
    "interval_terms", "interval_stats", "metrics_bytes", "scaler",
}  # fmt: skip
"""What a checkpoint says of the state, beside `provenance`."""


def run_dir_of(config: Config) -> Path | None:
    """`run_dir`, or that of the checkpoint to resume; None for a fresh one."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    if config.resume not in ("none", "auto"):
        return run_of(Path(config.resume))
    return None


def fresh_run_dir(config: Config, dataset: str) -> Path:
    """A directory under runs/ that no other run has, made."""
    return fresh_directory(Path("runs") / f"{dataset}_{config.method.name}_{time.strftime('%Y%m%d-%H%M%S')}")


def check_usable(config: Config) -> None:
    """Raise ValueError for a configuration or an environment that cannot be, and if the run directory is in use, or
    none to begin or to go on in; RuntimeError if nothing can be written there. Reads only, and loads nothing that takes
    time."""
    check(config)
    check_environment()
    check_trackers(config.log.track)
    run_dir = run_dir_of(config) or Path("runs")
    disk.check_directory(run_dir, "run_dir")
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise RuntimeError(f"run_dir {run_dir} cannot be written: {there} is read-only here; choose another")
    if run_dir_of(config) is not None:
        disk.check_free(run_dir / LOCK, f"run_dir {run_dir}")
        _check_content(run_dir, config.resume)


def _check_content(run_dir: Path, resume: str) -> None:
    """Raise ValueError if what is in the directory is not ours to add to."""
    names = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    used = any(not BEFORE.fullmatch(name) for name in names)
    if used and resume == "none":
        raise ValueError(f"run_dir must be new or empty; {run_dir} is not: choose another, or --resume auto")
    if used and resume == "auto" and not any((run_dir / name).exists() for name in (CONFIG_FILE, LOCK)):
        raise ValueError(f"run_dir must be new, empty or a run; {run_dir} has no {CONFIG_FILE}: choose another")


def provenance(config: Config, manifest: Manifest, split: Split, environment: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    from semi_fast.rundir.runlog import DECISIVE

    source = formats(manifest)[0] if config.data.source == "auto" else config.data.source
    lossy = {
        name: entry["sha256"]
        for name, entry in manifest.containers.items()
        if entry["format"] == source and entry.get("image_format") == "jpeg"
    }
    return {
        "config": identity(config),
        "data_sha256": manifest.data_sha256,
        "pixels_sha256": digest(lossy) if lossy else "those of the data",
        "split_sha256": split.sha256,
        "environment": {key: environment[key] for key in DECISIVE},
        "changed_on_resume": [],
    }


def checkpoint_to_resume(
    run_dir: Path, resume: str, meta: dict[str, Any], warn: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """What to go on from, None for a start; reads only.

    Raises ValueError if the directory holds nothing whole to resume, or is not of the run that `meta` describes.
    """
    from semi_fast.rundir import checkpoint

    root = run_dir / CHECKPOINTS
    if resume == "none":
        return None
    if resume == "auto":
        saved = checkpoint.newest(root, warn)
        if saved is None:
            if checkpoint.published(root):
                raise ValueError(f"no checkpoint under {root} is whole; start a new run_dir, or delete them")
            return None
    else:
        path = Path(resume)
        if run_of(path) != run_dir.resolve():
            raise ValueError(
                f"resume must name a checkpoint of run_dir; got {path} and {run_dir}: leave run_dir out, or mend it"
            )
        saved = checkpoint.load(path)
    check_same_run(saved, meta)
    return saved


def check_same_run(saved: checkpoint.Checkpoint, meta: dict[str, Any]) -> None:
    """Raise ValueError for the first thing in which a checkpoint is not of the run that `meta` describes."""
    if odd := sorted(saved.meta.keys() ^ (meta.keys() | OF_THE_LOOP)):
        raise ValueError(
            f"checkpoint {saved.path} is of another version of semi_fast: {odd[0]} is on one side only; "
            "use a new run_dir"
        )
    mine, its = leaves(meta["config"]), leaves(saved.meta["config"])
    for key in sorted(mine.keys() | its.keys()):
        here, there = (side.get(key, "absent") for side in (mine, its))
        if here != there:
            raise ValueError(
                f"checkpoint {saved.path} is of another config: {key} is {there} there, {here} here; "
                f"use its {CONFIG_FILE}, or a new run_dir"
            )
    for key in ("data_sha256", "pixels_sha256", "split_sha256"):
        if saved.meta[key] != meta[key]:
            raise ValueError(
                f"checkpoint {saved.path} is of other data: {key} is {saved.meta[key][:12]} there and "
                f"{meta[key][:12]} here; mend data.path, data.source or split.file, or use a new run_dir"
            )
    before, now = (side["environment"]["processes"] for side in (saved.meta, meta))
    if before != now and meta["config"]["model"]["bn"] == "local":
        raise ValueError(
            f"with model.bn local the share of a process is part of the method; {saved.path} had {before} processes, "
            f"now there are {now}: start as many"
        )


@contextmanager
def locked_run(run_dir: Path, resume: str, saved: checkpoint.Checkpoint | None) -> Iterator[None]:
    """Make the directory ours while the run lasts, which goes on from `saved`; `status.json` there says how it ended.

    While it runs there is no such file. Raises ValueError, naming the holder, if another process has the directory, or
    if one has had it since it was looked at.
    """
    with disk.locked(run_dir / LOCK, f"run_dir {run_dir}"):
        _check_content(run_dir, resume)
        if resume == "auto":
            _check_newest(run_dir / CHECKPOINTS, saved)
        status = run_dir / STATUS
        status.unlink(missing_ok=True)
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # of a disk that is full: what ended the run is what must be told
                write_json(status, {"exit_code": exit_code(error), "message": described(error)})
            raise
        write_json(status, {"exit_code": 0, "message": "finished"})


def _check_newest(root: Path, saved: checkpoint.Checkpoint | None) -> None:
    """Raise ValueError unless `saved` is what there is to go on from still."""
    from semi_fast.rundir import checkpoint

    then = [saved.path] if saved else []
    if checkpoint.published(root)[:1] != then:
        now = checkpoint.newest(root, warn=lambda _: None)  # what is damaged has been said
        if ([now.path] if now else []) != then:
            raise ValueError(
                f"resume auto means the newest checkpoint; {root} has another one since it was looked at: start again"
            )


def remove_empty(run_dir: Path) -> None:
    """Remove a fresh directory whose run never began."""
    with suppress(OSError):  # it is not empty
        run_dir.rmdir()
