"""What the arguments of a run stand for: any values at all, paths, a run to go on with, flags without effect."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from semi_fast.cli import main, make_parser
from semi_fast.schema import ranges
from semi_fast.schema.arguments import is_number, parse_config, read_arguments
from semi_fast.schema.config import Config, check, leaves, plain
from semi_fast.schema.effects import EFFECTS, without_effect
from semi_fast.schema.split import SplitConfig
from semi_fast.schema.yaml_file import config_keys, dump
from semi_fast.train import main as train_main

from .test_cli import refused, saved, tree
from .tiny import ARGUMENTS, FILE

KEYS = config_keys()
NUMBERS = sorted(key for key, kind in KEYS.items() if is_number(kind))
HOSTILE_NUMBERS = [
    -(2**63), -1, 0, 1, 2, 2**31, 2**63 - 1, 2**64, 10**30, -1.0, -0.0, 1e-320, 1e-39, 1e-7, 0.5, 1 - 1e-12, 1.5, 1e39,
    1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
ODD = (
    "01000 0o17 1:30 1_000 0x10 1e3 1e400 .5 -.inf .nan yes no on ~ null [] [1] [[la]] {} {a:1} la 'x' x - -- ' !!int "
    "& *a %TAG @ ` | > # é \U0001f600 2020-01-01 \x00 \x1b = ~/x"
)
TEXTS = st.sampled_from(ODD.split()) | st.text(max_size=8)


def with_key(config: Any, key: str, value: Any) -> Any:
    """`config` with the dotted key set."""
    first, _, rest = key.partition(".")
    return replace(config, **{first: with_key(getattr(config, first), rest, value) if rest else value})


def test_every_number_has_a_range() -> None:
    assert set(ranges.RANGES) == set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_beyond_a_range_is_refused_by_its_key_and_the_ends_are_not(key: str) -> None:
    bounds, base = ranges.RANGES[key], with_key(Config(), "data.path", "x")
    for value in HOSTILE_NUMBERS:
        kinds = {type(value)} & {KEYS[key], *get_args(KEYS[key])}
        if kinds and not bounds.holds(value):
            with pytest.raises(ValueError, match=f"^{key} must lie in "):
                check(with_key(base, key, value))
    for end, is_open in ((bounds.low, bounds.open_low), (bounds.high, bounds.open_high)):
        assert bounds.holds(end) != is_open


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(sorted(KEYS)),
    value=TEXTS | st.sampled_from(HOSTILE_NUMBERS).map(str),
    in_file=st.booleans(),
)
@example(key="run_dir", value="2020-01-01", in_file=True)
@example(key="data.path", value="!!binary x", in_file=True)
@example(key="augment.cutout", value="!!int", in_file=False)
@example(key="log.track", value="[1, [2]]", in_file=True)
def test_any_value_of_any_key_is_a_configuration_that_reads_back_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str, in_file: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    arguments = [f"--{key}={value}"]
    if in_file:
        lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(key.split("."))]
        (folder / "mine.yaml").write_text("\n".join(lines) + f" {value}\n", encoding="utf-8", errors="replace")
        arguments = [f"--config={folder / 'mine.yaml'}"]
    refusal, config = "", Config()
    try:
        config, _ = read_arguments(arguments)
        check(with_key(config, "data.path", config.data.path or "x"))
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert not re.search("Union|<class|typing", refusal)
        return
    assert all(math.isfinite(one) for one in leaves(plain(config)).values() if isinstance(one, float))
    (folder / "again.yaml").write_text(dump(config), encoding="utf-8")
    assert read_arguments([f"--config={folder / 'again.yaml'}"])[0] == config


def test_a_path_may_begin_at_home(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {path: ~/data}\nsplit: {file: ~/s.json}\n")
    config = parse_config(["--config=~/mine.yaml", "--run_dir=~/run"])
    paths = config.data.path, config.split.file, config.run_dir
    assert paths == tuple(str(tmp_path / name) for name in ("data", "s.json", "run"))
    (tmp_path / "data").symlink_to(digits)
    assert main(["inspect", "~/data"]) == 0
    for argv in (
        "prepare folder --raw=~/x --out=~/x", "split ~/x --name=s", "verify ~/x", "demo --out=~/x",
        "report ~/x --out=~/x", "reproduce --data=~/x --out=~/x", "sweep ~/x --out=~/x",
    ):  # fmt: skip
        values = str(vars(make_parser().parse_args(argv.split())).values())
        assert "~" not in values
        assert values.count(str(tmp_path / "x")) == argv.count("~")


def names_of_effects() -> Iterator[str]:
    for names, _, _ in EFFECTS:
        yield from names.split()


@pytest.mark.parametrize("name", sorted(set(names_of_effects())))
def test_what_an_effect_is_of_is_a_key(name: str) -> None:
    assert any(key.startswith(name) if name.endswith(".") else key == name for key in KEYS)


def test_a_file_may_hold_what_has_no_effect(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump(parse_config([*ARGUMENTS, "--method.name=supervised"])))
    config, flags = read_arguments([f"--config={file}"])
    assert config.method.fixmatch.threshold == 0.3
    assert without_effect(config, flags) == {}
    assert set(without_effect(config, KEYS)) >= {
        "method.fixmatch.threshold",
        "method.semi.mixing",
        "method.epoch_steps",
    }


def test_a_split_file_as_a_flag_takes_the_place_of_a_files_keys() -> None:
    config = parse_config([*ARGUMENTS, "--split.file=mine"])
    assert config.split == replace(type(config.split)(), file="mine"), "config.yaml holds nothing that is not used"
    with pytest.raises(ValueError, match=r"split\.file=mine is the whole split, so that split\.seed"):
        check(parse_config([*ARGUMENTS, "--data.path=x", "--split.file=mine", "--split.seed=3"]))


@pytest.fixture(scope="module")
def begun(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, saved after 2 and 4; its run directory is relative to the folder that it lies in."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    flags = ["--optim.steps=4", "--eval.every=4", "--checkpoint.every=2", "--method.name=fixmatch"]
    assert main(["train", f"--config={FILE}", f"--data.path={digits}", f"--run_dir={run_dir}", *flags]) == 0
    return run_dir


def cut(begun: Path, run_dir: Path) -> Path:
    """A copy that has not yet come beyond step 2."""
    shutil.copytree(begun, run_dir)
    shutil.rmtree(saved(run_dir, 4))
    (run_dir / "summary.json").unlink()
    return run_dir


@pytest.mark.parametrize(("named", "more"), [("run", []), ("run/checkpoints/step_000000002", ["--log.every=2"])])
def test_a_run_or_its_checkpoint_is_enough_to_go_on(
    named: str, more: list[str], begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(begun, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    before = tree(begun)
    assert main(["train", "--resume", named, *more]) == 0
    ours, theirs = (load_file(saved(run, 4) / "state.safetensors") for run in (tmp_path / "run", begun))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert tree(begun) == before, "a copy goes on, and the run that it is of stays as it was"
    assert Path(parse_config(["--config=run/config.yaml"]).run_dir or "").resolve() == tmp_path / "run"


def test_a_run_that_cannot_go_on_is_one_line(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = cut(begun, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    before = tree(run_dir)
    refused(capsys, ["train", "--resume", tmp_path / "nowhere"], ["resume must be none, auto, a run", "nowhere is no"])
    refused(capsys, ["train", "--resume", tmp_path / "empty"], ["resume must name a run or a checkpoint", "empty"])
    refused(capsys, ["train", "--resume", run_dir, "--seed=1"], ["of another config", "seed", "0 there, 1 here"])
    refused(capsys, ["train", "--resume", run_dir, "--run_dir=b"], ["resume must name run_dir", run_dir, "and b"])
    refused(
        capsys,
        ["train", f"--config={run_dir / 'config.yaml'}", "--resume=auto"],
        ["run_dir of", f"--resume {run_dir} or --resume {begun}"],
    )
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("path: /", "path: not/"))
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["train", "--resume", run_dir], ["has no manifest.json", f"(in {tmp_path}; "])
    del before["config.yaml"]
    assert {name: entry for name, entry in tree(run_dir).items() if name != "config.yaml"} == before


def test_a_file_that_goes_on_from_nowhere_is_refused_at_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {{path: {digits}}}\nresume: {tmp_path}/nowhere\n")
    monkeypatch.setitem(sys.modules, "semi_fast.train", None)  # which takes seconds to load
    refused(capsys, ["train", f"--config={tmp_path / 'mine.yaml'}"], ["resume must be none, auto, a run", "nowhere is"])


def test_a_name_that_no_disk_takes_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As `accelerate launch -m semi_fast.train` has it."""
    assert train_main([f"--resume={'x' * 300}"]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("below", ["", "/x"])
@pytest.mark.parametrize(
    "words",
    ["demo --out", f"sweep {FILE} --data.path=x --out", f"train {ARGUMENTS[0]} --data.path=x --run_dir"],
    ids=["demo", "sweep", "train"],
)
def test_a_file_is_no_place_to_write_to(
    words: str, below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    rule = f"must {'lie in' if below else 'be'} a directory; {tmp_path}/file is a file"
    refused(capsys, f"{words}={tmp_path}/file{below}".split(), [rule])


def test_a_mistyped_run_directory_is_told(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optim.steps=1", "--eval.every=1", "--method.name=supervised", f"--run_dir={tmp_path / 'mistyped'}"]
    assert main(["train", *ARGUMENTS, f"--data.path={digits}", *flags, "--resume=auto"]) == 0
    assert f"nothing to resume in {tmp_path / 'mistyped'}: starting at step 0" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("split {data} --name x --seed 1", ["split.seed shuffles where the rule does", "rule=semi"]),
        (
            "split {data} --name x --labeled-max 9 --unlabeled-max 9 --unlabeled-shape uniform --imbalance-unlabeled 5",
            ["split.unlabeled_shape=uniform", "split.imbalance_unlabeled 5"],
        ),
        ("split {data} --name x --labeled_max 5 --labeled-max 6", ["--labeled-max is given twice"]),
        ("prepare digits --out {data}2 --quality 90", ["--quality is of --image-format jpeg", "leave out --quality"]),
        ("prepare digits --out {data}2 --image-format png", ["--image-format png is of DALI", "leave out --image"]),
        ("prepare digits --out {data}2 --seed 1", ["split.seed shuffles where the rule does"]),
        ("reproduce --list --steps 5", ["reproduce --list shows all cells", "--steps"]),
    ],
)
def test_other_commands_refuse_what_has_no_effect(
    argv: str, words: list[str], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(digits.parent)
    refused(capsys, argv.format(data=digits).split(), words)
    assert tree(digits.parent) == before


@pytest.mark.parametrize("words", ["split x --name s", "prepare digits --out x"])
def test_the_keys_of_a_split_are_flags(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the names, defaults, choices and texts of their one owner."""
    taken = vars(make_parser().parse_args(words.split()))
    own = {field.name: field.default for field in fields(SplitConfig) if field.name != "file"}
    assert {key: value for key, value in taken.items() if key in own} == own
    with pytest.raises(SystemExit):
        make_parser().parse_args([*words.split()[:1], "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in ("labeled images of the first class (N_1)", "{consistent,uniform,reversed}", "{semi,daso,cossl,usb}"):
        assert text in said
    assert vars(make_parser().parse_args([*words.split(), "--labeled-max=5", "--imbalance-labeled=9"])) == taken | {
        "labeled_max": 5,
        "imbalance_labeled": 9.0,
    }
