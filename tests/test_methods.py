"""What must hold for every method: which rows are trained on, what a loss is a mean of, and what no method may see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from semi_fast.batch import Outputs, RowLayout, Rows, split_rows
from semi_fast.methods import Environment, Loss, Method, make_method
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.schema.method import FixMatchConfig, LogitAdjustmentConfig, MethodConfig, SemiConfig

COUNTS, DIM, B, U = (40, 12, 6, 2), 8, 6, 5
CPU, D = torch.device("cpu"), torch.float64
LA_ALL = LogitAdjustmentConfig(train=True, pseudo_label=True)
CONFIGS = {
    "supervised": MethodConfig(name="supervised"),
    "supervised+la": MethodConfig(name="supervised", plugins=("la",)),
    "fixmatch": MethodConfig(name="fixmatch", fixmatch=FixMatchConfig(threshold=0.5)),
    "fixmatch+la": MethodConfig(name="fixmatch", plugins=("la",), fixmatch=FixMatchConfig(threshold=0.5), la=LA_ALL),
    "semi": MethodConfig(
        name="semi", epoch_steps=2, semi=SemiConfig(threshold=0.5, warmup_epochs=0, bank_slots=4, bank_decay_every=3)
    ),
}


def make(name: str) -> tuple[Method, dict[str, Tensor]]:
    method = make_method(CONFIGS[name], steps=10)
    return method, method.init(Environment(COUNTS, DIM, CPU, D))


def layout_of(method: Method) -> RowLayout:
    needs = method.needs
    return RowLayout(B, U if needs.unlabeled else 0, needs.strong_views if needs.unlabeled else 0)


def batch(method: Method, seed: int = 0) -> tuple[Rows, Outputs]:
    generator, layout = torch.Generator().manual_seed(seed), layout_of(method)
    labels = torch.arange(B) % len(COUNTS)
    n = layout.images
    rows = Rows(torch.zeros(n, 4, 4, 3, dtype=torch.uint8), torch.arange(n), torch.zeros(n).long(), labels, layout)

    def leaf(width: int) -> Tensor:
        return (2 * torch.randn(layout.total, width, generator=generator, dtype=D)).requires_grad_()

    return rows, Outputs(leaf(DIM), {head: leaf(len(COUNTS)) for head in method.needs.heads})


def warm(name: str) -> tuple[Method, dict[str, Tensor]]:
    """A method a few steps into a run, so that bank and counts hold something."""
    method, state = make(name)
    for step in range(4):
        rows, outputs = batch(method, seed=100 + step)
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        method.update(state, loss.pending | loss.totals, torch.tensor(step))
    return method, state


def loss_of(
    name: str, edit: Callable[[Rows, Outputs], tuple[Rows, Outputs]] = lambda r, o: (r, o), seed: int = 0
) -> Loss:
    method, state = warm(name)
    rows, outputs = edit(*batch(method, seed))
    return method.loss(state, rows, outputs, torch.tensor(6))


NAMES = list(CONFIGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_term_has_a_gradient_and_the_weak_view_has_none(name: str) -> None:
    method, state = warm(name)
    rows, outputs = batch(method)
    loss = method.loss(state, rows, outputs, torch.tensor(6))
    leaves = [outputs.features, *outputs.logits.values()]
    for term, value in loss.terms.items():
        gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), f"{term} teaches nothing"
        for g in gradients:
            assert g is None or split_rows(g, rows.layout).weak.abs().sum() == 0, f"{term} trains on the weak view"
    torch.testing.assert_close(loss.total, torch.stack(list(loss.terms.values())).sum())
    assert all(not tensor.requires_grad for tensor in loss.pending.values())


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_does_not_matter_and_targets_stay_with_their_rows(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    order_l, order_u = (torch.randperm(n, generator=generator) for n in (B, U))

    def permuted(rows: Rows, outputs: Outputs) -> tuple[Rows, Outputs]:
        layout = rows.layout
        order = order_u[: layout.unlabeled]
        blocks = [order_l, *(B + v * layout.unlabeled + order for v in range(1 + layout.strong_views))]
        at = torch.cat(blocks) if layout.unlabeled else order_l
        logits = {head: z[at] for head, z in outputs.logits.items()}
        return rows._replace(labels=rows.labels[order_l]), Outputs(outputs.features[at], logits)

    first, second = loss_of(name), loss_of(name, permuted)
    torch.testing.assert_close(first.total, second.total)
    for key in ("pseudo_label", "mask", "confidence"):
        if key in first.pending:
            torch.testing.assert_close(second.pending[key], first.pending[key][order_u])


@pytest.mark.parametrize("name", NAMES)
def test_renaming_the_classes_changes_nothing(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])  # new class i is old class order[i]
    inverse = order.argsort()

    def total(relabeled: bool) -> Tensor:
        method = make_method(CONFIGS[name], steps=10)
        counts = tuple(COUNTS[int(i)] for i in order) if relabeled else COUNTS
        state = method.init(Environment(counts, DIM, CPU, D))
        for step in range(6):
            rows, outputs = batch(method, seed=step)
            if relabeled:
                outputs = Outputs(outputs.features, {head: z[:, order] for head, z in outputs.logits.items()})
                rows = rows._replace(labels=inverse[rows.labels])
            loss = method.loss(state, rows, outputs, torch.tensor(step))
            method.update(state, loss.pending | loss.totals, torch.tensor(step))
        return loss.total

    torch.testing.assert_close(total(True), total(False))


@pytest.mark.parametrize("name", ["fixmatch", "semi"])
def test_the_divisor_is_the_whole_batch(name: str) -> None:
    """Replacing unsure rows by sure ones changes the sum, not the divisor: U rows as if half were masked out."""

    def unsure(rows: Rows, outputs: Outputs) -> tuple[Rows, Outputs]:
        logits = {head: z.detach().clone() for head, z in outputs.logits.items()}
        for z in logits.values():
            z[B + 1 : B + U] = 0  # only the first weak row stays confident
            z[B] = 20 * torch.eye(len(COUNTS), dtype=D)[1]
        return rows, Outputs(outputs.features, logits)

    method, _ = make(name)
    rows, outputs = unsure(*batch(method))
    loss = loss_of(name, unsure)
    strong = split_rows(outputs.logits["head"], rows.layout).strong.view(2, U, -1)[:, 0]
    label = loss.pending["pseudo_label"][0].expand(2)
    one_row = cross_entropy(strong, label, reduction="sum") / (2 * U)
    weight = loss.terms["unlabeled"] / one_row
    assert loss.pending["mask"].tolist() == [True] + [False] * (U - 1)
    assert 0.25 <= weight.item() <= 1 + 1e-9
    if name != "semi":
        assert weight.item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["fixmatch", "semi"])
def test_no_confident_row_gives_zero_and_no_nan(name: str) -> None:
    def flat(rows: Rows, outputs: Outputs) -> tuple[Rows, Outputs]:
        return rows, Outputs(outputs.features, {head: 0 * z for head, z in outputs.logits.items()})

    loss = loss_of(name, flat)
    assert loss.terms["unlabeled"].item() == 0
    assert loss.total.isfinite()


def test_a_masked_row_adds_exactly_nothing_even_if_not_finite() -> None:
    logits = torch.randn(4, 3, dtype=D)
    logits[1], logits[3] = torch.nan, torch.inf
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([0.5, 0.0]))
    expected = 0.5 * (cross_entropy(logits[0:1], torch.tensor([0])) + cross_entropy(logits[2:3], torch.tensor([0]))) / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[[1, 3]].abs().sum() == 0
    assert logits.grad[[0, 2]].abs().sum() > 0


def test_logit_adjustment_points_towards_rare_classes() -> None:
    def share(rare: int) -> float:
        method, state = make("supervised+la")
        rows, outputs = batch(method)
        flat = Outputs(outputs.features, {"head": (0 * outputs.logits["head"]).detach().requires_grad_()})
        loss = method.loss(state, rows._replace(labels=torch.full((B,), rare)), flat, torch.tensor(0))
        return torch.autograd.grad(loss.total, flat.logits["head"])[0].abs().sum().item()

    assert share(3) > share(0), "a rare label pulls harder"
    method, state = make("fixmatch+la")
    rows, outputs = batch(method)
    even = Outputs(outputs.features, {"head": 0.1 * outputs.logits["head"]})
    labels = method.loss(state, rows, even, torch.tensor(0)).pending["pseudo_label"]
    assert labels.tolist() == [3] * U, "pseudo-labels move to the rare class"


def test_posthoc_adjustment_changes_the_prediction_and_is_named() -> None:
    options = MethodConfig(name="fixmatch", plugins=("la",), la=LogitAdjustmentConfig(train=False, predict=True))
    method = make_method(options, steps=10)
    state = method.init(Environment(COUNTS, DIM, CPU, D))
    _, outputs = batch(method)
    expected = outputs.logits["head"] - torch.tensor([n / 60 for n in COUNTS], dtype=D).log()
    torch.testing.assert_close(method.logits(state, outputs), expected, rtol=0, atol=1e-9)
    assert method.predicts == "adjusted_head"
    assert make("fixmatch+la")[0].predicts == "head"


def test_semi_warms_up_as_fixmatch_with_a_balanced_head() -> None:
    options = MethodConfig(name="semi", epoch_steps=5, semi=SemiConfig(threshold=0.8, warmup_epochs=1, bank_slots=4))
    method = make_method(options, steps=50)
    state = method.init(Environment(COUNTS, DIM, CPU, D))
    seen = []
    for step in range(8):
        rows, outputs = batch(method, seed=step)
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        seen.append((loss.terms["alignment"].item() > 0, loss.stats["hardness"].item() < 1))
        probs = torch.softmax(split_rows(outputs.logits["head"], rows.layout).weak, 1)
        raw = torch.equal(loss.pending["confidence"], probs.amax(1))
        assert raw == (step < 5), "prototypes vote only after the warm-up"
        method.update(state, loss.pending | loss.totals, torch.tensor(step))
        assert state["bank.inserted"].max() >= 0, "the bank fills from step 0"
        assert (state["center"].abs().sum() > 0) == (step >= 5)
        uniform = torch.full((4,), 0.25, dtype=D)
        assert torch.equal(state["label_share"], uniform) == (step < 4), "shares follow at the end of an epoch"
    assert seen == [(False, False)] * 5 + [(True, True)] * 3
    counts = state["label_counts"].double()
    assert counts.sum() > 0


def test_semi_bank_holds_the_strong_features_under_their_labels() -> None:
    method, state = make("semi")
    rows, outputs = batch(method)
    loss = method.loss(state, rows, outputs, torch.tensor(0))
    method.update(state, loss.pending | loss.totals, torch.tensor(0))
    strong = split_rows(outputs.features.detach(), rows.layout).strong
    taken = state["bank.inserted"] >= 0
    for k, slot in taken.nonzero().tolist():
        row = int(state["bank.inserted"][k, slot])  # step 0: the number is the row
        assert torch.equal(state["bank.features"][k, slot], strong[row])
        assert loss.pending["pseudo_label"][row % U] == k
        assert state["bank.confidences"][k, slot] == loss.pending["confidence"][row % U]
    assert taken.sum() > 0
