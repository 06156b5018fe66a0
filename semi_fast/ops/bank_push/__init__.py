"""Insertion into a bank that keeps the most confident rows of each class."""

from semi_fast.ops.bank_push.reference import bank_push

__all__ = ["bank_push"]
