"""Image files decoded on every core, by processes of limited memory that a damaged file may end, not the command."""

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

from semi_fast.data_prep.readers.image_file import ImageRead, Recipe, read_image
from semi_fast.data_prep.readers.kept_chunks import CHUNK_IMAGES, KeptChunks, identity

SHOWN = 20
CHUNKS_AHEAD = 3  # for each process
MEMORY_LIMIT_BYTES = 2**31  # that a decoding process may add; an image of 64 megapixels takes half of it at most


class BadImagesError(ValueError):
    """Files that are no usable images, each with the reason, of so many files."""

    def __init__(self, bad: dict[Path, str], files: int):
        lines = [f"{str(path)!r}: {reason}" for path, reason in list(bad.items())[:SHOWN]]
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        way_out = "repair or remove them (or --on-bad skip)"
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
        raise BadImagesError(bad, source["files"])
    source |= {"sha256": digest.hexdigest(), "converted_to_rgb": {m: n for m, n in sorted(modes.items()) if m != "RGB"}}


def _decoded(
    raw: Path, files: dict[str, list[str]], recipe: Recipe, kept: Path | None
) -> Generator[tuple[str, list[str], list[ImageRead]], None, None]:
    """(part, names, what became of them) in order, decoded on every core and a few chunks ahead of the reader.

    The processes end with this generator and with their parent, however that ends. RuntimeError when one of them dies.
    """
    processes = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads that show progress
    pending: deque[tuple[str, list[str], Callable[[], list[ImageRead]]]] = deque()
    with ExitStack() as stack:
        store = stack.enter_context(closing(KeptChunks(kept, recipe.resolution))) if kept else None
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare_process)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            for place, (part, names) in enumerate(_chunks(files)):
                pending.append((part, names, _begun(pool, store, place, raw, names, recipe)))
                if len(pending) > CHUNKS_AHEAD * processes:
                    part, names, result = pending.popleft()
                    yield part, names, result()
            for part, names, result in pending:
                yield part, names, result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that decodes images was ended, as happens when memory is short; try again"
            ) from error


def _chunks(files: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    for part, names in files.items():
        for first in range(0, len(names), CHUNK_IMAGES):
            yield part, names[first : first + CHUNK_IMAGES]


def _begun(
    pool: ProcessPoolExecutor, store: KeptChunks | None, place: int, raw: Path, names: list[str], recipe: Recipe
) -> Callable[[], list[ImageRead]]:
    """Waits for the images when called; they are read from `store`, or decoded and put there."""
    files = identity(raw, names, recipe) if store else b""
    found = store.load(place, files, len(names)) if store else None
    if found is not None:
        return lambda: found
    future = pool.submit(_decode_chunk, str(raw), names, recipe)

    def result() -> list[ImageRead]:
        decoded = future.result()
        if store:
            store.store(place, files, decoded)
        return decoded

    return result


def _decode_chunk(raw: str, names: list[str], recipe: Recipe) -> list[ImageRead]:
    return [read_image(Path(raw, name), recipe) for name in names]


def _prepare_process() -> None:
    """Of a decoding process: Ctrl-C is its parent's matter, whom it does not outlive, and its memory is limited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("ignore")  # Pillow warns of what is refused here, or of harmless metadata
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
