"""SeMi: FixMatch that mines hard examples, with a memory bank, prototypes and a balanced head.

Source: SeMi, ACM MM 2025 (arXiv 2501.06004). docs/methods.md maps every option to the paper's symbol and says where
paper and released code disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.batch import Outputs, Rows, split_rows
from semi_fast.methods import memory_bank
from semi_fast.methods.base import Environment, Loss, Needs, State, class_prior, fraction, log_power
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.pseudo_label import PseudoLabels, pseudo_label
from semi_fast.philox import BANK_SAMPLING, philox
from semi_fast.schema.semi import SemiConfig


class SeMi:
    """Two heads on one backbone: `head` learns from mixed pseudo-labels, `balanced_head` from logit-adjusted ones."""

    def __init__(self, options: SemiConfig, *, steps: int, epoch_steps: int, seed: int):
        self.options, self.seed = options, seed
        self.steps, self.epoch_steps = steps, epoch_steps  # of the whole run; of an "epoch" of the schedules
        heads = ("head", "balanced_head") if options.balanced_head else ("head",)
        self.needs = Needs(strong_views=options.strong_views, unlabeled=True, heads=heads)
        self.predicts = heads[-1]

    def init(self, env: Environment) -> State:
        o, classes = self.options, env.classes
        prior = class_prior(env.labeled_counts, env.device)  # [C]
        bank = memory_bank.empty(classes, o.bank_slots, env.features, device=env.device, dtype=env.dtype)
        state = bank | {
            "adjustment": log_power(prior, o.adjustment).to(env.dtype),
            "label_counts": torch.zeros(classes, dtype=torch.int64, device=env.device),  # [C], since step 0
            "label_share": torch.full((classes,), 1 / classes, dtype=env.dtype, device=env.device),  # m-tilde, [C]
            "center": torch.zeros(env.features, dtype=env.dtype, device=env.device),  # q-bar of eq. 6, [D]
        }
        if o.unlabeled_prior == "joint":
            return state | {"prior": prior}
        return state | {"pseudo_label_adjustment": log_power(prior, o.pseudo_label_adjustment).to(env.dtype)}

    def active(self, step: Tensor) -> Tensor:
        """bool scalar: the warm-up is over."""
        return step >= self.options.warmup_epochs * self.epoch_steps

    def mixing(self, state: State, step: Tensor) -> Tensor:
        """gamma * w of eq. 8, [C]; 0 during the warm-up. The paper leaves w open: shares, as in the released code."""
        o, share = self.options, state["label_share"]
        epoch = torch.div(step, self.epoch_steps, rounding_mode="floor").to(share.dtype)
        return torch.where(self.active(step), o.mixing * (epoch * self.epoch_steps / self.steps) * share, 0.0)

    def pseudo_label_adjustment(self, state: State) -> Tensor:
        """Adjustment of the balanced head's pseudo-labels, [C]."""
        if "prior" not in state:
            return state["pseudo_label_adjustment"]
        return log_power(state["prior"], self.options.pseudo_label_adjustment).to(state["center"].dtype)

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        return self.loss_of(state, rows, outputs, step, memory_bank.prototypes(state))

    def loss_of(
        self, state: State, rows: Rows, outputs: Outputs, step: Tensor, prototypes: tuple[Tensor, Tensor]
    ) -> Loss:
        """The loss with these prototypes [C, D], and bool [C]: classes that have one."""
        o, active = self.options, self.active(step)
        standard = split_rows(outputs.logits["head"], rows.layout)
        balanced = split_rows(outputs.logits[self.predicts], rows.layout)
        features = split_rows(outputs.features, rows.layout)
        dtype = standard.strong.dtype

        found = pseudo_label(
            standard.weak.detach(),
            balanced.weak.detach(),
            features.strong[: rows.layout.unlabeled].detach(),  # strong_0 asks, as in the released code
            *prototypes,
            self.mixing(state, step),
            self.pseudo_label_adjustment(state),
            o.hardness_scale * active.to(dtype),
            threshold=o.threshold,
            prototype_temperature=o.prototype_temperature,
            renormalize=o.mixing_renormalize,
            mask_source=o.mask_source,
            entropy_source=o.entropy_source,
            balanced_mask=o.balanced_mask,
        )
        target = self.target(found, active)
        alignment, aligned_to = embedding_align(
            features.weak,
            features.strong,
            state["center"],
            (active & ~found.mask).to(dtype),
            temperature=o.alignment_temperature,
            teacher_temperature=o.alignment_temperature / o.alignment_sharpening,
        )
        hardness = torch.where(found.mask, found.hardness, 0.0)  # a selection: masked rows add exactly 0
        terms = {
            "supervised": masked_cross_entropy(standard.labeled, rows.labels),  # eq. 1
            "unlabeled": masked_cross_entropy(standard.strong, target, hardness),  # eq. 9
        }
        if o.balanced_head:
            terms |= self.balanced_terms(state, rows, outputs, found, target, step)
        terms["alignment"] = o.alignment_weight * alignment  # eq. 6
        strong = features.strong.detach()
        pending = {
            "pseudo_label": found.label,  # [U]
            "mask": found.mask,  # [U]
            "confidence": found.confidence,  # [U]
            "features": strong.view(-1, *features.weak.shape).transpose(0, 1),  # [U, S, D]
        }
        totals = {"label_counts": found.counts}
        if o.center == "target_ema":
            totals["center"] = aligned_to.sum(0)
        if "prior" in state:
            totals["labeled_counts"] = count(rows.labels, classes=len(found.counts))
        stats = {
            "mask": fraction(found.mask),
            "balanced_mask": fraction(found.adjusted_mask),
            "hardness": found.hardness.mean(),
            "bank_fill": fraction(memory_bank.filled(state)),
        }
        return Loss(torch.stack(list(terms.values())).sum(), terms, pending, stats, totals)  # eq. 12

    def target(self, found: PseudoLabels, active: Tensor) -> Tensor:
        """What the standard head learns: classes [U], or distributions [U, C] once the warm-up is over."""
        if self.options.pseudo_label_target == "hard":
            return found.label
        classes = torch.arange(found.probs.shape[1], device=found.label.device)
        return torch.where(active, found.probs, (found.label.unsqueeze(1) == classes).to(found.probs.dtype))

    def balanced_terms(
        self, state: State, rows: Rows, outputs: Outputs, found: PseudoLabels, target: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        """The balanced head's losses: eq. 10, eq. 11, and that of stored features where they are drawn."""
        o, logits = self.options, split_rows(outputs.logits["balanced_head"], rows.layout)
        if o.balanced_target == "adjusted":
            target = found.adjusted_label
        mask = found.adjusted_mask.to(logits.strong.dtype)
        terms = {
            "balanced_supervised": masked_cross_entropy(logits.labeled, rows.labels, offset=state["adjustment"]),
            "balanced_unlabeled": masked_cross_entropy(logits.strong, target, mask),
        }
        if o.bank_sampling:
            label = found.label if o.balanced_target == "mixed" else found.adjusted_label
            learned = count(rows.labels, classes=len(found.counts))
            learned += count(label, found.adjusted_mask, classes=len(found.counts))
            terms["balanced_bank"] = self.bank_term(state, outputs, learned, step)
        if not o.warmup_balanced:
            terms = {name: torch.where(self.active(step), term, 0.0) for name, term in terms.items()}
        return terms

    def bank_term(self, state: State, outputs: Outputs, learned: Tensor, step: Tensor) -> Tensor:
        """Cross-entropy of stored features that top up the balanced head's batch to an equal share of every class.

        The share is that of the rows `learned` [C] anyway, labeled and unlabeled, and `bank_sampling` together; a class
        below it adds as many of its slots as are missing and filled, drawn without replacement.
        """
        assert outputs.classify is not None
        taken = memory_bank.filled(state)  # [C, M]
        classes, slots = taken.shape
        learned = processes.sum_in_place(learned)
        missing = (learned.sum() + self.options.bank_sampling) // classes - learned  # [C]
        place = torch.arange(classes * slots, device=step.device)
        word = philox(self.seed, (torch.full_like(place, BANK_SAMPLING), step.expand_as(place), place, 0 * place))[0]
        drawn = torch.where(taken, word.view(classes, slots), -1)  # empty slots come last
        rank = drawn.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (taken & (rank < missing.unsqueeze(1))).flatten()
        logits = outputs.classify(state["bank.features"].flatten(0, 1))["balanced_head"]
        coefficient = chosen.to(logits.dtype) * (len(place) / chosen.sum().clamp_min(1))
        return masked_cross_entropy(logits, torch.div(place, slots, rounding_mode="floor"), coefficient)

    def update(self, state: State, pending: State, step: Tensor) -> None:
        o = self.options
        self.count_labels(state, pending, step)
        memory_bank.push(state, *offered(pending), step, oldest_leaves=o.bank_eviction == "oldest")
        beta = state["bank.confidences"].new_full((), o.bank_decay)
        memory_bank.decay(state, torch.where((step + 1) % o.bank_decay_every == 0, beta, 1.0))
        if "center" in pending:
            self.move_center(state, pending, step)
        if "prior" in state:
            seen = (pending["labeled_counts"] + pending["label_counts"]).double()
            state["prior"].lerp_(seen / seen.sum(), 1 - o.prior_momentum)

    def count_labels(self, state: State, pending: State, step: Tensor) -> None:
        """Renew the shares of all pseudo-labels so far, where there are any, after every epoch, as released."""
        share = state["label_share"]
        state["label_counts"] += pending["label_counts"]
        counts = state["label_counts"].to(share.dtype)
        renewed = counts / counts.sum().clamp_min(1)
        renews = ((step + 1) % self.epoch_steps == 0) & (counts.sum() > 0)
        share.copy_(torch.where(renews, renewed, share))

    def move_center(self, state: State, pending: State, step: Tensor) -> None:
        """Towards the mean of this step's targets, once the warm-up is over."""
        momentum = self.options.center_momentum
        center = momentum * state["center"] + (1 - momentum) * pending["center"] / len(pending["mask"])
        state["center"].copy_(torch.where(self.active(step), center, state["center"]))

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        return outputs.logits[self.predicts]


def offered(pending: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the bank is offered, [S * U, D] and [S * U] each, strong_0 first: features, labels, confidences, mask."""
    views = pending["features"].shape[1]
    features = pending["features"].transpose(0, 1).flatten(0, 1)
    label, confidence, mask = (pending[name].repeat(views) for name in ("pseudo_label", "confidence", "mask"))
    return features, label, confidence, mask


def count(labels: Tensor, mask: Tensor | bool = True, *, classes: int) -> Tensor:
    """Labels per class where `mask`: int64 [C]."""
    return (mask & (labels == torch.arange(classes, device=labels.device).unsqueeze(1))).sum(1)
