"""Image files decoded on every core by processes of limited memory: a damaged file may end one, but not the command."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from semi_fast.data_prep.readers.image_file import Accepted, ImageRead, Recipe, read_image
from semi_fast.data_prep.readers.kept_chunks import CHUNK_IMAGES, KeptChunks, identity

SHOWN = 20
CHUNKS_AHEAD = 3  # for each process
SECONDS_FOR_A_FILE = 120
MEMORY_LIMIT_BYTES = 2**31  # that a decoding process may add; an image of 64 megapixels takes half of it at most


class BadImagesError(ValueError):
    """Files that are no usable images, each with the reason, of so many files."""

    def __init__(self, bad: dict[Path, str], files: int, accepted: Accepted):
        lines = [f"{str(path)!r}: {reason}" for path, reason in list(bad.items())[:SHOWN]]
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        way_out = "repair or remove them" + ("" if accepted.on_bad == "skip" else " (or --on-bad skip)")
        super().__init__(f"{len(bad)} files are no usable images, {way_out}: {'; '.join(lines)}{more}")
        self.bad, self.files = bad, files


def decoded_blocks(
    raw: Path, files: dict[str, list[str]], recipe: Recipe, source: dict[str, Any], kept: Path | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(part, uint8 [m, resolution, resolution, 3]) of the files of each part, whose paths under `raw` are given.

    BadImagesError at the end names what could not be decoded; `source["files"]` is the number of all. Puts the digest
    of all files into `source`, and how many were converted to RGB. `kept`: see KeptChunks.
    """
    digest, bad, modes = hashlib.sha256(), {}, Counter()
    with closing(_decoded(raw, files, recipe, kept)) as chunks:
        for part, names, decoded in chunks:
            for name, read in zip(names, decoded, strict=True):
                digest.update(os.fsencode(name) + b"\0" + read.sha256)
                modes[read.mode] += 1
                if isinstance(read.pixels, str):
                    bad[raw / name] = read.pixels
            if not bad:
                yield part, np.stack([read.pixels for read in decoded])  # type: ignore[arg-type]
    if bad:
        raise BadImagesError(bad, source["files"], recipe.accepted)
    source |= {"sha256": digest.hexdigest(), "converted_to_rgb": {m: n for m, n in sorted(modes.items()) if m != "RGB"}}


def _decoded(
    raw: Path, files: dict[str, list[str]], recipe: Recipe, kept: Path | None
) -> Generator[tuple[str, list[str], list[ImageRead]], None, None]:
    """(part, names, what became of them) in order, decoded a few chunks ahead of the reader."""
    pending: deque[tuple[str, list[str], Callable[[], list[ImageRead]]]] = deque()
    with ExitStack() as stack:
        store = stack.enter_context(closing(KeptChunks(kept, recipe.resolution))) if kept else None
        decoders = stack.enter_context(closing(Decoders()))
        for place, (part, names) in enumerate(_chunks(files)):
            pending.append((part, names, _begun(decoders, store, place, raw, names, recipe)))
            if len(pending) > CHUNKS_AHEAD * decoders.processes:
                part, names, result = pending.popleft()
                yield part, names, result()
        for part, names, result in pending:
            yield part, names, result()


def _chunks(files: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    for part, names in files.items():
        for first in range(0, len(names), CHUNK_IMAGES):
            yield part, names[first : first + CHUNK_IMAGES]


def _begun(
    decoders: Decoders, store: KeptChunks | None, place: int, raw: Path, names: list[str], recipe: Recipe
) -> Callable[[], list[ImageRead]]:
    """Waits for the images when called; they are read from `store`, or decoded and put there."""
    files = identity(raw, names, recipe) if store else b""
    found = store.load(place, files, len(names)) if store else None
    if found is not None:
        return lambda: found
    begun = decoders.begin(raw, names, recipe)

    def result() -> list[ImageRead]:
        decoded = begun()
        if store:
            store.store(place, files, decoded)
        return decoded

    return result


class Decoders:
    """Processes on every core; one that a file ends is replaced, and the file is named.

    They end with `close` and with their parent, however that ends.
    """

    def __init__(self) -> None:
        self.processes = len(os.sched_getaffinity(0))
        self.pool = _started(self.processes)
        self.alone: ProcessPoolExecutor | None = None

    def begin(self, raw: Path, names: list[str], recipe: Recipe) -> Callable[[], list[ImageRead]]:
        """Begin to decode files; waits for them when called."""
        arguments = str(raw), recipe, SECONDS_FOR_A_FILE
        try:
            future = self.pool.submit(_decode, names, *arguments)
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = _started(self.processes)
            future = self.pool.submit(_decode, names, *arguments)

        def result() -> list[ImageRead]:
            try:
                return future.result()
            except BrokenProcessPool:  # which ends all that was begun, whoever was to blame
                return [self._decode_alone(name, *arguments) for name in names]

        return result

    def _decode_alone(self, name: str, raw: str, recipe: Recipe, seconds: int) -> ImageRead:
        if self.alone is None:
            self.alone = _started(1)
        try:
            return self.alone.submit(_decode, [name], raw, recipe, seconds).result()[0]
        except BrokenProcessPool:
            self.alone.shutdown()
            self.alone = None
            return ImageRead(b"", f"ended its decoder, or took it more than {seconds} s or too much memory", "")

    def close(self) -> None:
        for pool in (self.pool, self.alone):
            if pool is not None:
                pool.shutdown(cancel_futures=True)


def _started(processes: int) -> ProcessPoolExecutor:
    """RuntimeError where not even a start succeeds, so that it is not put down to a file."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads that show progress
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare_process)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the processes that decode images do not start: memory is short, or they were started by a script that "
            "does not guard what it runs by `if __name__ == '__main__':`"
        ) from error
    return pool


def _decode(names: list[str], raw: str, recipe: Recipe, seconds: int) -> list[ImageRead]:
    """In a process of its own: the kernel ends it with a file that takes longer than that."""
    found = []
    for name in names:
        signal.alarm(seconds)
        found.append(read_image(Path(raw, name), recipe))
    signal.alarm(0)
    return found


def _prepare_process() -> None:
    """Of a decoding process: Ctrl-C is its parent's matter, whom it does not outlive, and its memory is limited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("ignore")  # Pillow warns of what is refused here, or of harmless metadata
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
