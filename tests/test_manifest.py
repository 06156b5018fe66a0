"""Manifest and split files: what was written is read back, and anything else is refused with its name."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semi_fast.data_prep.long_tail import make_split
from semi_fast.prepared.manifest import (
    Manifest,
    Split,
    find_split,
    load_manifest,
    load_split,
    save_split,
    verify_manifest,
)
from semi_fast.schema.split import SplitConfig
from semi_fast.sealed_json import digest, read_json
from tests.synthetic_data import write_prepared


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_prepared(tmp_path / "data", (9, 7, 8), (2, 3, 2), unlabeled=5)


@pytest.fixture
def split(manifest: Manifest) -> Split:
    return make_split(manifest, "x", SplitConfig(labeled_max=3, unlabeled_max=2, validation_per_class=1))


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Change entries of a sealed file and seal it again, as someone who knows the format could."""
    document = json.loads(path.read_text()) | change
    path.write_text(json.dumps(document | {"sha256": digest(document)}))


def test_the_arrays_are_those_written(manifest: Manifest) -> None:
    assert manifest.counts == {"train": (9, 7, 8), "test": (2, 3, 2), "unlabeled": 5}
    assert manifest.num_classes == 3
    for part, n in (("train", 24), ("test", 7), ("unlabeled", 5)):
        images = manifest.images(part)
        assert (images.shape, images.dtype, isinstance(images, np.memmap)) == ((n, 8, 8, 3), np.uint8, True)
        assert not images.flags.writeable
    assert np.bincount(manifest.labels("train")).tolist() == [9, 7, 8]
    assert manifest.labels("test").dtype == np.int64
    with pytest.raises(ValueError, match="no labels"):
        manifest.labels("unlabeled")


def test_loading_twice_gives_equal_manifests_and_the_digest_is_of_the_file(manifest: Manifest) -> None:
    assert load_manifest(manifest.root) == load_manifest(str(manifest.root))
    document = json.loads((manifest.root / "manifest.json").read_text())
    assert manifest.sha256 == document["sha256"] == digest(document)
    assert "/" not in document["command"].replace("semi-fast", "")


def test_a_data_set_without_an_unlabeled_part_has_an_empty_one(tmp_path: Path) -> None:
    images = write_prepared(tmp_path / "data").images("unlabeled")
    assert images.shape == (0, 8, 8, 3)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest.json.*semi-fast prepare"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged or no JSON"),
        ("[1]", "must hold a JSON object; got list"),
        ('{"version": 2}', "version must be 1; got 2"),
        ('{"version": 1, "sha256": "0"}', "does not match its own SHA-256"),
        ('{"version": 1, "version": 1}', "key 'version' is repeated"),
        ('{"version": NaN}', "NaN is not a JSON number"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "damaged or no JSON"),
        ('{"version": 1' + "0" * 6000 + "}", "damaged or no JSON"),
        ("\xff\xfe\x00", "damaged or no JSON"),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(manifest: Manifest, text: str, message: str) -> None:
    path = manifest.root / "manifest.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=message) as caught:
        load_manifest(manifest.root)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_changed_character_of_a_manifest_is_noticed(manifest: Manifest) -> None:
    path = manifest.root / "manifest.json"
    path.write_text(path.read_text().replace("class_1", "class_9"))
    with pytest.raises(ValueError, match="does not match its own SHA-256"):
        load_manifest(manifest.root)


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": [8]},
        {"resolution": [8, 9]},
        {"resolution": ["x", 8]},
        {"mean": None},
        {"counts": {"train": [9, 7, 8], "test": [2, 3, 2]}},
        {"counts": {"train": [9, 7, 9], "test": [2, 3, 2], "unlabeled": 5}},
        {"counts": {"train": [9, 8, 7], "test": [2, 3, 2], "unlabeled": 5}},
        {"counts": {"train": [10**30, 8, 7], "test": [2, 3, 2], "unlabeled": 5}},
        {"class_names": ["a", "b"]},
        {"class_names": 3},
        {"counts": {"test": [2, 3, 2], "unlabeled": 5}},
        {"counts": 3},
        {"files": {}},
        {"files": {"resident/train_images.npy": {}}},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "", "shape": [1], "dtype": "uint8"}}},
    ],
)
def test_a_manifest_that_contradicts_its_arrays_is_refused(manifest: Manifest, change: dict[str, Any]) -> None:
    rewrite(manifest.root / "manifest.json", change)
    with pytest.raises(ValueError, match="prepare again"):
        load_manifest(manifest.root)


