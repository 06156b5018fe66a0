"""Where arithmetic usually breaks: each test is one row of the table of numerics pitfalls that no other file holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from semi_fast.batch import Outputs, RowLayout, Rows, split_rows
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.evaluation import EvalSet, Evaluation
from semi_fast.loop.metrics import Interval
from semi_fast.loop.schedule import ema_weight
from semi_fast.loop.step import NEVER, StepReport, TrainState, TrainStep, make_optimizer
from semi_fast.methods import Environment, make_method, memory_bank
from semi_fast.methods.semi import SeMi
from semi_fast.models.classifier import Classifier
from semi_fast.ops.bank_push import kernel as push_kernel
from semi_fast.ops.bank_push import reference as push_reference
from semi_fast.ops.embedding_align import kernel as align_kernel
from semi_fast.ops.embedding_align import reference as align_reference
from semi_fast.ops.masked_cross_entropy import kernel as entropy_kernel
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.masked_cross_entropy import reference as entropy_reference
from semi_fast.ops.pseudo_label import PseudoLabels, hardness_weight
from semi_fast.ops.pseudo_label import kernel as label_kernel
from semi_fast.ops.pseudo_label import reference as label_reference
from semi_fast.schema.method import FixMatchConfig, MethodConfig, SemiConfig
from semi_fast.schema.model import EmaConfig, OptimConfig

from .conftest import DEVICE
from .test_methods import CONFIGS, batch

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of rows with NaN

CPU = torch.device("cpu")
FIRST_LOST = 2**24 + 1
"""The first whole number that float32 does not have."""

each_implementation = pytest.mark.parametrize("implementation", ["reference", "kernel"])
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def cross_entropy(implementation: str, logits: Tensor, target: Tensor, coefficient: Tensor | None = None) -> Tensor:
    if implementation == "reference":
        return entropy_reference.masked_cross_entropy(logits, target, coefficient, None)
    return entropy_kernel.masked_cross_entropy(logits, target, coefficient, None)[0].sum()


def align(
    implementation: str, weak: Tensor, strong: Tensor, coefficient: Tensor, temperature: float, teacher: float
) -> tuple[Tensor, Tensor]:
    """(loss, target) with no centre."""
    center = torch.zeros(weak.shape[1], device=weak.device)
    if implementation == "reference":
        temperatures = {"temperature": temperature, "teacher_temperature": teacher}
        return align_reference.embedding_align(weak, strong, center, coefficient, **temperatures)
    losses, target, _ = align_kernel.embedding_align(weak, strong, center, coefficient, temperature, teacher)
    return losses.sum(), target


def label(
    implementation: str, logits: Tensor, queries: Tensor, prototypes: Tensor, valid: Tensor, temperature: float = 1.0
) -> PseudoLabels:
    """Both heads give `logits`; the prototypes' vote weighs 0.2, and has the temperature."""
    classes, exact = logits.shape[1], torch.float64 if logits.dtype == torch.float64 else torch.float32
    mixing, none = (torch.full((classes,), x, dtype=exact, device=logits.device) for x in (0.2, 0.0))
    scale = torch.tensor(0.75, dtype=exact, device=logits.device)
    inputs = logits, logits, queries, prototypes, valid, mixing, none, scale
    if implementation == "kernel":
        return PseudoLabels(*label_kernel.pseudo_label(*inputs, 0.7, temperature, True, "or", "mixed", "or"))
    return PseudoLabels(
        *label_reference.pseudo_label(
            *inputs,
            threshold=0.7,
            prototype_temperature=temperature,
            renormalize=True,
            mask_source="or",
            entropy_source="mixed",
            balanced_mask="or",
        )
    )


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def semi(steps: int = 16, **options: object) -> SeMi:
    """Past its warm-up from step 0; an epoch has 2 steps."""
    config = replace(SemiConfig(warmup_epochs=0, bank_slots=4, threshold=0.5), **options)  # type: ignore[arg-type]
    method = make_method(MethodConfig(name="semi", epoch_steps=2, semi=config), steps=steps)
    assert isinstance(method, SeMi)
    return method


# Entropy and logarithms.


