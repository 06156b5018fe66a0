"""Damaged files: a reader says so in a line, or gives what the intact file gives; it never dies, hangs or invents."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from semi_fast.data_prep.formats import FORMATS, Formats
from semi_fast.data_prep.long_tail import make_split
from semi_fast.data_prep.prepare import prepare_digits
from semi_fast.errors import EXPECTED
from semi_fast.pipelines import ffcv
from semi_fast.prepared.beton import open_beton
from semi_fast.prepared.manifest import (
    check_container,
    file_sha256,
    load_manifest,
    load_split,
    save_split,
    split_document,
)
from semi_fast.prepared.tfrecord import open_records
from semi_fast.rundir import checkpoint
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.config import check
from semi_fast.schema.split import SplitConfig
from semi_fast.schema.yaml_file import dump
from semi_fast.sealed_json import digest
from tests.tiny import config

from .figures import amount, record
from .forked import forked

SEED = 6
BATCH = 50
NEAR_AN_END = 3000  # bytes: headers, tables and footers
MEMORY_BYTES = 2**30
BATCH_SECONDS = 120

Damage = Callable[[bytes, np.random.Generator], bytes]


class Target(NamedTuple):
    """A file, how it is read, and how it is damaged."""

    path: Path
    read: Callable[[], Any]
    damage: Damage
    same: bool = True
    """Whether nothing but what the intact file gives may come back; if not, the file carries no digest, or it fits."""


def place(size: int, rng: np.random.Generator) -> int:
    """A position in so many bytes, half of the time near an end."""
    near = min(size, NEAR_AN_END)
    choice = rng.integers(4)
    if choice == 0:
        return int(rng.integers(near))
    return int(size - 1 - rng.integers(near) if choice == 1 else rng.integers(size))


def block(size: int, rng: np.random.Generator) -> slice:
    """A part of so many bytes, short or long."""
    first = place(size, rng)
    return slice(first, first + int(2 ** rng.uniform(0, np.log2(size))))


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        out[place(len(out), rng)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: place(len(content), rng)]


def zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    out, where = bytearray(content), block(len(content), rng)
    out[where] = bytes(len(out[where]))
    return bytes(out)


def spliced(content: bytes, rng: np.random.Generator) -> bytes:
    """One part over another, or all after a place with what follows another."""
    if rng.integers(2):
        return content[: place(len(content), rng)] + content[place(len(content), rng) :]
    out, part = bytearray(content), content[block(len(content), rng)]
    first = place(len(content), rng)
    out[first : first + len(part)] = part[: len(out) - first]
    return bytes(out)


def inflated(content: bytes, rng: np.random.Generator) -> bytes:
    """A number that is far too large or none, where one stands."""
    numbers = list(re.finditer(rb"\d+", content)) if content.isascii() else []
    if numbers:
        found = numbers[int(rng.integers(len(numbers)))]
        values = (
            b"9" * 5,
            b"9" * 18,
            b"9" * 25,
            b"9" * 5000,
            b"-1",
            b"1e400",
            b"NaN",
            b"[" * 2000,
            b"0.5",
            b"!!bool x",
        )
        return content[: found.start()] + values[int(rng.integers(len(values)))] + content[found.end() :]
    out, width = bytearray(content), int(2 ** rng.integers(4))
    first = place(len(out), rng) // width * width
    value = (1 << 8 * width) - 1 if rng.integers(2) else 1 << int(rng.integers(8 * width))
    out[first : first + width] = value.to_bytes(width, "little")
    return bytes(out)


def repeated(content: bytes, rng: np.random.Generator) -> bytes:
    where = block(len(content), rng)
    return content[: where.stop] + content[where] * int(rng.integers(1, 4)) + content[where.stop :]


def without(content: bytes, rng: np.random.Generator) -> bytes:
    where = block(len(content), rng)
    return content[: where.start] + content[where.stop :]


def noise(content: bytes, rng: np.random.Generator) -> bytes:
    out, where = bytearray(content), block(len(content), rng)
    out[where] = rng.bytes(len(out[where]))
    return bytes(out)


DAMAGES: tuple[Damage, ...] = (flipped, flipped, cut, zeroed, spliced, inflated, inflated, repeated, without, noise)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes."""
    out = content
    while out == content:
        out = DAMAGES[int(rng.integers(len(DAMAGES)))](content, rng)
    return out


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**40,
    1.5,
    1e300,
    "",
    "\ud800",
    "../x",
    [],
    [[]],
    {},
    {"a": 1},
)


