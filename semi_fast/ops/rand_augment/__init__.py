"""Weak and strong views of uint8 images, exact to the pixel: flip, crop, two operations, cutout, normalise."""

from semi_fast.ops.rand_augment.reference import IDENTITY, OPERATIONS, ViewParameters, apply_operations, rand_augment

__all__ = ["IDENTITY", "OPERATIONS", "ViewParameters", "apply_operations", "rand_augment"]
