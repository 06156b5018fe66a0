"""How many kernels a compiled and captured step launches on a GPU, by kind; counted on any machine.

    python -m benchmarks.launches --out benchmarks/results/launches.csv

The program of a run is built on the CPU. What its parts are compiled to is Inductor's code for a pretended H200, made
and never run: its calls are counted, a convolution's backward as the one or two gradients that it is asked for. What is
dispatched beside the compiled parts counts one launch an operation, as the multi-tensor operations of torch take one
with CUDA 13 for as many tensors as a network has here; a kernel of this project counts what `LAUNCHES_OF` says. What a
library launches behind one call (split convolutions, changes of layout) does not show. `evaluation` is one forward of
it, and no part of `step`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import argparse
import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import torch.utils._triton
from torch._functorch import config as functorch
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from benchmarks import measure
from benchmarks.operations import CPU, as_on_a_gpu
from benchmarks.step_cases import Shape, configured, data_of, open_program
from semi_fast.loop.levels import Level, inductor_options
from semi_fast.loop.step import Compiler

CUDA = torch.device("cuda", 0)
CUDNN = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150_110_011_392, warp_size=32,
    regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2_048, max_threads_per_block=1_024,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    L2_cache_size=62_914_560, gcnArchName="",
)  # fmt: skip
"""Of the device that Inductor is told of."""
ALONE = {"compile_threads": 1, "force_disable_caches": True}
"""Inductor's options that let no other process compile, and no run meet, what cannot run."""
LAUNCHES_OF = {"semi_fast.rand_augment": 2, "semi_fast.pseudo_label": 2, "aten._foreach_norm": 2, "aten.index_put_": 11}
"""Of operations that launch more than one kernel: a pass for each of two; the counts' zeros; the sums of the parts; a
sort and what it needs, about as many."""
KINDS = {"sample": "sampling", "forward_and_loss": "forward", "account": "bookkeeping", "add_stacked": "interval"}
"""By the name of a compiled function."""
STEP = ("sampling", "views", "forward", "backward", "watch", "optimizer", "average", "bookkeeping", "interval", "other")
METHODS = {
    "supervised+la": ["--method.name=supervised", "--method.plugins=[la]"],
    "fixmatch": ["--method.name=fixmatch"],
    "semi": ["--method.name=semi"],
}
CALL = re.compile(r"^\s+(?:\w+ = )?((?:extern_kernels|torch\.ops|aten|triton_|combo_)[\w.]+)\((.*)$", re.MULTILINE)
GRADIENTS = re.compile(r"\[(True|False), (True|False), (True|False)\]")
Counts = Counter[str]


def launches(name: str, arguments: str = "") -> int:
    """Of one call in generated code, or of one dispatched operation `torch.ops.space.name.overload`."""
    if "convolution_backward" in name and (asked := GRADIENTS.search(arguments)):
        return asked[0].count("True")
    return LAUNCHES_OF.get(".".join(name.removeprefix("torch.ops.").split(".")[:2]), 1)


@contextmanager
def pretended(codes: list[str]) -> Iterator[None]:
    """Inductor believes in an H200 and writes its code, kept in `codes`, for it."""

    def keep(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        codes.append(code.value)
        return SimpleNamespace(call=lambda _: [], __file__="")

    told: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "_get_device_properties", lambda _: H200),
        (torch.cuda, "_exchange_device", lambda _: 0),
        (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch._C, "_select_conv_backend", lambda *_, **__: CUDNN),  # which keeps NHWC
        (torch._inductor.scheduler, "has_triton", lambda: True),
        (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
        (GraphLowering, "compile_to_module", keep),
    ]
    with ExitStack() as stack:
        for owner, name, value in told:
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield


def on_cuda(graph: GraphModule, inputs: list[Any]) -> tuple[GraphModule, list[Any]]:
    """A graph that was traced on the CPU, and its inputs, as if they were traced on the GPU."""
    graph, mode = copy.deepcopy(graph), detect_fake_mode(inputs)
    assert mode is not None
    for node in graph.graph.nodes:
        node.args = tuple(CUDA if isinstance(arg, torch.device) else arg for arg in node.args)
        node.kwargs = {key: CUDA if isinstance(arg, torch.device) else arg for key, arg in node.kwargs.items()}

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    there = [moved(tensor) for tensor in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*there)
    return graph, there


def blank(tensors: Any) -> Any:
    """Zeros laid out as fake tensors are."""

    def zeros(t: Any) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_() if isinstance(t, torch.Tensor) else t

    return tree_map(zeros, tensors)


