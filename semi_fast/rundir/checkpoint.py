"""Checkpoints: a directory is published whole and verified, or it does not exist."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from semi_fast import disk
from semi_fast.disk import fsync_directory, make_directory
from semi_fast.errors import described
from semi_fast.prepared.manifest import file_sha256
from semi_fast.sealed_json import read_json

TENSORS, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"
OURS = re.compile("step_[0-9]{9}")
LEFT = re.compile(r"\.tmp-[0-9]+-[0-9]+|\.del-step_[0-9]{9}")
"""What a checkpoint is called, and what a kill may leave; anything else beside them, a copy too, is the user's."""


class NotSavedError(RuntimeError):
    """The disk did not take a checkpoint; those before it are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def sync(path: Path) -> None:
    """Force a file to the disk."""
    with path.open("rb") as file:
        disk.sync(file.fileno(), path)


def save(root: Path, step: int, tensors: Iterable[tuple[str, Tensor]], meta: dict[str, Any], *, keep: int) -> Path:
    """Publish `root/step_%09d` and drop all but the `keep` newest: files and manifest are forced to the disk before
    the rename, the parent after it.

    Raises RuntimeError and publishes nothing if a tensor is not finite, NotSavedError if the disk refuses.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors}
    for name, tensor in held.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"checkpoint of step {step}: {name} is not finite; nothing was saved")
    final, hidden = root / f"step_{step:09d}", root / f".tmp-{os.getpid()}-{step}"
    try:
        make_directory(root)
        for left in _directories(root, LEFT):
            _delete(left)
        hidden.mkdir()
        save_file({name: tensor.clone() for name, tensor in held.items()}, hidden / TENSORS)
        (hidden / META).write_text(json.dumps(meta, sort_keys=True))
        if (hidden / TENSORS).stat().st_mode != (hidden / META).stat().st_mode:  # safetensors lets its owner alone read
            shutil.copymode(hidden / META, hidden / TENSORS)
        files = {}
        for name in (TENSORS, META):
            sync(hidden / name)
            files[name] = {"bytes": (hidden / name).stat().st_size, "sha256": file_sha256(hidden / name)}
        (hidden / MANIFEST).write_text(json.dumps({"step": step, "files": files}, sort_keys=True))
        sync(hidden / MANIFEST)
        fsync_directory(hidden)
        if final.exists():
            retire([final])
        hidden.rename(final)
        fsync_directory(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        why = described(error) if isinstance(error, OSError) else f"{error}; disk full?"
        raise NotSavedError(f"checkpoint of step {step} could not be written to {root}: {why}") from error
    retire(published(root)[keep:])
    return final


def retire(paths: list[Path]) -> None:
    """Delete checkpoints; each is gone at once for whoever looks for one."""
    for path in paths:
        hidden = path.with_name(f".del-{path.name}")
        path.rename(hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    """A directory with all in it; of a link to one, the link."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _directories(root: Path, name: re.Pattern[str]) -> list[Path]:
    return [path for path in root.glob("*") if name.fullmatch(path.name) and path.is_dir()]


def retire_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps, whole or damaged: a run that goes on from `step` writes its own."""
    retire([path for path in published(root) if path.name > f"step_{step:09d}"])


def published(root: Path) -> list[Path]:
    """The checkpoint directories under `root`, newest first."""
    return sorted(_directories(root, OURS), reverse=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying its name and every byte against its manifest; ValueError in one line if it
    fails."""
    try:
        manifest = read_json(path / MANIFEST)
        if path.resolve().name != f"step_{manifest['step']:09d}":
            raise ValueError(f"it was saved as that of step {manifest['step']}")
        for name in (TENSORS, META):
            expected = manifest["files"][name]
            if (num_bytes := (path / name).stat().st_size) != expected["bytes"]:
                raise ValueError(f"{name} has {num_bytes} bytes, not {expected['bytes']}")
            if file_sha256(path / name) != expected["sha256"]:
                raise ValueError(f"{name} does not match its digest")
        return Checkpoint(path, load_file(path / TENSORS), read_json(path / META))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}); use another one, or --resume auto") from error


def newest(root: Path, warn: Any) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies; calls `warn` with a line for every newer one that does not."""
    for path in published(root):
        try:
            return load(path)
        except ValueError as error:
            warn(f"skipped: {error}")
    return None


def restore(targets: Iterable[tuple[str, Tensor]], tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into their storage; ValueError unless names, shapes and types are the same on both sides."""
    held = dict(targets)
    if held.keys() != tensors.keys():
        odd = sorted(held.keys() ^ tensors.keys())[0]
        raise ValueError(f"checkpoint does not fit this run: {odd} is on one side only; start a new run_dir")
    with torch.no_grad():
        for name, target in held.items():
            saved = tensors[name]
            if saved.shape != target.shape or saved.dtype != target.dtype:
                raise ValueError(
                    f"checkpoint does not fit this run: {name} is {tuple(saved.shape)} {saved.dtype} there and "
                    f"{tuple(target.shape)} {target.dtype} here; start a new run_dir"
                )
            target.copy_(saved)
