"""Sources with host I/O: the rows of the next step are fetched by a thread while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from semi_fast.prepared.manifest import Manifest

PATIENCE_SECONDS = 120.0
"""For the rows of one step; a first one may wait for compilers."""


class HostRows(Protocol):
    """Decodes rows of a step on the host."""

    def fetch(self, step: int) -> np.ndarray:
        """uint8 [n, H, W, 3] of the step; steps mostly come one after the other."""
        ...

    def close(self) -> None:
        """End threads and let go of files."""
        ...


@runtime_checkable
class DeviceRows(HostRows, Protocol):
    """Decodes rows of a step on the GPU."""

    def fetch_into(self, step: int, out: Tensor) -> None:
        """As `fetch`, into uint8 [n, H, W, 3] on the device; done, on the current stream, when it returns."""
        ...


class MappedRows:
    """Rows gathered from the resident arrays on the disk."""

    def __init__(self, manifest: Manifest, order: Callable[[int], np.ndarray]):
        self.train, self.unlabeled = (manifest.verified_images(part) for part in ("train", "unlabeled"))
        self.order = order

    def fetch(self, step: int) -> np.ndarray:
        ids = self.order(step)
        rows = np.empty((len(ids), *self.train.shape[1:]), np.uint8)
        inside = ids < len(self.train)
        rows[inside] = self.train[ids[inside]]
        rows[~inside] = self.unlabeled[ids[~inside] - len(self.train)]
        return rows

    def close(self) -> None:
        """Nothing to end."""


class HostSource:
    """A source of `rows`, one step ahead; through pinned memory to a GPU, or through its own if it decodes them."""

    def __init__(self, rows: HostRows, device: torch.device, description: str, *, on_device: bool = False):
        """`on_device`: `rows` are `DeviceRows` and the device decodes."""
        self.rows, self.device, self.description = rows, device, description
        self.on_device = on_device
        use = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rows", initializer=use)
        self.ahead: tuple[int, Future[Tensor]] | None = None
        cuda = device.type == "cuda"
        self.copied = [torch.cuda.Event(blocking=True) for _ in range(2)] if cuda else []
        self.stream = torch.cuda.Stream(device) if cuda else None  # the thread's: it must not queue behind the steps
        self.staged: list[Tensor] = []  # two, used in turn

    def stage(self, out: Tensor) -> None:
        """Make the two buffers between thread and step; here, as none may be made while a step is captured."""
        if self.copied and not self.staged:
            here = out.device if self.on_device else torch.device("cpu")
            pinned = not self.on_device
            self.staged = [torch.empty(out.shape, dtype=out.dtype, device=here, pin_memory=pinned) for _ in range(2)]
            if self.on_device and self.stream is not None:  # queued work may still use what was in this memory before
                self.stream.wait_stream(torch.cuda.current_stream(out.device))

    def load(self, step: int) -> Tensor:
        """The rows of `step`, ready to be copied; in the thread."""
        if not self.copied:
            return torch.from_numpy(self.rows.fetch(step))
        staged = self.staged[step % 2]
        self.copied[step % 2].synchronize()  # the copy of two steps ago: this thread waits, not the one that steps
        if not self.on_device:
            return staged.copy_(torch.from_numpy(self.rows.fetch(step)))
        assert isinstance(self.rows, DeviceRows)
        with torch.cuda.stream(self.stream):
            self.rows.fetch_into(step, staged)
        return staged

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Nothing left to do on the device."""

    def fetch(self, step: int, out: Tensor) -> None:
        """See `source.Source`. RuntimeError if the rows do not come in time; an error of the thread is raised here."""
        self.stage(out)
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self.load, step)
        try:
            rows = self.ahead[1].result(timeout=PATIENCE_SECONDS)
        except FutureTimeout:
            raise RuntimeError(
                f"data.source: the rows of step {step} did not come within {PATIENCE_SECONDS:.0f} s "
                f"({self.description}); try --data.source=resident"
            ) from None
        out.copy_(rows, non_blocking=True)
        if self.copied:
            self.copied[step % 2].record()
        self.ahead = step + 1, self.thread.submit(self.load, step + 1)

    def close(self) -> None:
        """See `source.Source`."""
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.rows.close()
