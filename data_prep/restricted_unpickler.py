"""Reads pickled dicts of arrays, as CIFAR and the downsampled ImageNet come, without running what a pickle asks for."""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from semi_fast.disk import named

# What a dict of bytes, text, integers, lists and uint8 arrays needs, in every protocol; a pickle can do far more.
# fmt: off
OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "PUT",
    "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
})
# fmt: on
OPCODE_OF = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
MEMO_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
LENGTH_BYTES = {"BINSTRING": 4, "BINBYTES": 4, "BINBYTES8": 8}
CUT_BYTES = 256  # shorter ones have opcodes of their own
SKELETON_LIMIT_BYTES = 2**26
FAILURES = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
    ImportError,
)


@dataclass(frozen=True)
class StoredArray:
    """A uint8 array whose content stays in its file, row by row from `offset`."""

    offset: int
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """Bytes left in the file."""

    offset: int
    length: int


# Stand-ins for numpy: its own objects, filled with damaged state, crash or corrupt memory. `_ARRAY` stands for the type
# numpy.ndarray, which a pickle could also call to ask for any amount of memory.
_ARRAY = object()


class _Dtype:
    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1", "f8", b"f8"):
            raise pickle.UnpicklingError(f"only uint8 arrays are read; got dtype {code!r}")
        self.is_uint8 = code in ("u1", b"u1")

    def __setstate__(self, _: object) -> None:
        """Byte order, alignment and the like say nothing about uint8."""


class _Array:
    def __init__(self, kind: object, shape: object, _: object) -> None:
        if kind is not _ARRAY or shape != (0,):
            raise pickle.UnpicklingError("numpy arrays may only be made empty and then filled")
        self.filled: np.ndarray | StoredArray | None = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, object, bytes | _Stored]) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | _Stored):
            raise pickle.UnpicklingError("an array must be filled with bytes")
        if not dtype.is_uint8:
            self.filled = None  # the mean image of a downsampled ImageNet batch, which nothing needs
        elif isinstance(content, bytes):
            self.filled = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")
        elif column_major or any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) != content.length:
            raise pickle.UnpicklingError(f"an array of shape {shape} must have its {content.length} bytes row by row")
        else:
            self.filled = StoredArray(content.offset, tuple(shape))


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("only latin1 text may be encoded")
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Of a skeleton: what stayed in the file comes by its number, an opcode that no pickle given to us may use."""

    def __init__(self, skeleton: bytes, stored: list[_Stored]) -> None:
        super().__init__(io.BytesIO(skeleton), encoding="bytes")
        self.stored = stored

    def persistent_load(self, pid: int) -> _Stored:
        return self.stored[pid]

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return allowed


def load_dict(path: Path, content: bytes) -> dict[str, Any]:
    """The pickled dict in `content`, byte keys as text; ValueError names `path` when it is anything else or damaged."""
    try:
        return _load(io.BytesIO(content), len(content), math.inf)
    except FAILURES as error:
        raise _refusal(path, error) from error


def load_stored_dict(path: Path) -> dict[str, Any]:
    """As `load_dict` of a file larger than memory may be: uint8 arrays of 256 bytes or more are `StoredArray`."""
    try:
        with (
            named(path, "mmap"),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return _load(content, len(content), CUT_BYTES)  # type: ignore[arg-type]
    except FAILURES as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: BaseException) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(f"{path}: damaged, truncated or not a pickled batch ({reason}); get the file again")


def _load(file: BinaryIO, size: int, cut_bytes: float) -> dict[str, Any]:
    loaded = _Unpickler(*_skeleton(file, size, cut_bytes)).load()
    if not isinstance(loaded, dict):
        raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dict")
    return {_text(key): value.filled if isinstance(value, _Array) else value for key, value in loaded.items()}


def _text(key: object) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _skeleton(file: BinaryIO, size: int, cut_bytes: float) -> tuple[bytes, list[_Stored]]:
    """The pickle without frames and without its strings of `cut_bytes` or more, and where those lie in `file`.

    Refuses opcodes that are not needed, and memo numbers for which the C unpickler would reserve gigabytes.
    """
    limit = SKELETON_LIMIT_BYTES if cut_bytes < math.inf else size
    skeleton, stored, memo, kept_from, name = bytearray(), [], 0, 0, ""
    while name != "STOP":
        start = file.tell()
        opcode = OPCODE_OF.get(file.read(1))
        name = opcode.name if opcode else "unknown or missing"
        if opcode is None or name not in OPCODES:
            raise pickle.UnpicklingError(f"it uses the opcode {name}")
        length = _length(file, name)
        if length >= cut_bytes:
            if file.tell() + length > size:
                raise pickle.UnpicklingError(f"{length} bytes are announced where {size - file.tell()} are left")
            replaced = b"J" + struct.pack("<i", len(stored)) + b"Q"  # BININT, BINPERSID
            stored.append(_Stored(file.tell(), length))
            file.seek(length, io.SEEK_CUR)
        else:
            file.seek(start + 1)
            argument = opcode.arg.reader(file) if opcode.arg else None
            memo = max(memo, int(argument or 0)) if name in MEMO_STORES else memo
            replaced = b"" if name == "FRAME" else None
            if len(skeleton) + file.tell() - kept_from > limit:
                raise pickle.UnpicklingError(f"more than {limit} bytes are no array")
        if replaced is not None:
            skeleton += _between(file, kept_from, start) + replaced
            kept_from = file.tell()
    end = file.tell()
    skeleton += _between(file, kept_from, end)
    if memo > len(skeleton):
        raise pickle.UnpicklingError(f"memo number {memo} in {len(skeleton)} bytes")
    if end != size:
        raise pickle.UnpicklingError(f"{size - end} bytes after the end of the pickle")
    return bytes(skeleton), stored


def _length(file: BinaryIO, name: str) -> int:
    """What a string opcode announces, the file then standing at its first byte; 0 for any other."""
    width = LENGTH_BYTES.get(name, 0)
    return int.from_bytes(file.read(width), "little", signed=name == "BINSTRING")


def _between(file: BinaryIO, start: int, end: int) -> bytes:
    """These bytes; the file stands where it stood."""
    position = file.tell()
    file.seek(start)
    content = file.read(end - start)
    file.seek(position)
    return content