def test_a_large_json_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="at most 67108864 bytes; it has 67108865"):
        read_json(tmp_path / "big.json")


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _lengthen(content: bytes) -> bytes:
    return content + b"\0"


def _another_shape(content: bytes) -> bytes:
    return content.replace(b"(24,", b"(12,")


def _huge_shape(content: bytes) -> bytes:
    return content.replace(b"(24, 8, 8, 3), ", b"(2400000, 8, 8, 3), ").replace(b" " * 10 + b"\n", b" " * 5 + b"\n")


def _objects(content: bytes) -> bytes:
    return content.replace(b"'|u1'", b"'|O8'")


def _fortran(content: bytes) -> bytes:
    return content.replace(b"'fortran_order': False", b"'fortran_order': True ")


def _no_header(content: bytes) -> bytes:
    return b"\0" * len(content)


@pytest.mark.parametrize("damage", [_cut, _lengthen, _another_shape, _huge_shape, _objects, _fortran, _no_header])
def test_a_damaged_array_file_is_refused_when_opened(manifest: Manifest, damage) -> None:
    path = manifest.root / "resident" / "train_images.npy"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=r"train_images.npy: .*prepare again"):
        load_manifest(manifest.root)


def test_a_missing_array_file_is_named(manifest: Manifest) -> None:
    (manifest.root / "resident" / "test_labels.npy").unlink()
    with pytest.raises(ValueError, match=r"test_labels.npy: .*missing"):
        load_manifest(manifest.root)


@pytest.mark.parametrize("label", [-1, 3, 2**60, 0])
def test_labels_that_the_counts_deny_are_refused_when_opened(manifest: Manifest, label: int) -> None:
    path = manifest.root / "resident" / "train_labels.npy"
    labels = np.load(path)
    labels[np.flatnonzero(labels == 1)[0]] = label
    np.save(path, labels)
    with pytest.raises(ValueError, match=r"train_labels.npy: labels differ"):
        load_manifest(manifest.root)


@pytest.mark.parametrize("name", ["train_images", "test_images", "unlabeled_images", "train_labels", "test_labels"])
def test_verify_finds_one_flipped_bit(manifest: Manifest, name: str) -> None:
    verify_manifest(manifest)
    path = manifest.root / "resident" / f"{name}.npy"
    array = np.load(path)
    flat = array.reshape(-1)
    if "labels" in name:  # the counts stay as they are: only the digest tells
        i, j = np.flatnonzero(flat == 0)[0], np.flatnonzero(flat == 1)[0]
        flat[i], flat[j] = flat[j], flat[i]
    else:
        flat[-1] ^= 1
    np.save(path, array)
    part, kind = name.split("_")
    with pytest.raises(ValueError, match=rf"{name}.npy: content differs"):
        verify_manifest(manifest)
    with pytest.raises(ValueError, match=rf"{name}.npy: content differs"):
        load_manifest(manifest.root) if kind == "labels" else manifest.verified_images(part)


