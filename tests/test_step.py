"""The step on a device that cannot be read: no value of it may reach the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from semi_fast.batch import RowLayout, Rows
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.evaluation import EvalSet, Evaluation
from semi_fast.loop.metrics import Interval
from semi_fast.loop.program import Program
from semi_fast.loop.sampling import Batches
from semi_fast.loop.step import NEVER, TrainState, TrainStep, make_optimizer
from semi_fast.methods import Environment, make_method
from semi_fast.models import make_classifier
from semi_fast.ops import door
from semi_fast.ops.rand_augment import normalise
from semi_fast.ops.rand_augment.reference import affine_table
from semi_fast.pipelines.augment import Augmenter
from semi_fast.schema.data import AugmentConfig
from semi_fast.schema.method import MethodConfig, SemiConfig
from semi_fast.schema.model import EmaConfig, ModelConfig, OptimConfig
from semi_fast.schema.semi import PRESETS, ReleasedSemiConfig

COUNTS = (9, 8, 7, 6, 5, 4, 3, 2, 1, 1)
METHODS = {
    "supervised": MethodConfig(name="supervised", plugins=("la",)),
    "fixmatch": MethodConfig(name="fixmatch", plugins=("la",)),
    "semi": MethodConfig(name="semi", epoch_steps=2, semi=SemiConfig(warmup_epochs=0, bank_slots=4)),
    "paper": MethodConfig(name="semi", semi=SemiConfig(**PRESETS["paper"], bank_slots=4, bank_sampling=3)),
    "released_semi": MethodConfig(name="released_semi", released_semi=ReleasedSemiConfig(bank_slots=4)),
}


def program(options: MethodConfig, device: torch.device) -> tuple[TrainStep, Callable[[], Rows]]:
    method = make_method(options, steps=20)
    needs = method.needs
    with device:
        model, twin = (make_classifier(ModelConfig(name="wrn_10_2"), 10, needs.heads, (32, 32)) for _ in range(2))
    with patch("semi_fast.loop.ema.copy.deepcopy", return_value=twin):  # which copies the fake mode too
        average = WeightAverage(model)
    state = TrainState(
        model=model,
        average=average,
        optimizer=make_optimizer(model, OptimConfig(steps=20), device),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        method=method.init(Environment(COUNTS, model.features, device, torch.float32, COUNTS)),
        step=torch.zeros((), dtype=torch.int64, device=device),
        bad_step=torch.full((), NEVER, dtype=torch.int64, device=device),
    )
    augmenter = Augmenter(
        AugmentConfig(),
        seed=0,
        resolution=(32, 32),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        device=device,
        dtype=torch.float32,
    )
    layout = RowLayout(4, 4 if needs.unlabeled else 0, needs.strong_views)

    def rows() -> Rows:
        n = layout.images
        images = torch.zeros(n, 32, 32, 3, dtype=torch.uint8, device=device)
        ids = torch.arange(n, device=device)
        return Rows(images, ids, torch.zeros_like(ids), torch.zeros(4, dtype=torch.int64, device=device), layout)

    step = TrainStep(
        state, method, augmenter.views, optim=OptimConfig(steps=20), ema=EmaConfig(ramp=True), precision="fp32"
    )
    return step, rows


@pytest.fixture(autouse=True)
def no_fake_tables() -> Iterator[None]:
    """The table of affine maps is kept per device; none from another mode may be met."""
    affine_table.cache_clear()
    yield
    affine_table.cache_clear()


@pytest.fixture
def given_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's engine and the fused SGD kernel want a real CUDA context even for fake tensors: both are replaced.

    What is not shown thereby are torch's own backward pass and its fused kernel; this project adds nothing to either.
    """

    def backward(loss: torch.Tensor) -> None:
        for parameter in current:
            parameter.grad = torch.zeros_like(parameter)

    current: list[torch.nn.Parameter] = []
    initialise = TrainStep.__init__

    def remember(self: TrainStep, state: TrainState, *args: Any, **kwargs: Any) -> None:
        initialise(self, state, *args, **kwargs)
        current[:] = state.model.parameters()

    monkeypatch.setattr(TrainStep, "__init__", remember)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)


