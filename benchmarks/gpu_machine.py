"""What the GPU itself gives a step: convolutions, normalisation, a graph's nodes, and a value read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.gpu_rows import Row, Setting, measured, not_run
from benchmarks.measure import Work
from semi_fast.models import make_classifier
from semi_fast.schema.model import ModelConfig

CALLS = 10  # of a convolution in one graph, over two sets of tensors
NODES = 250
REPEATS = 15
COPIED = 2**30  # bytes


class Convolution(NamedTuple):
    """One of the network's, with the side of the image that it is given."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int

    def __str__(self) -> str:
        return f"conv {self.kernel}x{self.kernel} {self.inputs}->{self.outputs} /{self.stride} at {self.side} px"


def convolutions(model: str, side: int) -> list[Convolution]:
    """The distinct ones of a network, in its order."""
    network = make_classifier(ModelConfig(name=model), 10, ("head",), (side, side)).eval()
    found: dict[Convolution, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        channels = module.in_channels, module.out_channels
        found[Convolution(*channels, module.kernel_size[0], module.stride[0], inputs[0].shape[-1])] = None

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return list(found)


def machine(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = setting.cuda, False
    batch = setting.pick(256, 2)
    names = convolutions(*(("wrn_10_1", 16) if setting.small else ("wrn_28_2", 32)))
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    yield from copies(setting)
    for convolution in names:
        yield from passes(convolution, batch, dtype, setting)
    yield from normalisation(batch, dtype, setting)
    if not setting.cuda:
        yield not_run("graph node, value read back", "a cpu has no CUDA graphs")
        return
    yield from nodes(setting)


def seconds_of(call: Callable[[], object], calls: int, setting: Setting) -> list[float]:
    """Of one of the `calls` that `call` makes, captured where graphs are."""
    work = Work([call], calls_per_phase=calls)
    if setting.cuda:
        work = measure.captured(work)
    return measure.time_interleaved({"call": work}, setting.pick(REPEATS, 1), setting.device)["call"]


def copies(setting: Setting) -> Iterator[Row]:
    source = torch.randint(256, (setting.pick(COPIED, 2**16),), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), 1, setting)
    rates = [2 * source.numel() / s / 1e9 for s in seconds]
    yield measured("copy within the device", rates, "GB/s", setting, note="read and written bytes")


def passes(convolution: Convolution, batch: int, dtype: torch.dtype, setting: Setting) -> Iterator[Row]:
    """Forward, gradient of the input and of the weight, channels_last."""
    c, pad = convolution, convolution.kernel // 2

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=setting.device, dtype=dtype)
        return values.to(memory_format=torch.channels_last)

    images = [drawn(batch, c.inputs, c.side, c.side) for _ in range(2)]
    weight = drawn(c.outputs, c.inputs, c.kernel, c.kernel)
    outputs = [drawn(*torch.conv2d(image, weight, None, c.stride, pad).shape) for image in images]
    flop = 2 * outputs[0].numel() * c.inputs * c.kernel**2
    calls = setting.pick(CALLS, 2)

    def forward() -> None:
        for i in range(calls):
            torch.conv2d(images[i % 2], weight, None, c.stride, pad)

    where = [c.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1

    def backward(mask: list[bool]) -> Callable[[], None]:
        def call() -> None:
            for i in range(calls):
                tensors = outputs[i % 2], images[i % 2], weight
                torch.ops.aten.convolution_backward(*tensors, None, *where, mask)

        return call

    kinds = {"forward": forward, "input": backward([True, False, False]), "weight": backward([False, True, False])}
    for kind, call in kinds.items():
        if kind == "input" and c.inputs == 3:  # the images need none
            continue
        rates = [flop / s / 1e12 for s in seconds_of(call, calls, setting)]
        yield measured(f"{c}, {kind}", rates, "TFLOP/s", setting, note=f"{batch} images, {dtype}, NHWC")


def normalisation(batch: int, dtype: torch.dtype, setting: Setting) -> Iterator[Row]:
    """Batch normalisation and LeakyReLU in training, as dispatched; bytes as a fused form would move them."""
    channels, side = setting.pick(32, 4), setting.pick(32, 4)
    norm = nn.BatchNorm2d(channels).to(setting.device)
    shape = batch, channels, side, side
    images = torch.randn(*shape, device=setting.device, dtype=dtype).to(memory_format=torch.channels_last)
    images.requires_grad_()
    gradient = torch.randn_like(images).detach()
    size = images.numel() * images.element_size()

    def forward() -> Tensor:
        return nn.functional.leaky_relu(norm(images), 0.1)

    def both() -> None:
        torch.autograd.grad(forward(), [images, *norm.parameters()], gradient)

    for kind, call, moved in (("forward", forward, 3), ("forward and backward", both, 8)):
        rates = [moved * size / s / 1e9 for s in seconds_of(call, 1, setting)]
        note = f"{list(shape)} {dtype}; {moved} passes over the tensor are counted"
        yield measured(f"batch normalisation and LeakyReLU, {kind}", rates, "GB/s", setting, note=note)


def nodes(setting: Setting) -> Iterator[Row]:
    """A graph of tiny kernels one after the other, and what reading a value costs beside it."""
    value = torch.zeros(1, device=setting.device)

    def tiny() -> None:
        for _ in range(NODES):
            value.add_(1)

    graph = measure.captured(Work([tiny], calls_per_phase=NODES))
    seconds = measure.time_interleaved({"node": graph}, REPEATS, setting.device)["node"]
    yield measured("node of a graph", [1e6 * s for s in seconds], "us", setting, note=f"{NODES} nodes in a row")
    replay = graph.phases[0]
    idle, queued, drained = [], [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        idle.append(wall(value.item))
        replay()
        queued.append(wall(value.item))
        replay()
        drained.append(wall(torch.cuda.synchronize))
    yield measured(".item() with an idle queue", [1e6 * s for s in idle], "us", setting, note="wall")
    note = (
        f"wall, behind {NODES} nodes; waiting for these alone takes {1e6 * sorted(drained)[len(drained) // 2]:.0f} us"
    )
    yield measured(".item() with a busy queue", [1e6 * s for s in queued], "us", setting, note=note)


def wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
