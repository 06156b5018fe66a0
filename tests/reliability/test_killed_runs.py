"""Runs that are killed at any time, or stopped after any step: they end with the bytes of a run that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from semi_fast import train
from semi_fast.disk import write_text
from semi_fast.loop.fit import TrainingRun
from semi_fast.loop.sampling import Stream
from semi_fast.models import classifier
from semi_fast.philox import ORDER_LABELED, ORDER_UNLABELED
from semi_fast.prepared.manifest import file_sha256, load_manifest, load_split
from semi_fast.rundir.checkpoint import META, TENSORS, published
from semi_fast.schema.config import Config
from tests.reliability.figures import FULL, amount, record
from tests.reliability.forked import Ended, forked
from tests.tiny import config

STEPS = 12
KILLED_STEPS = 40
BETWEEN_SAVES, IN_A_SAVE = "between checkpoints", "writing a checkpoint"
CLOCK = {"seconds", "cpu_seconds", "training_seconds", "interval_seconds", "images_per_second", "rows_per_second"}
CLOCK |= {"commit"}  # which says that something was changed once another test has written its figures
# Sets that no batch divides, so that visits end within a step, those of one stream before those of the other.
SMALL = """
--split.labeled_max=4 --split.imbalance_labeled=2 --split.unlabeled_max=5 --split.imbalance_unlabeled=3
--method.semi.bank_slots=2 --checkpoint.keep=99 --eval.every=4 --log.every=5
""".split()  # noqa: SIM905, a command line reads best as one
KILLED = [*SMALL, f"--optim.steps={KILLED_STEPS}", "--checkpoint.every=3", "--eval.every=7", "--log.every=4"]
METHODS = {
    "semi": [],
    "semi, paper": ["--method.semi.preset=paper"],
    "released_semi": [
        "--method.name=released_semi", "--model.name=wrn_10_2", "--method.released_semi.bank_decay_every=3",
        "--method.released_semi.warmup_epochs=1", "--method.released_semi.bank_slots=2",
        "--method.released_semi.threshold=0.15",
    ],
    "semi, sampling and moving averages": [
        "--method.semi.bank_sampling=4", "--method.semi.unlabeled_prior=joint", "--method.semi.bank_eviction=oldest",
    ],
    "fixmatch+la": ["--method.name=fixmatch", "--method.plugins=[la]"],
    "supervised+la": ["--method.name=supervised", "--method.plugins=[la]"],
    "semi, dropout": [],
}  # fmt: skip


Whole = tuple[str, list[str], Path]
"""Which method, its flags, and where its `run` is."""


class Stopped(Exception):
    """A run has come as far as it should."""


@pytest.fixture(scope="module", autouse=True)
def no_page() -> Iterator[None]:
    """Drawing the page takes four times as long as the run, and reads what is compared here."""

    def page(run_dirs: list[Path], path: Path) -> Path:
        write_text(path, f"<title>{run_dirs[0].name} · semi_fast report</title>\n")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", page)
        yield


def timeless(content: object) -> object:
    """Without what the clock decides, and without the length of what holds that."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in {*CLOCK, "metrics_bytes"}}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def checkpoints(run_dir: Path) -> dict[str, tuple[str, object]]:
    """Of every checkpoint, the digest of its tensors and what stands beside them."""
    return {
        path.name: (file_sha256(path / TENSORS), timeless(json.loads((path / META).read_text())))
        for path in published(run_dir / "checkpoints")
    }


