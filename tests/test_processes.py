"""Two processes equal one: the same samples, pseudo-labels and bank, and weights equal to rounding in float64; and the
two are at every step the same to the bit, or end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from semi_fast import processes, train
from semi_fast.batch import Rows
from semi_fast.loop import preemption
from semi_fast.loop.evaluation import EvalSet, Evaluation
from semi_fast.loop.preemption import Preemption
from semi_fast.loop.step import StepReport, TrainStep
from semi_fast.methods import semi
from semi_fast.methods.base import Loss
from semi_fast.ops.pseudo_label import PseudoLabels
from semi_fast.schema.config import Config

from .libraries import needs
from .ranks import Rank, run_of
from .reliability.figures import record
from .tiny import ARGUMENTS

FLAGS = ["--optim.lr=0.03", "--method.semi.threshold=0.4", "--checkpoint.every=6", "--checkpoint.keep=9"]
"""Some pseudo-labels are confident, and some not."""
STEPS, UNLABELED = 12, 8


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    path: Path
    ranks: list[Rank]

    def tensors(self, step: int = STEPS) -> dict[str, Tensor]:
        return load_file(self.path / "checkpoints" / f"step_{step:09d}" / "state.safetensors")

    def saved(self) -> list[int]:
        return sorted(int(path.name[-9:]) for path in (self.path / "checkpoints").glob("step_*"))

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


def run(count: int, data: Path, path: Path, *flags: str, change: Callable[[], object] = bool, code: int = 0) -> Run:
    """A run of the small configuration, whose every process ends with `code`."""
    ended = Run(path, run_of(count, data, path, *FLAGS, *flags, change=change))
    assert [rank.code for rank in ended.ranks] == [code] * count, "\n".join(rank.output for rank in ended.ranks)
    return ended


@pytest.fixture(scope="module")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(1, digits, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(2, digits, tmp_path_factory.mktemp("two") / "run")


def greatest_difference(one: Run, two: Run) -> float:
    """Over weights, momenta, averages and state: the largest |a - b| of a tensor over its largest |a|."""
    ours, theirs, worst = one.tensors(), two.tensors(), 0.0
    for name, a in ours.items():
        if a.is_floating_point() and not name.startswith("interval."):
            scale = a.abs().max().clamp_min(1e-12)
            worst = max(worst, ((a - theirs[name]).abs().max() / scale).item())
    return worst


def assert_equal(one: Run, two: Run) -> None:
    """Integers exactly, and the rest to what 12 steps of float64, summed in another order, round."""
    ours, theirs = one.tensors(), two.tensors()
    assert ours.keys() == theirs.keys()
    assert [n for n, a in ours.items() if not a.is_floating_point() and not torch.equal(a, theirs[n])] == []
    assert greatest_difference(one, two) < 1e-12


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def whole(run: Run, name: str) -> list[list[int]]:
    """By step: the shares of its processes put together as the global batch has them, labeled first."""
    batches = []
    for shares in zip(*(rank.steps for rank in run.ranks), strict=True):
        labeled = [share[name][: -UNLABELED // len(shares)] for share in shares]
        unlabeled = [share[name][-UNLABELED // len(shares) :] for share in shares]
        batches.append(torch.cat([*labeled, *unlabeled]).tolist())
    return batches


def test_two_processes_equal_one(one: Run, two: Run) -> None:
    began = time.monotonic()
    assert [run.read("env.json")["processes"] for run in (one, two)] == [1, 2]
    assert_equal(one, two)
    records = [[json.loads(line) for line in (run.path / "metrics.jsonl").open()] for run in (one, two)]
    for a, b in zip(*records, strict=True):
        exact = ("step", "lr", "pseudo_labels") if a["kind"] == "train" else ("step", "heads")
        assert [a[key] for key in exact] == [b[key] for key in exact]
        if a["kind"] == "train":
            assert b["terms"] == pytest.approx(a["terms"], rel=1e-11)
    used = [line["pseudo_labels"]["used_fraction"] for line in records[0] if line["kind"] == "train"]
    assert 0 < used[1] < 1, "some pseudo-labels are used, and some not"
    record(
        "two processes beside one",
        made=STEPS,
        failures=0,
        goal="weights within 1e-12 in float64, integers exactly",
        seconds=time.monotonic() - began,
        note=f"steps; greatest difference {greatest_difference(one, two):.1e}",
    )


def test_every_step_is_that_of_one_process(one: Run, two: Run) -> None:
    """Samples and their visits; and on both processes the learning rate and what the whole batch hands to the bank."""
    for name in ("ids", "visits"):
        assert whole(one, name) == whole(two, name)
    assert len(one.ranks[0].steps) == STEPS
    for rank in two.ranks:
        for ours, theirs in zip(one.ranks[0].steps, rank.steps, strict=True):
            for name in ("lr", "pseudo_label", "mask", "label_counts"):
                assert torch.equal(ours[name], theirs[name]), name
            for name in ("confidence", "features", "center"):
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-13)


def test_both_processes_end_with_the_same_bits(two: Run) -> None:
    """Weights, averages, momenta, bank, running means, counters; the interval's sums too, which saving shares."""
    first, second = (rank.state for rank in two.ranks)
    assert_same_bits(first, second)
    assert_same_bits(two.tensors(), {name: second[name] for name in two.tensors()})
    assert {"step", "method.bank.features", "method.center", "bad_step"} < first.keys()


