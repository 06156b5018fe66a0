"""Say what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "timm", "numpy", "accelerate", "safetensors", "pillow")
FFCV_SYSTEM = "apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++"
DALI_COMMAND = "pip install 'semi-fast[dali]'"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run() -> None:
    """Print one line for each part, `ok` or `missing`, and below a missing one what to run."""
    print(f"semi_fast {installed('semi-fast')}, Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        show(name, lambda name=name: installed(name), f"pip install {name}")
    show(
        "GPU",
        gpu,
        "nothing to install: training runs on the CPU; a GPU needs NVIDIA's driver and a CUDA build of torch",
    )
    show("kernels", kernels, "pip install 'triton>=3.6'  (it comes with CUDA builds of torch on Linux)")
    show("CPU views", lambda: f"compiled by numba {imported('numba', 'numba')}", "pip install 'semi-fast[cpu]'")
    show("FFCV", ffcv, f"{FFCV_SYSTEM} && pip install 'semi-fast[ffcv]'")
    show("DALI", lambda: imported("nvidia.dali", "nvidia-dali-cuda130"), DALI_COMMAND)


def show(name: str, look: Callable[[], str], remedy: str) -> None:
    """One line; `look` gives what was found, or raises with what is wrong."""
    try:
        print(f"  ok       {name:12} {look()}")
    except (PackageNotFoundError, ImportError, RuntimeError, OSError) as error:
        print(f"  missing  {name:12} {' '.join(str(error).split())}")
        print(f"           {'':12} {remedy}")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise PackageNotFoundError(f"{name} is not installed") from None


def imported(module: str, package: str) -> str:
    """The version of a package whose module can really be imported."""
    found = installed(package)
    importlib.import_module(module)
    return found


def gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"


def kernels() -> str:
    import torch

    from semi_fast.ops.door import OBSTACLE, backend

    if OBSTACLE:
        raise RuntimeError(f"{OBSTACLE}; reference operations are used")
    return backend(torch.device("cuda"))


def ffcv() -> str:
    """FFCV with the threading layer that numba would use: two loaders at once need tbb or omp."""
    found = imported("ffcv.loader", "ffcv")
    if shutil.which("g++") is None:
        found += " (built; no g++ here to build it again)"
    numba = sys.modules["numba"]
    return f"{found}, numba {numba.__version__}, threading layer {numba.config.THREADING_LAYER}"