@each_implementation
@each_type
def test_entropy_of_certain_rows(dtype: torch.dtype, implementation: str) -> None:
    """p * log p of logits 120, 0, -120, where p is 1, 0, 0 in every type: weight 1 - s, and cross-entropy 0."""
    logits = torch.tensor([[120.0, 0, -120]], dtype=dtype, device=DEVICE).repeat(2, 1)
    nothing = torch.zeros(3, 4, device=DEVICE), torch.zeros(3, dtype=torch.bool, device=DEVICE)
    found = label(implementation, logits, torch.zeros(2, 4, dtype=dtype, device=DEVICE), *nothing)
    torch.testing.assert_close(found.hardness, torch.full_like(found.hardness, 0.25), atol=1e-6, rtol=0)
    leaf = logits.clone().requires_grad_()
    for coefficient in (None, torch.ones(2, device=DEVICE)):
        loss = cross_entropy(implementation, leaf, found.probs, coefficient)
        assert loss.item() == 0
        assert gradient(loss, leaf).abs().max() == 0


def test_the_gradient_of_the_entropy_is_finite_too() -> None:
    logits = torch.tensor([[120.0, 0, -120], [0, 0, 0], [3, 1, -2]], requires_grad=True)
    found = gradient(hardness_weight(torch.softmax(logits, 1), 0.75).sum(), logits)
    assert found[:2].abs().max() < 1e-6, "certain or undecided: level"
    assert found[2].isfinite().all()
    assert found[2].abs().max() > 0.01


def test_log_priors_are_finite_for_the_rarest_class_and_for_an_empty_one() -> None:
    """The sum with 1e-12 is in float64; a class without labeled images is refused where a split is made or read."""
    env = Environment((10**9 - 1, 1, 0), 1, CPU, torch.float32)
    for strength, rare in ((1.0, 1e-9), (2.0, 1e-18)):
        found = env.log_prior(strength)
        assert found.dtype == torch.float32
        expected = [math.log(rare + 1e-12), math.log(1e-12)]
        assert found[1:].tolist() == pytest.approx(expected, rel=1e-6)
    assert env.log_prior(0.0).eq(0).all()


# Temperatures.