class Launches(TorchDispatchMode):
    """Counts by kind, of compiled code when it is made, of what is dispatched beside it when it is; computes nothing
    that this project's kernels or compiled code would."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.calls, self.kind = Counts(), Counts(), "other"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = str(func)
        if not (func.is_view or operation.startswith(("profiler", "aten.empty", "aten.detach"))):
            self.counts[self.kind] += launches(f"torch.ops.{operation}")
            self.calls[f"{self.kind}: {operation}"] += 1
        if not operation.startswith("semi_fast"):
            return func(*args, **(kwargs or {}))
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = func(*args, **(kwargs or {}))
        return blank(fake)

    def named(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with what it launches counted as of this kind."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.kind = self.kind, kind
            try:
                return call(*args, **kwargs)
            finally:
                self.kind = before

        return counted

    def compiler(self, options: dict[str, Any]) -> Compiler:
        """Counts what functions are compiled to, and lets them give zeros."""

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            kind = KINDS.get(function.__name__, "evaluation")
            made: list[str] = []

            def inner(graph: GraphModule, inputs: Any, **kwargs: Any) -> Callable[[Any], Any]:
                with pretended(codes := []):
                    compile_fx_inner(*on_cuda(graph, inputs), **kwargs)
                name = "backward" if kind == "forward" and made else kind
                made.extend(codes)
                for call, arguments in CALL.findall("".join(code.partition("def call(")[2] for code in codes)):
                    self.counts[name] += launches(call, arguments)
                    self.calls[f"{name}: {call}"] += 1
                (output,) = (node for node in graph.graph.nodes if node.op == "output")
                outputs = [node.meta["val"] if isinstance(node, Node) else node for node in output.args[0]]
                run: Any = uncounted(lambda _: blank(outputs))
                run._boxed_call = True  # it is given one list
                return run

            def backend(graph: GraphModule, inputs: Any) -> Any:
                with functorch.patch(force_non_lazy_backward_lowering=True), inductor.patch(options):
                    return compile_fx(graph, inputs, inner_compile=cast(Any, inner))

            whole = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
            return uncounted(self.named(kind, whole))

        return compiled


def uncounted(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose operations are counted where they are compiled."""

    def unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return call(*args)

    return unseen


def count(flags: list[str], model: str = "wrn_28_2", **options: Any) -> Launches:
    """Of a step and of one forward of an evaluation, at level graph with compiled parts; `options` are Inductor's."""
    shape = Shape(model, 32, 64, 1)
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.enter_context(as_on_a_gpu())
        manifest = stack.enter_context(data_of(shape, None, small=True))
        config = configured(shape, manifest, CPU, ["--precision=bf16", *flags])
        program = open_program(config, manifest, stack)
        step, state = program.train_step, program.train_step.state
        counting = Launches()
        step.make_views = counting.named("views", step.make_views)
        step.watched = counting.named("watch", step.watched)
        state.optimizer.step = counting.named("optimizer", state.optimizer.step)
        state.average.update = counting.named("average", state.average.update)
        program.compile(counting.compiler(inductor_options(Level(captured=True, compiled=True)) | ALONE | options))
        program.draws.renew(0)
        with counting:
            program.work()
            with torch.no_grad():
                program.evaluations[0].run()
    return counting


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calls", action="store_true", help="print every call too")
    arguments = parser.parse_args()
    provenance = measure.provenance(CPU, measure.command("benchmarks.launches", sys.argv[1:]))
    origin = {key: provenance[key] for key in ("date", "commit", "torch", "triton", "command")}
    origin["cuda"] = torch.version.cuda
    rows = []
    cases = [(name, model, {}) for name, model in (*((m, "wrn_28_2") for m in METHODS), ("semi", "wrn_10_2"))]
    for name, model, options in [*cases, ("semi", "wrn_28_2", {"combo_kernels": False})]:
        found = count(METHODS[name], model, **options)
        changed = ", ".join(f"{key} {value}" for key, value in options.items())
        row = {"method": name, "model": model, "without": changed, **table(found.counts)}
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        if arguments.calls:
            print(*(f"    {n:4d} {call}" for call, n in sorted(found.calls.items())), sep="\n")
        rows.append(row | origin)
    measure.write_csv(arguments.out, rows)


def table(counts: Mapping[str, int]) -> dict[str, int]:
    """Every kind, and their sum over a step."""
    parts = {kind: counts.get(kind, 0) for kind in STEP}
    evaluation = counts.get("evaluation", 0)
    assert sum(counts.values()) == sum(parts.values()) + evaluation, counts
    return parts | {"step": sum(parts.values()), "evaluation": evaluation}


if __name__ == "__main__":
    main()