def altered(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one entry, however deep, replaced, removed or repeated."""
    if not (isinstance(value, dict | list) and value) or rng.random() < 0.1:
        return VALUES[int(rng.integers(len(VALUES)))]
    out = value.copy()
    keys = list(out) if isinstance(out, dict) else range(len(out))
    key = keys[int(rng.integers(len(keys)))]
    choice = rng.random()
    if choice < 0.1:
        del out[key]
    elif choice < 0.2 and isinstance(out, list):
        out.insert(key, out[key])
    else:
        out[key] = altered(out[key], rng)
    return out


def damaged_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes, half of the time still JSON, whose digest then does not fit."""
    return json.dumps(altered(json.loads(content), rng)).encode() if rng.integers(2) else damaged(content, rng)


def sealed_again(content: bytes, rng: np.random.Generator) -> bytes:
    """Another document, whose digest fits."""
    document = {key: value for key, value in json.loads(content).items() if key != "sha256"}
    out = altered(document, rng)
    return json.dumps(out | {"sha256": digest(out)} if isinstance(out, dict) else out).encode()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    root = tmp_path_factory.mktemp("fuzzed")
    data, saved, yaml = root / "data", root / "checkpoints" / "step_000000005", root / "config.yaml"
    prepare_digits(data, formats=Formats(FORMATS))
    manifest = load_manifest(data)
    split_path = data / "splits" / "lt.json"
    settings = SplitConfig(labeled_max=20, imbalance_labeled=5, unlabeled_max=60, imbalance_unlabeled=5)
    save_split(make_split(manifest, "lt", settings), split_path)
    draw = torch.Generator().manual_seed(SEED)
    tensors = {"weights": torch.randn(40, 30, generator=draw), "count": torch.arange(50), "flag": torch.tensor(True)}
    meta = {"step": 5, "interval_terms": ["total", "loss"], "config": {"a": [1, 2.5, None]}}
    checkpoint.save(saved.parent, 5, tensors.items(), meta, keep=1)
    yaml.write_text(dump(config(data, root / "run")))
    shard, index, beton = (
        next(data.glob(name)) for name in ("dali/test*.tfrecord", "dali/test*.idx", "ffcv/test.beton")
    )

    def read_split() -> Any:
        return split_document(load_split(split_path, manifest))

    def read_checkpoint() -> Any:
        found = checkpoint.load(saved)
        return {k: (t.dtype, t.shape, t.numpy().tobytes()) for k, t in found.tensors.items()}, found.meta

    def reseal_checkpoint(content: bytes, rng: np.random.Generator) -> bytes:
        """Other tensors or other meta, with digests that fit; `content` is the manifest."""
        document = json.loads(content)
        name = (checkpoint.TENSORS, checkpoint.META)[int(rng.integers(2))]
        for one, intact in intact_files.items():
            (saved / one).write_bytes(damaged(intact, rng) if one == name else intact)
            document["files"][one] = {"bytes": (saved / one).stat().st_size, "sha256": file_sha256(saved / one)}
        return json.dumps(document).encode()

    intact_files = {name: (saved / name).read_bytes() for name in (checkpoint.TENSORS, checkpoint.META)}

    def read_config() -> None:
        check(parse_config([f"--config={yaml}"]))

    def read_records() -> Any:
        """As whoever skips the digests would, who may meet other pixels; then as we do."""
        entry = manifest.containers[str(shard.relative_to(data))]
        try:
            found = open_records(shard, rows=entry["rows"], num_bytes=shard.stat().st_size)
            for i in range(0, len(found), 7):
                found.example(i)
        except ValueError as error:
            named(error, root)
        check_container(manifest, str(index.relative_to(data)))
        check_container(manifest, str(shard.relative_to(data)))
        found = open_records(shard, rows=entry["rows"], num_bytes=entry["bytes"])
        return [found.example(i) for i in range(len(found))]

    def read_beton() -> Any:
        try:
            found = open_beton(beton)
            found.images(np.arange(0, len(found.ids), 7))
        except ValueError as error:
            named(error, root)
        return ffcv.read_part(manifest, "test").tobytes()

    def read_manifest() -> Any:
        return asdict(load_manifest(data))

    return {
        "manifest": Target(data / "manifest.json", read_manifest, damaged_json),
        "manifest sealed again": Target(data / "manifest.json", read_manifest, sealed_again, same=False),
        "labels": Target(data / "resident" / "train_labels.npy", read_manifest, damaged),
        "split": Target(split_path, read_split, damaged_json),
        "split sealed again": Target(split_path, read_split, sealed_again, same=False),
        "checkpoint manifest": Target(saved / checkpoint.MANIFEST, read_checkpoint, damaged_json),
        "checkpoint meta": Target(saved / checkpoint.META, read_checkpoint, damaged_json),
        "checkpoint tensors": Target(saved / checkpoint.TENSORS, read_checkpoint, damaged),
        "checkpoint sealed again": Target(saved / checkpoint.MANIFEST, read_checkpoint, reseal_checkpoint, same=False),
        "config": Target(yaml, read_config, damaged, same=False),
        "TFRecord": Target(shard, read_records, damaged),
        "TFRecord index": Target(index, read_records, damaged),
        "beton": Target(beton, read_beton, damaged),
    }


NAMES = (
    "manifest",
    "manifest sealed again",
    "labels",
    "split",
    "split sealed again",
    "checkpoint manifest",
    "checkpoint meta",
    "checkpoint tensors",
    "checkpoint sealed again",
    "config",
    "TFRecord",
    "TFRecord index",
    "beton",
)


def named(error: BaseException, root: Path) -> None:
    """A message says which file, or which key."""
    text = str(error)
    assert str(root) in text or re.search(r"\b[a-z]+\.[a-z_]+\b", text), f"says not where: {text}"


def problem(target: Target, intact: Any) -> str:
    """What a reader must not do, and did with the file as it stands; else empty or `refused`."""
    try:
        result = target.read()
    except KeyboardInterrupt:
        raise
    except EXPECTED as error:
        named(error, target.path.parents[1])
        return "refused"
    return "gave something else" if target.same and result != intact else ""


@pytest.mark.parametrize("number_of_name", range(len(NAMES)), ids=NAMES)
def test_a_damaged_file_is_refused_or_read_as_the_intact_one(number_of_name: int, targets: dict[str, Target]) -> None:
    """Nothing may differ in silence; where no digest can tell, what is read must at least fit its schema."""
    name = NAMES[number_of_name]
    assert targets.keys() == set(NAMES)
    target, made, began = targets[name], amount(48, 770), time.monotonic()
    folder, content = target.path.parent, target.path.read_bytes()
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept)
    intact = target.read()
    outcomes: dict[int, str] = {}

    def batch(numbers: range) -> Callable[[], None]:
        def child() -> None:
            for number in numbers:
                rng = np.random.default_rng([SEED, number_of_name, number])
                target.path.write_bytes(target.damage(content, rng))
                os.write(1, f"\n{number} ".encode())
                try:
                    said = problem(target, intact)
                except BaseException as error:  # noqa: BLE001, the very thing that must not come
                    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                os.write(1, said.encode(errors="replace") or b"read")

        return child

    for first in range(0, made, BATCH):
        numbers = range(first, min(first + BATCH, made))
        ended = forked(batch(numbers), seconds=BATCH_SECONDS, memory_bytes=MEMORY_BYTES)
        for line in re.findall(r"^\d+ .*$", ended.output, re.MULTILINE):
            number, _, said = line.partition(" ")
            outcomes[int(number)] = said
        if ended.signal or ended.code:
            outcomes[max(outcomes)] = f"ended by signal {ended.signal}, code {ended.code}: {ended.output[-500:]}"
    shutil.rmtree(folder)
    kept.rename(folder)
    bad = {number: said for number, said in outcomes.items() if said not in ("refused", "read")}
    refused = list(outcomes.values()).count("refused")
    record(
        f"damaged file: {name}",
        made=made,
        failures=len(bad),
        goal="10,000 in all, 0 signals, hangs or silent differences",
        seconds=time.monotonic() - began,
        note=f"{refused} refused",
    )
    assert bad == {}, f"of rng [{SEED}, {number_of_name}, key]"
    assert len(outcomes) == made
    assert refused > (0.5 if target.same else 0.3) * made, "damage that nobody notices tests nothing"
    assert target.read() == intact
