"""Shared by all tests: one thread, where kernels run, and the data sets that several of them use."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Without a GPU kernels run in Triton's interpreter; with one nothing that is imported later may ask for it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read when a kernel is defined
PATIENCE = 240
"""Seconds within which what must come has come on the busiest machine: a guard against hanging, no measurement."""
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("no clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark with `gpu` what runs on a GPU: the kernels, but not what compiles them for others, and users of `device`;
    leave out there what needs the interpreter."""
    for item in items:
        if DEVICE.type == "cuda" and item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="with a GPU, Triton's interpreter is off"))
        kernel = "kernels" in item.path.parts and "spill" not in item.name
        if kernel or "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One thread; and autograd counts the devices at its first backward, so that comes before a test makes fake ones:
    threads that wait for a fake device would forbid every fork after it (tests/reliability)."""
    torch.set_num_threads(1)
    torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True, scope="session")
def few_images() -> Iterator[None]:
    """The writers of `synthetic_data` fill published layouts with fewer images than were published."""
    from semi_fast.data_prep.readers import cifar, downsampled_imagenet

    small = replace(downsampled_imagenet.load_table(), train_counts=np.full(1000, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "check_count", lambda *_: None)
        patch.setattr(downsampled_imagenet, "load_table", lambda: small)
        patch.setattr(downsampled_imagenet, "VAL_IMAGES", 1000)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits, prepared."""
    from semi_fast.data_prep.prepare import prepare_digits

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(out)
    return out


@pytest.fixture(scope="session")
def natural_images() -> np.ndarray:
    """uint8 [60, 32, 32, 3] of real photographs: crops of scikit-learn's two bundled pictures."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    pictures = load_sample_images().images
    crops = []
    for i in range(60):
        picture = pictures[i % 2][:: 1 + i % 5, :: 1 + i % 5]
        y, x = (rng.integers(0, side - 32) for side in picture.shape[:2])
        crops.append(picture[y : y + 32, x : x + 32])
    return np.stack(crops)
