"""Alignment of the features of strong views with a sharpened, centred distribution from the weak view."""

from semi_fast.ops.embedding_align.reference import embedding_align

__all__ = ["embedding_align"]
