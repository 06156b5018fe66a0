"""The cells of the paper's tables: complete, printed as they are resolved, cut as published, and run and compared."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import semi_fast.train
from semi_fast.cli import main
from semi_fast.commands.reproduce import configured, prepared, shortened
from semi_fast.data_prep.long_tail import make_split
from semi_fast.disk import locked
from semi_fast.methods import make_method
from semi_fast.prepared.manifest import Manifest
from semi_fast.reproduce.cells import cells, document, find
from semi_fast.reproduce.compare import against_paper, verdict
from semi_fast.reproduce.configuration import resolved, text
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.config import Config, check, leaves, plain
from semi_fast.schema.semi import PRESETS, SemiConfig

from .conftest import SHARED
from .synthetic_data import write_cifar10_binary, write_prepared

CELL = "table1/semi/cifar10_lt/n500_m4000_g100"
HERE = [cell for cell in cells().values() if cell.keys is not None]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COPIES = {
    "cifar10_lt/semi": CELL,
    "cifar100_lt/semi": "table1/semi/cifar100_lt/n150_m300_g10",
    "stl10_lt/semi": "table2/semi/stl10_lt/n150_g10",
    "imagenet127/semi_32": "table4/semi/imagenet127_32/labels10",
    "imagenet127/semi_64": "table4/semi/imagenet127_64/labels10",
}
"""Files under configs/ that stand for a cell."""
TINY = """
--split.labeled_max=20 --split.unlabeled_max=30 --split.imbalance_labeled=5 --split.imbalance_unlabeled=5
--batch.labeled=8 --model.name=wrn_10_1 --eval.every=3 --device=cpu --precision=fp32
""".split()  # noqa: SIM905, a command line reads best as one


@cache
def config_of(name: str, *flags: str) -> Config:
    return resolved(find(name), flags)


# The table.


def spec_cell(row: dict[str, Any]) -> str:
    """`method/dataset/setting` of a row of the specification, by its own names."""
    titles = {method["title"].lower(): name for name, method in document()["methods"].items()}
    title = row["method"].removesuffix(" (ours)").lower()
    known = titles | {"semi": "semi"} | {title.removeprefix("semi "): name for title, name in titles.items()}
    if row["dataset"] == "imagenet127":
        return f"{known[title]}/imagenet127_{row['img_size']}/labels10"
    gamma_l, gamma_u = row["gamma_l"], row["gamma_u"]
    if gamma_u == "unknown":
        assert row["M1"] == 100_000
        return f"{known[title]}/{row['dataset']}/n{row['N1']}_g{gamma_l}"
    shape = {str(gamma_l): "", "1": "_uniform", f"1/{gamma_l}": "_reversed"}[gamma_u]
    return f"{known[title]}/{row['dataset']}/n{row['N1']}_m{row['M1']}_g{gamma_l}{shape}"


def test_every_printed_value_is_in_the_table() -> None:
    printed = [cell for cell in cells().values() if "row" not in document()["methods"][cell.method]]
    assert Counter(cell.table for cell in printed) == {
        "table1": 15 * 8,
        "table2": 8 * 8,
        "table3": 6 * 4,
        "table4": 9 * 2,
        "table5": 6 * 2,
    }
    assert {cell.table for cell in printed if cell.paper.std is None} == {"table4", "table5"}
    path = SHARED / "spec" / "paper_results.yaml"
    if not path.exists():
        pytest.skip("the transcription of the paper's tables is not beside the repository")
    expected: dict[str, tuple[float, float | None, bool]] = {}
    for table, content in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for row in content["rows"]:
            expected[f"{table}/{spec_cell(row)}"] = (row["mean"], row["std"], "note" in row)
    assert len(expected) == 238
    assert {c.name: (c.paper.mean, c.paper.std, c.paper.note is not None) for c in printed} == expected


def test_every_cell_of_a_method_that_exists_can_be_trained() -> None:
    assert Counter(cell.method for cell in HERE) == Counter(
        supervised=8,
        supervised_la=8,
        fixmatch=8 + 8 + 4 + 2,
        fixmatch_la=8,
        semi=8 + 8 + 4 + 2 + 2,
        without_bank=2,
        without_entropy_weights=2,
        without_entropy_weights_t95=2,
        without_alignment=2,
        without_mixing=2,
        without_balanced_head=2,
    )


def test_patterns_and_names_of_the_table_are_used() -> None:
    content = document()
    for caveat in content["caveats"]:
        assert any(caveat["text"] in cell.caveats for cell in cells().values()), caveat["cells"]
    used = {setting for table in content["tables"].values() for setting in table["settings"]}
    assert content["settings"].keys() == used
    rows = {row for table in content["tables"].values() for row in table["rows"]}
    assert {name for name, method in content["methods"].items() if method.get("row", name) not in rows} == set()


# The configurations.


def test_every_cell_is_printed_as_it_is_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = leaves(plain(Config()))
    for cell in HERE:
        assert main(["reproduce", cell.name, "--print-config"]) == 0
        printed = capsys.readouterr().out
        assert printed == text(cell)
        assert printed.isascii()
        config = config_of(cell.name)  # made by reading a file of this text
        check(config)
        assert cell.keys is not None
        assert leaves(plain(config)) == defaults | cell.keys
        assert [key for key, value in cell.keys.items() if value == defaults[key]] == []
        assert make_method(config.method, steps=config.optim.steps).predicts == cell.head
        head = [line for line in printed.splitlines() if line.startswith("#")]
        for word in ("Command:", "Data:", "Expected:", "Duration:", "Protocol:", "Caveats:"):
            assert sum(line.startswith(f"# {word}") for line in head) == 1, word
        assert f"# Command:  semi-fast reproduce {cell.name}" in head
        assert f"the paper prints {cell.paper.mean:.1f} " in " ".join(head)
        assert sum(line.startswith("#   - ") for line in head) == len(cell.caveats)
        assert all(len(line) <= 120 for line in head)


@pytest.mark.parametrize("name", COPIES)
def test_a_file_to_copy_is_its_cell(name: str) -> None:
    cell, file = find(COPIES[name]), CONFIGS / f"{name}.yaml"
    assert parse_config([f"--config={file}"]) == config_of(cell.name)
    words = file.read_text(encoding="utf-8")
    printed = str(cell.paper).replace("±", "+-")
    for said in (f"the paper prints {printed} % (", f"{cell.source})", f"semi-fast reproduce {cell.name}\n"):
        assert said in words, said
    assert f"{cell.data.prepare} {config_of(cell.name).data.path}\n" in words


def test_a_folder_of_pictures_has_the_schedules_of_a_shortened_run() -> None:
    config = parse_config([f"--config={CONFIGS / 'folder' / 'semi.yaml'}"])
    assert config.method.epoch_steps == shortened(Config(), config.optim.steps)["method.epoch_steps"]
    assert config == replace(
        Config(),
        data=replace(Config().data, path="data/mine"),
        optim=replace(Config().optim, steps=config.optim.steps),
        method=replace(Config().method, epoch_steps=config.method.epoch_steps),
    )


@pytest.mark.parametrize("root", ["configs", "./configs", "semi_fast/configs", "/somewhere/configs"])
def test_what_was_a_file_is_named_by_its_cell(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("train --config {}", "sweep {} --out nowhere"):
        for path, cell in ((f"{CELL}.yaml", CELL), ("table1", "CELL"), ("", "CELL")):
            assert main(shlex.split(line.format(f"{root}/paper/{path}"))) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert (
                f"no such configuration file; the paper's cells are printed: semi-fast reproduce {cell} --print" in said
            )
    assert main(["train", f"--config={root}/papers/{CELL}.yaml"]) == 2
    assert "see configs/ for some" in capsys.readouterr().err


def test_the_constants_are_those_of_the_paper_and_its_code() -> None:
    """Values of SeMi's text, README and released code for CIFAR-10; the others follow below."""
    expected = {
        "batch.labeled": 64, "batch.unlabeled_ratio": 1, "optim.steps": 250_000, "optim.lr": 0.03,
        "optim.momentum": 0.9, "optim.weight_decay": 5e-4, "ema.decay": 0.999, "ema.ramp": False, "eval.every": 500,
        "method.epoch_steps": 500, "augment.cutout": 16, "augment.operations": 2, "split.rule": "semi",
        "split.seed": 0, "split.validation_per_class": 0,
    }  # fmt: skip
    semi = {
        "preset": "default", "threshold": 0.7, "strong_views": 2, "hardness_scale": 0.75, "mixing": 0.4,
        "prototype_temperature": 0.1, "alignment_weight": 0.15, "alignment_temperature": 0.09,
        "alignment_sharpening": 5, "adjustment": 2, "pseudo_label_adjustment": 2, "bank_slots": 128,
        "bank_decay": 0.99, "bank_eviction": "lowest", "balanced_head": True, "bank_sampling": 0,
    }  # fmt: skip
    for cell in HERE:
        values = leaves(plain(config_of(cell.name)))
        assert {key: values[key] for key in expected} == expected, cell.name
        image_net = cell.setting.startswith("imagenet127")
        network = (values["model.name"], values["model.bn_momentum"], values["augment.labeled_padding"])
        assert network == (("resnet50_cifar", 0.1, "zero") if image_net else ("wrn_28_2", 0.001, "reflect"))
        if cell.method == "semi":
            assert {key: values[f"method.semi.{key}"] for key in semi} == semi, cell.name
        if cell.table == "table5" or cell.method == "semi":
            every = 100 if cell.setting.startswith(("cifar10_", "stl10")) else 200
            assert values["method.semi.bank_decay_every"] == every
            assert values["method.semi.warmup_epochs"] == (2 if cell.setting.endswith("n1500_m3000_g100") else 20)
        if cell.method.startswith("fixmatch"):
            fixmatch = (values["method.fixmatch.threshold"], values["method.fixmatch.strong_views"])
            assert fixmatch == (0.95, 2)
        if cell.method.endswith("_la"):
            la = [values[f"method.la.{key}"] for key in ("strength", "train", "pseudo_label", "predict")]
            assert (values["method.plugins"], la) == (["la"], [1, True, False, False])


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("without_bank", {"bank_eviction": "oldest"}),
        ("without_entropy_weights", {"hardness_scale": 0.0}),
        ("without_entropy_weights_t95", {"hardness_scale": 0.0, "threshold": 0.95}),
        ("without_alignment", {"alignment_weight": 0.0}),
        ("without_mixing", {"mixing": 0.0}),
        ("without_balanced_head", {"balanced_head": False}),
    ],
)
def test_an_ablation_is_its_flag_and_nothing_else(method: str, flags: dict[str, Any]) -> None:
    for setting in document()["tables"]["table5"]["settings"]:
        whole, cut = config_of(f"table5/semi/{setting}"), config_of(f"table5/{method}/{setting}")
        given = [f"--method.semi.{key}={str(value).lower()}" for key, value in flags.items()]
        assert config_of(f"table5/semi/{setting}", *given) == cut
        assert replace(cut, method=whole.method) == whole


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_flag_on_a_cell(preset: str) -> None:
    config = config_of(CELL, f"--method.semi.preset={preset}")
    check(config)
    assert config.method.semi == replace(SemiConfig(preset=preset), **PRESETS[preset])  # type: ignore[arg-type]


