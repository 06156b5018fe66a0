"""Files written front to back and hashed as the bytes pass, over whatever a killed run has left of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from semi_fast.disk import named, sync


class HashedFile:
    """A file that in the end holds what was written and nothing else.

    Bytes that stand there already are compared and stay; from the first call that differs on, all are written. So work
    that was killed goes on where it ended, and nothing that it left need be trusted.
    """

    def __init__(self, path: Path) -> None:
        """The last part of `path` must not be a link (OSError)."""
        self.bytes = self.kept_bytes = 0
        """Written so far, and how many of them stood there."""
        self.hash = hashlib.sha256()
        self.there = bytearray()
        self.path = path
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")

    def write(self, data: bytes | memoryview) -> None:
        """`data` in bytes."""
        with named(self.path, "write"):
            if self.kept_bytes == self.bytes and self._stands(data):
                self.kept_bytes += len(data)
            else:
                if self.kept_bytes == self.bytes:
                    self.file.seek(self.bytes)
                self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def finish(self) -> dict[str, Any]:
        """Force it to the disk; its `bytes` and `sha256`."""
        with named(self.path, "write"):
            self.file.truncate(self.bytes)
            self.file.flush()
        sync(self.file.fileno(), self.path)
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self.file.close()

    def _stands(self, data: bytes | memoryview) -> bool:
        """Whether these bytes come next in the file."""
        if len(self.there) != len(data):
            self.there = bytearray(len(data))
        return self.file.readinto(self.there) == len(data) and self.there == data
