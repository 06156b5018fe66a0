"""Train as a configuration says (all its keys: semi-fast train --help)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from semi_fast.schema.arguments import parse_config


def arguments(parser: argparse.ArgumentParser) -> None:
    """None: all are keys of the configuration, which `run` reads."""


def run(*, words: Sequence[str]) -> int:
    config = parse_config(words)
    from semi_fast.rundir.directory import check_usable

    check_usable(config)
    from semi_fast.train import guarded  # which takes seconds to load

    return guarded(config)