@pytest.mark.usefixtures("given_gradients")
@pytest.mark.parametrize("obstacle", ["", "Triton is not installed"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name: str, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors raise on .item(), .tolist(), boolean indexing, nonzero and bincount; no GPU is needed.

    With the kernels as the opaque operations that they are registered as, and with their references in their place.
    """
    monkeypatch.setattr(door, "OBSTACLE", obstacle)
    with FakeTensorMode():
        step, rows = program(METHODS[name], torch.device("cuda"))
        for _ in range(2):
            report = step(rows())
        assert report.terms["total"].device.type == "cuda"


def whole(options: MethodConfig, device: torch.device) -> Program:
    """A step with all that the loop adds to it: sampling, reading, sums and evaluation."""
    step, _ = program(options, device)
    needs = step.method.needs
    unlabeled = 4 if needs.unlabeled else 0
    batches = Batches(np.arange(30), np.arange(300), seed=0, labeled_rows=4, unlabeled_rows=unlabeled)
    images = torch.zeros(300, 32, 32, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(300, dtype=torch.int64, device=device)

    def predict(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = step.forward(step.state.average.model, normalise(batch, *statistics, torch.float32))
        return outputs.logits | {step.method.predicts: step.method.logits(step.state.method, outputs)}

    statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
    source = Mock(read=lambda ids, out: torch.index_select(images, 0, ids, out=out))
    return Program(
        step,
        source,
        batches,
        layout=RowLayout(4, unlabeled, needs.strong_views),
        images=torch.empty(4 + unlabeled, 32, 32, 3, dtype=torch.uint8, device=device),
        labels=labels,
        interval=Interval(labels, 10),
        evaluations=[
            Evaluation(EvalSet("test", images, labels), predict, names=needs.heads, classes=10, batch=64, rank=0)
        ],
        levels=[],
        why="",
        seed=0,
        say=Mock(),
    )


class Uploads(TorchDispatchMode):
    """Copies of host memory to the device: a graph would keep their first values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_cuda:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            if any(tensor.device.type == "cpu" and tensor.ndim for tensor in tensors):
                self.found.append(str(func))
        return out


@pytest.mark.usefixtures("given_gradients")
@pytest.mark.parametrize("obstacle", ["", "Triton is not installed"])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_graph_holds_neither_waits_nor_copies_from_the_host(
    name: str, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole work of a step and of an evaluation, and the orders that are made between steps."""
    monkeypatch.setattr(door, "OBSTACLE", obstacle)
    with FakeTensorMode():
        steps = whole(METHODS[name], torch.device("cuda"))
        for step in range(2):
            steps.draws.renew(step)
            steps.work()  # the first one makes constant tables
            steps.evaluations[0].one_batch()
        with Uploads() as uploads:
            steps.draws.renew(100_000)
            steps.work()
            steps.evaluations[0].one_batch()
        assert uploads.found == []
        with uploads:
            torch.zeros(2, device="cuda") + torch.tensor([1, 2]).to("cuda")
        assert uploads.found, "the check can fail"


@pytest.mark.usefixtures("given_gradients")
def test_the_check_above_notices_a_wait() -> None:
    with FakeTensorMode():
        step, rows = program(METHODS["semi"], torch.device("cuda"))
        update = step.method.update

        def waiting(state: Any, pending: Any, at: Any) -> None:
            update(state, pending, at)
            pending["mask"].sum().item()

        step.method.update = waiting  # type: ignore[method-assign]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            step(rows())


class Count(TorchDispatchMode):
    """How many operations are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_the_bank_and_its_labels_cost_few_operations() -> None:
    """SeMi's own part of a step, by count: the released code's loop dispatches 1,400 operations for a filling bank."""
    step, rows = program(METHODS["semi"], torch.device("cpu"))
    s, batch = step.state, rows()
    outputs = step.forward(s.model, step.make_views(batch))
    with Count() as loss_ops:
        loss = step.method.loss(s.method, batch, outputs, s.step)
    with Count() as update_ops:
        step.method.update(s.method, loss.pending | loss.totals, s.step)
    assert loss_ops.operations < 220
    assert update_ops.operations < 120