def test_both_processes_exchange_alike_and_every_step_as_much(two: Run) -> None:
    """Else one would wait for ever: the same collectives, types and shapes in the same order."""
    first, second = two.ranks
    assert first.exchanges == second.exchanges
    steps = first.exchanges_of_steps
    assert len(steps) == STEPS
    assert steps == second.exchanges_of_steps == [steps[0]] * STEPS
    assert len(steps[0]) > 10, "with those of normalisation"


def test_a_launcher_starts_the_same_run(two: Run, digits: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["-m", "semi_fast.train", *ARGUMENTS, f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*words, "--precision=fp64", *FLAGS], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    launched = Run(tmp_path / "run", [])
    assert launched.read("env.json")["processes"] == 2
    assert_same_bits(two.tensors(), launched.tensors())


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    one: Run, two: Run, digits: Path, tmp_path: Path, count: int
) -> None:
    """The global batch is fixed; equal to rounding, as any number is."""
    shutil.copytree((one, two)[2 - count].path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:09d}")
    resumed = run(count, digits, tmp_path / "run", "--resume=auto")
    assert len(resumed.ranks[0].steps) == STEPS - 6
    assert_equal(one, resumed)


def train_twice_in_a_session() -> None:
    """A shorter run first, then the run."""

    def twice(config: Config) -> dict[str, Any]:
        shorter = replace(config, run_dir=f"{config.run_dir}_first", optim=replace(config.optim, steps=6))
        with train.session(config) as accelerator:
            train.run_in(accelerator, shorter)
            return train.run_in(accelerator, config)

    train.run = twice


def test_runs_may_follow_one_another_in_a_session(two: Run, digits: Path, tmp_path: Path) -> None:
    second = run(2, digits, tmp_path / "run", change=train_twice_in_a_session)
    assert json.loads((tmp_path / "run_first" / "summary.json").read_text())["status"] == "finished"
    assert_same_bits(second.tensors(), two.tensors())
    assert second.read("summary.json")["status"] == "finished"


def test_two_processes_go_on_as_two_bit_for_bit(two: Run, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(two.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:09d}")
    resumed = run(2, digits, tmp_path / "run", "--resume=auto")
    assert resumed.read("summary.json")["bit_exact"]
    assert_same_bits(two.tensors(), resumed.tensors())


def test_local_normalisation_goes_on_with_as_many_processes_alone(digits: Path, tmp_path: Path) -> None:
    flags = ("--model.bn=local", "--optim.steps=6", "--eval.every=6", "--checkpoint.every=3", "--resume=auto")
    two = run(2, digits, tmp_path / "run", *flags)
    shutil.rmtree(two.path / "checkpoints" / "step_000000006")
    refused = run(1, digits, two.path, *flags, code=2)
    assert "had 2 processes, now there are 1: start as many" in refused.ranks[0].output
    run(2, digits, two.path, *flags)


@pytest.mark.parametrize("source", ["ffcv", "dali"])
def test_two_processes_with_a_container_each_equal_one_in_memory(one: Run, tmp_path: Path, source: str) -> None:
    """Every process reads its own rows."""
    from semi_fast.cli import main

    needs(source)
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), "--formats", source]) == 0
    flags = (f"--data.source={source}", "--data.threads=1")
    assert_equal(one, run(2, tmp_path / "data", tmp_path / "two", *flags))


