"""Pixels that a killed preparation has written, taken up by the next one instead of being read and converted again."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers.resident import npy_header, part_lengths
from semi_fast.disk import named
from semi_fast.prepared.manifest import images_file

LOG_FILE = "blocks.log"
ENTRY = struct.Struct("<I32s")


def with_written(raw: Raw, root: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The blocks of `raw`, the first of them from the arrays under `root`, where a log says that they hold them.

    The log has an entry for each block: its rows, and SHA-256 over what the raw data is and the block. Nothing need be
    synced: from the first block that was changed, cut or never written on, `raw` is read.
    """
    if raw.blocks_after is None:
        yield from raw.blocks
        return
    descriptor = os.open(root / LOG_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as log:
        done = at = 0
        while (entry := log.read(ENTRY.size)) and len(entry) == ENTRY.size:
            rows, digest = ENTRY.unpack(entry)
            found = _written(raw, root, done, rows)
            if found is None or _digest(raw, found[1]) != digest:
                break
            yield found
            done, at = done + rows, at + ENTRY.size
        log.seek(at)
        for part, block in raw.blocks_after(done):
            yield part, block
            with named(root / LOG_FILE, "write"):
                log.write(ENTRY.pack(len(block), _digest(raw, block)))  # its reader has written it by now


def _written(raw: Raw, root: Path, first: int, rows: int) -> tuple[str, np.ndarray] | None:
    """So many rows behind the first ones, counted through all parts; None where they are not there."""
    for part, length in part_lengths(raw).items():
        if first < length:
            path, shape = root / images_file(part), (length, *raw.resolution, 3)
            row_bytes, offset = math.prod(shape[1:]), len(npy_header(shape, "uint8"))
            if not 0 < rows <= length - first or not path.is_file():
                return None
            found = np.fromfile(path, np.uint8, rows * row_bytes, offset=offset + first * row_bytes)
            return (part, found.reshape(rows, *shape[1:])) if len(found) == rows * row_bytes else None
        first -= length
    return None


def _digest(raw: Raw, block: np.ndarray) -> bytes:
    digest = hashlib.sha256(raw.identity)
    digest.update(np.ascontiguousarray(block).data)
    return digest.digest()