def test_a_split_file_is_read_back_as_it_was(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    saved = save_split(split, tmp_path / "new" / "x.json")
    loaded = load_split(tmp_path / "new" / "x.json", manifest)
    for part in ("labeled", "unlabeled", "validation"):
        assert getattr(loaded, part).dtype == np.int64
        assert np.array_equal(getattr(loaded, part), getattr(split, part))
    for key in ("name", "rule", "parameters", "data_sha256", "labeled_counts", "unlabeled_counts", "sha256"):
        assert getattr(loaded, key) == getattr(saved, key)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.json"]


def test_the_digest_does_not_depend_on_the_name(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    one, other = (
        save_split(split, tmp_path / "one.json"),
        save_split(replace(split, name="other"), tmp_path / "other.json"),
    )
    assert one.sha256 == other.sha256
    assert load_split(tmp_path / "other.json", manifest).name == "other"


def test_a_split_file_is_never_replaced_by_another(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_split(split, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    save_split(split, path)
    with pytest.raises(ValueError, match="is another split"):
        save_split(replace(split, parameters=split.parameters | {"seed": 99}), path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    target = tmp_path / "target.json"
    (tmp_path / "link.json").symlink_to(target)
    with pytest.raises(ValueError, match="is another split"):
        save_split(split, tmp_path / "link.json")
    assert not target.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "link.json", "x.json"]


def test_a_failed_save_leaves_nothing(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save_split(split, tmp_path / "splits" / "x.json")
    assert list((tmp_path / "splits").iterdir()) == []


def test_a_split_of_another_data_set_is_refused(split: Split, tmp_path: Path) -> None:
    save_split(split, tmp_path / "x.json")
    other = write_prepared(tmp_path / "other", (9, 7, 8), (2, 3, 2), unlabeled=5, seed=1)
    with pytest.raises(ValueError, match="made for another data set"):
        load_split(tmp_path / "x.json", other)


def test_a_changed_split_is_refused(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_split(split, path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="does not match its own SHA-256"):
        load_split(path, manifest)
    with pytest.raises(ValueError, match="no such split file"):
        load_split(tmp_path / "none.json", manifest)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("labeled", lambda ids: [*ids[:-1], 24], "labeled ids must be in 0..23"),
        ("unlabeled", lambda ids: [*ids, 29], "unlabeled ids must be in 0..28; got 0..29"),
        ("validation", lambda ids: [-1, *ids[1:]], "validation ids must be in 0..23; got -1"),
        ("labeled", lambda ids: [*ids, ids[0]], "labeled ids must be unique; 1 are repeated"),
        ("unlabeled", lambda ids: [*ids, ids[0]], "unlabeled ids must be unique"),
        ("validation", lambda ids: [*ids, ids[0]], "validation ids must be unique"),
        ("labeled", lambda ids: ids[1:], "counts per class"),
        ("labeled", lambda ids: [True, *ids[1:]], "ids must be integers"),
        ("labeled", lambda ids: [1.0, *ids[1:]], "ids must be integers"),
        ("labeled", lambda ids: [2**70, *ids[1:]], "not a split file"),
        ("labeled", lambda ids: None, "not a split file"),
        ("labeled_counts", lambda counts: [counts[0] + 1, *counts[1:]], "counts per class"),
        ("unlabeled_counts", lambda _: [2, 2, 2], "counts per class"),
        ("parameters", lambda _: 3, "not a split file"),
    ],
)
def test_a_split_that_breaks_a_rule_is_refused_even_if_sealed(
    manifest: Manifest, split: Split, tmp_path: Path, part: str, change, message: str
) -> None:
    path = tmp_path / "x.json"
    save_split(split, path)
    rewrite(path, {part: change(json.loads(path.read_text())[part])})
    with pytest.raises(ValueError, match=message) as caught:
        load_split(path, manifest)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", ["labeled", "unlabeled"])
def test_validation_images_are_in_neither_set(manifest: Manifest, split: Split, tmp_path: Path, part: str) -> None:
    path = tmp_path / "x.json"
    save_split(split, path)
    held = [*split.validation.tolist()[1:], split.unlabeled.tolist()[0 if part == "labeled" else 3]]
    rewrite(path, {"validation": held})
    with pytest.raises(ValueError, match=f"validation ids must not be {part} too; 1 are"):
        load_split(path, manifest)


def test_a_class_without_a_labeled_image_is_refused(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_split(split, path)
    rewrite(path, {"labeled": split.labeled[:3].tolist(), "labeled_counts": [3, 0, 0]})
    with pytest.raises(ValueError, match="'class_1' has none"):
        load_split(path, manifest)


def test_a_split_is_found_by_name_or_by_path(manifest: Manifest, split: Split, tmp_path: Path) -> None:
    save_split(split, manifest.root / "splits" / "x.json")
    assert find_split(manifest, "x") == manifest.root / "splits" / "x.json"
    assert find_split(manifest, str(tmp_path / "x.json")) == tmp_path / "x.json"
    assert find_split(manifest, "../splits/x") == Path("../splits/x")
    assert find_split(manifest, "y") == Path("y")