def test_the_switches_that_speak_across_processes_too(digits: Path, tmp_path: Path) -> None:
    """Totals over the batch, the running prior, and features drawn from the bank."""
    chosen = "unlabeled_prior=joint bank_sampling=6 prior_momentum=0.9"
    switches = [f"--method.semi.{switch}" for switch in chosen.split()]
    one, two = (run(count, digits, tmp_path / str(count), *switches) for count in (1, 2))
    assert_equal(one, two)
    assert_same_bits(*(rank.state for rank in two.ranks))


def test_gradients_exchanged_during_the_backward_are_the_same(one: Run, digits: Path, tmp_path: Path) -> None:
    """DDP, as large models have it; with the two normalisations of the quirk, which get no gradient."""
    two = run(2, digits, tmp_path / "two", "--engine.ddp_parameters=1")
    assert_equal(one, two)
    assert_same_bits(*(rank.state for rank in two.ranks))


def rejects_the_second_half() -> None:
    """No pseudo-label of the second half of the batch is confident: of two processes, none of the second one's."""
    made = semi.pseudo_label

    def rejecting(*args: Any, **kwargs: Any) -> PseudoLabels:
        found = made(*args, **kwargs)
        kept = torch.full_like(found.mask, processes.count() == 1 or dist.get_rank() == 0)
        kept[UNLABELED // 2 :] = False
        counts = semi.count(found.label, found.mask & kept, classes=len(found.counts))
        return found._replace(mask=found.mask & kept, adjusted_mask=found.adjusted_mask & kept, counts=counts)

    semi.pseudo_label = rejecting


def screen_closed() -> None:
    """Nobody reads what is printed any more, as behind `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def test_processes_go_on_without_a_screen(two: Run, digits: Path, tmp_path: Path) -> None:
    """K7: neither ends, nor takes the other for lost."""
    unseen = run(2, digits, tmp_path / "run", "--log.every=1", change=screen_closed)
    assert unseen.read("status.json")["exit_code"] == 0
    assert_equal(two, unseen)


def test_a_process_whose_pseudo_labels_are_all_rejected_goes_on_as_the_other(
    two: Run, digits: Path, tmp_path: Path
) -> None:
    flags = ("--method.semi.threshold=0.15", "--method.semi.alignment_weight=0")
    ours, theirs = (
        run(count, digits, tmp_path / str(count), *flags, change=rejects_the_second_half) for count in (1, 2)
    )
    half = [True] * (UNLABELED // 2) + [False] * (UNLABELED // 2)
    assert [step["mask"].tolist() for step in theirs.ranks[1].steps] == [half] * STEPS
    assert_equal(ours, theirs)
    assert [rank.exchanges_of_steps for rank in theirs.ranks] == [rank.exchanges_of_steps for rank in two.ranks]


def divides_by_its_own_confident_rows() -> None:
    """The trap: a mean over the masked rows of each process, which its mean over processes is not."""
    made = semi.masked_cross_entropy

    def local(
        logits: Tensor, target: Tensor, coefficient: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        share = 1.0 if coefficient is None else (coefficient != 0).double().mean().clamp_min(1 / len(coefficient))
        return made(logits, target, coefficient, offset) / share

    semi.masked_cross_entropy = local


def sums_gradients() -> None:
    """Every gradient the sum over processes, not the mean."""
    mean = processes.mean_gradients

    def summed(parameters: Any) -> None:
        held = list(parameters)
        mean(held)
        torch._foreach_mul_([p.grad for p in held if p.grad is not None], processes.count())

    processes.mean_gradients = summed


@pytest.mark.parametrize(
    ("flags", "change"),
    [(["--model.bn=local"], bool), ([], divides_by_its_own_confident_rows), ([], sums_gradients)],
    ids=["local normalisation", "local count of rows", "gradients without their divisor"],
)
def test_the_comparison_notices(flags: list[str], change: Callable[[], object], digits: Path, tmp_path: Path) -> None:
    one, two = (run(count, digits, tmp_path / str(count), *flags, change=change) for count in (1, 2))
    assert greatest_difference(one, two) > 1e-6


def test_a_batch_that_two_processes_do_not_divide(digits: Path, tmp_path: Path) -> None:
    refused = run(2, digits, tmp_path / "two", "--batch.labeled=7", code=2)
    for rank in refused.ranks:
        assert "batch.labeled must be divisible by the number of processes; got 7 and 2" in rank.output
    assert not refused.path.exists()


def directory_is_taken_meanwhile() -> None:
    """As by a run that was faster; it is the first process that finds it."""
    made = train.build

    def build(*args: Any, run_dir: Path, **parts: Any) -> Any:
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.yaml").touch()
        return made(*args, run_dir=run_dir, **parts)

    train.build = build


def test_what_the_first_process_cannot_begin_neither_does(digits: Path, tmp_path: Path) -> None:
    refused = run(2, digits, tmp_path / "two", change=directory_is_taken_meanwhile, code=2)
    for rank in refused.ranks:
        assert rank.output.splitlines()[-1].startswith("semi-fast: run_dir must be new or empty")


def second_process_makes_no_features() -> None:
    """In step 5 outputs of the second process are not finite, of which loss and gradients know nothing."""
    made = TrainStep.forward_and_loss

    def poisoned(self: TrainStep, rows: Rows, views: Tensor) -> tuple[Loss, list[Tensor]]:
        loss, sums = made(self, rows, views)
        return loss, [s * torch.nan for s in sums] if dist.get_rank() == 1 and self.state.step == 5 else sums

    TrainStep.forward_and_loss = poisoned


def second_process_loses_an_image() -> None:
    """In step 5 the weak view of its first unlabeled image is not finite."""
    made = TrainStep.forward_and_loss

    def poisoned(self: TrainStep, rows: Rows, views: Tensor) -> tuple[Loss, list[Tensor]]:
        if dist.get_rank() == 1 and self.state.step == 5:
            views[rows.layout.labeled] = torch.nan
        return made(self, rows, views)

    TrainStep.forward_and_loss = poisoned


@pytest.mark.parametrize("change", [second_process_makes_no_features, second_process_loses_an_image])
def test_a_process_that_is_not_finite_stops_both(
    change: Callable[[], None], one: Run, digits: Path, tmp_path: Path
) -> None:
    """At the checkpoint of step 6, which is the first to ask after it and is not made."""
    stopped = run(2, digits, tmp_path / "two", change=change, code=4)
    ids = whole(one, "ids")[5]
    for rank in stopped.ranks:
        assert f"not finite at step 5 (sample ids {', '.join(map(str, ids[:8]))}, ...)" in rank.output
        assert len(rank.steps) == 6
    assert stopped.read("nonfinite.json") == {"step": 5, "sample_ids": ids}
    assert stopped.read("status.json")["exit_code"] == 4
    assert stopped.saved() == []


def second_process_overflows() -> None:
    """In step 3 a gradient of the second process is infinite."""
    mean = processes.mean_gradients
    steps = iter(range(STEPS))

    def overflowing(parameters: Any) -> None:
        held = list(parameters)
        if next(steps) == 3 and dist.get_rank() == 1:
            held[0].grad.fill_(torch.inf)
        mean(held)

    processes.mean_gradients = overflowing


def test_both_processes_halve_the_scale_of_fp16_together(digits: Path, tmp_path: Path) -> None:
    flags = ("--precision=fp16", "--optim.steps=6")
    two = run(2, digits, tmp_path / "two", *flags, change=second_process_overflows)
    assert_same_bits(*(rank.state for rank in two.ranks))
    assert two.ranks[1].state["scaler.scale"] == 2.0**15, "it begins with 2 ** 16"


def second_process_asks_nothing() -> None:
    """It stands still where the two ask one another whether to stop."""

    def check(self: Preemption, done: int) -> None:
        if dist.get_rank() == 1 and done == 7:
            time.sleep(3600)

    inner, preemption.ASK_SECONDS = Preemption.check, 0.0  # after every step
    Preemption.check = lambda self, done: check(self, done) or inner(self, done)  # type: ignore[method-assign]


def second_process_dies() -> None:
    def act(step: TrainStep) -> None:
        if dist.get_rank() == 1 and int(step.state.step) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    after_every_step(act)


@pytest.mark.parametrize(
    ("change", "code"),
    [(second_process_dies, -signal.SIGKILL), (second_process_asks_nothing, -signal.SIGKILL)],
    ids=["killed", "hangs"],
)
def test_a_lost_process_is_named_by_the_other(
    change: Callable[[], object], code: int, digits: Path, tmp_path: Path
) -> None:
    """Without a launcher, which would end it; what hangs is killed by the test once the other has ended."""
    first, second = run_of(2, digits, tmp_path / "run", *FLAGS, "--engine.timeout_seconds=5", change=change, first=True)
    assert (first.code, second.code) == (3, code)
    assert "semi-fast: another process of this run has ended, or did not answer within" in first.output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 3


def drifts(entry: str, step: int) -> Callable[[TrainStep], None]:
    """What moves a part of a tensor of the second process after `step`, by the least that there is."""

    def drift(program: TrainStep) -> None:
        if dist.get_rank() == 1 and program.state.step == step:
            part = dict(program.state.tensors())[entry][-1]
            part.copy_(torch.nextafter(part, torch.full_like(part, torch.inf)))

    return drift


def after_every_step(act: Callable[[TrainStep], None]) -> None:
    one_step = TrainStep.__call__

    def acting(self: TrainStep, rows: Rows) -> StepReport:
        report = one_step(self, rows)
        with torch.no_grad():
            act(self)
        return report

    TrainStep.__call__ = acting


def weights_drift() -> None:
    after_every_step(drifts("model.backbone.conv1.weight", 8))


def bank_drifts() -> None:
    after_every_step(drifts("method.bank.features", 12))


@pytest.mark.parametrize(
    ("change", "entry"), [(weights_drift, "model.backbone.conv1.weight"), (bank_drifts, "method.bank.features")]
)
def test_processes_that_drift_apart_end_and_save_nothing(
    change: Callable[[], None], entry: str, digits: Path, tmp_path: Path
) -> None:
    ended = run(2, digits, tmp_path / "two", change=change, code=3)
    for rank in ended.ranks:
        assert f"all processes must hold the same state; after step 12 they differ in {entry} and " in rank.output
    assert ended.read("status.json")["exit_code"] == 3
    assert ended.saved() == [6], "before they drifted"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_is_of_every_bit_and_its_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(24).view(2, 3, 4).to(dtype)
    first = processes.checksum(values)
    for byte in range(values.nbytes):
        for bit in (1, 128)[: values.element_size()]:  # of a bool there is one
            flipped = values.clone()
            flipped.view(-1).view(torch.uint8)[byte] ^= bit
            assert processes.checksum(flipped) != first
    if dtype.is_floating_point:
        flipped = values.clone()
        flipped.view(-1)[[3, 9]] *= -1
        assert processes.checksum(flipped) != first, "two highest bits do not cancel"
    assert processes.checksum(values.flip(2)) != first
    assert processes.checksum(values.transpose(0, 2).contiguous().transpose(0, 2)) == first, "whatever the layout"
    assert processes.checksum(values[0, 0, 0]).shape == processes.checksum(values[:0]).shape == ()
    monkeypatch.setattr(processes, "AT_ONCE", 5)
    assert processes.checksum(values) == first


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 30))
def test_evaluation_counts_every_image_once(images: int, count: int, batch: int) -> None:
    """Also where neither processes nor forwards divide the set, and where it has fewer images than there are."""
    index = torch.arange(images)
    pixels = index.to(torch.uint8).view(-1, 1, 1, 1)
    tables = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: count)
        patch.setattr(processes, "sum_in_place", lambda tensor: tensor)
        for rank in range(count):
            evaluation = Evaluation(
                EvalSet("test", pixels, index),
                lambda x: {"head": torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), images)},
                names=("head",),
                classes=images,
                batch=batch,
                rank=rank,
            )
            evaluation.confusions()
            tables.append(evaluation.confusions()["head"])  # the second time as the first
    assert np.sum(tables, axis=0).tolist() == np.eye(images).tolist()
