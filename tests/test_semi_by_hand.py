"""SeMi step by step against a plain rendering of its equations: loops over rows and lists, in float64."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from semi_fast.batch import RowLayout
from semi_fast.methods.released_semi import ReleasedSeMi
from semi_fast.schema.semi import PRESETS, ReleasedSemiConfig, SemiConfig

from .test_semi import COUNTS, FIRST_VISIT, TINY, Environment, batch, method_of

C, EPOCH, STEPS = len(COUNTS), 3, 16
CASES = {
    "default": TINY,
    "paper": replace(TINY, **PRESETS["paper"], prior_momentum=0.8),
    "oldest": replace(
        TINY,
        entropy_source="linear",
        bank_eviction="oldest",
        pseudo_label_target="soft",
        balanced_target="mixed",
        balanced_mask="own_adjusted",
    ),
    "released": ReleasedSemiConfig(threshold=0.5, bank_slots=6, bank_decay_every=2, warmup_epochs=1),
}


def entropy(p: list[float], base: int) -> float:
    return -sum(min(max(x, 1e-8), 1 - 1e-8) * math.log(min(max(x, 1e-8), 1 - 1e-8)) for x in p) / math.log(base)


def cross(target: int | list[float], logits: Tensor) -> float:
    log_probs = torch.log_softmax(logits, 0).tolist()
    return (
        -log_probs[target] if isinstance(target, int) else -sum(t * x for t, x in zip(target, log_probs, strict=True))
    )


class ByHand:
    """The state and one step, row by row."""

    def __init__(self, o: SemiConfig, width: int):
        self.o = o
        self.labeled_prior = [n / sum(COUNTS) for n in COUNTS]
        self.prior = list(self.labeled_prior)
        self.bank: list[list[tuple[float, int, Tensor]]] = [[] for _ in range(C)]
        self.counts = [0] * C
        self.share = [1 / C] * C
        self.epochs = STEPS / EPOCH
        self.center = torch.zeros(width, dtype=torch.float64)

    def log_prior(self, prior: list[float], strength: float) -> Tensor:
        values = [math.log(p**strength + 1e-12) if strength else 0.0 for p in prior]
        return torch.tensor(values, dtype=torch.float64)

    def vote(self, query: Tensor) -> tuple[list[float], list[bool]]:
        o, scores, valid = self.o, [], []
        for rows in self.bank:
            mean = sum((feature for _, _, feature in rows), torch.zeros_like(query)) / max(len(rows), 1)
            valid.append(bool(rows))
            scores.append(math.exp(-(query - mean).norm().item() / o.prototype_temperature) if valid[-1] else 0.0)
        return [s / sum(scores) if sum(scores) else 0.0 for s in scores], valid

    def mixed(self, p: list[float], query: Tensor, step: int) -> list[float]:
        o, epoch = self.o, step // EPOCH
        if epoch < o.warmup_epochs:
            return p
        vote, valid = self.vote(query)
        g = [o.mixing * epoch / self.epochs * x if v else 0.0 for x, v in zip(self.share, valid, strict=True)]
        q = [(1 - a) * x + a * v for a, x, v in zip(g, p, vote, strict=True)]
        return [x / sum(q) for x in q] if o.mixing_renormalize and any(g) else q

    def step(
        self, step: int, labels: list[int], features: Tensor, z: Tensor, zt: Tensor, layout: RowLayout
    ) -> dict[str, float]:
        o, b, u = self.o, layout.labeled, layout.unlabeled
        active, views = step // EPOCH >= o.warmup_epochs, layout.strong_views
        strong = [[b + u + v * u + j for v in range(views)] for j in range(u)]
        adjusting = self.prior if o.unlabeled_prior == "joint" else self.labeled_prior
        terms = dict.fromkeys(("unlabeled", "balanced_unlabeled", "alignment"), 0.0)
        terms["supervised"] = sum(cross(labels[i], z[i]) for i in range(b)) / b
        with_prior = zt[:b] + self.log_prior(self.labeled_prior, o.adjustment)
        terms["balanced_supervised"] = sum(cross(labels[i], with_prior[i]) for i in range(b)) / b
        offers, kept_labels, targets = [], [], []
        for j in range(u):
            weak, tau = b + j, o.threshold
            p = torch.softmax(z[weak], 0).tolist()
            q = self.mixed(p, features[strong[j][0]], step)
            label, confidence = q.index(max(q)), max(q)
            kept = max(p) >= tau or (o.mask_source == "or" and confidence >= tau)
            weight = 1 - o.hardness_scale + o.hardness_scale * entropy(q if o.entropy_source == "mixed" else p, C)
            weight = weight if active else 1.0
            learn = q if o.pseudo_label_target == "soft" and active else label
            shift = self.log_prior(adjusting, o.pseudo_label_adjustment)
            pb = torch.softmax(z[weak] - shift, 0).tolist()
            own = torch.softmax(zt[weak], 0).max().item()
            own_adjusted = torch.softmax(zt[weak] - shift, 0).max().item()
            balanced = max(pb) >= tau or own >= tau if o.balanced_mask == "or" else own_adjusted >= tau
            balanced_learn = learn if o.balanced_target == "mixed" else pb.index(max(pb))
            t = torch.softmax((features[weak] - self.center) / (o.alignment_temperature / o.alignment_sharpening), 0)
            targets.append(t)
            for row in strong[j]:
                if kept:
                    terms["unlabeled"] += weight * cross(learn, z[row]) / (views * u)
                elif active:
                    aligned = cross(t.tolist(), features[row] / o.alignment_temperature)
                    terms["alignment"] += o.alignment_weight * aligned / (views * u)
                if balanced:
                    terms["balanced_unlabeled"] += cross(balanced_learn, zt[row]) / (views * u)
            if kept:
                kept_labels.append(label)
            offers.append((label, confidence, kept))
        if not (active or o.warmup_balanced):
            terms |= {"balanced_supervised": 0.0, "balanced_unlabeled": 0.0}
        self.update(step, labels, features, offers, kept_labels, targets, layout)
        return terms

    def update(self, step, labels, features, offers, kept_labels, targets, layout) -> None:  # type: ignore[no-untyped-def]
        o, b, u = self.o, layout.labeled, layout.unlabeled
        now = [kept_labels.count(k) for k in range(C)]
        self.counts = [x + y for x, y in zip(self.counts, now, strict=True)]
        if (step + 1) % EPOCH == 0 and sum(self.counts):
            self.share = [n / sum(self.counts) for n in self.counts]
        rows = list(range(b + u, len(features)))
        for r, row in enumerate(rows):
            label, confidence, kept = offers[r % u]
            self.push(label, (confidence, step * len(rows) + r, features[row]), kept)
        self.decay(step)
        if o.center != "none" and step // EPOCH >= o.warmup_epochs:
            mean = torch.stack(targets).mean(0)
            self.center = o.center_momentum * self.center + (1 - o.center_momentum) * mean
        seen = [labels.count(k) + kept_labels.count(k) for k in range(C)]
        m = o.prior_momentum
        self.prior = [m * p + (1 - m) * n / sum(seen) for p, n in zip(self.prior, seen, strict=True)]

    def push(self, label: int, row: tuple[float, int, Tensor], kept: bool) -> None:
        slots = self.bank[label]
        if not kept:
            return
        if len(slots) == self.o.bank_slots:
            if self.o.bank_eviction == "oldest":
                slots.remove(min(slots, key=lambda x: x[1]))
            else:
                victim = min(slots, key=lambda x: (x[0], -x[1]))
                if not row[0] > victim[0]:
                    return
                slots.remove(victim)
        slots.append(row)

    def decay(self, step: int) -> None:
        if (step + 1) % self.o.bank_decay_every == 0:
            self.bank = [[(c * self.o.bank_decay, n, f) for c, n, f in rows] for rows in self.bank]


class ReleasedByHand(ByHand):
    """As the released code has it: every slot shows something, and often not what its confidence is of."""

    def __init__(self, o: ReleasedSemiConfig, width: int):
        super().__init__(SemiConfig(**asdict(o), mixing_renormalize=False), width)
        self.labeled_prior = [n / sum(FIRST_VISIT) for n in FIRST_VISIT]
        self.share, self.epochs = [1.0] * C, EPOCH
        nothing = (0.0, -1, torch.zeros(width, dtype=torch.float64))
        self.bank = [[nothing] * o.bank_slots for _ in range(C)]
        self.stored: set[int] = set()  # insertion numbers since the last decay

    def step(
        self, step: int, labels: list[int], features: Tensor, z: Tensor, zt: Tensor, layout: RowLayout
    ) -> dict[str, float]:
        order = [4 * a + b for b in range(4) for a in range(layout.labeled)]
        return super().step(step, labels, features[order], z, zt, layout)

    def push(self, label: int, row: tuple[float, int, Tensor], kept: bool) -> None:
        slots = self.bank[label]
        if kept and row[0] > slots[-1][0]:
            numbered, shown = [*(s[:2] for s in slots[:-1]), row[:2]], [*(s[2] for s in slots[1:]), row[2]]
            self.bank[label] = in_order([(c, n, f) for (c, n), f in zip(numbered, shown, strict=True)])
            self.stored.add(row[1])

    def decay(self, step: int) -> None:
        if (step % EPOCH + 1) % self.o.bank_decay_every == 0:
            beta = self.o.bank_decay
            lowered = ([(c if n in self.stored else c * beta, n, f) for c, n, f in rows] for rows in self.bank)
            self.bank, self.stored = [in_order(rows) for rows in lowered], set()


def in_order(rows: list[tuple[float, int, Tensor]]) -> list[tuple[float, int, Tensor]]:
    return sorted(rows, key=lambda row: -row[0])


@pytest.mark.parametrize("name", CASES)
def test_every_term_and_the_state_of_every_step(name: str) -> None:
    o = CASES[name]
    released = isinstance(o, ReleasedSemiConfig)
    method = ReleasedSeMi(o, epoch_steps=EPOCH) if released else method_of(o, steps=STEPS)
    width, exact = 128, 1e-6 if released else 1e-9  # one term of the released code ends in float32
    state = method.init(Environment(COUNTS, width, torch.device("cpu"), torch.float64, FIRST_VISIT))
    hand, evicted, highest = ReleasedByHand(o, width) if released else ByHand(o, width), False, {}
    for step in range(STEPS):
        rows, outputs = batch(method, step)
        features = outputs.features.detach().double()
        logits = {head: z.detach().double() for head, z in outputs.logits.items()}
        found = method.loss(state, rows, outputs._replace(features=features, logits=logits), torch.tensor(step))
        method.update(state, found.pending | found.totals, torch.tensor(step))
        terms = hand.step(step, rows.labels.tolist(), features, logits["head"], logits["balanced_head"], rows.layout)
        assert {k: v.item() for k, v in found.terms.items()} == pytest.approx(terms, rel=exact, abs=1e-11), step
        highest = {k: max(v, highest.get(k, 0.0)) for k, v in terms.items()}
        assert state["label_share"].tolist() == pytest.approx(hand.share, abs=1e-12)
        assert state["label_counts"].tolist() == hand.counts
        torch.testing.assert_close(state["center"], hand.center)
        if "prior" in state:
            assert state["prior"].tolist() == pytest.approx(hand.prior, abs=1e-12)
        for k, slots in enumerate(hand.bank):
            evicted |= len(slots) == o.bank_slots
            numbers = state["bank.inserted"][k].tolist()
            if released:
                assert numbers == [n for _, n, _ in slots]
                assert state["bank.confidences"][k].tolist() == pytest.approx([c for c, _, _ in slots], abs=1e-12)
                assert torch.equal(state["bank.features"][k], torch.stack([f for _, _, f in slots]))
                continue
            assert sorted(n for n in numbers if n >= 0) == sorted(n for _, n, _ in slots)
            for confidence, number, feature in slots:
                at = numbers.index(number)
                assert state["bank.confidences"][k, at].item() == pytest.approx(confidence, abs=1e-12)
                assert torch.equal(state["bank.features"][k, at], feature)
    assert evicted, "a class was full"
    assert min(highest.values()) > 0, "every term was at work"
