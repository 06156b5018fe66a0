"""The keys under `split.`: which training images are labeled, which are unlabeled, which are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

from semi_fast.schema import ranges

Shape = Literal["consistent", "uniform", "reversed"]


@dataclass(frozen=True)
class SplitConfig:
    """How a long-tailed split is cut; K classes, class 0 is the head (`semi_fast.data_prep.long_tail` says how)."""

    file: str | None = None
    """A name under DATA/splits, or the path of a split file; then no other key is used."""
    labeled_max: int | None = None
    """Labeled images of the first class (N_1); by default every training row that is not held out."""
    unlabeled_max: int | None = None
    """Unlabeled images of the largest class (M_1), labeled copies apart; by default what remains; 0: none of train."""
    imbalance_labeled: float = 1.0
    """Labeled images of the first class over those of the last (gamma_l), at least 1."""
    imbalance_unlabeled: float = 1.0
    """Unlabeled images of the largest class over those of the smallest (gamma_u), at least 1."""
    unlabeled_shape: Shape = "consistent"
    """Unlabeled counts fall with the class id (consistent), rise with it (reversed), or are all M_1 (uniform)."""
    rule: Literal["semi", "daso", "cossl", "usb"] = "semi"
    """Whose protocol: the order within a class, and whether labeled images are unlabeled ones too."""
    validation_per_class: int = 0
    """Rows of each class held out of both sets, for the choice of a checkpoint."""
    seed: int = 0
    """Key of the shuffle within each class, where the rule shuffles."""
    labeled_fraction: float | None = None
    """Labeled share of the images of every class that are not held out, rounded half to even (ImageNet-127: 0.1);
    instead of labeled_max."""


@dataclass(frozen=True)
class Rule:
    """What a published protocol does within a class."""

    shuffle: Literal["never", "unless seed is 0", "always"]
    labeled_in_unlabeled: bool
    """Whether the unlabeled set begins, class by class, with the labeled images."""


# The protocols by their properties; the random streams are ours, so index lists made by their code do not carry over.
# semi   first N_k in file order; no seed (SeMi, ACR).
# cossl  the same, but each class is shuffled when the seed is not 0 (CoSSL; there with numpy's global generator).
# daso   the labeled images leave the unlabeled set; each class shuffled by the seed (DASO, which also always holds
#        validation images out: here `validation_per_class` says so for every rule).
# usb    as daso (USB draws its permutations from the global generator and holds nothing out). At one seed daso and usb
#        choose the same images here; both names exist so that a run says whose protocol it follows.
RULES = {
    "semi": Rule(shuffle="never", labeled_in_unlabeled=True),
    "cossl": Rule(shuffle="unless seed is 0", labeled_in_unlabeled=True),
    "daso": Rule(shuffle="always", labeled_in_unlabeled=False),
    "usb": Rule(shuffle="always", labeled_in_unlabeled=False),
}


def rules(split: SplitConfig) -> Iterator[tuple[bool, str]]:
    """(holds, message) of everything that must hold in a split; a key without effect beside the others is refused.

    Splits that differ in such a key alone would hold the same rows under two digests.
    """
    s = split
    beside = [field.name for field in fields(s) if getattr(s, field.name) != field.default and field.name != "file"]
    yield (
        s.file is None or not beside,
        f"split.file={s.file} is the whole split, so that split.{', split.'.join(beside)} would change nothing: "
        f"leave out one or the other",
    )
    yield s.rule in RULES, f"split.rule must be one of {', '.join(RULES)}; got {s.rule!r}"
    yield (
        s.unlabeled_shape in get_args(Shape),
        f"split.unlabeled_shape must be one of {', '.join(get_args(Shape))}; got {s.unlabeled_shape!r}",
    )
    yield from ranges.rules({f"split.{key}": value for key, value in vars(s).items()})
    yield (
        s.labeled_fraction is None or s.labeled_max is None,
        f"split.labeled_fraction and split.labeled_max both say how many images are labeled; got {s.labeled_fraction} "
        f"and {s.labeled_max}: set one of them to null",
    )
    for key, maximum in (("imbalance_labeled", "labeled_max"), ("imbalance_unlabeled", "unlabeled_max")):
        yield (
            getattr(s, key) == 1 or getattr(s, maximum) is not None,
            f"split.{key}={getattr(s, key)} needs split.{maximum}, the largest class's count; got null",
        )
    yield (
        s.unlabeled_shape == "consistent" or s.unlabeled_max is not None,
        f"split.unlabeled_shape={s.unlabeled_shape} needs split.unlabeled_max; got null",
    )
    yield (
        s.seed == 0 or RULES[s.rule].shuffle != "never",
        f"split.seed shuffles where the rule does; got {s.seed} with split.rule={s.rule}, which takes images in "
        "file order: leave split.seed out, or use rule cossl, daso or usb",
    )
    yield (
        s.imbalance_unlabeled == 1 or s.unlabeled_shape != "uniform",
        f"split.unlabeled_shape=uniform gives every class as many; got split.imbalance_unlabeled "
        f"{s.imbalance_unlabeled}: leave one of them out",
    )
    yield (
        s.unlabeled_shape != "reversed" or s.imbalance_unlabeled != 1,
        "split.unlabeled_shape=reversed needs split.imbalance_unlabeled above 1; got 1: every class has as many then",
    )
    yield (
        s.unlabeled_max != 0 or (s.imbalance_unlabeled, s.unlabeled_shape) == (1, "consistent"),
        "split.unlabeled_max=0 leaves nothing that split.imbalance_unlabeled and split.unlabeled_shape could shape; "
        f"got {s.imbalance_unlabeled} and {s.unlabeled_shape}: leave them out",
    )