def outcome(run_dir: Path) -> dict[str, object]:
    """All that a run leaves but times, its environment and, of the checkpoints, those before the last."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "checkpoint": max(checkpoints(run_dir).items()),
        "metrics": timeless([json.loads(line) for line in lines]),
        "summary": timeless(json.loads((run_dir / "summary.json").read_text())),
        "split": (run_dir / "split.json").read_bytes(),
        "status": json.loads((run_dir / "status.json").read_text()),
    }


def differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def lived(function: Callable[[], object], **limits: float) -> Ended:
    def child() -> None:
        function()

    return forked(child, **limits)  # type: ignore[arg-type]


def newest_step(run_dir: Path) -> int:
    found = published(run_dir / "checkpoints")
    return int(found[0].name[-9:]) if found else 0


def killed_until_done(
    start: Callable[[], object], run_dir: Path, rng: np.random.Generator, lasts: float
) -> tuple[Ended, Counter[str]]:
    """Start and kill until a start comes to its end; that end, and how many kills hit what."""
    kills: Counter[str] = Counter()
    hidden: set[Path] = set()  # what kills have left of checkpoints
    while True:
        most = lasts * (0.4 + 0.05 * kills.total())  # so that a slow machine, too, comes to an end
        end = lived(start, kill_after=rng.uniform(0, most))
        if end.signal != signal.SIGKILL:
            return end, kills
        left = set((run_dir / "checkpoints").glob(".*"))
        within = 0 < newest_step(run_dir) < KILLED_STEPS
        kills[IN_A_SAVE if left - hidden else BETWEEN_SAVES if within else "starting or ending"] += 1
        hidden = left


def test_runs_killed_at_random_end_with_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    runs, began = amount(2, 25), time.monotonic()

    def start(run_dir: Path) -> Callable[[], object]:
        return lambda: train.run(config(digits, run_dir, *KILLED, resume="auto"))

    start(tmp_path / "straight" / "run")()  # here, so that children find the views compiled
    lasts = time.monotonic()
    assert lived(start(tmp_path / "again" / "run")).code == 0
    lasts = time.monotonic() - lasts
    expected = outcome(tmp_path / "straight" / "run")
    assert outcome(tmp_path / "again" / "run") == expected, "else nothing is shown below"
    kills: Counter[str] = Counter()
    done, seed, failures = 0, 0, []
    while done < runs:
        seed += 1
        run_dir = tmp_path / f"seed_{seed}" / "run"
        end, mine = killed_until_done(start(run_dir), run_dir, np.random.default_rng(seed), lasts)
        kills += mine
        done += end.code != 0 or mine[BETWEEN_SAVES] + mine[IN_A_SAVE] > 0  # not if killed at its edges alone
        if end.code != 0:
            failures.append(f"seed {seed}, killed {dict(mine)}: {end}")
        elif odd := differing(expected, outcome(run_dir)):
            failures.append(f"seed {seed}, killed {dict(mine)}: {odd} differ from those of an uninterrupted run")
        shutil.rmtree(run_dir.parent)
    note = f"{kills.total()} kills: " + ", ".join(f"{n} {where}" for where, n in sorted(kills.items()))
    record(
        "training killed at random", made=runs, failures=len(failures), goal="25 runs end with the same bytes",
        seconds=time.monotonic() - began, note=note,
    )  # fmt: skip
    assert failures == []
    assert kills[BETWEEN_SAVES] + kills[IN_A_SAVE] >= runs, note


def test_a_run_killed_at_any_sync_goes_on(digits: Path, tmp_path: Path) -> None:
    """Every file that a run publishes is synced: this kills at the edges that random kills seldom meet."""
    flags = [*SMALL, "--optim.steps=4", "--checkpoint.every=2", "--checkpoint.keep=1"]
    began, fsync, syncs = time.monotonic(), os.fsync, 0

    def start(run_dir: Path, at: int = 0) -> Callable[[], object]:
        def synced(descriptor: int) -> None:
            nonlocal syncs
            syncs += 1
            if syncs == at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        def run() -> None:
            os.fsync = synced
            train.run(config(digits, run_dir, *flags, resume="auto"))
            print(f"syncs {syncs}")

        return run

    straight = lived(start(tmp_path / "straight" / "run"))
    assert straight.code == 0, straight.output
    count = int(straight.output.split()[-1])
    assert count > 15
    expected, lost = outcome(tmp_path / "straight" / "run"), []
    every = list(range(1, count + 1))
    chosen = every if FULL else [1, 2, *np.random.default_rng(0).choice(every[2:], 5, replace=False).tolist()]
    for at in chosen:
        run_dir = tmp_path / str(at) / "run"
        assert lived(start(run_dir, at)).signal == signal.SIGKILL, at
        end = lived(start(run_dir))
        if end.code != 0 or differing(expected, outcome(run_dir)):
            lost.append(f"sync {at} of {count}: {end.output.strip().splitlines()[-1]}")
    record(
        "training killed at every sync", made=len(chosen), failures=len(lost), seconds=time.monotonic() - began,
        goal="each goes on and ends with the same bytes",
    )  # fmt: skip
    assert lost == []


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """A run that saved after every step."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        if "dropout" in name:
            make = classifier.make_backbone
            patch.setattr(classifier, "make_backbone", lambda *options: nn.Sequential(make(*options), nn.Dropout(0.3)))
        flags = [*SMALL, *METHODS[name], "--checkpoint.every=1"]
        parent = tmp_path_factory.mktemp("whole")
        train.run(config(digits, parent / "run", *flags))
        yield name, flags, parent


def cut_back(parent: Path, to: Path, step: int) -> Path:
    """A copy of the run in which `step` is the last that was saved."""
    shutil.copytree(parent / "run", to / "run")
    for path in published(to / "run" / "checkpoints"):
        if path.name > f"step_{step:09d}":
            shutil.rmtree(path)
    for name in ("summary.json", "status.json"):
        (to / "run" / name).unlink()
    return to / "run"


