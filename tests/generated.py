"""Runs what Inductor writes for a GPU that is not here: its kernels in Triton's interpreter, the rest on the CPU.

`backend` is one for torch.compile. The code is that of `benchmarks.launches`, for a pretended H200; block sizes, which
a GPU would choose by timing, are small ones here.
"""

from __future__ import annotations

import itertools
import linecache
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime.triton_heuristics import GridExpr
from triton import language as tl

from benchmarks.launches import ALONE, on_cuda, pretended

NUMBERS = itertools.count()
HINT_OF = {"XBLOCK": "x", "YBLOCK": "y", "R0_BLOCK": "r0_", "R1_BLOCK": "r1_"}
MOST = {"XBLOCK": 1024, "YBLOCK": 64, "R0_BLOCK": 8, "R1_BLOCK": 8}
"""Entries of a block; the interpreter takes one after the other what a kernel combines at the end of a reduction."""
REPLACED = (
    (r"^triton_helpers\.set_driver_to_gpu\(\)$", ""),
    (r"^from torch\._inductor\.runtime import triton_helpers, triton_heuristics$",
     "from torch._inductor.runtime import triton_helpers\nfrom stand_in import triton_heuristics"),
    (r"^(from torch\._inductor\.runtime\.triton_helpers import) libdevice, (.*)$",
     r"\1 \2\nfrom stand_in import libdevice"),
    (r"^async_compile = AsyncCompile\(\)$", "from stand_in import async_compile"),
    (r"^empty_strided_cuda = .*$", "from stand_in import empty_strided_cuda"),
    (r"with torch\.cuda\._DeviceGuard\(0\):", "if True:"),
    (r"torch\.cuda\.set_device\(0\)", "pass"),
    (r"get_raw_stream\(0\)", "0"),
)  # fmt: skip
"""In generated code, what a GPU has and the interpreter has not."""


class Kernel:
    """In place of Inductor's launcher: one configuration of blocks, and the grid that Inductor computes for it."""

    def __init__(self, function: Any, options: dict[str, Any]):
        self.function, self.meta, self.types = function, options["inductor_meta"], options["triton_meta"]["signature"]
        hints = options.get("size_hints") or {}
        wanted = [name for name, kind in self.types.items() if kind == "constexpr" and name in HINT_OF]
        self.blocks = {}
        for name in wanted:
            hint = triton.next_power_of_2(int(hints.get(HINT_OF[name], 64)))
            self.blocks[name] = min(hint, MOST[name])

    def run(self, *values: Any, stream: int) -> None:
        given = dict(zip((name for name in self.types if name not in HINT_OF), values, strict=True)) | self.blocks
        grid = GridExpr.from_meta(self.meta, triton.Config(self.blocks), mode="python").eval_slow(given)
        self.function[tuple(grid)](**given)


class Heuristics:
    """Every decorator of torch._inductor.runtime.triton_heuristics."""

    def __getattr__(self, _: str) -> Callable[..., Any]:
        return lambda **options: lambda function: Kernel(function, options)


class Libdevice:
    """The functions of the GPU's library, by those of Triton's own, which the interpreter replaces while it runs."""

    def rsqrt(self, x: Any) -> Any:
        return 1 / tl.sqrt(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(tl.math, name)


def poisoned(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that nothing has written: NaN."""
    return torch.empty_strided(shape, strides, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 1)


def loaded(code: str) -> ModuleType:
    """Generated code as a module; Triton reads the source of its kernels."""
    for pattern, replacement in REPLACED:
        code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
    name = f"<generated {next(NUMBERS)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    module = ModuleType(name)
    module.__file__ = name
    exec(compile(code, name, "exec"), module.__dict__)
    return module


stand_in: Any = ModuleType("stand_in")
stand_in.triton_heuristics = Heuristics()
stand_in.libdevice = Libdevice()
stand_in.async_compile = SimpleNamespace(
    triton=lambda name, code, **_: getattr(loaded(code), name), wait=lambda _: None
)
stand_in.empty_strided_cuda = poisoned
sys.modules["stand_in"] = stand_in


def backend(options: dict[str, Any], codes: list[str]) -> Callable[..., Any]:
    """For torch.compile: Inductor with these options; `codes` gets what it writes."""

    def inner(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        with pretended(made := []):
            compile_fx_inner(*on_cuda(graph, inputs), **kwargs)
        (code,) = made
        codes.append(code)
        call = loaded(code).call
        run: Any = lambda values: call(list(values))  # noqa: E731, which takes an attribute
        run._boxed_call = True
        return run

    def compiled(graph: Any, inputs: Any) -> Any:
        with functorch.patch(force_non_lazy_backward_lowering=True), inductor.patch(options | ALONE):
            return compile_fx(graph, inputs, inner_compile=inner)

    return compiled
