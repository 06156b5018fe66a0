"""Values that were worked out in float64 from the equations, by hand or with another program."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.nn.functional import cross_entropy

from semi_fast.loop.schedule import cosine_7_16, ema_weight
from semi_fast.methods import memory_bank
from semi_fast.methods.base import Environment
from semi_fast.models import make_classifier
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.pseudo_label import hardness_weight, prototype_probs, pseudo_label
from semi_fast.schema.model import ModelConfig

D = torch.float64


def f64(*values: object) -> Tensor:
    return tensor(values[0] if len(values) == 1 else values, dtype=D)


@pytest.mark.parametrize(("step", "lr"), [(0, 0.03), (125_000, 0.02319031360088), (250_000, 0.00585270966048)])
def test_learning_rate(step: int, lr: float) -> None:
    assert cosine_7_16(tensor(step), base=0.03, steps=250_000).item() == pytest.approx(lr, abs=1e-13)


def test_ema_weight() -> None:
    assert ema_weight(tensor(0), decay=0.999, ramp=False).item() == pytest.approx(0.001)
    assert [ema_weight(tensor(t), decay=0.9, ramp=True).item() for t in (0, 1, 3, 99)] == pytest.approx(
        [1, 0.5, 0.25, 0.1]
    )


def test_hardness_weight() -> None:
    probs = f64([[0.7, 0.2, 0.1], [0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    expected = f64(0.79738502, 0.32639323, 1.0, 0.25000026)
    torch.testing.assert_close(hardness_weight(probs, 0.75), expected, atol=5e-9, rtol=0)


PROTOTYPES, QUERY = f64([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), f64([[0.5, 0.5]])
ALL = tensor([True, True, True])


def test_prototype_probs() -> None:
    found = prototype_probs(QUERY, PROTOTYPES, ALL, 0.5)
    torch.testing.assert_close(found[0], f64(0.45995818, 0.45995818, 0.08008363), atol=5e-9, rtol=0)
    without = prototype_probs(QUERY, PROTOTYPES, tensor([True, True, False]), 0.5)
    torch.testing.assert_close(without[0], f64(0.5, 0.5, 0.0))
    assert prototype_probs(QUERY, PROTOTYPES, ~ALL, 0.5).tolist() == [[0, 0, 0]]


def test_distances_keep_their_digits_for_clustered_prototypes() -> None:
    """Where |q|^2 - 2 qc + |c|^2 in float32 is wrong in the second digit."""
    generator = torch.Generator().manual_seed(0)
    prototypes = 30 + 1e-3 * torch.randn(10, 128, generator=generator, dtype=D)
    queries = 30 + 1e-3 * torch.randn(64, 128, generator=generator, dtype=D)
    prototypes, queries = prototypes.float().double(), queries.float().double()  # the same inputs in both precisions
    valid = torch.ones(10, dtype=torch.bool)
    exact = prototype_probs(queries, prototypes, valid, 1e-3)
    single = prototype_probs(queries.float(), prototypes.float(), valid, 1e-3)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


def mixed(valid: Tensor) -> Tensor:
    """q' of a single row: p = (0.6, 0.3, 0.1), w = (0.5, 0.3, 0.2), gamma = 0.2; read through all three labels."""
    logits = f64([[0.6, 0.3, 0.1]]).log()
    weights = 0.2 * f64(0.5, 0.3, 0.2)
    found = []
    for k in range(3):  # rotate the classes so that each in turn is scaled up to be the label: only `confidence` shows
        order = [k, (k + 1) % 3, (k + 2) % 3]
        z = logits[:, order]
        result = pseudo_label(
            z, z, QUERY, PROTOTYPES[order], valid[order], weights[order], torch.zeros(3, dtype=D),
            tensor(0.75, dtype=D), threshold=0.99, prototype_temperature=0.5,
        )  # fmt: skip
        found.append(result)
    assert {int(order.label) for order in found} == {0, 2, 1}, "class 0 wins wherever it stands"
    return torch.stack([found[0].confidence[0], found[0].hardness[0]])


def test_mixing_by_column_and_normalising_again() -> None:
    q = f64(0.58906091, 0.31121686, 0.09972223)
    torch.testing.assert_close(mixed(ALL), torch.stack([q[0], hardness_weight(q[None], 0.75)[0]]), atol=2e-8, rtol=0)


