"""ImageNet-127 from downsampled batches and from folders: exact pixels, order and labels, bad input by name."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from semi_fast import philox
from semi_fast.cli import main
from semi_fast.data_prep import prepare, restricted_unpickler
from semi_fast.data_prep.prepare import hidden_directory, prepare_imagenet127
from semi_fast.data_prep.readers import decoding, downsampled_imagenet, ilsvrc
from semi_fast.data_prep.readers.imagenet127 import read_imagenet127
from semi_fast.data_prep.readers.imagenet_classes import STATISTICS, class_by_wnid, load_table
from semi_fast.data_prep.readers.kept_chunks import scratch_bytes
from semi_fast.data_prep.restricted_unpickler import StoredArray, load_stored_dict
from semi_fast.data_prep.writers.resident import needed_bytes
from semi_fast.prepared.manifest import Manifest, load_manifest, verify_manifest
from tests.conftest import PATIENCE
from tests.synthetic_data import (
    imagenet_batches,
    python2_pickle,
    rows_chw,
    write_ilsvrc,
    write_imagenet_batches,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = SHARED / "data" / "tiny_imagenet127_lt.tar.xz"


def test_the_table_is_the_published_one() -> None:
    table = load_table()
    assert (len(set(table.class_names)), len(set(table.class_wnids)), len(set(table.synsets))) == (127, 127, 1000)
    assert sorted(set(table.class_of.tolist())) == list(range(127))
    per_class = np.bincount(table.class_of, weights=table.train_counts)
    assert table.train_images == per_class.sum() == 1_281_167
    assert round(per_class.max() / per_class.min(), 2) == 286.48
    synsets = Counter(table.class_names[k] for k in table.class_of)
    assert synsets.most_common(5) == [
        ("mammal", 218),
        ("device", 124),
        ("container", 92),
        ("bird", 59),
        ("structure", 57),
    ]
    assert sum(n == 1 for n in synsets.values()) == 65
    assert (table.class_names[0], table.class_names[126]) == ("loaf of bread", "soft-finned fish")


def test_labels_are_counted_as_in_the_development_kit() -> None:
    """The first ten validation images of ILSVRC-2012, by the kit's ground truth and by their published folders."""
    truth = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)
    folders = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729",
               "n01735189", "n02346627", "n02776631", "n03794056", "n02328150")  # fmt: skip
    table = load_table()
    assert tuple(table.synsets[label - 1] for label in truth) == folders
    assert table.synsets[0] == "n02119789"  # kit fox


@pytest.mark.skipif(not (SHARED / "data" / "imagenet127.json").exists(), reason="the sources are not beside this")
def test_the_table_agrees_with_its_sources() -> None:
    import csv
    import json

    table, source = load_table(), json.loads((SHARED / "data" / "imagenet127.json").read_text())
    rows = list(csv.DictReader((SHARED / "spec" / "imagenet127_map.csv").open()))
    labels = {row["wnid"]: int(row["downsampled_imagenet_label_1based"]) for row in rows}
    assert [labels[wnid] for wnid in table.synsets] == list(range(1, 1001))
    assert dict(zip(table.synsets, table.class_of.tolist(), strict=True)) == source["synset_to_class"]
    assert dict(zip(table.synsets, table.train_counts.tolist(), strict=True)) == source["synset_train_count"]
    assert list(table.class_names) == source["class_names"]
    assert list(table.class_wnids) == source["class_wnids"]


