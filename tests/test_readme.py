"""Every command in the README is one that the program takes, and every path it names is there."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.accuracy import markdown
from semi_fast.cli import make_parser, normal
from semi_fast.schema.arguments import parse_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
OURS = [shlex.split(line) for line in COMMANDS if "semi-fast" in line or "semi_fast.train" in line]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_commands_are_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "..."]
    if "semi_fast.train" in words:
        flags = [
            w.replace("C", "configs/cifar10_lt/cpu_semi.yaml") for w in words[words.index("semi_fast.train") + 1 :]
        ]
        parse_config(flags)
    elif words[1] == "train":
        parse_config(words[2:])
    else:
        make_parser().parse_args([normal(word) for word in words[1:]])


def test_there_are_commands() -> None:
    assert len(OURS) >= 8
    assert {"make demo", "make test"} <= set(COMMANDS)


def test_the_table_is_that_of_the_collected_runs() -> None:
    with (ROOT / "benchmarks" / "results" / "cpu_cifar10_lt.csv").open(encoding="utf-8") as file:
        assert markdown(list(csv.DictReader(file))) in TEXT


def test_the_configurations_expect_what_the_collected_runs_have() -> None:
    with (ROOT / "benchmarks" / "results" / "cpu_cifar10_lt.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            words = (ROOT / row["command"].split("--config ")[1]).read_text(encoding="utf-8")
            assert f"# Expected: {float(row['balanced_accuracy_last20']):.1f} % balanced accuracy" in words
            assert f"# Duration: {float(row['seconds']) / 60:.1f} minutes" in words


def test_the_figures_of_the_bank_are_those_of_the_table() -> None:
    with (ROOT / "benchmarks" / "results" / "ops_cpu.csv").open(encoding="utf-8") as file:
        rows = {row["shape"]: row for row in csv.DictReader(file) if row["operation"] == "bank_push"}

    def figure(classes: int, kind: str, column: str) -> float:
        (row,) = (row for shape, row in rows.items() if shape.startswith(f"C={classes} ") and kind in shape)
        return float(row[column])

    filling, ratio = "filling, even", "loop_over_ours_ratio"
    text = " ".join(TEXT.split())
    for words in (
        f"{figure(10, filling, 'reference_us'):.0f} us with 10 classes",
        f"{figure(127, filling, 'reference_us'):.0f} us with 127 while the bank fills",
        f"{figure(10, filling, ratio):.1f} and {figure(127, filling, ratio):.1f} times less than that loop; "
        f"{figure(10, 'long-tailed', ratio):.1f} times less",
        f"{figure(10, 'full', ratio):.1f} and {figure(127, 'full', ratio):.1f} times less once the bank is full",
    ):
        assert words in text


def test_the_figures_of_the_pipelines_are_those_of_the_table() -> None:
    with (ROOT / "benchmarks" / "results" / "pipelines_cpu.csv").open(encoding="utf-8") as file:
        rows = {row["pipeline"]: row for row in csv.DictReader(file)}
    text = " ".join(TEXT.split())
    for name, words in (
        ("resident", "{} augmented views per CPU-second from memory"),
        ("ffcv", "{} through FFCV"),
        ("dali-raw", "{} through DALI"),
    ):
        assert words.format(f"{float(rows[name]['per_cpu_second']):,.0f}") in text
    ratios = [f"{float(rows[name]['cpu_ratio']):.1f}" for name in ("resident", "ffcv", "dali-raw", "dali-png")]
    assert "{}, {} and {} times those of a DataLoader with Pillow".format(*ratios[:3]) in text
    assert f"PNG shards give {ratios[3]} times as many" in text
    with (ROOT / "benchmarks" / "results" / "pipelines_cpu_larger.csv").open(encoding="utf-8") as file:
        larger = {(row["pipeline"], row["side"]): row for row in csv.DictReader(file)}
    memory, png = (
        [float(larger[name, side]["cpu_ratio"]) for side in ("64", "96")] for name in ("resident", "dali-png")
    )
    assert (
        "memory gives {:.1f} and {:.1f} times those of Pillow, PNG shards {:.1f} and {:.1f}".format(*memory, *png)
        in text
    )


def test_the_figures_of_the_step_are_those_of_the_table() -> None:
    with (ROOT / "benchmarks" / "results" / "reference_cpu.csv").open(encoding="utf-8") as file:
        ours = [row for row in csv.DictReader(file) if row["trainer"] == "ours"]
    rows = {row["model"]: row for row in ours if row.get("kind", "steps") == "steps"}
    text = " ".join(TEXT.split())
    shown = [
        "{:.2f} ({:.2f} to {:.2f}) times".format(
            *(float(rows[model][f"cpu_ratio{part}"]) for part in ("", "_low", "_high"))
        )
        for model in ("wrn_10_2", "wrn_28_2")
    ]
    assert f"the loop takes {shown[0]} our CPU time with WRN-10-2 and {shown[1]} with WRN-28-2" in text


def test_paths_exist() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(
        r"`((?:docs|configs|benchmarks|semi_fast)/[\w./]+)`", TEXT
    ):
        assert (ROOT / path).exists(), path