def test_mixing_leaves_an_invalid_class_its_own_probability() -> None:
    q = f64(0.58882236, 0.31137725, 0.09980040)
    found = mixed(tensor([True, True, False]))
    torch.testing.assert_close(found, torch.stack([q[0], hardness_weight(q[None], 0.75)[0]]), atol=2e-8, rtol=0)


def test_without_a_valid_class_nothing_is_mixed_bit_for_bit() -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    result = pseudo_label(
        logits, logits, torch.zeros(50, 2), PROTOTYPES.float(), ~ALL, torch.full((3,), 0.4), torch.zeros(3),
        tensor(0.0), threshold=0.7, prototype_temperature=0.5,
    )  # fmt: skip
    assert torch.equal(result.confidence, torch.softmax(logits, 1).amax(1))
    assert result.hardness.eq(1).all()


def test_embedding_alignment() -> None:
    strong = f64([[0.3, 0.0, 0.1]]).requires_grad_()
    loss, target = embedding_align(
        f64([[0.2, 0.1, 0.4]]),
        strong,
        torch.zeros(3, dtype=D),
        torch.ones(1),
        temperature=0.09,
        teacher_temperature=0.018,
    )
    torch.testing.assert_close(target[0], f64(1.495e-5, 6e-8, 0.99998500), atol=1e-8, rtol=0)
    assert loss.item() == pytest.approx(2.35675670, abs=5e-9)
    loss.backward()
    assert strong.grad is not None
    torch.testing.assert_close(strong.grad[0], f64(9.71198695, 0.34647064, -10.05845759), atol=5e-9, rtol=0)


def test_logit_adjustment() -> None:
    env = Environment(labeled_counts=(7, 2, 1), features=1, device=torch.device("cpu"), dtype=D)
    logits, adjustment = f64([[1.0, 0.0, -1.0]]), env.log_prior(2.0)
    assert cross_entropy(logits + adjustment, tensor([2])).item() == pytest.approx(5.92408700, abs=5e-9)
    balanced = torch.softmax(logits - adjustment, 1)[0]
    torch.testing.assert_close(balanced, f64(0.08238622, 0.37127541, 0.54633837), atol=5e-9, rtol=0)


def test_bank_of_two_slots() -> None:
    bank = memory_bank.empty(1, 2, 1, device=torch.device("cpu"), dtype=D)
    after = [[0.8], [0.9, 0.8], [0.9, 0.9], [0.9, 0.9], [0.95, 0.9]]
    for number, (confidence, expected) in enumerate(zip((0.8, 0.9, 0.9, 0.85, 0.95), after, strict=True)):
        row = f64([[float(number)]])
        memory_bank.push(bank, row, tensor([0]), f64([confidence]), tensor([True]), tensor(number))
        stored = sorted(bank["bank.confidences"][0].tolist(), reverse=True)
        assert [c for c in stored if c] == expected
    assert sorted(bank["bank.features"][0, :, 0].tolist()) == [1.0, 4.0], "of the two at 0.9 the first one stayed"
    memory_bank.decay(bank, f64(0.99))
    assert sorted(bank["bank.confidences"][0].tolist()) == pytest.approx([0.891, 0.9405])


def test_network_of_the_lineage() -> None:
    model = make_classifier(ModelConfig(), 10, ("head", "balanced_head"), (32, 32))
    sizes = [p.numel() for p in model.parameters()]
    buffers = 75 - 25  # of the 75 in the lineage 25 count batches, which nothing reads
    assert (sum(sizes), len(sizes), len(list(model.buffers()))) == (1_468_900, 82, buffers)
    assert model.features == 128


def test_the_quirk_leaves_two_normalisations_without_gradient() -> None:
    def silent(quirk: bool) -> int:
        model = make_classifier(ModelConfig(name="wrn_10_1", wrn_quirk=quirk), 3, ("head",), (16, 16))
        model(torch.randn(4, 3, 16, 16)).logits["head"].square().sum().backward()
        return sum(p.grad is None for p in model.parameters())

    assert (silent(True), silent(False)) == (4, 0)  # weight and bias of two layers


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    model = make_classifier(ModelConfig(), 10, ("head",), (32, 32))
    conv = model.backbone.units[11].conv2.weight  # type: ignore[union-attr, index]
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)  # Kaiming-normal over fan-out
    head = model.heads["head"]
    assert head.bias.abs().sum().item() == 0  # type: ignore[union-attr]
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 138), rel=0.1)  # type: ignore[union-attr]
