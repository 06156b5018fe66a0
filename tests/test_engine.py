"""Whole small runs on real digits: what they leave, that they resume bit for bit, and how they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from semi_fast.errors import NonFiniteError
from semi_fast.loop.sampling import label_tables
from semi_fast.prepared.manifest import load_manifest, load_split
from semi_fast.rundir import checkpoint
from semi_fast.train import guarded, run

from .tiny import config, on_device


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{step:09d}" / "state.safetensors")


def records(run_dir: Path) -> list[dict]:
    """The metrics, without what the clock decides."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "rows_per_second")
    return [{key: value for key, value in record.items() if key not in clock} for record in found]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SeMi run of 12 steps, saved every 3; on a GPU where there is one."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(on_device(digits, run_dir, "--checkpoint.every=3", "--checkpoint.keep=9"))
    return run_dir


def test_a_line_says_of_which_step_its_evaluation_is(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(digits, tmp_path / "run", "--optim.steps=6", "--log.every=1", "--method.name=supervised"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ["test" in line for line in lines] == [False, False, False, True, True, True]
    assert ["(step 4)" in line for line in lines] == [False, False, False, False, True, False]


def test_a_run_leaves_everything(whole: Path, digits: Path) -> None:
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    files = {"config.yaml", "split.json", "env.json", "metrics.jsonl", "summary.json", "checkpoints", "report.html"}
    assert files <= names
    summary = json.loads((whole / "summary.json").read_text())
    required = "method protocol steps seconds images_per_second rows_per_second top1_final top1_last20"
    required += " balanced_accuracy_last20 split_sha256 manifest_sha256 seed"
    assert set(required.split()) <= summary.keys()
    manifest = load_manifest(digits)
    assert summary["manifest_sha256"] == manifest.sha256
    assert summary["split_sha256"] == load_split(whole / "split.json", manifest).sha256
    assert summary["rows_per_second"] == pytest.approx(2 * summary["images_per_second"])  # 8 + 3 * 8 rows of 16 images
    evaluations = [r for r in records(whole) if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [4, 8, 12]
    tops = [r["heads"]["balanced_head"]["top1"] for r in evaluations]
    assert summary["top1_last20"] == pytest.approx(np.mean(tops))
    assert (summary["averaged"], summary["predicts"]) == (3, "balanced_head")
    assert summary["best"] == {"top1": max(tops), "step": 4 * (1 + int(np.argmax(tops))), "selected_on": "test"}
    table = np.array(evaluations[-1]["heads"]["head"]["confusion"])
    assert table.sum(1).tolist() == list(manifest.counts["test"]), "every test image is counted once"
    assert {"key": "optim.steps", "run": 12, "paper": 250_000} in summary["shortened"]


def test_the_resolved_configuration_gives_the_same_run(whole: Path, digits: Path, tmp_path: Path) -> None:
    from semi_fast.schema.arguments import parse_config

    again = parse_config([f"--config={whole / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"])
    run(again)
    ours, theirs = state(whole, 12), state(tmp_path / "again", 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert records(whole) == records(tmp_path / "again")


@pytest.mark.parametrize("first", [3, 6, 9])
def test_resuming_equals_running_through_bit_for_bit(
    whole: Path, digits: Path, tmp_path: Path, device: torch.device, first: int
) -> None:
    """From a checkpoint inside and at the edge of log intervals; and a second time from the next one."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for step in range(3, 13, 3):
        if step > first:
            shutil.rmtree(run_dir / "checkpoints" / f"step_{step:09d}")
    run(on_device(digits, run_dir, "--checkpoint.every=3", "--checkpoint.keep=9", resume="auto"))
    for step in range(3, 13, 3):
        ours, theirs = state(whole, step), state(run_dir, step)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert records(whole) == records(run_dir)


@pytest.mark.parametrize("name", ["supervised", "fixmatch"])
def test_other_methods_resume_too(digits: Path, tmp_path: Path, name: str) -> None:
    flags = (f"--method.name={name}", "--method.plugins=[la]", "--checkpoint.every=5", "--checkpoint.keep=9")
    run(config(digits, tmp_path / "a", *flags))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step_{step:09d}")
    run(config(digits, tmp_path / "b", *flags, resume="auto"))
    ours, theirs = state(tmp_path / "a", 12), state(tmp_path / "b", 12)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert records(tmp_path / "a") == records(tmp_path / "b")


SAVED_ENTRIES = (
    "model.",
    "average.",
    "momentum.",
    "method.bank.",
    "method.label_counts",
    "method.label_share",
    "method.center",
    "interval.",
)


@pytest.mark.parametrize("entry", SAVED_ENTRIES)
def test_every_kind_of_saved_entry_matters(whole: Path, digits: Path, tmp_path: Path, entry: str) -> None:
    """The resume test can fail: with an entry set to zero the final state or the metrics differ."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for step in (9, 12):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:09d}")
    at = run_dir / "checkpoints" / "step_000000006"
    tensors = load_file(at / "state.safetensors")
    changed = [name for name in tensors if name.startswith(entry) and tensors[name].is_floating_point()] or [
        name for name in tensors if name.startswith(entry)
    ]
    assert changed
    save_file({n: t * 0 if n in changed else t for n, t in tensors.items()}, at / "state.safetensors")
    manifest = json.loads((at / "manifest.json").read_text())
    manifest["files"]["state.safetensors"]["sha256"] = checkpoint.file_sha256(at / "state.safetensors")
    (at / "manifest.json").write_text(json.dumps(manifest))
    run(on_device(digits, run_dir, "--checkpoint.every=0", resume="auto"))
    ours, theirs = state(whole, 12), state(run_dir, 12)
    same = all(torch.equal(ours[name], theirs[name]) for name in ours) and records(whole) == records(run_dir)
    assert not same


def test_the_truth_of_unlabeled_images_changes_no_training_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semi_fast import train

    run(config(digits, tmp_path / "a"))

    def poisoned(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        labels, truth = label_tables(*args)  # type: ignore[arg-type]
        return labels, torch.where(truth >= 0, (truth + 3) % 10, truth)

    monkeypatch.setattr(train, "label_tables", poisoned)
    run(config(digits, tmp_path / "b"))
    ours, theirs = state(tmp_path / "a", 12), state(tmp_path / "b", 12)
    trained = [name for name in ours if not name.startswith("interval.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    assert records(tmp_path / "a") != records(tmp_path / "b"), "only the diagnostics follow the truth"


def test_label_tables_hold_nothing_they_must_not(digits: Path) -> None:
    from semi_fast.data_prep.long_tail import make_split
    from semi_fast.schema.split import SplitConfig

    manifest = load_manifest(digits)
    split = make_split(manifest, "x", SplitConfig(labeled_max=10, unlabeled_max=20))
    labels, truth = label_tables(manifest, split)
    labeled = set(split.labeled.tolist())
    for i, known in enumerate(manifest.labels("train").tolist()):
        assert labels[i] == (known if i in labeled else -1)
        assert truth[i] == (-1 if i in labeled else known)


def test_validation_images_choose_and_test_images_report(digits: Path, tmp_path: Path) -> None:
    run(config(digits, tmp_path / "run", "--split.validation_per_class=3"))
    chosen = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]
    splits = [r["split"] for r in records(tmp_path / "run") if r["kind"] == "eval"]
    assert splits == ["test", "validation"] * 3
    assert chosen["selected_on"] == "validation"
    validation = [r for r in records(tmp_path / "run") if r.get("split") == "validation"]
    best = max(validation, key=lambda r: r["heads"][r["predicts"]]["balanced_accuracy"])
    assert chosen["step"] == best["step"]
    assert chosen["balanced_accuracy"] == best["heads"][best["predicts"]]["balanced_accuracy"]


def test_the_labels_of_test_images_choose_and_train_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semi_fast import train

    def run_and_choose(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        run(config(digits, tmp_path / name, "--split.validation_per_class=3"))
        return state(tmp_path / name, 12), json.loads((tmp_path / name / "summary.json").read_text())

    made = train.EvalSet
    ours, told = run_and_choose("a")
    monkeypatch.setattr(
        train, "EvalSet", lambda name, images, labels: made(name, images, (labels + (name == "test")) % 10)
    )
    theirs, told_poisoned = run_and_choose("b")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("step", "balanced_accuracy"):
        assert told["validation"][key] == told_poisoned["validation"][key]
    assert told["heads"] != told_poisoned["heads"], "only the report follows"


def test_a_loss_that_is_not_finite_stops_the_run(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ("--optim.lr=1e30", "--checkpoint.every=5")
    with pytest.raises(NonFiniteError, match=r"step \d+ \(sample ids \d+"):
        run(config(digits, run_dir, *flags))
    found = json.loads((run_dir / "nonfinite.json").read_text())
    assert 1 <= found["step"] < 5, "noticed at the first progress line"
    assert len(found["sample_ids"]) == 16
    assert checkpoint.published(run_dir / "checkpoints") == []
    assert guarded(config(digits, tmp_path / "other", *flags)) == 4
    assert json.loads((tmp_path / "other" / "status.json").read_text())["exit_code"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_other_precisions_train(digits: Path, tmp_path: Path, precision: str) -> None:
    run(config(digits, tmp_path / "run", f"--precision={precision}", "--optim.steps=6", "--eval.every=6"))
    terms = records(tmp_path / "run")[0]["terms"]
    assert all(np.isfinite(value) for value in terms.values())
    weights = state(tmp_path / "run", 6)["model.backbone.conv1.weight"]
    momentum = state(tmp_path / "run", 6)["momentum.backbone.conv1.weight"]
    assert momentum.abs().sum() > 0, "updates were made, not skipped"
    assert weights.dtype == (torch.float64 if precision == "fp64" else torch.float32), "weights stay whole"


def test_any_timm_model(digits: Path, tmp_path: Path) -> None:
    run(config(digits, tmp_path / "run", "--model.name=resnet18", "--optim.steps=4", "--model.bn_momentum=null"))
    assert "model.backbone.layer1.0.conv1.weight" in state(tmp_path / "run", 4)


def test_going_back_to_an_older_checkpoint_retires_the_newer_ones(whole: Path, digits: Path, tmp_path: Path) -> None:
    """Else a crash soon after would leave the newest checkpoints without the metrics that belong to them."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    at = run_dir / "checkpoints" / "step_000000003"
    flags = ("--checkpoint.every=3", "--checkpoint.keep=1")
    run(on_device(digits, run_dir, *flags, resume=str(at)))
    assert [path.name for path in checkpoint.published(run_dir / "checkpoints")] == ["step_000000012"]
    assert records(run_dir) == records(whole)


def test_a_bank_of_features_is_kept_in_full_precision(digits: Path, tmp_path: Path) -> None:
    run(config(digits, tmp_path / "run", "--precision=bf16"))
    bank = state(tmp_path / "run", 12)["method.bank.features"]
    assert not torch.equal(bank, bank.bfloat16().float())


def test_layout_in_memory_changes_rounding_alone(digits: Path, tmp_path: Path) -> None:
    seen: list[bool] = []

    def spy(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Conv2d) and out.dtype == torch.float64:  # not the probe of a new network
            seen.append(out.is_contiguous(memory_format=torch.channels_last))

    finals = []
    for value in ("true", "false"):
        seen.clear()
        hook = torch.nn.modules.module.register_module_forward_hook(spy)
        run(config(digits, tmp_path / value, f"--engine.channels_last={value}", "--precision=fp64"))
        hook.remove()
        assert set(seen) == {value == "true"}
        finals.append(state(tmp_path / value, 12))
    for name, tensor in finals[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(finals[1][name], tensor, rtol=1e-9, atol=1e-11)
