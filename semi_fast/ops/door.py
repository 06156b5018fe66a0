"""What every operation checks before it computes, and whether its Triton kernel can run."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLDEST_TRITON = (3, 6)
LARGEST = {"bank_push": 4096, "embedding_align": 16_384, "masked_cross_entropy": 8192, "pseudo_label": 2048}
"""Classes, features, or slots and rows (bank_push) that a kernel takes. One block holds them all: of the next power of
two it spills registers on sm_80 or sm_90 (pseudo_label 1 to 40 KB at 4,096, by the number of warps)."""
BY_CLASS = ("masked_cross_entropy", "pseudo_label")


def find_obstacle() -> str:
    """Why no kernel can be compiled here; empty where they can."""
    try:
        triton = import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    numbers = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])
    if numbers >= OLDEST_TRITON:
        return ""
    return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"


OBSTACLE = find_obstacle()


def has_kernel(device: torch.device) -> bool:
    """Whether operations on `device` run their kernels; elsewhere their references run."""
    return device.type == "cuda" and not OBSTACLE


def numbered(device: torch.device) -> torch.device:
    """The device with its number, as tensors on it have it and as torch.cuda.set_device demands it.

    accelerate leaves it out where one process has the first GPU.
    """
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def fits(operation: str, entries: int) -> bool:
    """Whether its kernel takes so many; its reference takes more."""
    return entries <= LARGEST[operation]


@cache
def find_numba_obstacle() -> str:
    """Why views cannot be compiled for a CPU; empty where they can. Imports numba: asked only where they are made."""
    try:
        numba = import_module("numba")
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""


def has_compiled_views(device: torch.device) -> bool:
    """Whether views on `device` are made by the code that numba compiles."""
    return device.type == "cpu" and not find_numba_obstacle()


def values_at_hand(device: torch.device) -> bool:
    """Whether the host may look at values on `device` without waiting; elsewhere, and for a compiler, shapes must be
    fixed."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def backend(device: torch.device, classes: int = 0) -> str:
    """One line for logs: what the operations run on `device` with so many classes, and why no kernels."""
    if has_kernel(device):
        large = [f"{name} (kernel up to {LARGEST[name]:,})" for name in BY_CLASS if not fits(name, classes)]
        references = f"; {classes:,} classes: the reference of {', '.join(large)}" if large else ""
        return f"Triton {import_module('triton').__version__} kernels{references}"
    line = f"reference operations, no kernels: {OBSTACLE or f'the device is {device.type}, not CUDA'}"
    if has_compiled_views(device):
        return f"{line}; views compiled by numba {import_module('numba').__version__}"
    return f"{line}; views not compiled: {find_numba_obstacle()}" if device.type == "cpu" else line


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def expect(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: Collection[torch.dtype], device: torch.device
) -> None:
    """Raise ValueError with the argument's name unless shape (None: any size), dtype and device are as given."""
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device:
        return
    fits = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}]; got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}; got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}; got {tensor.device}")