@each_implementation
@each_type
@pytest.mark.parametrize("temperature", [0.05, 0.07])
@pytest.mark.parametrize("size", [1.0, 8000.0])
def test_small_temperatures_and_large_values(
    size: float, temperature: float, dtype: torch.dtype, implementation: str
) -> None:
    """Vectors of length 1 and of 8000, whose exponents overflow every type: as in float64."""
    torch.manual_seed(0)
    weak, strong, logits = (torch.randn(6, 12, device=DEVICE) for _ in range(3))
    weak, strong, logits = ((size * nn.functional.normalize(x, dim=1)).to(dtype) for x in (weak, strong, logits))
    prototypes = strong.float().roll(1, 0).repeat(2, 1)
    ones, valid = torch.ones(6, device=DEVICE), torch.ones(12, dtype=torch.bool, device=DEVICE)
    ours, exact = strong.clone().requires_grad_(), strong.double().requires_grad_()
    loss, target = align(implementation, weak, ours, ones, temperature, temperature / 5)
    expected, expected_target = align("reference", weak.double(), exact, ones, temperature, temperature / 5)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(target.double(), expected_target, rtol=5e-5, atol=1e-6)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    found, wanted = gradient(loss, ours), gradient(expected, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-5)

    labels = label(implementation, logits, strong, prototypes, valid, temperature)
    same = label("reference", logits.double(), strong.double(), prototypes.double(), valid, temperature)
    torch.testing.assert_close(labels.probs.double(), same.probs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(labels.hardness.double(), same.hardness, rtol=1e-4, atol=1e-6)
    assert torch.equal(labels.label, same.label)


@each_implementation
@each_type
def test_sharpening_keeps_what_a_power_would_lose(dtype: torch.dtype, implementation: str) -> None:
    """0.02 ** 20 is 0 in float16 and 0.02 ** 40 is 0 in float32; the softmax of log p / T has neither."""
    weak = torch.full((2, 50), math.log(0.02), device=DEVICE).to(dtype)
    for teacher in (1 / 20, 1 / 40):
        _, target = align(implementation, weak, weak, torch.ones(2, device=DEVICE), 0.09, teacher)
        torch.testing.assert_close(target, torch.full_like(target, 0.02), rtol=1e-5, atol=0)


# Masks, and what is not finite.


@each_implementation
@pytest.mark.parametrize("loss", ["cross_entropy", "align"])
def test_an_empty_mask_gives_zero_forward_and_backward(loss: str, implementation: str) -> None:
    """Also of rows that are not finite: selected, not multiplied."""
    leaf = torch.full((6, 5), torch.nan, device=DEVICE, requires_grad=True)
    none, weak = torch.zeros(3, device=DEVICE), torch.zeros(3, 5, device=DEVICE)
    if loss == "align":
        value, _ = align(implementation, weak, leaf, none, 0.09, 0.018)
    else:
        value = cross_entropy(implementation, leaf, torch.zeros(3, dtype=torch.int64, device=DEVICE), none)
    assert value.item() == 0
    assert gradient(value, leaf).eq(0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_at_all_give_zero(weighted: bool) -> None:
    leaf = torch.zeros(0, 5, requires_grad=True)
    value = masked_cross_entropy(leaf, torch.zeros(0, dtype=torch.int64), torch.zeros(0) if weighted else None)
    assert value.item() == 0


@pytest.mark.parametrize("name", ["fixmatch", "fixmatch+la", "semi"])
def test_a_batch_without_a_confident_row_teaches_exactly_nothing(name: str) -> None:
    method = make_method(CONFIGS[name], steps=10)
    state = method.init(Environment((5, 5, 5, 5), 8, CPU, torch.float32))
    rows, outputs = batch(method)
    flat = outputs._replace(logits={head: z.detach().mul(0).requires_grad_() for head, z in outputs.logits.items()})
    loss = method.loss(state, rows, flat, torch.tensor(6))
    assert not loss.pending["mask"].any()
    assert loss.terms["unlabeled"].item() == 0
    assert gradient(loss.terms["unlabeled"], flat.logits["head"]).eq(0).all()
    method.update(state, loss.pending | loss.totals, torch.tensor(7))
    assert all(tensor.isfinite().all() for tensor in state.values())


LAYOUT = RowLayout(4, 3, 2)
ROWS = Rows(
    images=torch.zeros(7, 1, 1, 3, dtype=torch.uint8),
    ids=torch.arange(7),
    visits=torch.zeros(7, dtype=torch.int64),
    labels=torch.tensor([0, 1, 2, 0]),
    layout=LAYOUT,
)
METHODS = {
    "fixmatch": MethodConfig(name="fixmatch", fixmatch=FixMatchConfig(threshold=0.34)),
    "semi": MethodConfig(name="semi", epoch_steps=2, semi=SemiConfig(threshold=0.34, warmup_epochs=0, bank_slots=4)),
}


def step_of(options: MethodConfig, views: Callable[[], Tensor], *, precision: str, norm: bool = False) -> TrainStep:
    """A step of a linear network, with a normalisation before it or not, in a run of that precision."""
    torch.manual_seed(0)
    method = make_method(options, steps=9)
    backbone = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6)) if norm else nn.Linear(5, 6)
    model = Classifier(backbone, 6, 3, method.needs.heads)
    optim = OptimConfig(steps=9)
    state = TrainState(
        model=model,
        average=WeightAverage(model),
        optimizer=make_optimizer(model, optim, CPU),
        scaler=torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        method=method.init(Environment((3, 2, 1), 6, CPU, torch.float32)),
        step=torch.zeros((), dtype=torch.int64),
        bad_step=torch.full((), NEVER),
    )
    return TrainStep(state, method, lambda rows: views(), optim=optim, ema=EmaConfig(), precision=precision)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("output", ["features", "head"])
@pytest.mark.parametrize("name", METHODS)
def test_a_weak_row_that_is_not_finite_is_noticed_and_not_only_rejected(name: str, output: str, value: float) -> None:
    """NaN is above no threshold: the row falls out of the mask, loss and gradients stay finite, and the run goes on."""
    options = METHODS[name]
    if output == "features":  # which the alignment would spread into the loss
        options = replace(options, semi=replace(options.semi, warmup_epochs=2))
    step = step_of(options, lambda: torch.randn(LAYOUT.total, 5), precision="fp32")

    def spoil(model: nn.Module, inputs: tuple[Tensor, ...], outputs: Outputs) -> Outputs:
        bad = torch.zeros(LAYOUT.total, 1, dtype=torch.bool)
        bad[LAYOUT.labeled] = step.state.step == 1
        if output == "features":
            return outputs._replace(features=torch.where(bad, value, outputs.features))
        return outputs._replace(logits=outputs.logits | {"head": torch.where(bad, value, outputs.logits["head"])})

    step.state.model.register_forward_hook(spoil)  # type: ignore[arg-type]
    for t in range(3):
        report = step(ROWS)
        assert report.terms["total"].isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in step.state.model.parameters())
        if t == 1 and output == "head":
            assert not report.pending["mask"][0], "rejected"
    assert step.state.bad_step.item() == 1, "and noticed"


# Prototypes, priors and shares.


