"""Preparing data end to end: what is published is complete, and anything that goes wrong leaves nothing."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from semi_fast.cli import main
from semi_fast.commands import inspect, split, verify
from semi_fast.commands import prepare as command
from semi_fast.data_prep import prepare
from semi_fast.data_prep.prepare import (
    hidden_directory,
    prepare_cifar10,
    prepare_cifar100,
    prepare_digits,
    prepare_folder,
)
from semi_fast.data_prep.readers.cifar import read_cifar
from semi_fast.data_prep.writers.resident import statistics
from semi_fast.prepared.manifest import load_manifest, verify_manifest
from tests.synthetic_data import (
    cifar_sets,
    images_of,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100_binary,
    write_cifar100_python,
    write_image_folder,
    write_prepared,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], object]) -> int:
    """Exit status of a forked child that runs `action`: 0, 1 after an exception, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_both_cifar10_layouts_give_the_same_files(tmp_path: Path) -> None:
    python = prepare_cifar10(write_cifar10_python(tmp_path / "a", 4), tmp_path / "python")
    binary = prepare_cifar10(write_cifar10_binary(tmp_path / "b", 4), tmp_path / "binary")
    assert python.files == binary.files
    assert python.mean == (0.4914, 0.4822, 0.4465)
    assert python.counts == {"train": (4,) * 10, "test": (5,) * 10, "unlabeled": 0}
    for part, (images, labels) in cifar_sets(10, 4, 5, 0).items():
        assert np.array_equal(python.images(part), images)
        assert np.array_equal(python.labels(part), labels)
    assert names(tmp_path) == ["a", "b", "binary", "python"]
    assert names(tmp_path / "python") == ["manifest.json", "resident"]


def test_both_cifar100_layouts_give_the_same_files(tmp_path: Path) -> None:
    python = prepare_cifar100(write_cifar100_python(tmp_path / "a"), tmp_path / "python")
    binary = prepare_cifar100(write_cifar100_binary(tmp_path / "b"), tmp_path / "binary")
    assert python.files == binary.files
    assert python.std == (0.2675, 0.2565, 0.2761)
    assert (python.num_classes, python.dataset) == (100, "cifar100")


def test_preparing_twice_gives_the_same_digest(tmp_path: Path) -> None:
    raw = write_image_folder(tmp_path / "raw", unlabeled=3)
    manifests = [prepare_folder(raw, tmp_path / place / "data", resolution=8) for place in ("here", "there")]
    assert manifests[0].sha256 == manifests[1].sha256
    assert manifests[0].command == "semi-fast prepare folder --raw raw --resolution 8 --out data"
    assert str(tmp_path) not in (tmp_path / "here" / "data" / "manifest.json").read_text()


def test_mean_and_std_of_a_folder_are_those_of_its_train_pixels(tmp_path: Path) -> None:
    manifest = prepare_folder(
        write_image_folder(tmp_path / "raw", side=8, unlabeled=3), tmp_path / "data", resolution=8
    )
    pixels = manifest.images("train") / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    assert manifest.length("unlabeled") == len(manifest.images("unlabeled")) == 3


def test_a_constant_channel_keeps_a_positive_std(tmp_path: Path) -> None:
    raw = write_image_folder(tmp_path / "raw", per_class=1, test_per_class=1)
    for path in raw.rglob("*.png"):
        red = images_of(np.array([0]), 4, 0)[0] * np.array([1, 0, 0], np.uint8)
        Image.fromarray(red).save(path)
    manifest = prepare_folder(raw, tmp_path / "data", resolution=4)
    assert manifest.std[1:] == (1 / 255, 1 / 255)
    assert manifest.std[0] > 1 / 255


def test_digits_are_prepared_from_nothing(tmp_path: Path) -> None:
    manifest = prepare_digits(tmp_path / "data")
    assert manifest.resolution == (16, 16)
    assert manifest.counts["test"] == (45,) * 10
    verify_manifest(manifest)


def test_repeated_test_images_are_counted_and_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw")
    for i in (1, 2):
        (raw / "test" / "dog" / f"copy{i}.png").write_bytes((raw / "train" / "cat" / f"000{i}.png").read_bytes())
    command.run(dataset="folder", raw=raw, out=tmp_path / "data", resolution=8)
    assert load_manifest(tmp_path / "data").source["repeated_test_images"] == 2
    assert capsys.readouterr().err.startswith("warning: 2 test images have the pixels of a train")


