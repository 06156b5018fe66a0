"""JSON files that carry the SHA-256 of their own content, read with care."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from semi_fast.disk import named, sync

JSON_LIMIT_BYTES = 64 * 2**20


def digest(document: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces, ASCII) of all entries but `sha256`."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_sealed(path: Path, document: dict[str, Any], *, indent: int | None = None) -> str:
    """Write `document` and its digest as a new file, fsynced; returns the digest. FileExistsError if there is one."""
    sha256 = digest(document)
    with named(path, "write"), path.open("x", encoding="ascii") as file:
        json.dump(document | {"sha256": sha256}, file, indent=indent, ensure_ascii=True, allow_nan=False)
        file.write("\n")
        file.flush()
        sync(file.fileno(), path)
    return sha256


def read_sealed(path: Path, version: int) -> dict[str, Any]:
    """A file of `write_sealed` with this `version` entry; ValueError names the file when it is anything else."""
    document = read_json(path)
    if document.get("version") != version:
        raise ValueError(f"{path}: version must be {version}; got {document.get('version')!r}; make it again")
    if document.get("sha256") != digest(document):
        raise ValueError(f"{path}: content does not match its own SHA-256: changed or damaged; make it again")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB without repeated keys, NaN or infinities; ValueError names the file."""
    size = path.stat().st_size
    if size > JSON_LIMIT_BYTES:
        raise ValueError(f"{path}: a JSON file must be at most {JSON_LIMIT_BYTES} bytes; it has {size}")
    with named(path, "read"):
        content = path.read_bytes()
    try:
        document = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or no JSON ({error}); make it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must hold a JSON object; got {type(document).__name__}; make it again")
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} is repeated")
        out[key] = value
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")