def test_an_empty_bank_and_features_of_length_zero() -> None:
    """The root of a distance of 0 has an infinite gradient; none flows through the prototypes."""
    method = semi(pseudo_label_target="soft")
    state = method.init(Environment((3, 2, 1, 1), 8, CPU, torch.float64))
    rows, outputs = batch(method)
    features = outputs.features.detach().mul(0).requires_grad_()
    for filled in (False, True):
        if filled:  # two of four classes
            stored = torch.eye(8, dtype=torch.float64)[:2], torch.tensor([2, 3]), torch.ones(2), torch.ones(2).bool()
            memory_bank.push(state, *stored, torch.tensor(0))
        found = method.loss(state, rows, outputs._replace(features=features), torch.tensor(6))
        assert found.total.isfinite()
        assert all(not x.is_floating_point() or x.isfinite().all() for x in found.pending.values())
        assert gradient(found.total, features).abs().max() < 1


def test_shares_without_a_pseudo_label_stay_uniform() -> None:
    """0 of 0 pseudo-labels is no share; one class with all of them leaves the others 0."""
    method = semi()
    state = method.init(Environment((3, 2, 1), 2, CPU, torch.float32))
    for step in range(4):
        method.count_labels(state, {"label_counts": torch.zeros(3, dtype=torch.int64)}, torch.tensor(step))
    assert torch.equal(state["label_share"], torch.full((3,), 1 / 3))
    method.count_labels(state, {"label_counts": torch.tensor([0, 9, 0])}, torch.tensor(5))
    assert state["label_share"].sum().item() == pytest.approx(1)
    assert method.mixing(state, torch.tensor(16)).tolist()[1] == pytest.approx(0.4)


