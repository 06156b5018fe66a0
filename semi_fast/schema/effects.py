"""Which keys change nothing beside the others: given as a flag, such a key is refused, as whoever gives it is misled.

Files may hold them: a file is read, edited and run with another method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from semi_fast.schema.config import Config

Condition = Callable[[Config], bool]
# keys (a section ends with a dot) -> (when they have an effect, in words)
EFFECTS: tuple[tuple[str, Condition, str], ...] = (
    ("method.fixmatch.", lambda c: c.method.name == "fixmatch", "method.name=fixmatch"),
    ("method.la.", lambda c: "la" in c.method.plugins, "method.plugins=[la]"),
    ("method.la.pseudo_label", lambda c: c.method.name != "supervised", "method.name=fixmatch"),
    ("method.semi.", lambda c: c.method.name == "semi", "method.name=semi"),
    ("method.released_semi.", lambda c: c.method.name == "released_semi", "method.name=released_semi"),
    (
        "method.released_semi.alignment_temperature",
        lambda c: c.method.released_semi.alignment_weight > 0,
        "method.released_semi.alignment_weight above 0",
    ),
    ("method.epoch_steps", lambda c: c.method.name in ("semi", "released_semi"), "method.name semi or released_semi"),
    ("batch.unlabeled_ratio", lambda c: c.method.name != "supervised", "a method with unlabeled images"),
    ("augment.cutout augment.operations", lambda c: c.method.name != "supervised", "a method with strong views"),
    ("augment.labeled_padding", lambda c: c.augment.pad != 0, "augment.pad above 0"),
    ("ema.ramp", lambda c: c.ema.decay > 0, "ema.decay above 0"),
    ("model.wrn_quirk", lambda c: c.model.name.startswith("wrn_"), "a model.name that begins with wrn_"),
    ("engine.autotune", lambda c: not c.engine.autotune or c.engine.level != "eager", "engine.level compile or graph"),
    (
        "method.semi.mixing_renormalize method.semi.prototype_temperature",
        lambda c: c.method.semi.mixing > 0,
        "method.semi.mixing above 0",
    ),
    ("method.semi.bank_decay_every", lambda c: c.method.semi.bank_decay < 1, "method.semi.bank_decay below 1"),
    ("method.semi.entropy_source", lambda c: c.method.semi.hardness_scale > 0, "method.semi.hardness_scale above 0"),
    (
        "method.semi.alignment_temperature method.semi.alignment_sharpening method.semi.center "
        "method.semi.center_momentum",
        lambda c: c.method.semi.alignment_weight > 0,
        "method.semi.alignment_weight above 0",
    ),
    ("method.semi.center_momentum", lambda c: c.method.semi.center != "none", "method.semi.center=target_ema"),
    (
        "method.semi.adjustment method.semi.pseudo_label_adjustment method.semi.balanced_target "
        "method.semi.balanced_mask method.semi.warmup_balanced",
        lambda c: c.method.semi.balanced_head,
        "method.semi.balanced_head=true",
    ),
    (
        "method.semi.warmup_balanced",
        lambda c: c.method.semi.warmup_epochs > 0,
        "method.semi.warmup_epochs above 0",
    ),
    (
        "method.semi.prior_momentum",
        lambda c: c.method.semi.unlabeled_prior == "joint",
        "method.semi.unlabeled_prior=joint",
    ),
)


def without_effect(config: Config, keys: Collection[str]) -> dict[str, str]:
    """Of `keys`, those that change nothing in a run of `config`, each with a line that says why."""
    found: dict[str, str] = {}
    for names, has_effect, needed in EFFECTS:
        for name in names.split():
            for key in keys:
                if (key.startswith(name) if name.endswith(".") else key == name) and not has_effect(config):
                    found.setdefault(
                        key, f"{key} has an effect with {needed} alone: leave --{key} out, or set that too"
                    )
    return found
