"""The command line: every command on good input, and one clear line for every kind of bad input."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import semi_fast
from semi_fast import train as module
from semi_fast.cli import main
from semi_fast.loop.fit import TrainingRun
from semi_fast.loop.sampling import Batches
from semi_fast.schema.arguments import below, parse_config
from semi_fast.schema.config import Config, check
from semi_fast.schema.yaml_file import config_keys, dump

from .synthetic_data import write_cifar10_binary, write_cifar10_python, write_image_folder, write_prepared
from .tiny import ARGUMENTS, FILE

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SHORT = ["--optim.steps=6", "--eval.every=6", "--checkpoint.every=2", "--checkpoint.keep=9"]


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every path under `root`, files with size and time; empty if there is no `root`."""
    found: dict[str, tuple[int, int]] = {}
    for path in root.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(root))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


def refused(capsys: pytest.CaptureFixture[str], argv: Sequence[object], words: Sequence[object], code: int = 2) -> str:
    """What `semi-fast argv` says on its one line of stderr, which must hold every one of `words`."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("semi-fast: ")
    assert [word for word in words if str(word) not in lines[0]] == [], lines[0]
    return lines[0]


def train(data: Path, run_dir: Path, *flags: str) -> list[str]:
    """The arguments of a small run."""
    return ["train", *ARGUMENTS, f"--data.path={data}", f"--run_dir={run_dir}", *flags]


def not_started(
    capsys: pytest.CaptureFixture[str], data: Path, run_dir: Path, flags: Sequence[str], words: Sequence[object]
) -> None:
    """A run that is refused: data and run directory are as if it had never been tried."""
    before = tree(data), tree(run_dir)
    refused(capsys, train(data, run_dir, *flags), words)
    assert (tree(data), tree(run_dir)) == before


BAD_FLAGS = {
    "unknown key": ("--optim.step=3", "no key optim.step;", "optim.steps?"),
    "unknown key, nothing like it": ("--zzz=3", "no key zzz;", "train --help"),
    "misspelt section": ("--optm.steps=3", "no key optm.steps", "optim.steps?"),
    "section for a key": ("--optim=3", "optim is a section", "optim.steps"),
    "number for an optional one": ("--eval.batch=x", "eval.batch must be of type int, or null;", "got x"),
    "base of 60": ("--optim.steps=1:30", "optim.steps must be a decimal number", "got 1:30"),
    "no float32": ("--method.semi.prototype_temperature=1e-39", "temperature must lie in [1e-06", "got 1e-39"),
    "one in float32": ("--ema.decay=0.999999999999", "ema.decay must lie in [0, 1)", "got 0.999999999999"),
    "more than memory": (f"--batch.labeled={2**63}", "batch.labeled must lie in [1, 1048576]", f"got {2**63}"),
    "batch beyond memory": ("--batch.labeled=1000000 --batch.unlabeled_ratio=9", "4194304 images", "got 10000000"),
    "time that runs back": ("--engine.timeout_seconds=-5", "engine.timeout_seconds must lie in [1, ", "got -5"),
    "no threads": ("--data.threads=-3", "data.threads must lie in [1, 1024]", "got -3"),
    "option of another method": ("--method.fixmatch.threshold=0.9", "effect with method.name=fixmatch", "leave --me"),
    "option of no plug-in": ("--method.la.strength=2", "has an effect with method.plugins=[la]"),
    "option of before": ("--method.semi.bank-views=weak", "semi.bank_views is an option no more, it is always strong"),
    "option that is off": (
        "--method.semi.mixing=0 --method.semi.prototype_temperature=1",
        "method.semi.mixing above 0",
    ),
    "ramp of nothing": ("--ema.decay=0 --ema.ramp=true", "ema.ramp has an effect with ema.decay above 0 alone"),
    "warm-up of nothing": (
        "--method.name=semi --method.semi.warmup_epochs=0 --method.semi.warmup_balanced=false",
        "method.semi.warmup_balanced has an effect with method.semi.warmup_epochs above 0 alone",
    ),
    "option of a level": ("--engine.autotune=true --engine.level=eager", "engine.autotune has an effect with engine."),
    "seed of no shuffle": ("--split.seed=1", "split.seed shuffles where the rule does", "got 1 with split.rule=semi"),
    "ratio of equal counts": ("--split.unlabeled_shape=uniform", "uniform gives every class as many", "5.0: leave"),
    "shape of nothing": ("--split.unlabeled_max=0", "split.unlabeled_max=0 leaves nothing", "got 5.0 and consistent"),
    "reversed and equal": (
        "--split.unlabeled_shape=reversed --split.imbalance_unlabeled=1",
        "needs split.imbalance_unlabeled above 1",
    ),
    "file and keys": ("--split.file=a --split.labeled_max=2", "split.file=a is the whole", "split.labeled_max would"),
    "twice": ("--ema.decay=0.5 --ema.decay=0.6", "--ema.decay is given twice, 0.5 and 0.6; keep one"),
    "twice, spelt differently": ("--run_dir=a --run-dir=b", "--run-dir is given twice"),
    "abbreviated": ("--method.sem.threshold=0.7", "no key method.sem.threshold", "method.semi.threshold?"),
    "unknown, no value": ("--optim.step", "no key optim.step;", "optim.steps?"),
    "no value": ("--optim.steps", "--optim.steps needs a value", "--optim.steps=VALUE"),
    "no file": ("--config", "--config needs a value", "--config=VALUE"),
    "no flag": ("stray", "--key=value", "'stray'"),
    "text for a number": ("--optim.steps=many", "optim.steps must be of type int", "got many"),
    "fraction for a count": ("--optim.steps=1.5", "optim.steps must be of type int", "got 1.5"),
    "not a number": ("--optim.lr=nan", "optim.lr must be of type float", "got nan"),
    "infinite": ("--method.la.strength=inf", "method.la.strength must be of type float", "got inf"),
    "text for a switch": ("--augment.flip=maybe", "augment.flip must be of type bool", "got maybe"),
    "text for a list": ("--method.plugins=la", "method.plugins must be a list, [NAME, ...]", "got la"),
    "choice in a list": ("--method.plugins=[lo]", "method.plugins must be one of la", "got lo"),
    "choice": ("--method.name=mixmatch", "method.name must be one of supervised, fixmatch, semi", "got mixmatch"),
    "source": ("--data.source=nvme", "data.source must be one of auto, ", "got nvme"),
    "precision": ("--precision=fp8", "precision must be one of auto, fp32", "got fp8"),
    "evaluation after the end": ("--eval.every=13", "eval.every must be at most optim.steps", "13 and 12"),
    "no evaluation": ("--eval.every=0", "eval.every must lie in [1, 999999999]", "got 0"),
    "warm-up to the end": ("--method.semi.warmup_epochs=6", "method.semi.warmup_epochs", "optim.steps", "6 * 2 and 12"),
    "plug-in on semi": ("--method.plugins=[la]", "method.plugins stack on supervised and fixmatch", "is semi"),
    "out of range": ("--ema.decay=1", "ema.decay must lie in [0, 1)", "got 1.0"),
    "negative seed": ("--seed=-1", "seed must lie in [0, 18446744073709551615]", "got -1"),
    "no data": ("--data.path=", "data.path must name a prepared data set", "semi-fast prepare"),
    "data nowhere": ("--data.path=nowhere", "nowhere", "manifest.json", "semi-fast prepare"),
    "split nowhere": ("--split.file=nowhere", "nowhere", "no such split file", "semi-fast split"),
    "class without labels": ("--split.labeled_max=4", "'8' gets 0", "raise split.labeled_max (now 4)"),
    "more than there are": ("--split.labeled_max=1000", "133 train images", "1000 labeled", "lower split."),
    "model": ("--model.name=wrn_99", "model.name must be one of", "got wrn_99", "wrn_"),
    "checkpoint nowhere": ("--resume=atuo", "resume must be none, auto, a run or a checkpoint", "atuo"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_gets_one_line(
    case: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flag, *words = BAD_FLAGS[case]
    before = tree(digits)
    defaults = [f"--data.path={digits}"] + ([] if "twice" in case else [f"--run_dir={tmp_path / 'run'}"])
    refused(capsys, ["train", *ARGUMENTS, *below(flag.split(), defaults)], words)
    assert tree(digits) == before
    assert set(tree(tmp_path)) <= {"run"}, "at most the empty run directory"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "fixmatch --split.unlabeled_max=0 --split.imbalance_unlabeled=1",
            ["method.name fixmatch needs unlabeled images", "check split.*"],
        ),
        (
            "supervised --method.plugins=[la] --method.la.train=true --method.la.predict=true",
            ["method.la.train", "method.la.predict", "twice", "set one of them to false"],
        ),
        ("fixmatch --method.plugins=[la,la]", ["method.plugins must not repeat a name", "['la', 'la']"]),
    ],
    ids=["nothing unlabeled", "adjusted twice", "plug-in twice"],
)
def test_parts_that_do_not_fit_get_one_line(
    flags: str, words: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_started(capsys, digits, tmp_path / "run", f"--method.name={flags}".split(), words)


def test_cuda_where_there_is_none(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    not_started(capsys, digits, tmp_path / "run", ["--device=cuda"], ["device is cuda", "--device cpu, or auto"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("labeled", "unlabeled", "key"), [(7, 14, "batch.labeled"), (8, 9, "the unlabeled batch")])
def test_a_global_batch_that_the_processes_do_not_divide(labeled: int, unlabeled: int, key: str) -> None:
    ids = np.arange(20)
    with pytest.raises(ValueError, match=rf"{key} must be divisible by the number of processes; got \d+ and 2"):
        Batches(ids, ids, seed=0, labeled_rows=labeled, unlabeled_rows=unlabeled, processes=2)


BAD_FILES = {
    "unknown key": ("optim:\n  step: 3\n", "no key optim.step;", "optim.steps?"),
    "misspelt section": ("optm:\n  steps: 3\n", "no key optm.steps", "optim.steps?"),
    "misspelt empty section": ("optm: {}\n", "no key optm", "?"),
    "section without keys": ("optim:\n", "optim is a section", "optim.steps"),
    "dotted key": ("optim.steps: 3\n", "the key optim.steps has a dot", "indented"),
    "key twice": ("optim:\n  steps: 3\n  lr: 1\n  steps: 4\n", "the key steps stands twice", "line 2", "keep one"),
    "section twice": ("optim:\n  steps: 3\noptim:\n  lr: 1\n", "the key optim stands twice", "keep one"),
    "not YAML": ("optim: [\n", "not YAML", "line 2"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not YAML", "single document"),
    "object": ("seed: !!python/object/apply:os.getcwd []\n", "not YAML", "python/object"),
    "list": ("- optim\n", "is a mapping of keys", "got list"),
    "nothing": ("", "is a mapping of keys", "got NoneType"),
    "itself": ("&a\noptim: *a\n", "the alias *a (line 2)"),
    "alias": ("seed: &a 1\noptim:\n  steps: *a\n", "the alias *a (line 3)", "written out"),
    "null": ("optim:\n  lr:\n", "optim.lr must have a value", "got null"),
    "list that is null": ("method:\n  plugins: null\n", "method.plugins must have a value"),
    "octal": ("optim:\n  steps: 01000\n", "01000 (line 2) would be read as 512", "decimal"),
    "base of 60": ("optim:\n  steps: 1:30\n", "1:30 (line 2) would be read as 90", "decimal"),
    "base of 60, a fraction": ("optim:\n  lr: 1:30.5\n", "1:30.5 (line 2) would be read as 90.5"),
    "tag of a truth value": ("seed: !!bool x\n", "does not fit its tag"),
    "tag of a date": ("seed: !!timestamp x\n", "does not fit its tag"),
    "tag of an empty number": ("seed: !!float ''\n", "does not fit its tag"),
    "deep": ("[" * 5000, "nested too deep"),
    "too large": ("#" * 2**20 + "\n", "at most 1048576 bytes"),
    "another file": ("config: other.yaml\n", "no key config"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_configuration_file_gets_one_line_that_names_it(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, *words = BAD_FILES[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    refused(capsys, ["train", f"--config={file}"], [file, *words])
    assert set(tree(tmp_path)) == {"mine.yaml"}


def test_other_files_that_are_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"\xe9: 1\n")
    for name, words in {
        "missing.yaml": ["no such configuration file", "configs/"],
        ".": ["no such configuration file"],
        "latin.yaml": ["not UTF-8"],
    }.items():
        refused(capsys, ["train", "--config", tmp_path / name], [tmp_path / name, *words])
    (tmp_path / "type.yaml").write_text("optim:\n  steps: many\n")
    refused(capsys, ["train", "--config", tmp_path / "type.yaml"], ["optim.steps must be of type int", "got many"])


def written(folder: Path, **texts: str) -> dict[str, Path]:
    paths = {name: folder / f"{name}.yaml" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    return paths


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path) -> None:
    file = written(tmp_path, base="seed: 1\noptim: {lr: 0.5, steps: 7}\n")["base"]
    flag = "--seed=2"
    for argv in ([flag, f"--config={file}"], [f"--config={file}", flag], ["--seed", "2", "--config", str(file)]):
        config = parse_config(argv)
        assert (config.seed, config.optim.lr, config.optim.steps) == (2, 0.5, 7)
        assert replace(config, seed=0, optim=Config().optim) == Config(), "every other key keeps its default"


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    files = written(tmp_path, a="seed: 1\noptim: {lr: 0.5, steps: 7}\n", b="optim: {steps: 8}\n")
    one = parse_config([f"--config={files['a']}", f"--config={files['b']}"])
    other = parse_config([f"--config={files['b']}", f"--config={files['a']}"])
    assert (one.seed, one.optim.lr, one.optim.steps) == (1, 0.5, 8)
    assert (other.seed, other.optim.lr, other.optim.steps) == (1, 0.5, 7)
    between = parse_config([f"--config={files['a']}", "--optim.steps=9", f"--config={files['b']}"])
    assert between.optim.steps == 9


def test_dashes_and_underscores_are_the_same_in_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dashed = parse_config(["--run-dir=a-b_c", "--optim.weight-decay=0.25", "--method.semi.bank-slots", "9"])
    assert dashed == parse_config(["--run_dir=a-b_c", "--optim.weight_decay=0.25", "--method.semi.bank_slots=9"])
    assert (dashed.run_dir, dashed.optim.weight_decay, dashed.method.semi.bank_slots) == ("a-b_c", 0.25, 9)
    write_prepared(tmp_path / "data")
    for name, flag in (("a_1", "--labeled-max"), ("a-1", "--labeled_max")):
        assert main(["split", str(tmp_path / "data"), "--name", name, f"{flag}=5"]) == 0
        assert (tmp_path / "data" / "splits" / f"{name}.json").is_file()


# What YAML takes for something else; no control characters, and for run_dir no second spelling of null.
TEXTS = st.sampled_from(
    ["1", "1e3", "3e-2", "true", "[a]", "{a: 1}", "a: b", " x ", "-", "é", "0x1f", "1:30", "2020-01-01"]
)
ANY_TEXT = TEXTS | st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]))


def means_nothing(text: str) -> bool:
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1),
    lr=st.floats(1e-300, 1e300),
    momentum=st.none() | st.floats(0, 1, exclude_min=True),
    flip=st.booleans(),
    run_dir=st.none() | ANY_TEXT.filter(lambda text: not means_nothing(text)),
    path=ANY_TEXT,
    track=st.lists(TEXTS, max_size=2),
    plugins=st.sampled_from([(), ("la",)]),
)
@example(seed=0, lr=1e-05, momentum=1e-05, flip=True, run_dir="3e-2", path="null", track=["1e3"], plugins=())
def test_a_written_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    lr: float,
    momentum: float | None,
    flip: bool,
    run_dir: str | None,
    path: str,
    track: list[str],
    plugins: tuple,
) -> None:
    base = Config()
    config = replace(
        base,
        seed=seed,
        run_dir=run_dir,
        data=replace(base.data, path=path),
        optim=replace(base.optim, lr=lr),
        model=replace(base.model, bn_momentum=momentum),
        augment=replace(base.augment, flip=flip),
        log=replace(base.log, track=tuple(track)),
        method=replace(base.method, plugins=plugins),
    )
    file = tmp_path_factory.mktemp("configs") / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert parse_config([f"--config={file}"]) == config


def test_there_are_configurations() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"digits", "cifar10_lt"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_loads_and_says_what_to_expect(file: Path, tmp_path: Path) -> None:
    config = parse_config([f"--config={file}"])
    check(config)
    head = [line for line in file.read_text().split("\n")[:12] if line.startswith("#")]
    for word in ("Command:", "Expected:", "Duration:", "Hardware:"):
        assert sum(line.startswith(f"# {word}") for line in head) == 1, word
    command = next(line for line in head if line.startswith("# Command:"))
    assert f"--config {file.relative_to(ROOT)}" in command
    (tmp_path / "again.yaml").write_text(dump(config))
    assert parse_config([f"--config={tmp_path / 'again.yaml'}"]) == config


def prepared_with_split(root: Path, seed: int = 0) -> Path:
    """A prepared directory with the split `s`."""
    write_prepared(root, seed=seed)
    assert main(["split", str(root), "--name", "s", "--labeled-max", "5", "--unlabeled-max", "9"]) == 0
    return root


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_manifest_a_split_or_an_array_that_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = prepared_with_split(tmp_path / "good")
    flags = ["--split.file=s"]
    for name in ("manifest.json", "splits/s.json"):
        data = tmp_path / Path(name).stem
        shutil.copytree(good, data)
        change(data / name, "30", "31") if name == "manifest.json" else change(data / name, '"semi"', '"daso"')
        not_started(capsys, data, tmp_path / "run", flags, [data / name, "its own SHA-256", "make it again"])
        refused(capsys, ["inspect", data], [data / name, "its own SHA-256"])
        refused(capsys, ["verify", data], [data / name, "its own SHA-256"])
    data = tmp_path / "array"
    shutil.copytree(good, data)
    array = data / "resident" / "train_images.npy"
    array.write_bytes(array.read_bytes()[:-1])
    not_started(capsys, data, tmp_path / "run", flags, [array, "bytes", "prepare again"])
    array.write_bytes(array.read_bytes() + b"x")
    refused(capsys, ["verify", data], [array, "SHA-256", "prepare again"])
    assert not (tmp_path / "run").exists()


def test_a_split_of_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = prepared_with_split(tmp_path / "mine"), prepared_with_split(tmp_path / "other", seed=1)
    file = other / "splits" / "s.json"
    words = [file, "another data set", "make the split again"]
    not_started(capsys, mine, tmp_path / "run", [f"--split.file={file}"], words)
    not_started(capsys, mine, tmp_path / "run", ["--split.file=t"], ["t: no such split file", "has --split.file=s"])


def test_a_split_that_cannot_be_made_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared_with_split(tmp_path / "data")
    before = tree(data)
    split = ["split", data, "--name"]
    refused(
        capsys, [*split, "x", "--labeled-max=5", "--imbalance-labeled=9"], ["class_2", "gets 0", "split.labeled_max"]
    )
    refused(capsys, [*split, "x", "--labeled-max=31"], ["class_0", "30 train images", "31 labeled", "lower"])
    refused(capsys, [*split, "s", "--labeled-max=6"], ["s.json", "another split", "another name"])
    refused(capsys, [*split, "../x", "--labeled-max=5"], ["--name", "'../x'"])
    refused(capsys, [*split, "x", "--labeled=5"], ["--labeled", "--help"])
    assert tree(data) == before


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1])  # within a record
    return path


def test_a_source_file_that_is_damaged_is_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = truncated(write_cifar10_python(tmp_path / "a", 5) / "cifar-10-batches-py" / "data_batch_3")
    binary = truncated(write_cifar10_binary(tmp_path / "b", 5) / "cifar-10-batches-bin" / "test_batch.bin")
    folder = write_image_folder(tmp_path / "c", per_class=2, test_per_class=1)
    picture = truncated(min((folder / "train" / "emu").iterdir()))
    before = tree(tmp_path)
    for dataset, raw, path in (("cifar10", "a", python), ("cifar10", "b", binary), ("folder", "c", picture)):
        refused(capsys, ["prepare", dataset, "--raw", tmp_path / raw, "--out", tmp_path / "out"], [path])
    assert tree(tmp_path) == before


def test_one_class_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", ("cat",), 2, test_per_class=1)
    before = tree(tmp_path)
    words = ["at least two classes", "only cat"]
    refused(capsys, ["prepare", "folder", "--raw", raw, "--out", tmp_path / "out"], words)
    assert tree(tmp_path) == before


def test_other_commands_refuse_in_one_line_too(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [], ["COMMAND", "semi-fast --help"])
    refused(capsys, ["trian"], ["'trian'", "'train'"])
    refused(capsys, ["prepare", "mnist", "--out", "x"], ["'mnist'", "'digits'"])
    refused(capsys, ["prepare", "digits"], ["--out", "semi-fast prepare --help"])
    refused(capsys, ["prepare", "digits", "--out", digits], ["--out", digits, "choose another"])
    refused(capsys, ["prepare", "digits", "--out", tmp_path / "x", "--resolution=big"], ["--resolution", "'big'"])
    refused(capsys, ["inspect", tmp_path], [tmp_path, "manifest.json", "semi-fast prepare"])
    refused(capsys, ["report", tmp_path], [tmp_path, "metrics.jsonl"])
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(capsys, ["prepare", "digits", "--out", tmp_path / "x"], ["bytes of disk space", "another --out"], code=3)
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps by the command line, saved every 2."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(train(digits, run_dir, *SHORT)) == 0
    return run_dir


def saved(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:09d}"


def same_end(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(saved(run_dir, 6) / "state.safetensors") for run_dir in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_directory_in_use_is_not_touched(
    finished: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((finished / "status.json").read_text()) == {"exit_code": 0, "message": "finished"}
    not_started(capsys, digits, finished, SHORT, ["run_dir must be new or empty", finished, "--resume auto"])
    assert json.loads((finished / "status.json").read_text())["exit_code"] == 0
    file = finished / "config.yaml"
    before = tree(finished)
    for resume in ("none", "auto"):
        refused(
            capsys, train(digits, file, f"--resume={resume}"), ["run_dir must be a directory", file, "choose another"]
        )
    assert tree(finished) == before


def test_a_run_directory_must_be_named_to_resume(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = ["train", *ARGUMENTS, f"--data.path={digits}"]
    refused(capsys, [*bare, "--resume=auto"], ["resume auto needs run_dir", "set run_dir"])
    refused(capsys, [*bare, "--run_dir="], ["run_dir must name a directory", "empty"])
    assert tree(tmp_path) == {}


def test_the_default_run_directory_is_fresh_and_holds_the_status(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--method.name=supervised", "--optim.steps=1", "--eval.every=1"]
    assert main(["train", *ARGUMENTS, f"--data.path={digits}", *flags]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "status.json").read_text()) == {"exit_code": 0, "message": "finished"}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--optim.lr=0.004", ["optim.lr", "0.003", "0.004"]),
        ("--method.semi.threshold=0.2", ["method.semi.threshold", "0.15", "0.2"]),
        ("--seed=1", ["seed", "0 there", "1 here"]),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_another_configuration(
    flag: str, words: list[str], resume: str, finished: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = "auto" if resume == "auto" else saved(finished, 4)
    flags = [*SHORT, flag, f"--resume={where}"]
    not_started(capsys, digits, finished, flags, ["of another config", "new run_dir", *words])


def test_a_run_goes_on_with_another_timeout(finished: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(saved(tmp_path / "run", 6))
    assert main(train(digits, tmp_path / "run", *SHORT, "--engine.timeout_seconds=77", "--resume=auto")) == 0
    assert same_end(tmp_path / "run", finished)


def test_a_checkpoint_of_other_data(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "digits", "--out", str(tmp_path / "other"), "--resolution=12"]) == 0
    flags = [*SHORT, "--resume=auto"]
    not_started(capsys, tmp_path / "other", finished, flags, ["of other data", "data_sha256", "data.path"])


def test_a_damaged_checkpoint_named_is_refused_and_the_newest_whole_one_is_found(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    damaged = saved(run_dir, 6)
    truncated(damaged / "state.safetensors")
    not_started(
        capsys, digits, run_dir, [*SHORT, f"--resume={damaged}"], [damaged, "state.safetensors", "--resume auto"]
    )
    assert main(train(digits, run_dir, *SHORT, "--resume=auto")) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("warning: skipped") and str(damaged) in line]
    assert [line for line in out if line == f"resumed from {saved(run_dir, 4)}"]
    assert same_end(run_dir, finished)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == len(
        (finished / "metrics.jsonl").read_text().splitlines()
    )


def test_nothing_to_resume_is_no_reason_to_start_over(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, flags = tmp_path / "run", [*SHORT, "--resume=auto"]
    shutil.copytree(finished, run_dir)
    for step in (2, 4, 6):
        truncated(saved(run_dir, step) / "meta.json")
    not_started(capsys, digits, run_dir, flags, ["no checkpoint under", run_dir, "is whole", "new run_dir"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("not a run")
    not_started(capsys, digits, tmp_path / "mine", flags, ["run_dir must be", tmp_path / "mine", "no config.yaml"])


def test_a_run_directory_in_use_by_another_process(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    with (run_dir / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["run_dir", run_dir, f"in use by process {os.getpid()} on {socket.gethostname()}", "choose another"]
        not_started(capsys, digits, run_dir, [*SHORT, "--resume=auto"], words)


OCCUPIED = """
import sys
from semi_fast.cli import main
codes = [main(words.split("|")) for words in sys.argv[1:]]
print(codes, sorted({"torch", "accelerate", "matplotlib", "safetensors"} & set(sys.modules)))
"""


def test_a_run_that_cannot_begin_is_refused_before_anything_heavy_is_loaded(
    finished: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    checkpoint = f"--resume={saved(run_dir, 2)}"
    named = [word for word in train(digits, run_dir, *SHORT, checkpoint) if not word.startswith("--run_dir")]
    words = [
        train(digits, run_dir, *SHORT),
        train(digits, run_dir, *SHORT, "--resume=auto"),
        named,
        train(digits, finished, *SHORT),
        train(digits, tmp_path / "new", "--optim.lr=-1"),
        train(digits, tmp_path / "new", "--log.track=[tensorbord]"),
        ["sweep", str(FILE), "--log.track=[tensorbord]", f"--data.path={digits}", f"--out={tmp_path / 'out'}"],
    ]
    with (run_dir / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", OCCUPIED, *map("|".join, words)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = ended.stderr.splitlines()
    assert ["is in use by process" in line for line in lines] == [True, True, True, False, False, False, False], lines
    assert "run_dir must be new or empty" in lines[3]
    assert "optim.lr must lie in" in lines[4]
    assert all("log.track must be of" in line for line in lines[5:])
    assert ended.stdout == "[2, 2, 2, 2, 2, 2, 2] []\n"


def test_a_directory_that_was_used_since_it_was_looked_at(
    finished: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run that began and ended while another was still loading."""
    run_dir, built = tmp_path / "run", module.build

    def build(*arguments: Any, **parts: Any) -> TrainingRun:
        shutil.copytree(finished, run_dir)
        return built(*arguments, **parts)

    monkeypatch.setattr(module, "build", build)
    refused(capsys, train(digits, run_dir, *SHORT), ["run_dir must be new or empty", run_dir])
    ours, theirs = (tree(one) for one in (run_dir, finished))
    assert {path for path in ours if ours[path] != theirs[path]} <= {"run.lock"}
    shutil.rmtree(run_dir)
    words = ["resume auto means the newest checkpoint", run_dir, "start again"]
    refused(capsys, train(digits, run_dir, *SHORT, "--resume=auto"), words)