def expected_of_batches(side: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    batches = list(imagenet_batches(side))
    class_of = load_table().class_of
    train = [np.concatenate(arrays) for arrays in zip(*(batch[1:] for batch in batches[:10]), strict=True)]
    return {"train": (train[0], class_of[train[1] - 1]), "test": (batches[10][1], class_of[batches[10][2] - 1])}


@pytest.mark.parametrize(("side", "npz", "protocol"), [(8, False, 3), (8, False, 4), (16, False, 3), (8, True, 3)])
def test_batches_give_pixels_and_classes_in_their_order(tmp_path: Path, side: int, npz: bool, protocol: int) -> None:
    raw = write_imagenet_batches(tmp_path / "raw", side, npz=npz, protocol=protocol)
    manifest = prepare_imagenet127(raw, tmp_path / "data")
    verify_manifest(manifest)
    assert (manifest.dataset, manifest.num_classes, manifest.resolution) == ("imagenet127", 127, (side, side))
    for part, (images, labels) in expected_of_batches(side).items():
        assert np.array_equal(manifest.images(part), images)
        assert np.array_equal(manifest.labels(part), labels)
    assert (manifest.mean, manifest.std) == STATISTICS
    assert "subset" not in manifest.source
    assert len(manifest.source["sha256"]) == 11


def test_batches_pickled_by_python_2_are_read(tmp_path: Path) -> None:
    raw = write_imagenet_batches(tmp_path / "raw")
    for path in [path for path in raw.rglob("*") if path.is_file()]:
        batch = load_stored_dict(path)
        assert isinstance(batch["data"], StoredArray)
        rows = np.fromfile(path, np.uint8, np.prod(batch["data"].shape), offset=batch["data"].offset)
        batch["data"] = rows.reshape(batch["data"].shape)
        path.write_bytes(python2_pickle({key.encode(): value for key, value in batch.items()}))
    manifest = prepare_imagenet127(raw, tmp_path / "data")
    assert np.array_equal(manifest.images("train"), expected_of_batches(8)["train"][0])


def test_batches_must_hold_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, small = write_imagenet_batches(tmp_path / "raw"), downsampled_imagenet.load_table()
    other = replace(small, train_counts=np.array([1, 3] + [2] * 998))
    monkeypatch.setattr(downsampled_imagenet, "load_table", lambda: other)
    with pytest.raises(ValueError, match=r"must follow the development kit \(1 is n02119789\); 2 of them have another"):
        read_imagenet127(raw, None)
    monkeypatch.setattr(downsampled_imagenet, "load_table", lambda: small)
    monkeypatch.setattr(downsampled_imagenet, "VAL_IMAGES", 50_000)
    with pytest.raises(ValueError, match="val_data: must hold 50000 images; got 1000: not the published file"):
        read_imagenet127(raw, None)
    monkeypatch.setattr(downsampled_imagenet, "load_table", load_table)
    with pytest.raises(ValueError, match="train_data_batch_1 to 10: must hold 1281167 images; got 2000: not the publ"):
        read_imagenet127(raw, None)


def rewrite(path: Path, **changed: object) -> None:
    """A batch with other entries; None leaves one out."""
    rows = np.zeros((3, 3 * 64), np.uint8)
    batch = {"data": rows, "labels": [1, 2, 3]} | changed
    path.write_bytes(python2_pickle({k.encode(): v for k, v in batch.items() if v is not None}))


TRAIN_3, VAL = "Imagenet8_train/train_data_batch_3", "Imagenet8_val/val_data"
BAD_BATCHES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": (TRAIN_3, lambda p: p.write_bytes(p.read_bytes()[:-3000]), "damaged, truncated or not a pickled batch ("),
    "cut in the pixels": (TRAIN_3, lambda p: p.write_bytes(p.read_bytes()[:9000]), "are left)"),
    "empty": (VAL, lambda p: p.write_bytes(b""), "damaged, truncated"),
    "a call": (VAL, lambda p: p.write_bytes(b"cos\nsystem\n(S'false'\ntR."), "it asks for os.system"),
    "no labels": (TRAIN_3, lambda p: rewrite(p, labels=None), "has no entry 'labels'"),
    "no pixels": (TRAIN_3, lambda p: rewrite(p, data=None), "has no entry 'data'"),
    "a list": (TRAIN_3, lambda p: rewrite(p, data=[1]), "data must be a uint8 array; got list"),
    "floats": (TRAIN_3, lambda p: rewrite(p, data=np.zeros((3, 192))), "data must be a uint8 array; got NoneType"),
    "odd width": (TRAIN_3, lambda p: rewrite(p, data=np.zeros((3, 190), np.uint8)), "got [3, 190]"),
    "flat": (TRAIN_3, lambda p: rewrite(p, data=np.zeros(576, np.uint8)), "got [576]"),
    "columns": (
        TRAIN_3,
        lambda p: rewrite(p, data=np.asfortranarray(np.zeros((3, 192), np.uint8))),
        "row by row",
    ),
    "other size": (
        TRAIN_3,
        lambda p: rewrite(p, data=np.zeros((3, 768), np.uint8)),
        "has 16x16 images where val_data has 8x8",
    ),
    "fewer labels": (TRAIN_3, lambda p: rewrite(p, labels=[1, 2]), "one label for each of 3 images; got 2"),
    "labels from 0": (
        TRAIN_3,
        lambda p: rewrite(p, labels=[0, 1001, True]),
        "labels must be integers in 1..1000; 3 are not (row 0: 0, row 1: 1001, row 2: True)",
    ),
}


def test_a_batch_cannot_ask_for_other_bytes_or_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "batch"
    content = pickle.dumps({"data": np.ones((3, 192), np.uint8), "labels": [1, 2, 3]}, protocol=3)
    path.write_bytes(content)
    assert load_stored_dict(path)["data"] == StoredArray(content.index(b"\1" * 576), (3, 192))
    path.write_bytes(content.replace(b"K\x03K\xc0\x86", b"K\x04K\xc0\x86"))  # shape (4, 192)
    with pytest.raises(ValueError, match=r"an array of shape \(4, 192\) must have its 576 bytes row by row"):
        load_stored_dict(path)
    path.write_bytes(b"J\x00\x00\x00\x00Q" + content)
    with pytest.raises(ValueError, match="it uses the opcode BINPERSID"):
        load_stored_dict(path)
    path.write_bytes(content)
    monkeypatch.setattr(restricted_unpickler, "SKELETON_LIMIT_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes are no array"):
        load_stored_dict(path)


def refused(raw: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that preparing `raw` ends with; nothing is left."""
    out = raw.parent / "data"
    assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(out), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]
    return line


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_one_line_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file, change, message = BAD_BATCHES[name]
    raw = write_imagenet_batches(tmp_path / "raw")
    change(raw / file)
    line = refused(raw, capsys)
    assert str(raw / file) in line
    assert message in line


def test_a_bad_npz_batch_is_one_line_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_imagenet_batches(tmp_path / "raw", npz=True)
    path = raw / "Imagenet8_train_npz" / "train_data_batch_7.npz"
    whole, rows = path.read_bytes(), np.zeros((3, 192), np.uint8)

    def saved(**arrays: np.ndarray) -> None:
        np.savez(path, **arrays)  # type: ignore[arg-type]

    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: path.write_bytes(whole[:-2000]), "not a zip file"),
        (lambda: path.write_bytes(whole[:5000] + b"x" + whole[5001:]), "Bad CRC-32 for file 'data.npy'"),
        (lambda: saved(data=rows), "no item named 'labels.npy'"),
        (lambda: saved(data=rows.astype(np.float32), labels=np.ones(3, int)), "data must be uint8"),
        (lambda: saved(data=np.asfortranarray(rows), labels=np.ones(3, int)), "row by row"),
        (lambda: saved(data=rows, labels=np.array([1, "x", None], object)), "allow_pickle=False"),
        (lambda: saved(data=rows, labels=np.ones(3)), "labels must be integers in 1..1000; 3 are not (row 0: 1.0"),
    ]
    for change, message in changes:
        change()
        line = refused(raw, capsys)
        assert str(path) in line
        assert message in line


def test_the_set_of_batches_must_be_whole_and_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_imagenet_batches(tmp_path / "raw")
    assert "--resolution must be that of the batches, 8, or left out; got 64" in refused(
        raw, capsys, "--resolution", "64"
    )
    write_imagenet_batches(raw, 16)
    assert "must hold one train_data_batch_1; it has Imagenet16_train/" in refused(raw, capsys)
    for path in (raw / "Imagenet16_train", raw / "Imagenet16_val"):
        for file in path.iterdir():
            file.unlink()
    (raw / TRAIN_3).unlink()
    (raw / VAL).unlink()
    assert "train_data_batch_3, val_data missing" in refused(raw, capsys)
    (raw / "train").mkdir()
    assert "either train/<synset>/ folders or downsampled batches" in refused(raw, capsys)


def test_a_directory_with_neither_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    assert "holds neither" in refused(tmp_path / "raw", capsys)


def expected_of_folders(raw: Path, part: str, side: int) -> list[tuple[str, np.ndarray]]:
    """(synset, pixels) in the fixed order, from the file names alone."""
    paths = sorted((raw / part).rglob("*.JPEG"))
    order = philox.shuffled(np.arange(len(paths)), 0, philox.FILE_ORDER, 0)
    resized = []
    for path in [paths[i] for i in order]:
        with Image.open(path) as image:
            resized.append((path.parent.name, np.asarray(image.resize((side, side), Image.Resampling.BOX))))
    return resized


def test_folders_give_whole_images_box_resized_in_a_fixed_mixed_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=30)
    assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("imagenet127: 2 classes, 32x32, 90 train, 3 test, 0 unlabeled\n")
    assert printed.err == "note: a subset of ImageNet-127, 2 of 127 classes, 90 of 1281167 train images\n"
    manifest = load_manifest(tmp_path / "data")
    verify_manifest(manifest)
    assert manifest.class_names == ("mammal", "soft-finned fish"), "of the classes, those that occur, in their order"
    for part, folder in (("train", "train"), ("test", "val")):
        expected = expected_of_folders(raw, folder, 32)
        assert np.array_equal(manifest.images(part), np.stack([image for _, image in expected]))
        names = [manifest.class_names[k] for k in manifest.labels(part)]
        assert names == [load_table().class_names[class_by_wnid()[wnid]] for wnid, _ in expected]
    assert manifest.source["files"] == 93
    np.testing.assert_allclose(manifest.mean, (manifest.images("train") / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    assert len({wnid for wnid, _ in expected_of_folders(raw, "train", 4)[:20]}) == 3, "synsets are mixed"


def same_rows(a: Manifest, b: Manifest) -> bool:
    return all(np.array_equal(a.images(p), b.images(p)) for p in ("train", "test")) and all(
        np.array_equal(a.labels(p), b.labels(p)) for p in ("train", "test")
    )


def test_validation_images_without_folders_take_their_labels_from_a_list(tmp_path: Path) -> None:
    manifests = [
        prepare_imagenet127(write_ilsvrc(tmp_path / kind, val=kind), tmp_path / f"of_{kind}", resolution=8)
        for kind in ("folders", "ground_truth", "solution")
    ]
    assert same_rows(manifests[0], manifests[1])
    assert same_rows(manifests[0], manifests[2])


def test_a_folder_may_be_named_by_a_super_class(tmp_path: Path) -> None:
    synsets = write_ilsvrc(tmp_path / "a", ("n01440764", "n02119789"))
    classes = write_ilsvrc(tmp_path / "b", ("n01440764", "n02119789"))
    for part in ("train", "val"):
        (classes / part / "n01440764").rename(classes / part / "126_n01428580")
        (classes / part / "n02119789").rename(classes / part / "n01861778")
    a, b = (prepare_imagenet127(raw, tmp_path / f"of_{raw.name}", resolution=8) for raw in (synsets, classes))
    assert (a.class_names, a.counts) == (b.class_names, b.counts)


def _text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def _move(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


BAD_FOLDERS: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "no val": ("folders", "", lambda r: _move(r / "val", "validation"), "has no val/"),
    "unknown": ("folders", "train/cats", lambda r: _move(r / "train/n01440764", "cats"), "named by a synset"),
    "wrong number": (
        "folders",
        "train/12_n01440764",
        lambda r: _move(r / "train/n01440764", "12_n01440764"),
        "n01440764 belongs to class 126, not 12",
    ),
    "differing": (
        "folders",
        "",
        lambda r: _move(r / "val/n01440764", "n01443537"),
        "the same synsets; train/ lacks 'n01443537'; val/ lacks 'n01440764'",
    ),
    "stray file": ("folders", "train", lambda r: (r / "train/list.txt").write_text(""), "one folder per synset; "),
    "empty folder": ("folders", "train/n01443537", lambda r: (r / "train/n01443537").mkdir(), "holds no image"),
    "link outside": (
        "folders",
        "train/n01440764/x.JPEG",
        lambda r: (r / "train/n01440764/x.JPEG").symlink_to("/etc/hostname"),
        "links must lead to files inside",
    ),
    "no list": ("ground_truth", "val", lambda r: (r / ilsvrc.GROUND_TRUTH).unlink(), "it has no such list"),
    "short list": (
        "ground_truth",
        ilsvrc.GROUND_TRUTH,
        lambda r: _text(r / ilsvrc.GROUND_TRUTH, "449\n", ""),
        "must name every image of val/; it lacks",
    ),
    "bad label": (
        "ground_truth",
        ilsvrc.GROUND_TRUTH,
        lambda r: _text(r / ilsvrc.GROUND_TRUTH, "449\n", "1001\n"),
        "1 are none (ILSVRC2012_val_00000001: '1001')",
    ),
    "image missing": (
        "solution",
        "val",
        lambda r: (r / "val/ILSVRC2012_val_00000002.JPEG").unlink(),
        "must hold the 3 images of LOC_val_solution.csv; it has 2",
    ),
    "damaged image": (
        "folders",
        "train/n02119789/n02119789_4.JPEG",
        lambda r: (r / "train/n02119789/n02119789_4.JPEG").write_bytes(b"GIF89a"),
        "1 files are no usable images, repair or remove them (or --on-bad skip)",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    val, file, change, message = BAD_FOLDERS[name]
    raw = write_ilsvrc(tmp_path / "raw", val=val)
    change(raw)
    line = refused(raw, capsys)
    assert str(raw / file) in line
    assert message in line


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_decoding_processes_end_with_their_reader(tmp_path: Path) -> None:
    before = children()
    raw = read_imagenet127(write_ilsvrc(tmp_path / "raw", per_class=90), 8)
    next(raw.blocks)
    assert len(children() - before) >= len(os.sched_getaffinity(0))
    raw.blocks.close()  # type: ignore[attr-defined]
    assert alive(children() - before) == []


def alive(pids: Iterable[str]) -> list[str]:
    """Those of the decoding processes that do not end."""
    until = time.monotonic() + PATIENCE
    while (found := [pid for pid in pids if "multiprocessing.spawn" in _command(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


KILLED = """
import os, signal, sys, time
from pathlib import Path
from semi_fast.data_prep.readers.imagenet127 import read_imagenet127
if __name__ == "__main__":
    raw = read_imagenet127(Path(sys.argv[1]), 8)
    next(raw.blocks)
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    print(own, flush=True)
    if sys.argv[2] == "parent":
        os.kill(os.getpid(), signal.SIGKILL)
    for pid in own.split():
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    print(sum(len(rows) for _, rows in raw.blocks), flush=True)
"""


@pytest.mark.parametrize("who", ["parent", "child"])
def test_a_killed_process_leaves_no_other_behind(tmp_path: Path, who: str) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=400, size=(8, 8))
    end = subprocess.run([sys.executable, "-c", KILLED, str(raw), who], capture_output=True, text=True, check=False)
    if who == "parent":
        assert end.returncode == -signal.SIGKILL
        pids = end.stdout.split()
    else:
        assert end.returncode == 0, "others take their place"
        *pids, rows = end.stdout.split()
        assert int(rows) == 1200 + 3 - decoding.CHUNK_IMAGES
    assert alive(pids) == []


def decoded_count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every chunk that is handed to the decoding processes from now on."""
    counts: list[int] = []
    begin = decoding.Decoders.begin

    def counted(self, raw, names, recipe):
        counts.append(len(names))
        return begin(self, raw, names, recipe)

    monkeypatch.setattr(decoding.Decoders, "begin", counted)
    return counts


KILLED_LATER = """
import os, signal, sys
from pathlib import Path
from semi_fast.data_prep import prepare
from semi_fast.data_prep.readers import decoding
if __name__ == "__main__":
    blocks = 0
    def killed(*arguments):
        global blocks
        blocks += 1
        if blocks == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return stored(*arguments)
    stored, decoding.KeptChunks.store = decoding.KeptChunks.store, killed
    prepare.prepare_imagenet127(Path(sys.argv[1]), Path(sys.argv[2]), 8)
"""


def test_what_a_killed_run_has_decoded_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out, kept = write_ilsvrc(tmp_path / "raw", per_class=200), tmp_path / "data", tmp_path / ".data.decoded"
    paths = sorted((raw / "train").rglob("*.JPEG"))
    for path in paths[::7]:
        Image.open(path).convert("L").save(path)
    end = subprocess.run([sys.executable, "-c", KILLED_LATER, str(raw), str(out)], check=False)
    assert end.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.name, ".data.preparing", "raw"]
    saved = kept.read_bytes()
    whole = prepare_imagenet127(raw, tmp_path / "whole", 8)
    assert whole.source["converted_to_rgb"] == {"L": len(paths[::7])}
    counts = decoded_count(monkeypatch)

    def prepared_again(content: bytes, there: int) -> None:
        kept.write_bytes(content)
        counts.clear()
        manifest = prepare_imagenet127(raw, out, 8)
        assert (manifest.files, manifest.source) == (whole.files, whole.source)
        assert len(counts) == 10 + 1 - there, "chunks of 600 images and 3"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw", "whole"]
        shutil.rmtree(out)

    prepared_again(saved, 4)
    prepared_again(saved[:100] + b"x" + saved[101:-1], 2)
    os.utime(paths[philox.shuffled(np.arange(len(paths)), 0, philox.FILE_ORDER, 0)[0]], ns=(1, 1))
    prepared_again(saved, 3)
    kept.write_bytes(saved)
    other = read_imagenet127(raw, 4, kept)
    counts.clear()
    list(other.blocks)
    assert len(counts) == 11, "another resolution"


def test_what_is_decoded_goes_when_the_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=90)
    (raw / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    assert "empty file" in refused(raw, capsys)


def test_two_preparations_of_one_directory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_ilsvrc(tmp_path / "raw")
    with hidden_directory(tmp_path / ".data.preparing"):
        assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 2
        assert not (tmp_path / ".data.decoded").exists(), "which is the other's"
    assert "--out, whose work stands in" in (said := capsys.readouterr().err)
    assert "is in use by another process" in said


def test_the_disk_must_hold_what_is_decoded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=90)
    kept = tmp_path / ".data.decoded"
    expected = scratch_bytes(kept, 273, 32)
    assert read_imagenet127(raw, 32, kept).scratch_bytes == expected > 273 * 32 * 32 * 3
    kept.write_bytes(bytes(2**21))
    assert read_imagenet127(raw, 32, kept).scratch_bytes == 0
    kept.unlink()
    needed = needed_bytes(read_imagenet127(raw, 32)) + expected
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(RuntimeError, match=f"needs {needed} bytes of disk space"):
        prepare_imagenet127(raw, tmp_path / "data", 32)


