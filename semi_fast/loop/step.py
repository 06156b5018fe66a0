"""One training step: the same straight line for every method, with no branch on a value of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semi_fast import processes
from semi_fast.batch import Outputs, Rows
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.schedule import cosine_7_16, ema_weight
from semi_fast.methods.base import Loss, Method, State
from semi_fast.schema.model import EmaConfig, OptimConfig

NEVER = torch.iinfo(torch.int64).max
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A function in, one that does the same out."""


@dataclass
class TrainState:
    """Everything that a step changes."""

    model: nn.Module
    average: WeightAverage
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    method: State
    step: Tensor
    """int64 scalar: steps done."""
    bad_step: Tensor
    """int64 scalar: the first step whose loss or outputs were not finite on this process, or NEVER."""

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """What a step changes beside `tensors`."""
        yield "bad_step", self.bad_step
        if self.scaler.is_enabled():
            self.scaler.scale(torch.ones((), device=self.step.device))  # which makes its tensors
            assert self.scaler._scale is not None
            assert self.scaler._growth_tracker is not None
            yield from (("scaler.scale", self.scaler._scale), ("scaler.growth", self.scaler._growth_tracker))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and storage of everything that a checkpoint holds, in a fixed order."""
        for prefix, module in (("model", self.model), ("average", self.average.model)):
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in module.state_dict().items())
        for name, parameter in self.model.named_parameters():
            yield f"momentum.{name}", self.optimizer.state[parameter]["momentum_buffer"]
        yield from ((f"method.{name}", tensor) for name, tensor in self.method.items())
        yield "step", self.step


@dataclass(frozen=True)
class StepReport:
    """What a step leaves for the loop to count; nothing has been read back."""

    terms: dict[str, Tensor]
    """Scalars of this process: `total` and the loss terms."""
    stats: dict[str, Tensor]
    """The method's, scalars too."""
    pending: State
    """What the method carried over, for the whole batch."""


def make_optimizer(model: nn.Module, options: OptimConfig, device: torch.device) -> torch.optim.SGD:
    """SGD with Nesterov momentum; its learning rate is a tensor on the device, and weights of one axis do not decay.

    The momentum begins as zeros, which makes the same first update as none and lets a checkpoint be read back.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.momentum > 0,
        fused=True,
    )
    lr = torch.tensor(options.lr, dtype=torch.float32, device=device)
    for group in optimizer.param_groups:
        group["lr"] = lr  # one tensor, written by every step
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class TrainStep:
    """Calling it with the rows of a batch does one step on `state`."""

    def __init__(
        self,
        state: TrainState,
        method: Method,
        make_views: Callable[[Rows], Tensor],
        *,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
    ):
        self.state, self.method, self.make_views = state, method, make_views
        self.optim, self.ema, self.precision = optim, ema, precision
        self.device = state.step.device.type
        self.lr: Tensor = state.optimizer.param_groups[0]["lr"]
        self.losses, self.bookkeeping = self.forward_and_loss, self.account
        self.trained: nn.Module = state.model  # the model, or what exchanges its gradients as they are made

    def forward(self, model: nn.Module, views: Tensor) -> Outputs:
        """One forward in the run's precision; features and logits come in full precision."""
        with torch.autocast(self.device, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST):
            return model(views)

    def forward_and_loss(self, rows: Rows, views: Tensor) -> tuple[Loss, list[Tensor]]:
        """The part of a step before its backward: (loss, sums that are finite only if all outputs are)."""
        s = self.state
        outputs = self.forward(self.trained, views)
        loss = self.method.loss(s.method, rows, outputs, s.step)
        sums = [tensor.detach().sum() for tensor in (outputs.features, *outputs.logits.values())]
        terms = {name: term.detach() for name, term in loss.terms.items()}  # or compiled code adds their zero gradients
        return loss._replace(terms=terms), sums

    def compile(self, compiled: Compiler) -> None:
        """From the next call on run what `compiled` makes of forward and loss, whose backward comes with them, and of
        the bookkeeping."""
        self.losses, self.bookkeeping = compiled(self.forward_and_loss), compiled(self.account)

    def overlap_exchange(self) -> None:
        """Exchange gradients in buckets while the backward goes on, not all at once behind it: for large models."""
        self.trained = DistributedDataParallel(self.state.model, broadcast_buffers=False, static_graph=True)

    def watched(self, loss: Tensor, sums: list[Tensor]) -> Tensor:
        """Scalars that are finite only if the whole step is, in one vector.

        In fp16 a gradient may overflow: that update is skipped and the scale halved, which is noted only once the scale
        has fallen below 1, where no gradient of this size should overflow any more.
        """
        s = self.state
        parts = [loss.detach(), *sums]
        if s.scaler.is_enabled():
            parts.append(torch.where(s.scaler.scale(torch.ones_like(parts[0])) < 1, torch.inf, 0.0))
        else:
            parts += torch._foreach_norm([p.grad for p in s.model.parameters() if p.grad is not None])
        return torch.stack(parts)

    def account(self, watched: Tensor, pending: State) -> Tensor:
        """All that follows the gradients and touches no weight: note the first step at which something is not finite,
        set the learning rate, change the method's state, count the step. Returns the weight of the average."""
        s = self.state
        s.bad_step.copy_(torch.where(watched.isfinite().all(), s.bad_step, torch.minimum(s.bad_step, s.step)))
        self.lr.copy_(cosine_7_16(s.step, base=self.optim.lr, steps=self.optim.steps))
        weight = ema_weight(s.step, decay=self.ema.decay, ramp=self.ema.ramp).to(s.average.averaged[0].dtype)
        self.method.update(s.method, pending, s.step)
        s.step.add_(1)
        return weight

    def __call__(self, rows: Rows) -> StepReport:
        s = self.state
        loss, sums = self.losses(rows, self.make_views(rows))

        s.optimizer.zero_grad(set_to_none=True)
        s.scaler.scale(loss.total).backward()
        if self.trained is s.model:
            processes.mean_gradients(s.model.parameters())
        pending = processes.gather_rows(loss.pending) | processes.sums(loss.totals)
        weight = self.bookkeeping(self.watched(loss.total, sums), pending)
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.average.update(weight)

        terms = {"total": loss.total.detach(), **loss.terms}
        return StepReport(terms, {name: value.detach() for name, value in loss.stats.items()}, pending)
