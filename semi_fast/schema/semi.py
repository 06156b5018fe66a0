"""Options of SeMi: what a preset, a published command or a published ablation sets; the presets as values of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SemiConfig:
    """SeMi. The defaults are the preset `default`; docs/methods.md has the reasons, symbols and sources."""

    preset: Literal["default", "paper"] = "default"
    """Fills in the keys below that are not given: default; or paper, to the letter."""

    threshold: float = 0.7
    """Confidence from which a pseudo-label counts (tau)."""
    pseudo_label_target: Literal["hard", "soft"] = "hard"
    """Whether the standard head learns the most probable class or the mixed distribution (q')."""
    mask_source: Literal["or", "linear"] = "or"
    """Which confidence must reach the threshold: of the head (linear), or this or that after mixing."""
    strong_views: int = 2
    """Strong views per unlabeled image; the paper's equations write 1, the code has 2."""

    hardness_scale: float = 0.75
    """Span of the entropy weight (s); weights lie in [1 - s, 1]. 0 turns the weights off."""
    entropy_source: Literal["mixed", "linear"] = "mixed"
    """Whose entropy it is: after mixing, or of the head."""

    mixing: float = 0.4
    """Weight of the prototypes' vote at the end of training (alpha). 0 turns label mixing off."""
    mixing_renormalize: bool = True
    """Whether the rows of the mixed distribution are made to sum to 1."""

    prototype_temperature: float = 0.1
    """Of the softmax over distances to prototypes (T_p)."""

    bank_slots: int = 128
    """Slots per class of the memory bank (M)."""
    bank_eviction: Literal["lowest", "oldest"] = "lowest"
    """Who leaves a full class: the lowest confidence, or the oldest."""
    bank_decay: float = 0.99
    """Factor on stored confidences (beta) ..."""
    bank_decay_every: int = 100
    """... every so many steps (n)."""
    bank_sampling: int = 0
    """Stored features that top up the balanced head's batch in each step (num_samples); 0 for none."""

    alignment_weight: float = 0.15
    """Weight of the embedding alignment (lambda_EA). 0 turns it off."""
    alignment_temperature: float = 0.09
    """Temperature of the strong views' features (T_e)."""
    alignment_sharpening: float = 5.0
    """The weak view's temperature is T_e divided by this."""
    center: Literal["target_ema", "none"] = "target_ema"
    """What is taken off the weak features (q-bar): a moving average of targets, or nothing."""
    center_momentum: float = 0.9
    """Of that moving average."""

    balanced_head: bool = True
    """Whether there is a second, logit-adjusted head; without it the standard head is evaluated."""
    adjustment: float = 2.0
    """Factor on the log prior in the balanced head's labeled loss (T_b) ..."""
    pseudo_label_adjustment: float = 2.0
    """... and in its pseudo-labels (T_b there)."""
    balanced_target: Literal["adjusted", "mixed"] = "adjusted"
    """Its pseudo-labels: the standard head's adjusted prediction, or those of the standard head."""
    balanced_mask: Literal["or", "own_adjusted"] = "or"
    """Rows it learns: where the adjusted or its own prediction is confident, or its own adjusted one."""
    unlabeled_prior: Literal["labeled", "joint"] = "labeled"
    """Prior of the pseudo-labels: that of the labeled images, or a running one over labels and pseudo-labels."""
    prior_momentum: float = 0.999
    """Of the running prior."""

    warmup_epochs: int = 20
    """Epochs (of `method.epoch_steps`) before mixing, entropy weights and alignment begin."""
    warmup_balanced: bool = True
    """Whether the balanced head learns during the warm-up."""


@dataclass(frozen=True)
class ReleasedSemiConfig:
    """SeMi as its released code computes it, for ablation; see docs/methods.md."""

    threshold: float = 0.7
    """As in SeMi, and so are all of these; of the published commands, where the code's own default is 0.95."""
    mixing: float = 0.4
    """Of the published commands, where the code's own default is 0. It rises with epoch / method.epoch_steps."""
    hardness_scale: float = 0.75
    bank_slots: int = 128
    bank_decay_every: int = 50
    """Counted anew in every epoch."""
    alignment_weight: float = 0.15
    alignment_temperature: float = 0.1
    """Of the code; 0.09 in the published commands."""
    warmup_epochs: int = 6


# What each preset changes. `paper`: the text to the letter, where it is well defined.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "pseudo_label_target": "soft",
        "mask_source": "linear",
        "strong_views": 1,
        "entropy_source": "linear",
        "mixing_renormalize": False,
        "alignment_weight": 1.0,
        "center": "none",
        "balanced_target": "mixed",
        "balanced_mask": "own_adjusted",
        "unlabeled_prior": "joint",
        "warmup_balanced": False,
    },
}
# What no preset, published command or ablation sets. Source: the released code; the paper is silent on all of them.
CONSTANTS = {
    "temperature": "1",
    "head_adjustment": "0",
    "mixing_index": "column",
    "class_weight_norm": "sum",
    "class_weight_temperature": "without effect",
    "class_weight_update": "epoch_cumulative",
    "class_weight_momentum": "without effect",
    "prototype_normalize": "false",
    "prototype_query": "strong_0",
    "prototype_min_filled": "1",
    "bank_views": "strong",
}
RELEASED = {
    "mixing_ramp": "epoch",
    "class_weight_start": "uniform",
    "prototype_mean": "filled",
    "bank_decay_scope": "all",
    "bank_decay_clock": "global",
    "prior_counts": "exact",
    "double_adjustment": "false",
    "feature_order": "correct",
}
"""The same, and the released code has another value."""
OFFICIAL = "the released code is --method.name=released_semi, with keys such as --method.released_semi.threshold"
"""Where what was `official` is now."""
REMOVED = {
    f"method.semi.{key}": f"is an option no more, it is always {value}: " + (OFFICIAL if key in RELEASED else "drop it")
    for key, value in (CONSTANTS | RELEASED).items()
}
"""Key of an earlier version -> what became of it."""


def rules(
    name: str, options: SemiConfig | ReleasedSemiConfig, *, unlabeled_ratio: int, epoch_steps: int, steps: int
) -> Iterator[tuple[bool, str]]:
    """(holds, message) of what must hold between the options in a run of the method `name`, each within its range."""
    yield (
        options.warmup_epochs * epoch_steps < steps,
        f"method.{name}.warmup_epochs * method.epoch_steps must be below optim.steps; got "
        f"{options.warmup_epochs} * {epoch_steps} and {steps}",
    )
    if isinstance(options, SemiConfig):
        yield (
            options.balanced_head or not options.bank_sampling,
            "method.semi.bank_sampling tops up the balanced head's batch; set method.semi.balanced_head, or 0",
        )
        return
    highest = options.mixing * ((steps - 1) // epoch_steps) / epoch_steps
    yield (
        highest <= 1,
        "method.name released_semi must not raise mixing above 1, as a share of it is mixed; "
        f"got {highest:g} at the end: use a larger method.epoch_steps",
    )
    yield (
        unlabeled_ratio == 1,
        f"method.name released_semi needs batch.unlabeled_ratio 1, as its code does; got {unlabeled_ratio}",
    )