def test_a_running_prior_that_loses_a_class_stays_finite() -> None:
    """With momentum 0 a class that a batch lacks has prior 0."""
    method = semi(unlabeled_prior="joint", prior_momentum=0.0)
    state = method.init(Environment((3, 2, 1, 1), 8, CPU, torch.float64))
    rows, outputs = batch(method)
    rows = rows._replace(labels=torch.zeros_like(rows.labels))
    for step in range(3):
        found = method.loss(state, rows, outputs, torch.tensor(step))
        assert found.total.isfinite()
        found.totals["label_counts"].zero_()
        method.update(state, found.pending | found.totals, torch.tensor(step))
        assert state["prior"].tolist() == [1, 0, 0, 0]
    adjustment = method.pseudo_label_adjustment(state).tolist()
    assert adjustment == pytest.approx([0] + 3 * [math.log(1e-12)], abs=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_weighs_more_for_its_class(name: str) -> None:
    """No method divides by a class's count: with 10 ** 6 images or 1 a row's gradient is at most 2 over the rows."""
    method = make_method(CONFIGS[name], steps=10)
    state = method.init(Environment((10**6, 1000, 10, 1), 8, CPU, torch.float64))
    rows, outputs = batch(method)
    total = method.loss(state, rows, outputs, torch.tensor(6)).total
    for head in method.needs.heads:
        parts = split_rows(gradient(total, outputs.logits[head]), rows.layout)
        for part in (parts.labeled, parts.strong):
            assert (part.abs().sum(1) <= 2 / max(len(part), 1) * (1 + 1e-9)).all()
        assert parts.labeled.abs().sum() > 0


# Averages, precision and counts.


@each_precision
def test_weights_and_their_average_are_float32_in_every_precision(precision: str) -> None:
    """5,000 updates of an average in float16 or bfloat16 towards 1.01 would leave it at 1."""
    step = step_of(METHODS["semi"], lambda: torch.randn(LAYOUT.total, 5), precision=precision, norm=True)
    s = step.state
    step(ROWS)
    assert {t.dtype for _, t in s.tensors() if t.is_floating_point()} <= {torch.float32, torch.float64}
    assert all(p.dtype == torch.float32 for p in (*s.model.parameters(), *s.average.model.parameters()))
    with torch.no_grad():
        for average, current in zip(s.average.averaged, s.average.current, strict=True):
            average.fill_(1.0)
            current.fill_(1.01)
    for t in range(5000):
        s.average.update(ema_weight(torch.tensor(t), decay=0.999, ramp=False).float())
    for average in s.average.model.parameters():
        expected = torch.full_like(average, 1.01 - 0.01 * 0.999**5000)
        torch.testing.assert_close(average, expected, rtol=0, atol=6e-5)  # each rounding of 6e-8 fades by 0.001 a step


@each_precision
def test_features_and_logits_of_a_forward_are_float32(precision: str) -> None:
    """So the losses, the pseudo-labels and the bank never see half precision; the heads do not compute in it."""
    views = torch.randn(LAYOUT.total, 5)
    step = step_of(METHODS["semi"], lambda: views, precision=precision)
    outputs = step.forward(step.state.model, views)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    assert outputs.features.dtype == torch.float32
    assert half is None or torch.equal(outputs.features, outputs.features.to(half).float()), "the backbone does"
    for logits in outputs.logits.values():
        assert logits.dtype == torch.float32
        assert half is None or not torch.equal(logits, logits.to(half).float())


@each_implementation
@pytest.mark.parametrize("oldest_leaves", [False, True])
def test_insertion_numbers_beyond_float32(oldest_leaves: bool, implementation: str) -> None:
    """Rows FIRST_LOST - 1 and FIRST_LOST would be one number in float32; one of them leaves, and it is known which."""
    bank = {k: t.to(DEVICE) for k, t in memory_bank.empty(1, 2, 1, device=CPU, dtype=torch.float32).items()}
    numbers = torch.tensor([FIRST_LOST, FIRST_LOST - 1])  # were they equal, the first slot would be emptied
    bank["bank.inserted"][0], bank["bank.confidences"][0] = numbers if oldest_leaves else numbers.flip(0), 0.5
    row = torch.ones(1, 1), torch.zeros(1).long(), torch.ones(1), torch.ones(1).bool(), torch.tensor([FIRST_LOST + 1])
    offered = [x.to(DEVICE) for x in row]
    if implementation == "kernel":
        push_kernel.bank_push(*bank.values(), *offered, oldest_leaves)
    else:
        push_reference.bank_push(*bank.values(), *offered, oldest_leaves=oldest_leaves)
    left = FIRST_LOST if oldest_leaves else FIRST_LOST - 1
    assert sorted(bank["bank.inserted"][0].tolist()) == [left, FIRST_LOST + 1]
    assert memory_bank.numbers(torch.tensor(FIRST_LOST), 1).tolist() == [FIRST_LOST]


def test_no_count_is_lost_beyond_float32() -> None:
    """One more than 2 ** 24: of the pseudo-labels' classes, of their fate in a log interval, of an evaluation."""
    method = semi()
    state = method.init(Environment((3, 2, 1), 2, CPU, torch.float32))
    state["label_counts"][1] = FIRST_LOST - 1
    method.count_labels(state, {"label_counts": torch.tensor([0, 1, 0])}, torch.tensor(0))
    assert state["label_counts"].tolist() == [0, FIRST_LOST, 0]

    interval = Interval(torch.tensor([1]), 3)
    for counts in (interval.seen[1, 1:2], interval.used[1, 1:2], interval.rows):
        counts.fill_(FIRST_LOST - 1)
    one = torch.tensor([1])
    pending = {"pseudo_label": one, "mask": one.bool()}
    interval.add(StepReport({"total": torch.tensor(1.0)}, {}, pending), torch.tensor([0]))
    assert (interval.seen[1, 1], interval.used[1, 1]) == (FIRST_LOST, FIRST_LOST)
    assert interval.rows.tolist() == [FIRST_LOST] * 2

    images = torch.zeros(3, 1, 1, 3, dtype=torch.uint8)
    predict = {"head": torch.eye(3)}
    evaluation = Evaluation(
        EvalSet("test", images, torch.arange(3)), lambda _: predict, names=predict, classes=3, batch=3, rank=0
    )
    evaluation.confusions()
    evaluation.counts["head"][0, 0] = FIRST_LOST - 1
    evaluation.at.zero_()
    evaluation.one_batch()
    assert evaluation.counts["head"].diagonal().tolist() == [FIRST_LOST, 2, 2]


# Batch normalisation.


@pytest.mark.parametrize("name", METHODS)
def test_all_rows_of_a_step_are_normalised_together(name: str) -> None:
    """One forward over [labeled | weak | strong]: labeled rows depend on the others in training, not in evaluation."""
    views = torch.randn(LAYOUT.total, 5) + torch.arange(LAYOUT.total).unsqueeze(1)
    others = views.clone()
    others[LAYOUT.labeled :] += 3
    terms, seen = [], []
    for shown in (views, others):
        step = step_of(METHODS[name], lambda shown=shown: shown, precision="fp32", norm=True)
        step.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        terms.append(step(ROWS).terms["supervised"].item())
        assert len(seen) == len(terms)
        assert torch.equal(seen[-1], shown)
        norm = step.state.model.get_submodule("backbone.0")
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.momentum is not None
        torch.testing.assert_close(norm.running_mean, norm.momentum * shown.mean(0))  # from 0
    assert abs(terms[0] - terms[1]) > 0.01
    alone, together = (step.forward(step.state.average.model, x).logits["head"][:4] for x in (views[:4], views))
    torch.testing.assert_close(alone, together)