def test_two_runs_that_begin_in_the_same_second_have_directories_of_their_own(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot begin leaves none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "write_report", lambda run_dirs, page: page)
    monkeypatch.setattr("time.strftime", lambda *_: "20261128-120000")
    words = ["train", *ARGUMENTS, "--optim.steps=3", "--eval.every=3", f"--data.path={digits}"]
    assert main(words) == main(words) == 0
    refused(
        capsys,
        [*words, "--split.unlabeled_max=0", "--split.imbalance_unlabeled=1", "--method.name=fixmatch"],
        ["needs unlabeled images"],
    )
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["digits_semi_20261128-120000", "digits_semi_20261128-120000_2"]
    for name in names:
        assert yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text())["run_dir"] == f"runs/{name}"


def test_a_run_in_the_directory_one_stands_in(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is filled in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "write_report", lambda run_dirs, page: page)
    before = tmp_path.stat().st_ino
    assert main(train(digits, Path(), "--optim.steps=3", "--eval.every=3")) == 0
    assert (tmp_path / "summary.json").exists()
    assert Path.cwd().stat().st_ino == before


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "digits"],
        ["demo"],
        ["sweep", "x.yaml"],
        ["reproduce", "table1/semi/cifar10_lt/n500_m4000_g100"],
        ["report", "run"],
    ],
    ids=lambda words: words[0],
)
def test_an_empty_output_is_no_place(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, [*words, "--out", ""], ["--out must name where the output goes; it is empty"])
    refused(capsys, [*words, "--out="], ["--out must name where the output goes; it is empty"])
    assert tree(tmp_path) == {}


