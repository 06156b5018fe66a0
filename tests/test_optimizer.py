"""The update rule against a loop written by hand in float64: decay, momentum, learning rate, average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from semi_fast.batch import Outputs, RowLayout, Rows
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.step import NEVER, TrainState, TrainStep, make_optimizer
from semi_fast.methods import make_method
from semi_fast.schema.method import MethodConfig
from semi_fast.schema.model import EmaConfig, OptimConfig

D = torch.float64
OPTIM = OptimConfig(steps=7, lr=0.5, momentum=0.9, weight_decay=0.1)


class Small(nn.Module):
    """A linear map behind a normalisation: weights of two axes, of one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(5, dtype=D), nn.Linear(5, 3, dtype=D)

    def forward(self, x: torch.Tensor) -> Outputs:
        features = self.bn(x)
        return Outputs(features, {"head": self.linear(features)})


def fresh(model: nn.Module) -> TrainState:
    return TrainState(
        model=model,
        average=WeightAverage(model),
        optimizer=make_optimizer(model, OPTIM, torch.device("cpu")),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        method={},
        step=torch.zeros((), dtype=torch.int64),
        bad_step=torch.full((), NEVER),
    )


ROWS = Rows(
    images=torch.zeros(6, 1, 1, 3, dtype=torch.uint8),
    ids=torch.arange(6),
    visits=torch.zeros(6, dtype=torch.int64),
    labels=torch.tensor([0, 1, 2, 0, 1, 2]),
    layout=RowLayout(6, 0, 0),
)


@pytest.mark.parametrize("ramp", [False, True])
def test_three_steps_by_hand(ramp: bool) -> None:
    torch.manual_seed(0)
    model, batches = Small(), [torch.randn(6, 5, dtype=D) for _ in range(3)]
    twin = Small()
    twin.load_state_dict(model.state_dict())
    state = fresh(model)
    views = iter(batches)
    ema = EmaConfig(decay=0.8, ramp=ramp)
    method = make_method(MethodConfig(name="supervised"), steps=7)
    step = TrainStep(state, method, lambda rows: next(views), optim=OPTIM, ema=ema, precision="fp64")

    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    average = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for t, x in enumerate(batches):
        step(ROWS)
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x).logits["head"], ROWS.labels).backward()
        lr = float(torch.tensor(0.5 * math.cos(7 * math.pi * t / (16 * 7)), dtype=torch.float32))
        kept = min(0.8, 1 - 1 / (t + 1)) if ramp else 0.8
        with torch.no_grad():
            for name, p in twin.named_parameters():
                assert p.grad is not None
                gradient = p.grad + (0.1 * p if name == "linear.weight" else 0)
                velocity[name] = 0.9 * velocity[name] + gradient
                p -= lr * (gradient + 0.9 * velocity[name])  # Nesterov
                average[name] = kept * average[name] + (1 - kept) * p
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=name)
        for name, ours in state.average.model.named_parameters():
            torch.testing.assert_close(ours, average[name], rtol=1e-12, atol=1e-14, msg=name)
        for ours, current in zip(state.average.model.buffers(), model.buffers(), strict=True):
            assert torch.equal(ours, current), "buffers are copied"
    assert state.step.item() == 3
    assert state.bad_step.item() == NEVER


@pytest.mark.parametrize("spoiled", ["gradient", "outputs"])
def test_what_is_not_finite_is_noted_at_its_own_step(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Small()
    state = fresh(model)
    good = torch.randn(6, 5, dtype=D)
    views = iter([good, good if spoiled == "gradient" else good / 0, good])
    method = make_method(MethodConfig(name="supervised"), steps=7)
    step = TrainStep(state, method, lambda rows: next(views), optim=OPTIM, ema=EmaConfig(), precision="fp64")
    for t in range(3):
        if spoiled == "gradient" and t == 1:
            model.linear.bias.register_hook(lambda gradient: gradient * torch.nan)
        step(ROWS)
    assert state.bad_step.item() == 1
