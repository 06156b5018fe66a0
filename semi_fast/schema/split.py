"""The keys under `split.`: which training images are labeled, which are unlabeled, which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SplitConfig:
    """How a long-tailed split is cut; K classes, class 0 is the head (`semi_fast.data_prep.long_tail` says how)."""

    file: str | None = None
    """A name under DATA/splits, or the path of a split file; then no other key is used."""
    labeled_max: int | None = None
    """Labeled images of the first class (N_1); null: every training row that is not held out."""
    unlabeled_max: int | None = None
    """Unlabeled images of the largest class (M_1), labeled copies apart; null: what remains; 0: none of train."""
    imbalance_labeled: float = 1.0
    """Labeled images of the first class over those of the last (gamma_l), at least 1."""
    imbalance_unlabeled: float = 1.0
    """Unlabeled images of the largest class over those of the smallest (gamma_u), at least 1."""
    unlabeled_shape: Literal["consistent", "uniform", "reversed"] = "consistent"
    """Unlabeled counts fall with the class id (consistent), rise with it (reversed), or are all M_1 (uniform)."""
    rule: Literal["semi", "daso", "cossl", "usb"] = "semi"
    """Order within a class, and whether labeled images are unlabeled ones too; the table is `long_tail.RULES`."""
    validation_per_class: int = 0
    """Rows of each class held out of both sets, for the choice of a checkpoint."""
    seed: int = 0
    """Key of the shuffle within each class, where the rule shuffles."""
    labeled_fraction: float | None = None
    """Labeled share of the images of every class that are not held out, rounded half to even (ImageNet-127: 0.1);
    instead of labeled_max."""
