"""What the disk must take: files that get their name whole and durable, and directories that have one writer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semi_fast.errors import reason

NO_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems answer that have no hard links, no sync of a directory, and no locks (NFS: of a directory)."""
HOLDER_BYTES = 500
"""Of a lock, for whose it is."""
LOOK_SECONDS = 0.05
"""More than it takes to look whether a lock is free."""


@contextmanager
def named(path: Path, call: str) -> Iterator[None]:
    """An OSError says of which file it is and what failed, where the system leaves that out."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
            error.add_note(call)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RuntimeError in one line that names the file, if the disk does not take what is written meanwhile."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"{path} could not be written: {reason(error)}") from error


def no_link(path: str, flags: int) -> int:
    """Opens a file of ours for `open`, never through a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(descriptor: int, path: Path) -> None:
    """Force an open file to the disk."""
    with named(path, "fsync"):
        os.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, after a file was created in it or renamed into it; a file system that
    cannot be asked to does so in its own time."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor, path)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, each with a name that is on the disk; one that is there is left."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def check_directory(path: Path, what: str) -> None:
    """Raise ValueError, which begins with `what`, if `path` or something above it is a file."""
    whole = path.absolute()
    for one in (whole, *whole.parents):
        if one.exists() and not one.is_dir():
            rule = "be" if one == whole else "lie in"
            raise ValueError(f"{what} must {rule} a directory; {one} is a file: choose another")


def fresh_directory(path: Path) -> Path:
    """Make a directory that nobody else has: `path`, or the first of `path_2`, `path_3`, ... that is not there."""
    make_directory(path.parent)
    mine, number = path, 1
    while True:
        try:
            mine.mkdir()
        except FileExistsError:
            number += 1
            mine = path.with_name(f"{path.name}_{number}")
        else:
            fsync_directory(path.parent)
            return mine


def publish_new(hidden: Path, path: Path) -> None:
    """Give a file its name unless that is taken (FileExistsError), and make the name durable."""
    try:
        with named(path, "link"):
            os.link(hidden, path)  # unlike a rename, never replaces
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            path.open("x").close()  # ours alone from here on
        except FileExistsError:
            if path.is_symlink() or path.stat().st_size:
                raise  # else a kill left it here
        try:
            hidden.replace(path)
        except BaseException:
            path.unlink()
            raise
    fsync_directory(path.parent)


def write_text(path: Path, text: str, *, errors: str = "strict", alone: bool = True) -> None:
    """Replace a file whole: a reader sees the old or the new content, and the new one is on the disk afterwards.

    `errors`: what becomes of characters that are none, see `str.encode`. `alone`: no other process writes this file at
    the same time, as in a directory with a lock; then what a kill leaves is written over.
    """
    hidden = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(hidden, "w", encoding="utf-8", errors=errors, newline="", opener=no_link) as file:
                file.write(text)
                file.flush()
                sync(file.fileno(), path)
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)
        fsync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file whole; a number that is not finite is an error."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def check_free(lock: Path, what: str) -> None:
    """Raise ValueError, naming the holder, if another process has the lock file; nothing is written."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        locks = _try_lock(descriptor, lock, fcntl.LOCK_SH)  # which others that only look may have too
    finally:
        os.close(descriptor)
    if locks is False or _marker(lock).exists():
        raise ValueError(_in_use(lock, what))


@contextmanager
def locked(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which says who holds it; its directory is made. ValueError if another process does."""
    make_directory(lock.parent)
    with writing(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with locked_descriptor(descriptor, lock, what):
            with writing(lock):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _me())
            yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_descriptor(descriptor: int, path: Path, what: str) -> Iterator[None]:
    """Lock an open file or directory while entered; ValueError that begins with `what` if another process has it.

    Where the file system has no locks, `PATH.held` is created instead and removed at the end. One that a kill leaves
    stays: nothing says on which machine its process may still be at work, so that only the user can tell.
    """
    locks, marker = _try_lock(descriptor, path, fcntl.LOCK_EX), _marker(path)
    if locks is False:
        time.sleep(LOOK_SECONDS)  # it may be `check_free` of another process, which only looks
        locks = _try_lock(descriptor, path, fcntl.LOCK_EX)
    if locks is False or (locks and marker.exists()):
        raise ValueError(_in_use(path, what))
    if locks is None:
        try:
            marker.open("x").close()
        except FileExistsError:
            raise ValueError(_in_use(path, what)) from None
    try:
        if locks is None:
            marker.write_bytes(_me())
        yield
    finally:
        if locks is None:
            marker.unlink(missing_ok=True)


def _try_lock(descriptor: int, path: Path, how: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        with named(path, "flock"):
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def _me() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()


def _in_use(path: Path, what: str) -> str:
    """Who has it, as the marker or the lock file says, and the way out."""
    marker = _marker(path)
    says = marker if marker.exists() else path
    holder = ""
    if says.is_file():
        with says.open("rb") as file:
            holder = " ".join(file.read(HOLDER_BYTES).decode(errors="replace").split())
    stale = f"; if that has ended, delete {marker}, which a kill has left" if says == marker else ""
    return f"{what} is in use by {holder or 'another process'}; wait for it, or choose another{stale}"
