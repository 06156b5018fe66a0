"""Reads the pickled dicts of CIFAR without running what a pickle may ask for."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

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
MEMO_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
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


# Stand-ins for numpy: its own objects, filled with damaged state, crash or corrupt memory. `_ARRAY` stands for the type
# numpy.ndarray, which a pickle could also call to ask for any amount of memory.
_ARRAY = object()


class _Dtype:
    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"only uint8 arrays are read; got dtype {code!r}")

    def __setstate__(self, _: object) -> None:
        """Byte order, alignment and the like say nothing about uint8."""


class _Array:
    def __init__(self, kind: object, shape: object, _: object) -> None:
        if kind is not _ARRAY or shape != (0,):
            raise pickle.UnpicklingError("numpy arrays may only be made empty and then filled")
        self.filled = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, object, bytes]) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array must be filled with bytes")
        self.filled = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


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
    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return allowed


def load_dict(path: Path, content: bytes) -> dict[str, Any]:
    """The pickled dict in `content`, byte keys as text; ValueError names `path` when it is anything else or damaged."""
    try:
        _check_opcodes(content)
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dict")
        return {_text(key): value.filled if isinstance(value, _Array) else value for key, value in loaded.items()}
    except FAILURES as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: damaged, truncated or not a CIFAR batch ({reason}); get the file again") from error


def _text(key: object) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _check_opcodes(content: bytes) -> None:
    """Refuse opcodes that CIFAR does not need, and memo numbers for which the C unpickler would reserve gigabytes."""
    end = 0
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"it uses the opcode {opcode.name}")
        if opcode.name in MEMO_STORES and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"memo number {argument} in {len(content)} bytes")
        end = (position or 0) + 1
    if end != len(content):
        raise pickle.UnpicklingError(f"{len(content) - end} bytes after the end of the pickle")