def test_a_checkpoint_named_knows_its_run_and_no_other(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for step in (4, 6):
        shutil.rmtree(saved(run_dir, step))
    elsewhere = saved(finished, 2)
    flags = [*SHORT, f"--resume={elsewhere}"]
    not_started(capsys, digits, run_dir, flags, ["resume must name a checkpoint of run_dir", elsewhere, run_dir])
    named = ["train", *ARGUMENTS, *SHORT, f"--data.path={digits}", f"--resume={saved(run_dir, 2)}"]
    assert main(named) == 0, "without run_dir it is the checkpoint's own"
    assert same_end(run_dir, finished)


def test_a_stale_status_does_not_outlive_the_next_start(
    finished: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    seen: list[bool] = []

    def full(*args: object, **kwargs: object) -> None:
        seen.append((run_dir / "status.json").exists())
        raise OSError("no space left\non device")

    monkeypatch.setattr(TrainingRun, "fit", full)
    refused(capsys, train(digits, run_dir, *SHORT, "--resume=auto"), ["no space left on device"], code=3)
    assert seen == [False]
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 3


def test_the_data_commands_and_the_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "digits"
    assert main(["prepare", "digits", "--out", str(data), "--resolution", "8"]) == 0
    split = "--name tail --labeled-max 20 --imbalance-labeled 5 --unlabeled-max 60 --imbalance-unlabeled 5 --rule daso"
    assert main(["split", str(data), *split.split(), "--validation-per-class=2", "--seed=3"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(data / "splits" / "tail.json"))
    assert main(["inspect", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "10 classes, 8x8, 1347 train, 450 test" in shown
    assert "tail labeled" in shown
    assert main(["verify", str(data)]) == 0
    assert capsys.readouterr().out.startswith("ok: 4 arrays")
    assert main(["report", str(finished), "--out", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()
    assert err == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--version"], [semi_fast.__version__]),
        (["--help"], ["train", "prepare", "split", "inspect", "verify", "report"]),
        (["split", "--help"], ["--labeled-max", "--unlabeled-shape", "consistent", "reversed"]),
        (["train", "--help"], [f"--{key}" for key in config_keys()]),
    ],
    ids=["version", "help", "split", "train"],
)
def test_help_goes_to_stdout(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert [word for word in words if word not in out] == []


def test_the_two_ways_to_start_training_are_one_program(tmp_path: Path) -> None:
    """In processes of their own: the same line and exit code."""
    script = Path(sys.executable).with_name("semi-fast")
    ends = [
        subprocess.run([*words, "--optim.step=3"], cwd=tmp_path, capture_output=True, text=True, check=False)
        for words in ([str(script), "train"], [sys.executable, "-m", "semi_fast.train"])
    ]
    assert [end.returncode for end in ends] == [2, 2]
    line = "semi-fast: command line: there is no key optim.step; did you mean optim.steps?\n"
    assert [end.stderr for end in ends] == [line, line]
    assert [end.stdout for end in ends] == ["", ""]
