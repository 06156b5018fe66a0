"""Raw data -> a published directory: read, write, manifest last, rename; or nothing at all."""

from __future__ import annotations

import csv
import errno
import io
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

import semi_fast
from semi_fast.data_prep.formats import RESIDENT, Formats
from semi_fast.data_prep.progress import watched
from semi_fast.data_prep.readers import Raw, name_of
from semi_fast.data_prep.readers.cifar import read_cifar
from semi_fast.data_prep.readers.decoding import BadImagesError
from semi_fast.data_prep.readers.digits import read_digits
from semi_fast.data_prep.readers.image_file import REFUSED, Accepted
from semi_fast.data_prep.readers.image_folder import listed, read_image_folder
from semi_fast.data_prep.readers.imagenet127 import read_imagenet127
from semi_fast.data_prep.readers.stl10 import SIDE as STL10_RESOLUTION
from semi_fast.data_prep.readers.stl10 import read_stl10
from semi_fast.data_prep.taken_up import with_written
from semi_fast.data_prep.writers.resident import write_resident
from semi_fast.disk import fsync_directory, locked_descriptor, make_directory
from semi_fast.errors import NO_SPACE
from semi_fast.prepared.hashed_file import HashedFile
from semi_fast.prepared.manifest import Manifest, kept_arrays, load_manifest, write_manifest

DIGITS_RESOLUTION = 16
FOLDER_RESOLUTION = 32
BAD_FILE = "bad.csv"
BAD_LIMIT = 0.01
"""Of all files: how many may be left out."""


def prepare_cifar10(raw: Path, out: Path, formats: Formats = RESIDENT) -> Manifest:
    return publish(lambda: read_cifar("cifar10", raw), out, f"cifar10 --raw {_name(raw)}", formats)


def prepare_cifar100(raw: Path, out: Path, formats: Formats = RESIDENT) -> Manifest:
    return publish(lambda: read_cifar("cifar100", raw), out, f"cifar100 --raw {_name(raw)}", formats)


def prepare_stl10(raw: Path, out: Path, resolution: int = STL10_RESOLUTION, formats: Formats = RESIDENT) -> Manifest:
    _check_resolution(resolution, STL10_RESOLUTION)
    arguments = f"stl10 --raw {_name(raw)} --resolution {resolution}"
    return publish(lambda: read_stl10(raw, resolution), out, arguments, formats)


def prepare_imagenet127(
    raw: Path,
    out: Path,
    resolution: int | None = None,
    formats: Formats = RESIDENT,
    accepted: Accepted = REFUSED,
) -> Manifest:
    """Without a resolution, that of the batches in `raw`, or 32 for folders of images.

    What a killed run has decoded of the same files stays in `.<name>.decoded` beside `out`, and is not decoded again.
    """
    if resolution is not None:
        _check_resolution(resolution)
    option = "" if resolution is None else f" --resolution {resolution}"
    whole = Path(os.path.abspath(out))
    kept = whole.parent / f".{whole.name}.decoded"
    arguments = f"imagenet127 --raw {_name(raw)}{option}"
    return _publish_usable(
        lambda left_out: read_imagenet127(raw, resolution, kept, accepted, left_out),
        raw,
        out,
        arguments,
        formats,
        accepted,
    )


def prepare_folder(
    raw: Path,
    out: Path,
    resolution: int = FOLDER_RESOLUTION,
    formats: Formats = RESIDENT,
    accepted: Accepted = REFUSED,
) -> Manifest:
    _check_resolution(resolution)
    arguments = f"folder --raw {_name(raw)} --resolution {resolution}"
    return _publish_usable(
        lambda left_out: read_image_folder(raw, resolution, accepted, left_out), raw, out, arguments, formats, accepted
    )


def prepare_digits(out: Path, resolution: int = DIGITS_RESOLUTION, formats: Formats = RESIDENT) -> Manifest:
    _check_resolution(resolution)
    return publish(lambda: read_digits(resolution), out, f"digits --resolution {resolution}", formats)


def publish(
    read: Callable[[], Raw],
    out: Path,
    arguments: str,
    formats: Formats = RESIDENT,
    *,
    last: Callable[[Manifest], None] = lambda _: None,
) -> Manifest:
    """Prepare what `read` returns; `arguments` are those of the command, for the manifest.

    `last` may add to the directory before it gets its name.

    ValueError for bad input, RuntimeError when the disk is too small; `out` is complete afterwards, or untouched. Until
    then everything stands in `.<name>.preparing` beside it, which only a kill leaves: the next run goes on with it.
    """
    out = Path(os.path.abspath(out))
    check_absent(out)
    raw = read()
    _check_classes(raw)
    make_directory(out.parent)
    needed = formats.needed_bytes(raw) + raw.scratch_bytes
    no_space = f"{out} needs {needed} bytes of disk space; make room or choose another --out"
    try:
        with _staging(out) as root, ExitStack() as stack:
            left, free = _size(root), shutil.disk_usage(out.parent).free
            if free + left < needed:
                raise RuntimeError(f"{no_space} ({free} bytes are free)")
            if left:
                print(f"note: going on with {left} bytes that an interrupted run left", file=sys.stderr)
            writers = formats.writers(raw, root)
            for writer in writers:
                stack.callback(writer.close)
            blocks = stack.enter_context(watched(replace(raw, blocks=with_written(raw, root))))
            seen = replace(raw, blocks=blocks)
            written = write_resident(seen, root, images="resident" in formats.names, others=writers)
            containers = {name: entry for writer in writers for name, entry in writer.finish().items()}
            labels = {part: np.bincount(ids, minlength=len(raw.class_names)) for part, ids in raw.labels.items()}
            manifest = Manifest(
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
                versions=versions(),
                resident="resident" in formats.names,
                containers=containers,
            )
            _remove_others(manifest)
            write_manifest(manifest)
            last(manifest)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise RuntimeError(f"{no_space} ({error.strerror})") from error
        raise
    return load_manifest(out)


