"""A long-tailed split as a data set of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from semi_fast.cli import main
from semi_fast.data_prep.long_tail import make_split
from semi_fast.prepared.manifest import load_manifest, load_split, verify_manifest
from semi_fast.schema.split import RULES, SplitConfig

from .reliability.forked import forked
from .synthetic_data import write_cifar10_binary

FLAGS = "--labeled-max 6 --imbalance-labeled 3 --unlabeled-max 9 --imbalance-unlabeled 3 --validation-per-class 1"


@pytest.mark.parametrize("rule", ["semi", "daso"])
def test_it_holds_the_rows_of_the_split_and_no_others(tmp_path: Path, rule: str) -> None:
    raw = write_cifar10_binary(tmp_path / "raw", 40)
    assert main(["prepare", "cifar10", "--raw", str(raw), "--out", str(tmp_path / "whole")]) == 0
    seed = 0 if RULES[rule].shuffle == "never" else 3
    flags = [*FLAGS.split(), "--rule", rule, f"--seed={seed}"]
    assert main(["prepare", "cifar10", "--raw", str(raw), "--out", str(tmp_path / "small"), *flags]) == 0
    whole, small = load_manifest(tmp_path / "whole"), load_manifest(tmp_path / "small")
    verify_manifest(small)
    options = {"labeled_max": 6, "imbalance_labeled": 3.0, "unlabeled_max": 9, "imbalance_unlabeled": 3.0}
    split = make_split(whole, "x", SplitConfig(**options, validation_per_class=1, rule=rule, seed=seed))  # type: ignore[arg-type]
    (path,) = (tmp_path / "small" / "splits").glob("*.json")
    mine = load_split(path, small)
    for part in ("labeled", "unlabeled", "validation"):
        theirs, ours = getattr(split, part), getattr(mine, part)
        assert len(theirs) == len(ours) > 0
        assert np.array_equal(whole.images("train")[theirs], small.images("train")[ours])
        assert np.array_equal(whole.labels("train")[theirs], small.labels("train")[ours])
    kept = np.unique(np.concatenate([mine.labeled, mine.unlabeled, mine.validation]))
    assert np.array_equal(kept, np.arange(small.length("train"))), "nothing else is in it"
    assert np.array_equal(whole.images("test"), small.images("test"))
    assert (whole.mean, whole.std) == (small.mean, small.std)
    assert small.source["rows_of"]["data_sha256"] == whole.data_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "small", "whole"], "nothing is left beside it"


def test_what_a_kill_has_left_beside_a_finished_subset_goes_with_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the rename; work in progress, where nothing is published yet, stays."""
    raw, out, hidden = write_cifar10_binary(tmp_path / "raw", 40), tmp_path / "small", tmp_path / ".small.whole"
    command = ["prepare", "cifar10", "--raw", str(raw), "--out", str(out), "--labeled-fraction", "0.5"]

    def child() -> int:
        shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return main(command)

    assert forked(child).signal == signal.SIGKILL
    verify_manifest(load_manifest(out))
    assert hidden.exists()
    assert main(command) == 2
    assert "--out must be new or an empty directory" in capsys.readouterr().err
    assert not hidden.exists()
    verify_manifest(load_manifest(out))

    hidden.mkdir()
    (out / "manifest.json").unlink()
    assert main(command) == 2
    assert hidden.exists(), "it may belong to a preparation that is not finished"
