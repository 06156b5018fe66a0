"""The reference loop does what it is compared with, learns, and the benchmark of a step runs."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import measure, trainers
from benchmarks.measure import Work
from benchmarks.reference import __main__ as benchmark
from benchmarks.reference import semi_step
from benchmarks.reference.loop import ReferenceLoop, de_interleave, interleave
from benchmarks.trainers import OURS, REFERENCE, OurLoop, Seconds, Setting
from semi_fast.batch import Rows, split_rows

from .tiny import ARGUMENTS

CPU = torch.device("cpu")
CONFIG = "--config=configs/digits/semi.yaml"

Make = Callable[..., Setting]


@pytest.fixture
def make(digits: Path) -> Make:
    """A setting of the tiny configuration with flags on top."""
    return lambda *flags, workers=0: trainers.settings(digits, [*ARGUMENTS, *flags], workers)


def our_rows(loop: OurLoop) -> Rows:
    """What our next step is given."""
    program = loop.run.program
    program.draws.renew(loop.done)
    ids, visits = program.draws.share(program.train_step.state.step)
    program.source.read(ids, program.images)
    return Rows(program.images, ids, visits, program.labels[ids[: program.layout.labeled]], program.layout)


def to_float64(loop: ReferenceLoop) -> None:
    """In place, so that a comparison shows differences of meaning and not of rounding."""
    for model in (loop.model, loop.ema_model):
        model.double()
    loop.bank.features, loop.bank.confidences = loop.bank.features.double(), loop.bank.confidences.double()
    loop.label_share, loop.center = loop.label_share.double(), loop.center.double()


def test_a_step_of_the_loop_is_a_step_of_ours(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, weights, averages, bank and shares after the same pixels, over warm-up, decays and renewals."""
    lower = semi_step.decay

    def decay_all(bank: semi_step.LoopBank, factor: float) -> None:
        bank.accepted = [[] for _ in bank.accepted]
        lower(bank, factor)

    monkeypatch.setattr(semi_step, "decay", decay_all)  # with nothing to spare, as ours
    flags = "--precision=fp64 --optim.lr=0.03 --method.semi.threshold=0.22"
    setting = make(*flags.split(), "--method.semi.bank_slots=128")
    ours, loop = setting.open(OURS), setting.open(REFERENCE)
    assert isinstance(ours, OurLoop)
    assert isinstance(loop, ReferenceLoop)
    to_float64(loop)
    state, masks = ours.run.program.train_step.state, set()
    for _ in range(8):
        rows = our_rows(ours)
        views = split_rows(ours.run.program.train_step.make_views(rows), rows.layout)
        strong = views.strong.chunk(rows.layout.strong_views)
        ours.step()
        unknown = torch.full((rows.layout.unlabeled,), -1)
        loop.update((([views.labeled], rows.labels), ([views.weak, *strong], unknown)))
        interval = ours.run.program.interval
        terms, stats, _ = interval.read()
        interval.reset()
        assert loop.meters.pop("mask") == pytest.approx(stats["mask"])
        assert loop.meters == pytest.approx({name: terms[name] for name in loop.meters}, rel=1e-6)
        masks.add(stats["mask"])
    assert len(masks) > 2, "some and all pseudo-labels were used"
    # within what a learning rate in float32, as ours is, changes
    for mine, theirs in ((loop.model, state.model), (loop.ema_model, state.average.model)):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    method = state.method
    assert torch.equal(loop.label_counts, method["label_counts"])
    torch.testing.assert_close(loop.label_share, method["label_share"], check_dtype=False)
    torch.testing.assert_close(loop.center, method["center"], rtol=1e-6, atol=1e-7)
    ordered = method["bank.confidences"].sort(1, descending=True).values
    torch.testing.assert_close(loop.bank.confidences, ordered, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loop.bank.features.sum(1), method["bank.sums"], rtol=1e-6, atol=1e-7)
    for one in (ours, loop):
        one.close()


