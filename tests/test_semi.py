"""SeMi's switches: each changes what it names, and the presets are what paper and released code say."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.reference import semi_step
from semi_fast import processes
from semi_fast.batch import Outputs, RowLayout, Rows
from semi_fast.methods import Environment, make_method, memory_bank, released_semi
from semi_fast.methods.released_semi import ReleasedSeMi
from semi_fast.methods.semi import SeMi
from semi_fast.ops.pseudo_label.reference import mix, prototype_probs
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.config import check
from semi_fast.schema.method import MethodConfig
from semi_fast.schema.semi import PRESETS, ReleasedSemiConfig, SemiConfig

from .tiny import config

CPU = torch.device("cpu")
COUNTS, FIRST_VISIT = (40, 12, 6, 2), (38, 11, 4, 1)
B, C, WIDTH = 6, 4, 128
TINY = SemiConfig(
    threshold=0.5,
    warmup_epochs=1,
    bank_slots=6,
    bank_decay=0.8,
    bank_decay_every=2,
    prototype_temperature=5.0,
    mixing=1.0,
)  # as many slots as rows of a class come in two steps: rows are driven out


def method_of(options: SemiConfig, *, steps: int = 16, seed: int = 0) -> SeMi:
    method = make_method(MethodConfig(name="semi", epoch_steps=3, semi=options), steps=steps, seed=seed)
    assert isinstance(method, SeMi)
    return method


def batch(method: SeMi | ReleasedSeMi, seed: int) -> tuple[Rows, Outputs]:
    """Random outputs of a network whose features lie near a centre per class, so that prototypes vote."""
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout(B, B, method.needs.strong_views)
    rows = Rows(
        torch.zeros(2 * B, 4, 4, 3, dtype=torch.uint8),
        torch.arange(2 * B),
        torch.zeros(2 * B).long(),
        torch.randint(C, (B,), generator=generator),
        layout,
    )
    heads = {head: torch.randn(WIDTH, C, generator=torch.Generator().manual_seed(7)) / 5 for head in method.needs.heads}
    features = torch.randn(layout.total, WIDTH, generator=generator).requires_grad_()
    noise = {head: torch.randn(layout.total, C, generator=generator) for head in ("head", "balanced_head")}

    def classify(x: Tensor) -> dict[str, Tensor]:
        return {head: x @ weight for head, weight in heads.items()}

    logits = {head: z + noise[head] for head, z in classify(features).items()}
    return rows, Outputs(features, logits, classify)


def environment(dtype: torch.dtype = torch.float32) -> Environment:
    return Environment(COUNTS, WIDTH, CPU, dtype, FIRST_VISIT)


def trajectory(options: SemiConfig, steps: int = 13) -> tuple[list[float], dict[str, Tensor], list[dict[str, float]]]:
    """(losses, last state, terms) of some steps on the same random batches."""
    method = method_of(options)
    state = method.init(environment())
    losses, terms = [], []
    for step in range(steps):
        rows, outputs = batch(method, step)
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        method.update(state, loss.pending | loss.totals, torch.tensor(step))
        losses.append(loss.total.item())
        terms.append({name: term.item() for name, term in loss.terms.items()})
    return losses, state, terms


DIFFERENT: dict[str, Any] = {
    "threshold": 0.9, "pseudo_label_target": "soft", "strong_views": 1, "hardness_scale": 0.0,
    "entropy_source": "linear", "mixing": 0.2, "mixing_renormalize": False, "prototype_temperature": 1.0,
    "bank_slots": 3, "bank_decay": 0.1, "bank_decay_every": 5, "bank_sampling": 8, "alignment_weight": 0.0,
    "alignment_temperature": 0.3, "alignment_sharpening": 2.0, "center_momentum": 0.1, "balanced_head": False,
    "adjustment": 1.0, "pseudo_label_adjustment": 1.0, "prior_momentum": 0.5, "warmup_epochs": 2,
    "warmup_balanced": False,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {  # what another key must be for the switch to show
    "mask_source": {"threshold": 0.4, "prototype_temperature": 0.2},
    "prior_momentum": {"unlabeled_prior": "joint"},
}


def alternatives() -> list[tuple[str, Any]]:
    hints = get_type_hints(SemiConfig)
    found = []
    for field in fields(SemiConfig):
        if field.name == "preset":
            continue
        values = [v for v in get_args(hints[field.name]) if v != field.default] or [DIFFERENT[field.name]]
        found += [(field.name, value) for value in values]
    return found


@pytest.mark.parametrize(("key", "value"), alternatives())
def test_every_switch_changes_the_run_and_keeps_it_finite(key: str, value: Any) -> None:
    base = replace(TINY, **NEEDED.get(key, {}))
    losses, other_losses = (trajectory(options)[0] for options in (base, replace(base, **{key: value})))
    assert all(torch.tensor(other_losses).isfinite())
    assert losses != other_losses


def test_presets_are_keys_and_explicit_keys_win() -> None:
    assert PRESETS["default"] == {}
    assert SemiConfig(**PRESETS["paper"]), "every key exists"
    paper = parse_config(["--method.semi.preset=paper", "--method.semi.alignment_weight=0.3"]).method.semi
    assert (paper.mask_source, paper.alignment_weight, paper.strong_views) == ("linear", 0.3, 1)


def test_a_preset_as_a_flag_does_not_quietly_lose_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("method:\n  semi:\n    strong_views: 2\n    mixing: 0.4\n")
    flags = [f"--config={file}", "--method.semi.preset=paper"]
    with pytest.raises(ValueError, match=r"preset=paper has strong_views 1, but the file sets 2: give"):
        parse_config(flags)
    for views in (1, 2):
        assert parse_config([*flags, f"--method.semi.strong_views={views}"]).method.semi.strong_views == views


def test_a_preset_in_a_file_gives_way_to_keys_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("method:\n  semi:\n    preset: paper\n    alignment_weight: 0.7\n")
    semi = parse_config([f"--config={file}"]).method.semi
    assert (semi.balanced_mask, semi.alignment_weight, semi.center) == ("own_adjusted", 0.7, "none")


@pytest.mark.parametrize("key", ["preset", "bank_eviction", "feature_order"])
def test_what_was_official_names_the_method_that_it_is_now(key: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"method:\n  semi:\n    {key}: official\n")
    for argument in (f"--method.semi.{key}=official", f"--config={tmp_path}/c.yaml"):
        with pytest.raises(ValueError, match=rf"{key} .*--method\.name=released_semi.*--method\.released_semi\.thres"):
            parse_config([argument])


RELEASED = "--method.name=released_semi"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((RELEASED, "--batch.unlabeled_ratio=2"), r"released_semi needs batch\.unlabeled_ratio 1, .*; got 2"),
        ((RELEASED, "--method.released_semi.warmup_epochs=500"), r"warmup_epochs \* .* must be below optim\.steps"),
        (("--method.semi.balanced_head=false", "--method.semi.bank_sampling=4"), "tops up the balanced head's batch"),
        (("--method.semi.center_momentum=1",), r"center_momentum must lie in \[0, 1\); got 1"),
        ((RELEASED, "--method.epoch_steps=200"), r"must not raise mixing above 1.*; got 2\.498 at the end"),
        (("--method.semi.prototype_temperature=0",), r"prototype_temperature must lie in \[1e-06, 1e\+06\]; got 0"),
        (("--method.semi.warmup_epochs=500",), r"warmup_epochs \* method\.epoch_steps must be below optim\.steps"),
    ],
)
def test_what_cannot_run_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(parse_config(["--data.path=x", *flags]))


def test_the_released_code_refuses_what_it_could_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    method = ReleasedSeMi(ReleasedSemiConfig(), epoch_steps=3)
    with pytest.raises(ValueError, match="needs a network of 128 features"):
        method.init(Environment(COUNTS, 64, CPU, torch.float32, FIRST_VISIT))
    with pytest.raises(ValueError, match="counts no image of a class"):
        method.init(Environment(COUNTS, 128, CPU, torch.float32, (64, 0, 0, 0)))
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="runs in one process"):
        method.init(environment())


def test_mixing_without_normalising_golden() -> None:
    """Golden value 4 of the specification."""
    queries, prototypes = (torch.tensor(x, dtype=torch.float64) for x in ([[0.5, 0.5]], [[0, 0], [1, 0], [0, 2.0]]))
    vote = prototype_probs(queries, prototypes, torch.ones(3, dtype=torch.bool), 0.5)
    probs, share = (torch.tensor(x, dtype=torch.float64) for x in ([[0.6, 0.3, 0.1]], [0.5, 0.3, 0.2]))
    expected = torch.tensor([[0.58599582, 0.30959749, 0.09920335]], dtype=torch.float64)
    torch.testing.assert_close(mix(probs, vote, 0.2 * share, renormalize=False), expected, atol=5e-9, rtol=0)


def test_mixing_rises_with_the_epochs() -> None:
    method = method_of(replace(TINY, warmup_epochs=0, mixing=0.4), steps=12)
    state = method.init(environment())
    weights = [method.mixing(state, torch.tensor(step))[0].item() * 4 for step in range(7)]
    assert weights == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.2])


def test_the_warm_up_learns_hard_labels_whatever_the_target() -> None:
    hard, _, _ = trajectory(TINY, steps=3)
    soft, _, _ = trajectory(replace(TINY, pseudo_label_target="soft"), steps=3)
    assert hard == pytest.approx(soft, rel=1e-6)
    _, _, terms = trajectory(replace(TINY, warmup_balanced=False), steps=4)
    assert [t["balanced_supervised"] for t in terms[:3]] == [0, 0, 0]
    assert terms[3]["balanced_supervised"] > 0


def test_each_ablation_turns_its_part_off() -> None:
    _, _, base = trajectory(TINY)
    last = base[-1]
    _, _, no_alignment = trajectory(replace(TINY, alignment_weight=0.0))
    assert no_alignment[-1] == last | {"alignment": 0.0}, "nothing else changes"
    _, _, no_weights = trajectory(replace(TINY, hardness_scale=0.0))
    assert no_weights[-1]["unlabeled"] > last["unlabeled"], "weights lie below 1"
    losses, _, no_balance = trajectory(replace(TINY, balanced_head=False))
    assert no_balance[-1].keys() == {"supervised", "unlabeled", "alignment"}
    assert method_of(replace(TINY, balanced_head=False)).predicts == "head"
    assert all(loss > 0 for loss in losses)
    method = method_of(replace(TINY, mixing=0.0))
    assert method.mixing(method.init(environment()), torch.tensor(9)).eq(0).all()


def test_the_joint_prior_follows_labels_and_pseudo_labels() -> None:
    options = replace(TINY, unlabeled_prior="joint", prior_momentum=0.75)
    method = method_of(options)
    state = method.init(environment())
    expected = torch.tensor(COUNTS).double() / sum(COUNTS)
    assert torch.equal(state["prior"], expected)
    rows, outputs = batch(method, 0)
    loss = method.loss(state, rows, outputs, torch.tensor(0))
    method.update(state, loss.pending | loss.totals, torch.tensor(0))
    kept = loss.pending["pseudo_label"][loss.pending["mask"]]
    seen = torch.bincount(torch.cat([rows.labels, kept]), minlength=C).double()
    torch.testing.assert_close(state["prior"], 0.75 * expected + 0.25 * seen / seen.sum())


def test_stored_features_top_up_rare_classes() -> None:
    method = method_of(replace(TINY, bank_sampling=12))
    state = method.init(environment())
    for step in range(8):
        rows, outputs = batch(method, step)
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        if step == 0:
            assert loss.terms["balanced_bank"].item() == 0, "the bank is empty"
        method.update(state, loss.pending | loss.totals, torch.tensor(step))
    assert loss.terms["balanced_bank"].item() > 0
    again = method.loss(state, rows, outputs, torch.tensor(7)).terms["balanced_bank"]
    assert torch.equal(again, method.loss(state, rows, outputs, torch.tensor(7)).terms["balanced_bank"])
    other = method_of(replace(TINY, bank_sampling=12), seed=1)
    assert other.loss(state, rows, outputs, torch.tensor(7)).terms["balanced_bank"].item() != again.item()


def test_all_stored_features_are_drawn_where_every_class_is_far_below_its_share() -> None:
    """Then the term is the mean cross-entropy of every filled slot with its own class."""
    method = method_of(replace(TINY, bank_sampling=10_000))
    state = method.init(environment())
    for step in range(6):
        rows, outputs = batch(method, step)
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        if step == 5:
            assert outputs.classify is not None
            taken = (state["bank.inserted"] >= 0).nonzero()
            features = state["bank.features"][taken[:, 0], taken[:, 1]]
            expected = cross_entropy(outputs.classify(features)["balanced_head"], taken[:, 0])
            torch.testing.assert_close(loss.terms["balanced_bank"], expected)
        method.update(state, loss.pending | loss.totals, torch.tensor(step))


# The released code.


def test_the_scrambled_order_golden() -> None:
    """Golden value 9, and how many rows still meet their own image: 2 of 128, 1 of 64, and no pair."""
    layout = RowLayout(64, 64, 2)
    place = released_semi.scrambled(torch.arange(256.0).unsqueeze(1), layout)[:, 0].long()
    for a, b in ((0, 0), (5, 3), (63, 2), (17, 1)):
        assert place[64 * b + a] == 4 * a + b
    holds = torch.where(place < 64, 64 + place, place % 64)  # which image a place shows, the unlabeled ones first
    strong = holds[128:]
    assert (strong == torch.arange(64).repeat(2)).sum() == 2
    assert (holds[128:192] == torch.arange(64)).sum() == 1
    assert (holds[64:128].repeat(2) == strong).sum() == 0


def test_the_released_bank_equals_the_loop_that_is_measured() -> None:
    """Pushes and decays against a loop with the released structure; no two confidences are equal."""
    generator = torch.Generator().manual_seed(0)
    bank = memory_bank.empty(3, 5, 2, device=CPU, dtype=torch.float64)
    loop = semi_step.empty_bank(3, 5, 2, CPU)
    loop.features, loop.confidences = loop.features.double(), loop.confidences.double()
    for step in range(30):
        labels = torch.randint(0, 3, (8,), generator=generator)
        confidences = 0.5 + torch.rand(8, generator=generator, dtype=torch.float64) / 2
        mask = torch.rand(8, generator=generator) < 0.8
        features = (step * 8 + torch.arange(8.0, dtype=torch.float64) + 1).unsqueeze(1).repeat(1, 2)
        released_semi.push(bank, features, labels, confidences, mask, torch.tensor(step))
        semi_step.push(loop, features, labels, confidences, mask, semi_step.insert_official)
        if step % 3 == 2:
            stale = bank["bank.inserted"] < (step - 2) * 8
            memory_bank.decay(bank, torch.where(stale, 0.99, 1.0).double())
            released_semi.sort_by_confidence(bank)
            semi_step.decay(loop)
        torch.testing.assert_close(bank["bank.confidences"], loop.confidences)
        assert torch.equal(bank["bank.features"], loop.features)
    torch.testing.assert_close(bank["bank.sums"], bank["bank.features"].sum(1))
    assert (bank["bank.confidences"] < 0.99).any()


def test_stale_slots_decay_by_the_clock_of_the_epoch() -> None:
    """Epochs of 5 steps, a decay every 2: after steps 1, 3, 6, 8, 11, 13; step 4 belongs to the decay after step 6."""
    method = ReleasedSeMi(ReleasedSemiConfig(bank_decay_every=2), epoch_steps=5)
    bank = memory_bank.empty(1, 20, 1, device=CPU, dtype=torch.float32)
    expected: dict[int, float] = {}
    since: set[int] = set()
    for step in range(15):
        one = torch.ones(1, 1), torch.zeros(1).long(), torch.ones(1), torch.ones(1).bool()
        memory_bank.push(bank, *one, torch.tensor(step))
        expected[step], since = 1.0, since | {step}
        method.decay(bank, torch.tensor(step), rows=1)
        if step in (1, 3, 6, 8, 11, 13):
            expected = {n: c if n in since else c * 0.99 for n, c in expected.items()}
            since = set()
        number = bank["bank.inserted"][0]
        stored = bank["bank.confidences"][0]
        assert {int(n): c.item() for n, c in zip(number, stored, strict=True) if n >= 0} == pytest.approx(expected)


@pytest.mark.parametrize("given", ["--method.semi.preset=paper", RELEASED])
def test_the_paper_and_the_released_code_train_and_resume(digits: Path, tmp_path: Path, given: str) -> None:
    import shutil

    from safetensors.torch import load_file

    from semi_fast.train import run

    keys = ["threshold=0.15", "bank_decay_every=2", "bank_slots=8", "warmup_epochs=1"]
    flags = [f"--method.{method}.{key}" for method in ("semi", "released_semi") for key in keys]
    flags += [given, "--model.name=wrn_10_2", "--method.epoch_steps=3", "--checkpoint.every=4", "--checkpoint.keep=9"]
    run(config(digits, tmp_path / "a", *flags))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step_{step:09d}")
    run(config(digits, tmp_path / "b", *flags, resume="auto"))
    ours, theirs = (load_file(tmp_path / x / "checkpoints/step_000000012/state.safetensors") for x in "ab")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (ours["method.bank.inserted"] >= 0).any()


@pytest.mark.parametrize(("section", "schema"), [("semi", SemiConfig), ("released_semi", ReleasedSemiConfig)])
def test_the_tables_of_the_documentation_are_the_schema(section: str, schema: Any) -> None:
    """Every key with its default, and what the preset `paper` makes of it."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:g}" if isinstance(value, float) else str(value)

    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    table = text[text.index(f"| `method.{section}.` |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    paper = PRESETS["paper"] if section == "semi" else {}
    expected = {f.name: [shown(f.default), shown(paper[f.name]) if f.name in paper else ""] for f in fields(schema)}
    expected.pop("preset", None)
    first = 3 if section == "semi" else 1
    assert {row[0].strip("`"): [row[first], row[4] if section == "semi" else ""] for row in cells} == expected