def test_an_existing_directory_is_only_taken_when_empty(tmp_path: Path) -> None:
    raw = write_cifar10_binary(tmp_path / "raw", 1)
    out = tmp_path / "data"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ValueError, match="--out must be new or an empty directory"):
        prepare_cifar10(raw, out)
    assert names(out) == ["mine"]
    (out / "mine").unlink()
    prepare_cifar10(raw, out)
    assert names(out) == ["manifest.json", "resident"]
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="must not be a symbolic link"):
        prepare_cifar10(raw, tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out must be new"):
        prepare_cifar10(raw, tmp_path / "file")


@pytest.mark.parametrize("split", [[], ["--labeled-max", "20"]])
@pytest.mark.parametrize("named", [".", "../here", "here/..", "mount"])
def test_the_directory_one_stands_in_is_never_replaced(
    named: str, split: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a mount point, which cannot be; said before anything is read."""
    here = tmp_path / "here"
    (here / "mount").mkdir(parents=True)
    if named == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
        monkeypatch.chdir(here)
    elif named == "here/..":
        monkeypatch.chdir(here / "mount")
        named = str(here / "mount" / "..")
    else:
        (here / "mount").rmdir()
        monkeypatch.chdir(here)
    before = here.stat().st_ino
    assert main(["prepare", "digits", "--out", named, *split]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "neither a mount point nor the directory one stands in" in line
    assert "name a new directory in it" in line
    assert here.stat().st_ino == before
    assert names(tmp_path) == ["here"]
    assert [path for path in here.rglob("*") if not path.is_dir()] == []


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*arguments: object, **options: object) -> object:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "theirs").write_text("")
        return written(*arguments, **options)  # type: ignore[arg-type]

    written = prepare.write_resident
    monkeypatch.setattr(prepare, "write_resident", meanwhile)
    with pytest.raises(ValueError, match="made by another process meanwhile"):
        prepare_cifar10(write_cifar10_binary(tmp_path / "raw", 1), tmp_path / "data")
    assert names(tmp_path) == ["data", "raw"]
    assert names(tmp_path / "data") == ["theirs"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    raw = write_image_folder(tmp_path / "raw")
    (raw / "test" / "emu" / "0007.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="1 files are no usable images"):
        prepare_folder(raw, tmp_path / "data")
    assert names(tmp_path) == ["raw"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def stop(_: object) -> None:
        raise error

    monkeypatch.setattr(prepare, "write_manifest", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare_cifar10(write_cifar10_binary(tmp_path / "raw", 1), tmp_path / "data")
    assert names(tmp_path) == ["raw"]


def test_one_class_or_an_empty_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two classes are needed; got only cat"):
        prepare_folder(write_image_folder(tmp_path / "one", ("cat",)), tmp_path / "data")
    with pytest.raises(ValueError, match="every class needs an image in test; 'class_1' has none"):
        write_prepared(tmp_path / "data", (3, 3), (1, 0))
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize("resolution", [0, 3, 1025])
def test_an_odd_resolution_is_refused(tmp_path: Path, resolution: int) -> None:
    with pytest.raises(ValueError, match=f"--resolution must be in 4..1024; got {resolution}"):
        prepare_digits(tmp_path / "data", resolution=resolution)


def test_a_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_cifar10_binary(tmp_path / "raw", 1)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(RuntimeError, match=r"needs 12\d{5} bytes of disk space.*1000000 bytes are free"):
        prepare_cifar10(raw, tmp_path / "data")
    assert names(tmp_path) == ["raw"]


@pytest.mark.parametrize("limit", [100, 5_000, 30_000, 150_000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, limit: int) -> None:
    raw = write_cifar10_binary(tmp_path / "raw", 5)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(RuntimeError, match="bytes of disk space"):
            prepare_cifar10(raw, tmp_path / "data")

    assert in_child(limited) == 0
    assert names(tmp_path) == ["raw"]


def test_a_kill_at_any_sync_leaves_no_half_data_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    raw, out = write_cifar10_binary(tmp_path / "raw", 1), tmp_path / "out" / "data"
    out.parent.mkdir()
    fsync = os.fsync

    def killed_at(n: int) -> None:
        calls = 0

        def counted(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = counted
        prepare_cifar10(raw, out)

    before_the_rename = 7  # four arrays, their directory, the manifest, the directory of all
    for n in range(1, before_the_rename + 1):
        assert in_child(lambda n=n: killed_at(n)) == -signal.SIGKILL
        assert names(out.parent) == [".data.preparing"], "what earlier kills left is taken up"
    assert in_child(lambda: killed_at(before_the_rename + 1)) == -signal.SIGKILL, "the rename is synced"
    assert names(out.parent) == ["data"]
    verify_manifest(load_manifest(out))


def test_the_work_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    raw, running = write_cifar10_binary(tmp_path / "raw", 1), tmp_path / ".data.preparing"
    with hidden_directory(running):
        (running / "theirs").write_text("")
        with pytest.raises(ValueError, match=r"\.data\.preparing, is in use by another process; .* choose another"):
            prepare_cifar10(raw, tmp_path / "data")
        assert names(running) == ["theirs"]
    assert names(tmp_path) == ["raw"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_work_in_progress_never_goes_through_a_link(tmp_path: Path, kind: str) -> None:
    raw, elsewhere = write_cifar10_binary(tmp_path / "raw", 1), tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        (tmp_path / ".data.preparing").symlink_to(elsewhere)
    else:
        (tmp_path / ".data.preparing").write_text("")
    with pytest.raises(ValueError, match=r"\.data\.preparing: must be a directory"):
        prepare_cifar10(raw, tmp_path / "data")
    assert names(elsewhere) == []


def test_the_commands_print_what_they_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    command.run(dataset="cifar10", raw=write_cifar10_binary(tmp_path / "raw", 20), out=data)
    assert capsys.readouterr().out.startswith("cifar10: 10 classes, 32x32, 200 train, 50 test, 0 unlabeled\n")
    split.run(data=data, name="lt", labeled_max=8, unlabeled_max=10, imbalance_labeled=4, validation_per_class=2)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["class", "labeled", "unlabeled"]
    assert out[10].split() == ["truck", "2", "10"]
    assert "40 labeled, 140 unlabeled rows, 20 validation, rule semi" in out[11]
    assert out[12:] == ["train on it with --split.file=lt", str(data / "splits" / "lt.json")]
    inspect.run(data=data)
    out = capsys.readouterr().out.splitlines()
    assert out[2].split() == ["class", "train", "test", "lt", "labeled", "lt", "unlabeled"]
    assert out[3].split() == ["airplane", "20", "5", "8", "10"]
    verify.run(data=data)
    assert capsys.readouterr().out.startswith("ok: 4 arrays (770512 bytes), 1 splits, manifest ")


def test_a_terminal_gets_a_table_and_odd_class_names_stay_on_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ("\x1b[1m", "[bold]x", "line\nbreak")
    prepare_folder(write_image_folder(tmp_path / "raw", odd), tmp_path / "data", resolution=4)
    verify_manifest(load_manifest(tmp_path / "data"))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        inspect.run(data=tmp_path / "data")
        out = capsys.readouterr().out
        assert ("┃" in out) == terminal
        assert all(text in out for text in ("\\x1b[1m", "[bold]x", "line\\nbreak"))


def test_verify_covers_the_splits(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path / "data")
    split.run(data=tmp_path / "data", name="x", labeled_max=3)
    path = manifest.root / "splits" / "x.json"
    path.write_text(path.read_text().replace('"rule": "semi"', '"rule": "daso"'))
    for check in (verify.run, inspect.run):
        with pytest.raises(ValueError, match=r"x.json: content does not match"):
            check(data=tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar10"}, "cifar10 needs --raw"),
        ({"dataset": "digits", "raw": "x"}, "takes no --raw"),
        ({"dataset": "cifar100", "raw": "x", "resolution": 64}, "leave out --resolution 64"),
        ({"dataset": "folder", "raw": "/nothing here"}, "--raw must be a directory; /nothing here is not"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.run(out=tmp_path / "data", **arguments)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".x", "a/b", "../x", "a\\b", "a\nb", "a\0b", "x" * 201])
def test_a_split_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    write_prepared(tmp_path / "data")
    with pytest.raises(ValueError, match="--name must be a plain file name"):
        split.run(data=tmp_path / "data", name=name, labeled_max=3)
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["manifest.json", "resident"]


def test_preparing_needs_no_torch() -> None:
    code = "import sys, semi_fast.data_prep.subset; sys.exit(len({'torch', 'sklearn', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    not (SHARED / "data" / "unpack.py").exists(), reason="the real CIFAR-10 is not beside the repository"
)
def test_the_real_cifar10_gives_the_same_pixels_in_both_layouts(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("unpack", SHARED / "data" / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    sets, class_names = unpack.read_strips(SHARED / "data" / "cifar10_lossless_webp.tar")
    unpack.write_python(sets, class_names, tmp_path / "python", 10)
    unpack.write_bin(sets, class_names, tmp_path / "binary", 10)
    raws = [read_cifar("cifar10", tmp_path / layout) for layout in ("python", "binary")]
    parts = dict.fromkeys(("train", "test"), 0)
    for (part, python), (other, binary) in zip(*(raw.blocks for raw in raws), strict=True):
        expected = sets[part][0][parts[part] : parts[part] + len(python)]
        assert part == other
        assert np.array_equal(python, expected)
        assert np.array_equal(binary, expected)
        parts[part] += len(python)
    assert parts == {"train": 50_000, "test": 10_000}
    for raw in raws:
        assert raw.class_names == tuple(class_names)
        assert all(np.array_equal(raw.labels[part], sets[part][1]) for part in parts)
    histogram = np.array([np.bincount(sets["train"][0][..., channel].ravel(), minlength=256) for channel in range(3)])
    computed, published = statistics(histogram), raws[0].statistics
    assert published is not None
    np.testing.assert_allclose(computed[0], published[0], atol=1e-4)
    np.testing.assert_allclose(computed[1], published[1], atol=1e-4)