# Settings: images labeled, in its first and last class; unlabeled besides, in its first and last class.
COUNTS = {
    "cifar10_lt/n500_m4000_g100": (1236, 500, 5, 9922, 4000, 40),
    "cifar10_lt/n1500_m3000_g100": (3720, 1500, 15, 7443, 3000, 30),
    "cifar10_lt/n500_m4000_g150": (1162, 500, 3, 9329, 4000, 26),
    "cifar10_lt/n1500_m3000_g150": (3496, 1500, 10, 6996, 3000, 20),
    "cifar10_lt/n500_m4000_g100_uniform": (1236, 500, 5, 40_000, 4000, 4000),
    "cifar10_lt/n1500_m3000_g100_uniform": (3720, 1500, 15, 30_000, 3000, 3000),
    "cifar10_lt/n500_m4000_g100_reversed": (1236, 500, 5, 9922, 40, 4000),
    "cifar10_lt/n1500_m3000_g100_reversed": (3720, 1500, 15, 7443, 30, 3000),
    "cifar100_lt/n50_m400_g10": (1911, 50, 5, 15_651, 400, 40),
    "cifar100_lt/n150_m300_g10": (5835, 150, 15, 11_720, 300, 30),
    "cifar100_lt/n50_m400_g20": (1545, 50, 2, 12_719, 400, 20),
    "cifar100_lt/n150_m300_g20": (4741, 150, 7, 9527, 300, 15),
    "cifar100_lt/n50_m400_g10_uniform": (1911, 50, 5, 40_000, 400, 400),
    "cifar100_lt/n150_m300_g10_uniform": (5835, 150, 15, 30_000, 300, 300),
    "cifar100_lt/n50_m400_g10_reversed": (1911, 50, 5, 15_651, 40, 400),
    "cifar100_lt/n150_m300_g10_reversed": (5835, 150, 15, 11_720, 30, 300),
    "stl10_lt/n150_g10": (609, 150, 15, None, None, None),
    "stl10_lt/n450_g10": (1835, 450, 45, None, None, None),
    "stl10_lt/n150_g20": (507, 150, 7, None, None, None),
    "stl10_lt/n450_g20": (1528, 450, 22, None, None, None),
}
SIZES = {"cifar10_lt": ((5000,) * 10, 0), "cifar100_lt": ((500,) * 100, 0), "stl10_lt": ((500,) * 10, 100_000)}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Data sets with the published numbers of images, of one pixel each."""
    root = tmp_path_factory.mktemp("full_size")
    return {
        name: write_prepared(root / name, train, (1,) * len(train), unlabeled, side=1)
        for name, (train, unlabeled) in SIZES.items()
    }


@pytest.mark.parametrize("setting", COUNTS)
def test_a_setting_cuts_the_published_counts(setting: str, full_size: dict[str, Manifest]) -> None:
    configs = {config_of(cell.name).split for cell in HERE if cell.setting == setting}
    assert len(configs) == 1, "the same for all methods and tables"
    split = make_split(full_size[setting.split("/")[0]], "x", configs.pop())
    labeled, unlabeled = split.labeled_counts, split.unlabeled_counts
    total, first, last, *others = COUNTS[setting]
    assert (len(split.labeled), sum(labeled), labeled[0], labeled[-1]) == (total, total, first, last)
    if unlabeled is None:
        assert others == [None] * 3
        assert split.unlabeled.tolist() == list(range(5000, 105_000)), "the unlabeled images and no other"
    else:
        assert [sum(unlabeled), unlabeled[0], unlabeled[-1]] == others
        assert len(split.unlabeled) == total + others[0], "labeled images are unlabeled ones too"


def test_a_tenth_of_each_class_of_imagenet127_is_labeled_and_all_is_unlabeled(tmp_path: Path) -> None:
    sizes = tuple(range(10, 137))
    split = make_split(
        write_prepared(tmp_path / "data", sizes, (1,) * 127, side=1),
        "x",
        config_of("table4/semi/imagenet127_32/labels10").split,
    )
    assert split.labeled_counts == tuple(round(n / 10) for n in sizes)
    assert sorted(split.unlabeled) == list(range(sum(sizes)))


def test_every_setting_is_counted() -> None:
    settings = document()["settings"].keys()
    assert settings - COUNTS.keys() == {"imagenet127_32/labels10", "imagenet127_64/labels10"}


# The command.


def refused(capsys: pytest.CaptureFixture[str], line: str, *words: object) -> None:
    """`semi-fast reproduce LINE` ends with code 2 and one line that holds `words`."""
    capsys.readouterr()
    assert main(["reproduce", *shlex.split(line)]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert [word for word in words if str(word) not in err] == [], err
    assert out == ""


def test_the_list_has_every_cell_and_says_which_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  table")]
    assert [words[0] for words in lines] == list(cells())
    assert {words[0] for words in lines if words[-1] == "yes"} == {cell.name for cell in HERE}
    assert [CELL, "80.3", "±", "0.41", "yes"] in lines


def test_what_cannot_be_reproduced_gets_one_line(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, "", "reproduce needs a CELL", "--list")
    refused(capsys, CELL.replace("n500", "n50O"), "there is no cell", f"did you mean {CELL}")
    refused(capsys, "nonsense", "there is no cell nonsense", "--list")
    refused(capsys, CELL.replace("semi", "fixmatch_darp"), "prints 74.5 ± 0.78", "not have the method FixMatch w/DARP")
    refused(capsys, CELL, "data/cifar10 holds no", "semi-fast prepare cifar10 --raw RAW --out data/cifar10")
    refused(capsys, f"{CELL} --data 'my data'", "semi-fast prepare cifar10 --raw RAW --out 'my data'")
    refused(capsys, "table2/semi/stl10_lt/n150_g10", "data/stl10", "prepare stl10 --raw RAW --resolution 32 --out")
    refused(capsys, "table4/semi/imagenet127_64/labels10", "data/imagenet127_64", "--resolution 64 --out")
    refused(capsys, f"{CELL} --data {digits}", "--data must hold cifar10, 10 classes at 32x32", "holds digits")
    for seeds in ("0,0", "a", "1,,2", "-1", "0.5"):
        refused(capsys, f"{CELL} --seeds={seeds}", "--seeds must be different whole numbers", seeds)
    for steps in (0, 250_001):
        refused(capsys, f"{CELL} --steps {steps}", "--steps must lie in 1..250000", steps)
    for flag, way_out in (
        ("seed", "--seeds"),
        ("run-dir", "--out"),
        ("data.path", "--data"),
        ("optim.steps", "--steps"),
    ):
        refused(capsys, f"{CELL} --{flag}=1", "is set by reproduce", way_out)
    refused(capsys, f"{CELL} --resume=auto", "--resume", "leave it out")
    refused(capsys, f"{CELL} --config=mine.yaml", "leave out --config mine.yaml")
    refused(capsys, f"--print-config {CELL} --seeds 0 --steps 3", "as published; leave out --seeds --steps: ", "train")
    refused(capsys, f"--print-config {CELL} --data d --out o --seed=1", "leave out --data --out --seed=1: ")
    refused(capsys, "--print-config", "reproduce needs a CELL")
    refused(capsys, f"--print-config {CELL}".replace("n500", "n50O"), "there is no cell", f"did you mean {CELL}")
    refused(capsys, "--print-config --list", "--list shows all cells; leave out --print-config")
    refused(capsys, f"{CELL} --optim.lrr=1", "there is no key optim.lrr", "optim.lr?")
    refused(capsys, f"{CELL} stray", "'stray'")
    launched = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
    for word in launched.split():
        monkeypatch.setenv(*word.split("="))
    refused(capsys, CELL, f"reproduce {CELL} --print-config > FILE", "accelerate launch -m semi_fast.train", "collects")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [CELL, "table1/semi/cifar10_lt/n1500_m3000_g100", CELL.replace("semi", "fixmatch")])
def test_a_shortened_run_is_valid_and_keeps_the_shares_of_its_schedules(name: str) -> None:
    whole = config_of(name)
    for steps in (1, 6, 59, 60, 499, 500, 501, 999, 3000, 30_000, 249_999):
        short = shortened(whole, steps)
        config = replace(
            whole,
            optim=replace(whole.optim, steps=steps),
            eval=replace(whole.eval, every=short["eval.every"]),
            method=replace(
                whole.method,
                epoch_steps=short.get("method.epoch_steps", 500),
                semi=replace(whole.method.semi, warmup_epochs=short.get("method.semi.warmup_epochs", 0)),
            ),
        )
        check(config)
        assert config.eval.every <= 500
        assert config.eval.every >= min(steps, 50)
        assert steps < 3000 or steps // config.eval.every >= 60
        if whole.method.name == "semi":
            share = config.method.semi.warmup_epochs * config.method.epoch_steps / steps
            assert share <= whole.method.semi.warmup_epochs / 500
            if steps >= 3000:
                assert share > 0.9 * whole.method.semi.warmup_epochs / 500
    assert shortened(whole, whole.optim.steps) == {}


def summary(top1: float, balanced: float) -> dict[str, Any]:
    scores = {"top1_last20": top1, "balanced_accuracy_last20": balanced, "best": {"top1": top1 + 1}}
    return {"averaged": 20, **scores}


def test_the_comparison_is_means_and_spreads_over_seeds() -> None:
    table = against_paper(find(CELL), [summary(80, 1), summary(81, 2), summary(82, 3)])
    assert [row[1:4] for row in table.rows] == [(80.3, 0.41, 3), (81, 1, 3), (82, 1, 3)]
    assert [row[4] for row in table.rows] == [None, pytest.approx(0.7), pytest.approx(1.7)]
    assert "mean of the last 20 evaluations" in table.rows[1][0]
    once = against_paper(find(CELL), [summary(80, 1) | {"averaged": 1}])
    assert once.rows[1][0] == "ours: top-1, the one evaluation"
    image_net = against_paper(find("table4/semi/imagenet127_32/labels10"), [summary(50, 40)])
    assert [row[1:4] for row in image_net.rows] == [(56.1, None, None), (50, None, 1), (40, None, 1), (51, None, 1)]
    assert "balanced accuracy" in image_net.rows[2][0]


def test_a_run_of_the_cell_as_it_is_is_comparable() -> None:
    cell = find(CELL)
    published, config, short = configured(cell, steps=None, data=None, flags=["--log.every=7", "--device=cpu"])
    assert verdict(cell, published, config, short=short, runs=3) == (True, [])
    assert verdict(cell, published, config, short=short, runs=1) == (True, ["1 of the paper's 3 runs"])
    config = replace(config, precision="bf16")
    assert verdict(cell, published, config, short={}, runs=3) == (True, ["precision is bf16, in the cell auto"])
    config = replace(config, method=replace(config.method, name="fixmatch"))
    comparable, lines = verdict(cell, published, config, short={}, runs=3)
    assert not comparable
    assert "method.name is fixmatch, in the cell semi: not comparable with the paper" in lines
    starred = cells()["table2/fixmatch_seval/stl10_lt/n150_g10"]
    assert "starred" in verdict(starred, published, published, short={}, runs=3)[1][0]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in CIFAR-10's layout, prepared by the command line."""
    root = tmp_path_factory.mktemp("cifar10")
    write_cifar10_binary(root / "raw", per_class=50, test_per_class=2)
    assert main(["prepare", "cifar10", "--raw", str(root / "raw"), "--out", str(root / "data")]) == 0
    return root / "data"


