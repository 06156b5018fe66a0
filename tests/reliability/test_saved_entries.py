"""A resumed run needs every entry of a checkpoint: without any one of them it is refused, or ends elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semi_fast import train
from semi_fast.prepared.manifest import file_sha256
from semi_fast.rundir import checkpoint
from semi_fast.rundir.runlog import DECISIVE
from semi_fast.schema.config import leaves
from semi_fast.train import guarded, run
from tests.test_engine import records
from tests.tiny import config

from .figures import amount, record
from .forked import forked

SEED = 6
FIRST, LAST = "step_000000006", "step_000000012"
NOT_NEEDED = re.compile(
    r"average\.\S+\.running_(mean|var)"  # copied from the model's in every step
    r"|method\.(head_|pseudo_label_)?adjustment"  # follow from the configuration and the split
    r"|(model|average|momentum)\.backbone\.units\.[12]\.bn1\.\w+"  # of the published network, which never uses them
    r"|interval\.rows"  # here the network is sure of every image: the share of used rows is 1 over any number of them
)
"""Saved, but the same without: all tensors of a state are saved alike."""


@pytest.fixture(scope="module", autouse=True)
def no_page() -> Iterator[None]:
    """Drawing the page takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda run_dirs, page: page)
        yield


JOINT = ("--method.semi.unlabeled_prior=joint", "--method.semi.prior_momentum=0.9")
"""A method with another state."""


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(config(digits, run_dir, "--checkpoint.every=6"))
    return run_dir


def resumed_without(entry: str, digits: Path, run_dir: Path, *flags: str) -> Callable[[], int]:
    """A run that goes on from a checkpoint, but has one tensor as a new run has it."""

    def child() -> int:
        restore = checkpoint.restore

        def forgetful(targets: Iterable[tuple[str, Tensor]], tensors: dict[str, Tensor]) -> None:
            held = dict(targets)
            fresh = {name: target.detach().clone() for name, target in held.items()}
            restore(held.items(), tensors)
            if entry:
                with torch.no_grad():
                    held[entry].copy_(fresh[entry])

        checkpoint.restore = forgetful
        return guarded(config(digits, run_dir, "--checkpoint.every=0", *flags, resume="auto"))

    return child


