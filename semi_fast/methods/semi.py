"""SeMi: FixMatch that mines hard examples, with a memory bank, prototypes and a balanced head.

Source: SeMi, ACM MM 2025 (arXiv 2501.06004). Where paper and released code disagree this is the preset `default`;
docs/methods.md maps every option to the paper's symbol.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from semi_fast import memory_bank
from semi_fast.batch import Outputs, Rows, split_rows
from semi_fast.methods.base import Environment, Loss, Needs, State, fraction
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.pseudo_label import pseudo_label
from semi_fast.schema.method import SemiConfig


class SeMi:
    """Two heads on one backbone: `head` learns from mixed pseudo-labels, `balanced_head` from logit-adjusted ones."""

    needs = Needs(strong_views=2, unlabeled=True, heads=("head", "balanced_head"))
    predicts = "balanced_head"

    def __init__(self, options: SemiConfig, *, steps: int, epoch_steps: int):
        self.options = options
        self.steps, self.epoch_steps = steps, epoch_steps  # of the whole run; of an "epoch" of the schedules

    def init(self, env: Environment) -> State:
        classes = env.classes
        bank = memory_bank.empty(classes, self.options.bank_slots, env.features, device=env.device, dtype=env.dtype)
        return bank | {
            "adjustment": env.log_prior(self.options.adjustment),  # [C]
            "label_counts": torch.zeros(classes, dtype=torch.int64, device=env.device),  # [C], since step 0
            "label_share": torch.full((classes,), 1 / classes, dtype=env.dtype, device=env.device),  # w of eq. 8, [C]
            "center": torch.zeros(env.features, dtype=env.dtype, device=env.device),  # q-bar of eq. 6, [D]
        }

    def active(self, step: Tensor) -> Tensor:
        """bool scalar: the warm-up is over."""
        return step >= self.options.warmup_epochs * self.epoch_steps

    def mixing(self, state: State, step: Tensor) -> Tensor:
        """gamma * w of eq. 8, [C]; gamma = alpha * epoch / epochs, 0 during the warm-up."""
        epoch = torch.div(step, self.epoch_steps, rounding_mode="floor")
        gamma = self.options.mixing * epoch * self.epoch_steps / self.steps
        return torch.where(self.active(step), gamma * state["label_share"], 0.0)

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        o, active = self.options, self.active(step)
        labeled, weak, strong = split_rows(outputs.logits["head"], rows.layout)
        balanced_labeled, balanced_weak, balanced_strong = split_rows(outputs.logits["balanced_head"], rows.layout)
        _, features_weak, features_strong = split_rows(outputs.features, rows.layout)
        unlabeled = rows.layout.unlabeled
        dtype = strong.dtype

        found = pseudo_label(
            weak.detach(),
            balanced_weak.detach(),
            features_strong[:unlabeled].detach(),  # strong_0
            *memory_bank.prototypes(state),
            self.mixing(state, step),
            state["adjustment"],
            threshold=o.threshold,
            prototype_temperature=o.prototype_temperature,
            hardness_scale=o.hardness_scale * active.to(dtype),
        )
        alignment, target = embedding_align(
            features_weak,
            features_strong,
            state["center"],
            (active & ~found.mask).to(dtype),
            temperature=o.alignment_temperature,
            teacher_temperature=o.alignment_temperature / o.alignment_sharpening,
        )
        terms = {
            "supervised": cross_entropy(labeled, rows.labels),  # eq. 1
            "unlabeled": masked_cross_entropy(  # eq. 9
                strong, found.label, torch.where(found.mask, found.hardness, 0.0)
            ),
            "balanced_supervised": cross_entropy(balanced_labeled + state["adjustment"], rows.labels),  # eq. 10
            "balanced_unlabeled": masked_cross_entropy(  # eq. 11
                balanced_strong, found.balanced_label, found.balanced_mask.to(dtype)
            ),
            "alignment": o.alignment_weight * alignment,  # eq. 6
        }
        pending = {
            "pseudo_label": found.label,  # [U]
            "mask": found.mask,  # [U]
            "confidence": found.confidence,  # [U]
            "features": features_strong.detach().view(2, unlabeled, -1).transpose(0, 1),  # [U, S, D]
            "target": target,  # [U, D]
        }
        stats = {
            "mask": fraction(found.mask),
            "balanced_mask": fraction(found.balanced_mask),
            "hardness": found.hardness.mean(),
            "bank_fill": fraction(memory_bank.filled(state)),
        }
        return Loss(torch.stack(list(terms.values())).sum(), terms, pending, stats)  # eq. 12

    def update(self, state: State, pending: State, step: Tensor) -> None:
        o, label, mask = self.options, pending["pseudo_label"], pending["mask"]
        classes = torch.arange(len(state["label_counts"]), device=label.device)
        state["label_counts"] += (mask & (label == classes.unsqueeze(1))).sum(1)
        counts = state["label_counts"].to(state["label_share"].dtype)
        epoch_ends = ((step + 1) % self.epoch_steps == 0) & (counts.sum() > 0)
        state["label_share"].copy_(torch.where(epoch_ends, counts / counts.sum().clamp_min(1), state["label_share"]))

        features = pending["features"].transpose(0, 1).flatten(0, 1)  # [S * U, D], strong_0 first
        labels, confidences, offered = (x.repeat(2) for x in (label, pending["confidence"], mask))  # [S * U]
        memory_bank.push(state, features, labels, confidences, offered, step)

        center = o.center_momentum * state["center"] + (1 - o.center_momentum) * pending["target"].mean(0)
        state["center"].copy_(torch.where(self.active(step), center, state["center"]))
        decays = (step + 1) % o.bank_decay_every == 0
        memory_bank.decay(state, torch.where(decays, o.bank_decay, 1.0))

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        return outputs.logits["balanced_head"]
