"""Cross-entropy of strong rows against the targets of their images, with a coefficient per image."""

from semi_fast.ops.masked_cross_entropy.reference import masked_cross_entropy

__all__ = ["masked_cross_entropy"]
