"""Raw data -> a published directory: read, write, manifest last, rename; or nothing at all."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

import semi_fast
from semi_fast.data_prep.formats import RESIDENT, Formats
from semi_fast.data_prep.progress import watched
from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.readers.cifar import read_cifar
from semi_fast.data_prep.readers.digits import read_digits
from semi_fast.data_prep.readers.image_folder import read_image_folder
from semi_fast.data_prep.readers.imagenet127 import read_imagenet127
from semi_fast.data_prep.readers.stl10 import SIDE as STL10_RESOLUTION
from semi_fast.data_prep.readers.stl10 import read_stl10
from semi_fast.data_prep.writers.resident import write_resident
from semi_fast.manifest import Manifest, load_manifest, write_manifest
from semi_fast.sealed_json import fsync_directory

DIGITS_RESOLUTION = 16
FOLDER_RESOLUTION = 32
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def prepare_cifar10(raw: Path, out: Path, formats: Formats = RESIDENT) -> Manifest:
    return publish(lambda: read_cifar("cifar10", raw), out, f"cifar10 --raw {_name(raw)}", formats)


def prepare_cifar100(raw: Path, out: Path, formats: Formats = RESIDENT) -> Manifest:
    return publish(lambda: read_cifar("cifar100", raw), out, f"cifar100 --raw {_name(raw)}", formats)


def prepare_stl10(raw: Path, out: Path, resolution: int = STL10_RESOLUTION, formats: Formats = RESIDENT) -> Manifest:
    _check_resolution(resolution, STL10_RESOLUTION)
    arguments = f"stl10 --raw {_name(raw)} --resolution {resolution}"
    return publish(lambda: read_stl10(raw, resolution), out, arguments, formats)


def prepare_imagenet127(raw: Path, out: Path, resolution: int | None = None, formats: Formats = RESIDENT) -> Manifest:
    """Without a resolution, that of the batches in `raw`, or 32 for folders of images.

    What a killed run has decoded of the same files stays in `.<name>.decoded` beside `out`, and is not decoded again.
    """
    if resolution is not None:
        _check_resolution(resolution)
    option = "" if resolution is None else f" --resolution {resolution}"
    whole = Path(os.path.abspath(out))
    kept = whole.parent / f".{whole.name}.decoded"
    arguments = f"imagenet127 --raw {_name(raw)}{option}"
    return publish(lambda: read_imagenet127(raw, resolution, kept), out, arguments, formats)


def prepare_folder(raw: Path, out: Path, resolution: int = FOLDER_RESOLUTION, formats: Formats = RESIDENT) -> Manifest:
    _check_resolution(resolution)
    arguments = f"folder --raw {_name(raw)} --resolution {resolution}"
    return publish(lambda: read_image_folder(raw, resolution), out, arguments, formats)


def prepare_digits(out: Path, resolution: int = DIGITS_RESOLUTION, formats: Formats = RESIDENT) -> Manifest:
    _check_resolution(resolution)
    return publish(lambda: read_digits(resolution), out, f"digits --resolution {resolution}", formats)


def publish(read: Callable[[], Raw], out: Path, arguments: str, formats: Formats = RESIDENT) -> Manifest:
    """Prepare what `read` returns; `arguments` are those of the command, for the manifest.

    ValueError for bad input, RuntimeError when the disk is too small; `out` is complete afterwards, or untouched.
    """
    out = Path(os.path.abspath(out))
    _check_absent(out)
    raw = read()
    _check_classes(raw)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = formats.needed_bytes(raw) + raw.scratch_bytes, shutil.disk_usage(out.parent).free
    no_space = f"{out} needs {needed} bytes of disk space; make room or choose another --out"
    if free < needed:
        raise RuntimeError(f"{no_space} ({free} bytes are free)")
    try:
        with _staging(out) as root, ExitStack() as stack:
            writers = formats.writers(raw, root)
            for writer in writers:
                stack.callback(writer.close)
            blocks = stack.enter_context(watched(raw))
            seen = replace(raw, blocks=blocks)
            written = write_resident(seen, root, images="resident" in formats.names, others=writers)
            containers = {name: entry for writer in writers for name, entry in writer.finish().items()}
            labels = {part: np.bincount(ids, minlength=len(raw.class_names)) for part, ids in raw.labels.items()}
            write_manifest(
                Manifest(
                    root=root,
                    dataset=raw.dataset,
                    class_names=raw.class_names,
                    resolution=raw.resolution,
                    mean=written.mean,
                    std=written.std,
                    counts={p: tuple(c.tolist()) for p, c in labels.items()} | {"unlabeled": raw.num_unlabeled},
                    files=written.files,
                    source=raw.source | {"repeated_test_images": written.repeated_test_images},
                    command=f"semi-fast prepare {arguments}{formats.arguments} --out {_name(out)}",
                    versions={
                        "semi_fast": semi_fast.__version__,
                        "python": platform.python_version(),
                        "numpy": np.__version__,
                        "pillow": version("pillow"),
                        "scikit-learn": version("scikit-learn"),
                    },
                    resident="resident" in formats.names,
                    containers=containers,
                )
            )
    except OSError as error:
        if error.errno in NO_SPACE:
            raise RuntimeError(f"{no_space} ({error.strerror})") from error
        raise
    return load_manifest(out)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, renamed to `out` at the end; removed on any failure."""
    with hidden_directory(out) as root:
        yield root
        fsync_directory(root)
        try:
            root.rename(out)  # replaces an empty directory, never a full one
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ValueError(f"{out} was made by another process meanwhile; choose another --out") from error
            raise
        fsync_directory(out.parent)


@contextmanager
def hidden_directory(out: Path) -> Iterator[Path]:
    """A new hidden directory beside `out`, removed at the end if it is still there under its name.

    It stays locked while its process lives, so that what a killed run left is told from the work of a running one.
    """
    _remove_stale(out)
    root = out.parent / f".{out.name}.tmp-{secrets.token_hex(4)}"
    root.mkdir()
    lock = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


def _remove_stale(out: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.tmp-[0-9a-f]{{8}}")
    for path in [p for p in out.parent.iterdir() if pattern.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]:
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another process is preparing it now
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _check_absent(out: Path) -> None:
    if out.is_symlink():
        raise ValueError(f"--out must not be a symbolic link; {out} is one, name the directory itself")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out must be new or an empty directory; {out} is not, choose another or delete it")


def _check_classes(raw: Raw) -> None:
    if len(raw.class_names) < 2:
        raise ValueError(f"at least two classes are needed; got only {', '.join(raw.class_names) or 'none'}")
    for part, labels in raw.labels.items():
        empty = np.flatnonzero(np.bincount(labels, minlength=len(raw.class_names)) == 0)
        if len(empty):
            raise ValueError(f"every class needs an image in {part}; {raw.class_names[empty[0]]!r} has none")


def _name(path: Path) -> str:
    """A path's last part for the manifest, which names no machine's folders."""
    return shlex.quote(Path(os.path.abspath(path)).name)


def _check_resolution(resolution: int, highest: int = 1024) -> None:
    if not 4 <= resolution <= highest:
        raise ValueError(f"--resolution must be in 4..{highest}; got {resolution}")