def test_both_evaluate_the_same_weights_alike(make: Make) -> None:
    setting = make()
    ours, loop = setting.open(OURS), setting.open(REFERENCE)
    assert isinstance(ours, OurLoop)
    assert isinstance(loop, ReferenceLoop)
    for _ in range(6):
        ours.step()
    loop.ema_model.load_state_dict(ours.run.program.train_step.state.average.model.state_dict())
    found, expected = loop.evaluate(), ours.evaluate()
    assert found["top1"] != found["balanced_accuracy"]
    assert found == pytest.approx(expected, abs=0.3)  # an image or two on the edge between classes
    loop.close()


def test_the_loop_learns(digits: Path) -> None:
    setting = trainers.settings(digits, [CONFIG, "--device=cpu", "--batch.labeled=16"], 0)
    loop = setting.open(REFERENCE)
    assert isinstance(loop, ReferenceLoop)
    before = loop.evaluate()
    trainers.run_steps(loop, 160)
    after = loop.evaluate()
    assert before["balanced_accuracy"] < 30
    assert after["balanced_accuracy"] > 65
    assert loop.loading_seconds > 0
    assert float((loop.bank.confidences > 0).float().mean()) > 0.1
    loop.close()


def test_interleaving_is_undone() -> None:
    rows = torch.arange(24).view(12, 2)
    mixed = interleave(rows, 4)
    assert mixed[:, 0].div(2).int().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(de_interleave(mixed, 4), rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_their_own_labels_and_no_truth(make: Make, workers: int) -> None:
    setting = make(workers=workers)
    loop = setting.open(REFERENCE)
    assert isinstance(loop, ReferenceLoop)
    running = len(multiprocessing.active_children())
    assert running >= 2 * workers
    counts = torch.zeros(10, dtype=torch.int64)
    steps = len(setting.split.labeled) // 8
    for _ in range(steps):
        (labeled, labels), (views, none) = loop.fetch()
        assert [len(view) for view in (*labeled, *views)] == [8] * 4
        assert not torch.equal(views[1], views[2]), "each strong view is its own"
        assert torch.equal(none, torch.full((8,), -1))
        counts += torch.bincount(labels, minlength=10)
    left = torch.tensor(setting.split.labeled_counts) - counts
    assert int(left.min()) >= 0, "no image comes twice in a pass"
    assert int(left.sum()) == len(setting.split.labeled) % 8
    loop.close()
    assert len(multiprocessing.active_children()) == running - 2 * workers


def test_prototypes_are_means_over_filled_slots() -> None:
    bank = semi_step.empty_bank(2, 4, 3, CPU)
    bank.features[0, :2] = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    bank.confidences[0, :2] = 0.9
    centers, valid = semi_step.prototypes_of_filled(bank)
    assert centers.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert valid.tolist() == [True, False]


def test_the_step_waits_as_the_released_code_does(make: Make) -> None:
    """Per row that is selected and that enters (released: 9, the corrected one 8), and six values for the log."""
    loop = make("--method.semi.bank_slots=64", "--method.semi.bank_decay_every=100").open(REFERENCE)
    assert isinstance(loop, ReferenceLoop)
    loop.step()
    batch = loop.fetch()
    before = sum(map(len, loop.bank.accepted))
    counted = measure.count(Work([lambda: loop.update(batch)]), CPU)
    entered = sum(map(len, loop.bank.accepted)) - before
    selected = round(loop.meters["mask"] * 16)
    assert entered > 0
    logged, classes, masks, renewal = 6, 2, 3, 1
    assert counted.waits == 1 + 2 * selected + 8 * entered + logged + classes + masks + renewal
    loop.close()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--method.name=fixmatch", "method.name must be semi"),
        ("--method.semi.center=none", "method.semi.center=target_ema; got none"),
        ("--augment.operations=1", "augment.operations must be 2"),
    ],
)
def test_what_the_loop_does_not_do_is_refused(make: Make, flag: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(flag)


def test_a_flag_wins_over_the_precision_of_the_comparison(make: Make) -> None:
    assert make().config.precision == "fp32"
    assert make("--precision=bf16").config.precision == "bf16"


def test_the_benchmark_writes_rows_that_can_be_traced(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reference.csv"
    words = ["--repeats", "3", "--steps", "1", "--before", "0", *ARGUMENTS]
    benchmark.main(["--data", str(digits), *words, "--out", str(out)])
    with out.open(encoding="utf-8") as file:
        kinds = {(row["kind"], row["trainer"]): row for row in csv.DictReader(file)}
    assert list(kinds) == [(kind, name) for kind in ("steps", "evaluation", "counts") for name in (REFERENCE, OURS)]
    rows = {name: kinds["steps", name] for name in (REFERENCE, OURS)}
    waits = [float(kinds["counts", name]["waits_per_step"]) for name in rows]
    for name, row in rows.items():
        low, ratio, high = (float(row[f"cpu_ratio{part}"]) for part in ("_low", "", "_high"))
        assert 0 < low <= ratio <= high
        positive = "cpu_seconds wall_seconds build_seconds first_step_seconds peak_mib"
        assert all(float(row[column]) > 0 for column in positive.split())
        assert float(kinds["evaluation", name]["evaluation_cpu_seconds"]) > 0
        assert (row["model"], row["rows_per_step"], row["n"], row["level"]) == ("wrn_10_1", "32", "3", "eager")
        provenance = "date commit hardware threads data clock split_sha256"
        assert all(row[column] for column in provenance.split())
        assert row["command"].startswith("python -m benchmarks.reference --data digits --repeats 3")
        assert str(tmp_path) not in row["command"]
    assert float(rows[REFERENCE]["cpu_ratio"]) == 1
    assert waits[0] > 6 > waits[1]
    assert rows[OURS]["goal"] == "cpu_ratio >= 1.15"
    assert f"{rows[OURS]['verdict']}: cpu_ratio >= 1.15" in capsys.readouterr().out


def test_windows_take_turns_and_the_first_repeat_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Loop:
        def __init__(self, name: str):
            self.name = name

        def step(self) -> None:
            order.append(self.name)

        def evaluate(self) -> dict[str, float]:
            return {}

        def close(self) -> None: ...

    def clock(call: Callable[[], object], device: torch.device) -> Seconds:
        call()
        return Seconds(len(order), 2 * len(order))

    monkeypatch.setattr(benchmark, "timed", clock)
    loops = {name: Loop(name) for name in (REFERENCE, OURS)}
    windows = benchmark.run_windows(loops, steps=2, repeats=1, device=CPU)
    first, second = order[:6], order[6:]
    assert first == [REFERENCE] * 2 + [OURS] * 4
    assert second == [OURS] * 4 + [REFERENCE] * 2
    assert windows[REFERENCE] == [Seconds(6, 12)]
    assert len(windows["same"]) == 1


def test_windows_without_steps_are_refused(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--data", str(digits), "--steps", "0", *ARGUMENTS])
    assert "--steps and --repeats must be positive" in capsys.readouterr().err


def test_a_gpu_with_few_cores_must_gain_more() -> None:
    assert [goal.bound for goal in benchmark.goals(16)] == [1.15, 7]
    assert [goal.bound for goal in benchmark.goals(4)] == [1.15, 10]


def test_the_command_names_no_folder_of_the_machine() -> None:
    for words in (["--data", "/some/where/cifar10"], ["--data=/some/where/cifar10"]):
        repeated = trainers.repeated("benchmarks.reference", [*words, "--out", "/a/b.csv", "--steps", "3"])
        assert repeated.replace("=", " ") == "python -m benchmarks.reference --data cifar10 --steps 3"


def test_on_a_gpu_the_reference_searches_for_kernels_from_its_first_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ours does: else the memory of a search would be ours alone."""
    searches = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(trainers, "ReferenceLoop", lambda *_, **__: searches.append(torch.backends.cudnn.benchmark))
    for device, searched in ((CPU, False), (torch.device("cuda"), True)):
        make()._replace(device=device).open(REFERENCE)
        assert searches.pop() == searched
    torch.set_float32_matmul_precision(before)
