"""Decoded images kept in a file beside the output, so that a preparation that was killed does not decode them again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow_version

from semi_fast.data_prep.readers.image_file import ImageRead
from semi_fast.disk import named

DIGEST_BYTES = 32
MODE_BYTES = 8
HEAD_BYTES = DIGEST_BYTES + MODE_BYTES
CHUNK_IMAGES = 64


class KeptChunks:
    """A file of slots, one for each chunk of files; a slot is whole or does not count. One process has it: the one that
    holds the output.

    It begins with a digest over names, sizes and times of the files, how they were decoded, and what the slot holds:
    nothing need be synced, and whatever changed, was cut or never written is decoded again. The file goes with
    `close`; only a kill leaves it.
    """

    def __init__(self, path: Path, resolution: int) -> None:
        self.path = path
        self.resolution = resolution
        self.row_bytes = HEAD_BYTES + 3 * resolution**2
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def load(self, place: int, identity: bytes, images: int) -> list[ImageRead] | None:
        """What the slot holds of the files with this identity; None if it does not."""
        slot = os.pread(self.file, DIGEST_BYTES + images * self.row_bytes, self._offset(place))
        digest, content = slot[:DIGEST_BYTES], slot[DIGEST_BYTES:]
        if len(content) != images * self.row_bytes or digest != self._digest(identity, content):
            return None
        rows = np.frombuffer(content, np.uint8).reshape(images, self.row_bytes)
        pixels = rows[:, HEAD_BYTES:].reshape(images, self.resolution, self.resolution, 3)
        heads = [row[:HEAD_BYTES].tobytes() for row in rows]
        return [
            ImageRead(head[:DIGEST_BYTES], image, head[DIGEST_BYTES:].rstrip(b"\0").decode("ascii"))
            for head, image in zip(heads, pixels, strict=True)
        ]

    def store(self, place: int, identity: bytes, decoded: list[ImageRead]) -> None:
        """Fill a slot; one with a file that is no image stays as it is."""
        rows = [
            read.sha256 + read.mode.encode("ascii").ljust(MODE_BYTES, b"\0") + read.pixels.tobytes()
            for read in decoded
            if not isinstance(read.pixels, str)
        ]
        if len(rows) == len(decoded):
            content = b"".join(rows)
            slot, done = self._digest(identity, content) + content, 0
            with named(self.path, "write"):
                while done < len(slot):
                    done += os.pwrite(self.file, slot[done:], self._offset(place) + done)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.file)

    def _offset(self, place: int) -> int:
        return place * (DIGEST_BYTES + CHUNK_IMAGES * self.row_bytes)

    def _digest(self, identity: bytes, content: bytes) -> bytes:
        digest = hashlib.blake2b(identity, digest_size=DIGEST_BYTES)
        digest.update(content)
        return digest.digest()


def identity(raw: Path, names: list[str], how: object) -> bytes:
    """What decides the pixels of these files, without reading them; `how`: the resolution, and what prints as it is."""
    digest = hashlib.blake2b(f"{how} {pillow_version}".encode(), digest_size=DIGEST_BYTES)
    for name in names:
        found = os.stat(raw / name)
        digest.update(os.fsencode(name) + f"\0{found.st_size} {found.st_mtime_ns}\0".encode())
    return digest.digest()


def scratch_bytes(path: Path, images: int, resolution: int) -> int:
    """Disk space that the file at `path` will take, beyond what it has already."""
    slots = -(-images // CHUNK_IMAGES) + 1  # one more: parts end with chunks of their own
    whole = slots * (DIGEST_BYTES + CHUNK_IMAGES * (HEAD_BYTES + 3 * resolution**2))
    return max(0, whole - (path.lstat().st_blocks * 512 if path.is_file() else 0))