def test_one_process_at_a_time_has_the_directory(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "reproduce.lock", "--out"):
        words = shlex.join([CELL, f"--data={cifar10}", f"--out={tmp_path}", "--seeds=0", "--steps=60", *TINY])
        refused(capsys, words, f"--out {tmp_path} is in use by process {os.getpid()}", "wait for it, or choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["reproduce.lock"]


def test_a_short_cell_is_run_compared_and_not_run_again(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, started = semi_fast.train.run, []

    def counted(config: Config) -> dict[str, Any]:
        started.append((config.seed, config.resume, config.run_dir))
        return run(config)

    monkeypatch.setattr(semi_fast.train, "run", counted)
    out = tmp_path / "out"
    line = ["reproduce", CELL, "--steps", "6", "--data", str(cifar10), "--out", str(out), *TINY]
    assert main([*line, "--seeds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "nothing to resume" not in shown
    for words in (
        "FixMatch w/SeMi on CIFAR-10-LT, N1 = 500, M1 = 4000, gamma_l = gamma_u = 100",
        "80.3  0.41     3",
        "ours: top-1, mean of the last 2 evaluations",
        "6 of 250,000 steps: not comparable with the paper",
        "fitted to the steps: method.epoch_steps 1, method.semi.warmup_epochs 0",
        "split.labeled_max is 20, in the cell 500: not comparable with the paper",
        "eval.every is 3, in the cell 500",
        "1 of the paper's 3 runs",
        "protocol: cifar10 32 px, rule semi N1=20 M1=30 gamma_l=5 gamma_u=5",
        "balanced_head of the averaged weights on the test set, mean of the last 2 evaluations",
        "caveat: the paper does not say whether",
    ):
        assert words in shown, words
    assert main([*line, "--seeds", "0,1"]) == 0
    assert "seed_0 is finished, and taken as it is" in capsys.readouterr().out
    assert started == [(seed, "none", str(out / f"seed_{seed}")) for seed in (0, 1)], "each seed once"
    written = json.loads((out / "reproduce.json").read_text())
    assert (written["cell"], written["comparable"], written["paper"]["mean"]) == (CELL, False, 80.3)
    assert [run["seed"] for run in written["runs"]] == [0, 1]
    scores = [json.loads((out / f"seed_{k}" / "summary.json").read_text())["top1_last20"] for k in (0, 1)]
    assert written["table"][1]["mean"] == pytest.approx(sum(scores) / 2)
    assert written["table"][1]["difference"] == pytest.approx(sum(scores) / 2 - 80.3)

    arguments = f"{CELL} --steps 6 --data {cifar10} --out {out} --seeds 0 {' '.join(TINY)}"
    refused(capsys, f"{arguments} --optim.lr=0.01", "seed_0", "another configuration: optim.lr is 0.03 there, 0.01")
    other = arguments.replace("--split.labeled_max=20", "--split.labeled_max=19")
    refused(capsys, other, "split.labeled_max is 20 there, 19 here", "another --out")
    summary_file = out / "seed_0" / "summary.json"
    changed = json.loads(summary_file.read_text()) | {"split_sha256": "0" * 64}
    summary_file.write_text(json.dumps(changed))
    refused(capsys, arguments, "seed_0", "other data or another split", "another --out")
    assert len(started) == 2


def test_data_of_the_right_kind_is_taken(cifar10: Path) -> None:
    assert prepared(find(CELL), cifar10).dataset == "cifar10"
    with pytest.raises(ValueError, match=r"must hold cifar100, 100 classes .* holds cifar10, 10 classes"):
        prepared(find("table1/semi/cifar100_lt/n50_m400_g10"), cifar10)