def go_on(configuration: Config, until: int | None = None) -> None:
    """Resume; to the end, or to the checkpoint after step `until`."""
    with pytest.MonkeyPatch.context() as patch:
        save = TrainingRun.save

        def stopping(self: TrainingRun, done: int, *, must: bool) -> None:
            save(self, done, must=must)
            if done == until:
                raise Stopped

        patch.setattr(TrainingRun, "save", stopping)
        try:
            train.run(configuration)
        except Stopped:
            assert until is not None


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{step:09d}" / TENSORS)


def test_what_the_steps_meet(whole: Whole, digits: Path) -> None:
    """Else equality would show little: visits end within steps, other ones in either stream; full slots are filled
    again; no checkpoint is like another."""
    name, _, parent = whole
    split = load_split(parent / "run" / "split.json", load_manifest(digits))
    boundaries = []
    for ids, stream in ((split.labeled, ORDER_LABELED), (split.unlabeled, ORDER_UNLABELED)):
        visits = [Stream(ids, seed=0, stream=stream).take(8 * step, 8).visits for step in range(STEPS)]
        assert any(len(set(of_step.tolist())) > 1 for of_step in visits), "a visit ends within a step"
        boundaries.append({step for step, of_step in enumerate(visits) if len(set(of_step.tolist())) > 1})
    assert boundaries[0] != boundaries[1]
    states = [digest for digest, _ in checkpoints(parent / "run").values()]
    assert len(set(states)) == len(states) == STEPS
    if "semi" in name:
        filled = [tensors(parent / "run", step)["method.bank.confidences"] for step in (STEPS - 1, STEPS)]
        full = (filled[0] > 0).all(dim=1)
        assert full.any()
        assert not torch.equal(filled[0][full], filled[1][full])


def same(parent: Path, run_dir: Path, what: str) -> None:
    """Every checkpoint that the run has, and everything else, equals that of the run that was never stopped."""
    assert differing(outcome(parent / "run"), outcome(run_dir)) == [], what
    assert differing(checkpoints(parent / "run"), checkpoints(run_dir)) == [], what


def test_resuming_after_every_step_is_bit_for_bit(whole: Whole, digits: Path, tmp_path: Path) -> None:
    name, flags, parent = whole
    began, every = time.monotonic(), list(range(1, STEPS))
    steps = (
        every
        if FULL or name == "semi"
        else np.random.default_rng(list(name.encode())).choice(every, 2, replace=False).tolist()
    )
    for step in steps:
        run_dir = cut_back(parent, tmp_path / str(step), step)
        go_on(config(digits, run_dir, *flags, resume="auto"))
        same(parent, run_dir, f"{name}, resumed after step {step}")
    record(
        f"resumed once, {name}", made=len(steps), failures=0, goal="every k of 12 steps, bit for bit",
        seconds=time.monotonic() - began,
    )  # fmt: skip


def test_resuming_twice_is_bit_for_bit(whole: Whole, digits: Path, tmp_path: Path) -> None:
    """And once a run that is stopped after every single step."""
    name, flags, parent = whole
    began, pairs = time.monotonic(), list(combinations(range(1, STEPS), 2))
    if not FULL:
        rng = np.random.default_rng(list(name.encode()))
        pairs = [pairs[i] for i in rng.choice(len(pairs), 3 if name == "semi" else 1, replace=False)]
    for first, second in pairs:
        run_dir = cut_back(parent, tmp_path / f"{first}_{second}", first)
        go_on(config(digits, run_dir, *flags, resume="auto"), until=second)
        assert newest_step(run_dir) == second
        go_on(config(digits, run_dir, *flags, resume="auto"))
        same(parent, run_dir, f"{name}, resumed after steps {first} and {second}")
    run_dir = tmp_path / "each" / "run"
    for step in range(1, STEPS + 1):
        go_on(config(digits, run_dir, *flags, resume="auto"), until=None if step == STEPS else step)
    same(parent, run_dir, f"{name}, resumed after every step")
    record(
        f"resumed twice, {name}", made=len(pairs) + 1, failures=0,
        goal="every k1 < k2 of 12 steps, and after each step, bit for bit", seconds=time.monotonic() - began,
    )  # fmt: skip


def test_saving_what_was_resumed_gives_the_same_bytes(
    whole: Whole, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, flags, parent = whole

    def fit(self: TrainingRun, start: int, preemption: object) -> None:
        self.save(start, must=True)
        raise Stopped

    monkeypatch.setattr(TrainingRun, "fit", fit)
    for step in (1, 7):
        run_dir = cut_back(parent, tmp_path / str(step), step)
        before = checkpoints(run_dir)
        shutil.rmtree(run_dir / "checkpoints" / "step_000000001") if step > 1 else None
        with pytest.raises(Stopped):
            train.run(config(digits, run_dir, *flags, resume="auto"))
        assert max(checkpoints(run_dir).items()) == max(before.items()), f"{name}, step {step}"
