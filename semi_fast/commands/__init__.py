"""The commands of `semi-fast`, a module each, and what the arguments of several share.

A module's first line is the command's help, `arguments` declares its flags, and `run` takes their values and returns
the exit code, or None for 0. What is slow to load is imported where it is used, as help imports all of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from semi_fast.schema.arguments import key_of

SEEDS = "0,1,2"
PATH = os.path.expanduser
"""Type of a path: `~`, which shells leave as it is behind an equals sign."""


def as_help(sentence: str) -> str:
    """Without capital and full stop, on one line."""
    text = " ".join(sentence.split()).removesuffix(".")
    return text[:1].lower() + text[1:]


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", metavar="K,...", help=f"one run each; default {SEEDS}")


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """`0,1,2` as numbers; the default if none are given."""
    words = (SEEDS if text is None else text).split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) != len(words):
        raise ValueError(f"--seeds must be different whole numbers, K,K,...; got {text}")
    return tuple(map(int, words))


def check_free(flags: Sequence[str], owned: dict[str, str], command: str) -> None:
    """Raise ValueError for a key of the configuration that the command sets; `owned` says what to use instead."""
    for key in map(key_of, flags):
        if key in owned:
            raise ValueError(f"--{key} is set by {command}; use {owned[key]}")