LIMITED = """
import sys
from pathlib import Path
from semi_fast.data_prep.prepare import prepare_imagenet127
from semi_fast.data_prep.readers import downsampled_imagenet
downsampled_imagenet._check_published = lambda *_: None
prepare_imagenet127(Path(sys.argv[1]), Path(sys.argv[2]))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_a_batch(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, images, labels in imagenet_batches(8):
        rows = rows_chw(images).repeat(64, axis=1)
        batch = {"data": rows, "labels": labels.tolist()}
        if name == "train_data_batch_10":  # 209 MB, of 1.6 GB that a published one has
            batch = {"data": np.zeros((17_000, 3 * 64 * 64), np.uint8), "labels": [5] * 17_000}
        with (raw / name).open("wb") as file:
            pickle.dump(batch, file, protocol=3)
    command = [sys.executable, "-c", LIMITED, str(raw), str(tmp_path / "data")]
    used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(used) < 170 * 1024, "KiB; the interpreter with numpy and Pillow takes 40 MiB, a block of images 3 x 13"


@pytest.mark.skipif(not TINY.exists(), reason="the Tiny-ImageNet subset is not beside the repository")
def test_a_fifth_of_the_tiny_imagenet_subset_is_prepared(tmp_path: Path) -> None:
    with tarfile.open(TINY) as tar:
        images = sorted((m for m in tar.getmembers() if m.name.endswith(".JPEG")), key=lambda m: m.name)
        fifth = [member for part in ("train/", "val/") for member in [m for m in images if part in m.name][::5]]
        tar.extractall(tmp_path / "raw", members=fifth, filter="data")
    manifest = prepare_imagenet127(tmp_path / "raw", tmp_path / "data", resolution=32)
    names, folders = load_table().class_names, [member.name.split("/")[-3:-1] for member in fifth]
    for part, folder in (("train", "train"), ("test", "val")):
        counted = Counter(names[int(name.split("_")[0])] for of_part, name in folders if of_part == folder)
        assert dict(zip(manifest.class_names, manifest.counts[part], strict=True)) == counted  # type: ignore[arg-type]
    assert manifest.source["subset"] == "48 of 127 classes, 4014 of 1281167 train images"
    np.testing.assert_allclose(manifest.mean, STATISTICS[0], atol=0.01)  # whose pixels are like the published ones
    np.testing.assert_allclose(manifest.std, STATISTICS[1], atol=0.01)