@pytest.mark.parametrize(("name", "flags"), [("semi", ()), ("semi, joint prior", JOINT)])
def test_every_single_saved_tensor_is_needed(
    name: str, flags: tuple[str, ...], whole: Path, digits: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    if flags:
        whole = tmp_path / "whole"
        run(config(digits, whole, "--checkpoint.every=6", *flags))
    expected = checkpoint.load(whole / "checkpoints" / LAST).tensors
    names = sorted(name for name in expected if not NOT_NEEDED.fullmatch(name))
    assert ("method.prior" in names) == bool(flags)
    order = np.random.default_rng(SEED).permutation(len(names))
    chosen = [names[i] for i in order[: amount(4, len(names))]]
    chosen += [name for name in ("method.prior",) if name in names and name not in chosen]
    unnoticed = []
    for entry in ["", *chosen]:
        run_dir = tmp_path / "run"
        shutil.copytree(whole, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / LAST)
        ended = forked(resumed_without(entry, digits, run_dir, *flags))
        assert ended.code == 0, f"{entry}: {ended}"
        found = checkpoint.load(run_dir / "checkpoints" / LAST).tensors
        same = all(torch.equal(found[name], expected[name]) for name in expected) and records(run_dir) == records(whole)
        shutil.rmtree(run_dir)
        if not entry:
            assert same, "with all of them it ends where the run that went through does"
        elif same:
            unnoticed.append(entry)
    record(
        f"one tensor left out of a checkpoint, {name}",
        made=len(chosen),
        failures=len(unnoticed),
        goal="every one, each noticed",
        seconds=time.monotonic() - began,
        note=f"{len(expected) - len(names)} of {len(expected)} follow from others or never change",
    )
    assert unnoticed == [], f"seed {SEED}"


PRECISION = "--precision=fp16"  # whose scaler is saved too
EVERY = ("--checkpoint.every=6", "--checkpoint.keep=9", "--method.name=supervised", PRECISION)
LONG = 1e6
"""Seconds before the checkpoint, so that they show among those of any machine."""
BEFORE = {
    "seconds": LONG,
    "cpu_seconds": LONG,
    "training_seconds": LONG,
    "interval_seconds": LONG,
    "changed_on_resume": ["torch was 1.0, is 2.0"],
}
"""What a checkpoint says of a run that has been on its way for long."""
FRESH = {
    "seconds": 0.0,
    "cpu_seconds": 0.0,
    "training_seconds": 0.0,
    "interval_seconds": 0.0,
    "metrics_bytes": 0,
    "step": 0,
    "interval_steps": 0,
    "interval_terms": [],
    "interval_stats": ["another"],
    "changed_on_resume": [],
    "scaler.scale": 131072.0,  # not that of a new run, which it still has
    "scaler._growth_tracker": 0,
    "level": "graph: the whole step is one CUDA graph",  # a new run has the level that it runs at
    "data_sha256": "0" * 64,
    "pixels_sha256": "0" * 64,
    "split_sha256": "0" * 64,
}
"""What a new run has in their place, or, where that is the same, another one."""
CONSTANTS = {"scaler.growth_factor", "scaler.backoff_factor", "scaler.growth_interval"}  # of torch, which reads them


def replaced(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Another entry at a dotted key; without one if `value` is None."""
    out = deepcopy(content)
    *outer, last = key.split(".", 2 if ".versions." in key else -1)
    inner = out
    for part in outer:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return out


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """A checkpoint that verifies, with this meta."""
    (path / checkpoint.META).write_text(json.dumps(meta, sort_keys=True))
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    size = (path / checkpoint.META).stat().st_size
    manifest["files"][checkpoint.META] = {"bytes": size, "sha256": file_sha256(path / checkpoint.META)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def long_on_its_way(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 6 of 12."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    run(config(digits, run_dir, *EVERY))
    shutil.rmtree(run_dir / "checkpoints" / LAST)
    (run_dir / "summary.json").unlink()
    at = run_dir / "checkpoints" / FIRST
    write_meta(at, json.loads((at / checkpoint.META).read_text()) | BEFORE)
    return run_dir


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run ends with; of clocks whether they know of a long time before."""
    last = run_dir / "checkpoints" / LAST
    meta, summary = json.loads((last / checkpoint.META).read_text()), json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if line["kind"] == "train"]
    clocks = {key: summary.pop(key) > LONG / 2 for key in ("seconds", "cpu_seconds", "training_seconds")}
    for key in [*BEFORE, "metrics_bytes"]:
        meta.pop(key)
    for key in ("images_per_second", "rows_per_second", "commit"):
        summary.pop(key)
    return {
        "tensors": (last / checkpoint.TENSORS).read_bytes(),
        "meta": meta,
        "summary": summary,
        "records": records(run_dir),
        "long intervals": [rate < 1 for rate in rates],
        **clocks,
    }


def resumed_with(meta: dict[str, Any], before: Path, digits: Path, run_dir: Path) -> tuple[int | None, str]:
    """How a copy of the run goes on with another meta: exit code and output."""
    shutil.copytree(before, run_dir)
    write_meta(run_dir / "checkpoints" / FIRST, meta)
    ended = forked(lambda: guarded(config(digits, run_dir, *EVERY, resume="auto")))
    return ended.code, ended.output


def test_every_single_entry_beside_the_tensors_is_needed(long_on_its_way: Path, digits: Path, tmp_path: Path) -> None:
    began, saved = time.monotonic(), checkpoint.load(long_on_its_way / "checkpoints" / FIRST).meta
    environment = leaves({"environment": saved["environment"]})
    config_keys = set(leaves({"config": saved["config"]}))
    expected_keys = FRESH.keys() | CONSTANTS | environment.keys() | config_keys
    assert leaves(saved).keys() == expected_keys, "a new entry needs a line here"
    assert {key.split(".")[1] for key in environment} == set(DECISIVE)
    others = {**FRESH, **{key: "another" for key in environment}}
    order = np.random.default_rng(SEED).permutation(sorted(others))
    chosen = [str(key) for key in order[: amount(5, len(others))]]
    code, said = resumed_with(saved, long_on_its_way, digits, tmp_path / "all" / "run")
    assert code == 0, said
    expected, unnoticed = outcome(tmp_path / "all" / "run"), []
    assert all(expected[key] is True for key in ("seconds", "cpu_seconds", "training_seconds"))
    assert expected["long intervals"] == [False, True, False]
    for key in chosen:
        run_dir = tmp_path / key / "run"
        code, said = resumed_with(replaced(saved, key, others[key]), long_on_its_way, digits, run_dir)
        refused = code == 2 and said.splitlines()[-1].startswith("semi-fast: checkpoint ")
        assert refused or code == 0, f"{key}: {said}"
        if not refused and outcome(run_dir) == expected:
            unnoticed.append(key)
        shutil.rmtree(run_dir)
    record(
        "one entry beside the tensors left out of a checkpoint",
        made=len(chosen),
        failures=len(unnoticed),
        goal="every one, each noticed",
        seconds=time.monotonic() - began,
        note="those of the configuration, and whole entries, are refused at the door",
    )
    assert unnoticed == [], f"seed {SEED}"


def test_an_entry_that_is_missing_is_refused_in_one_line(long_on_its_way: Path, digits: Path) -> None:
    """At the door, where nothing has been written: as `train.run` asks."""
    from semi_fast.rundir.directory import check_same_run

    saved = checkpoint.load(long_on_its_way / "checkpoints" / FIRST)
    mine = {key: saved.meta[key] for key in ("config", "data_sha256", "pixels_sha256", "split_sha256", "environment")}
    mine |= {"changed_on_resume": []}
    check_same_run(saved, mine)
    for key in [*saved.meta, *leaves({"config": saved.meta["config"]})]:
        without = checkpoint.Checkpoint(saved.path, saved.tensors, replaced(saved.meta, key, None))
        with pytest.raises(ValueError, match=re.escape(key.removeprefix("config."))):
            check_same_run(without, mine)
    with pytest.raises(ValueError, match="later is on one side only"):
        check_same_run(checkpoint.Checkpoint(saved.path, saved.tensors, saved.meta | {"later": 1}), mine)


@pytest.mark.parametrize("lost", ["step", "files", f"files {checkpoint.META}", f"files {checkpoint.TENSORS} bytes"])
def test_every_entry_of_the_manifest_is_needed(lost: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / FIRST
    shutil.copytree(whole / "checkpoints" / FIRST, path)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert manifest.keys() == {"step", "files"}
    assert {key for entry in manifest["files"].values() for key in entry} == {"bytes", "sha256"}
    inner, (*outer, last) = manifest, lost.split()
    for part in outer:
        inner = inner[part]
    number = inner.pop(last)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{FIRST} is damaged \('{re.escape(last)}'\)"):
        checkpoint.load(path)
    if isinstance(number, int):
        inner[last] = number + 1
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"{FIRST} is damaged \(.*{number + 1}"):
            checkpoint.load(path)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints" / FIRST, tmp_path / "step_000000009")
    with pytest.raises(ValueError, match=r"step_000000009 is damaged \(it was saved as that of step 6\)"):
        checkpoint.load(tmp_path / "step_000000009")