def _publish_usable(
    read: Callable[[Collection[Path]], Raw], raw: Path, out: Path, arguments: str, formats: Formats, accepted: Accepted
) -> Manifest:
    """Publish what `read` returns without some files under `raw`: those that are no images, if they may be left out."""
    arguments += accepted.arguments
    try:
        return publish(lambda: read(()), out, arguments, formats)
    except BadImagesError as error:
        if accepted.on_bad != "skip":
            raise
        if len(error.bad) > BAD_LIMIT * error.files:
            raise ValueError(
                f"--on-bad skip leaves out at most {BAD_LIMIT:.0%} of {error.files} files; {error}"
            ) from error
        bad = error.bad
        try:
            usable = read(bad)
        except ValueError as emptied:
            raise ValueError(f"--on-bad skip must leave no folder empty; without them {emptied}; {error}") from error
    print(f"note: {len(bad)} files are no usable images; the others are read again", file=sys.stderr)
    usable.source["left_out"] = len(bad)
    table = io.StringIO(newline="")
    names = [os.fsencode(path.relative_to(raw)).decode("utf-8", "surrogateescape") for path in bad]
    csv.writer(table).writerows([("file", "reason"), *zip(names, bad.values(), strict=True)])
    content = table.getvalue().encode("utf-8", "surrogateescape")
    return publish(lambda: usable, out, arguments, formats, last=lambda manifest: write_bad(manifest.root, content))


def write_bad(root: Path, content: bytes) -> None:
    """The table of files that were left out."""
    with closing(HashedFile(root / BAD_FILE)) as file:
        file.write(content)
        file.finish()


def versions() -> dict[str, str]:
    """What decides the bytes beside the raw data."""
    return {
        "semi_fast": semi_fast.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": version("pillow"),
        "scikit-learn": version("scikit-learn"),
    }


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, renamed to `out` at the end; removed on any failure."""
    with hidden_directory(out.parent / f".{out.name}.preparing") as root:
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
def hidden_directory(path: Path) -> Iterator[Path]:
    """The directory `path` with what a killed run left in it, removed at the end if it is still there under its name.

    It is locked while its process lives; ValueError where another holds it.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: must be a directory, where the work in progress stands; delete it")
    path.mkdir(exist_ok=True)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with locked_descriptor(lock, path, f"--out, whose work stands in {path},"):
            if not _stands_at(lock, path):
                raise ValueError(f"{path} was published by another process meanwhile; choose another --out")
            try:
                yield path
            finally:
                if _stands_at(lock, path):
                    shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _stands_at(descriptor: int, path: Path) -> bool:
    """Whether the open directory is the one of this name, not one that was renamed or removed meanwhile."""
    return path.is_dir() and os.path.samestat(os.fstat(descriptor), path.lstat())


def _size(root: Path) -> int:
    """Disk space that the files under `root` take."""
    return sum(path.lstat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


def _remove_others(manifest: Manifest) -> None:
    """Whatever else an interrupted run, perhaps with other formats, has left in the directory."""
    names = {*kept_arrays(manifest), *manifest.containers}
    for path in sorted(manifest.root.rglob("*"), reverse=True):  # what is inside a folder comes before it
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(manifest.root)) not in names:
            path.unlink()
            if path.parent != manifest.root:  # which is forced to the disk at the end
                fsync_directory(path.parent)


def check_absent(out: Path) -> None:
    """ValueError unless `out` is new or an empty directory, which nothing but its name would miss: it is replaced."""
    if out.is_symlink():
        raise ValueError(f"--out must not be a symbolic link; {out} is one, name the directory itself")
    if out.is_dir() and (os.path.ismount(out) or any(map(out.samefile, (Path.cwd(), *Path.cwd().parents)))):
        raise ValueError(
            f"--out must be neither a mount point nor the directory one stands in, whose place no other can take; got "
            f"{out}: name a new directory in it"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out must be new or an empty directory; {out} is not, choose another or delete it")


def _check_classes(raw: Raw) -> None:
    if len(raw.class_names) < 2:
        raise ValueError(f"at least two classes are needed; got only {', '.join(raw.class_names) or 'none'}")
    for part, labels in raw.labels.items():
        empty = np.flatnonzero(np.bincount(labels, minlength=len(raw.class_names)) == 0)
        if len(empty):
            lacking = listed([raw.class_names[k] for k in empty])
            raise ValueError(f"every class needs an image in {part}; {lacking} has none")


def _name(path: Path) -> str:
    """A path's last part for the manifest, which names no machine's folders."""
    return shlex.quote(name_of(Path(os.path.abspath(path))))


def _check_resolution(resolution: int, highest: int = 1024) -> None:
    if not 4 <= resolution <= highest:
        raise ValueError(f"--resolution must be in 4..{highest}; got {resolution}")
