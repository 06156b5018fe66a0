"""A long-tailed split as a data set of its own: what can be shipped by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from semi_fast.data_prep.formats import RESIDENT, Formats
from semi_fast.data_prep.long_tail import make_split
from semi_fast.data_prep.prepare import hidden_directory, publish
from semi_fast.data_prep.readers.prepared import read_prepared, renumbered
from semi_fast.manifest import Manifest, save_split, seal_split
from semi_fast.schema.split import SplitConfig

SPLIT_NAME = "prepared"


def prepare_subset(
    whole: Callable[[Path, Formats], Manifest], config: SplitConfig, out: Path, formats: Formats
) -> Manifest:
    """Prepare the rows of a split alone, with the split as splits/prepared.json; the whole data set, which `whole`
    prepares at a path in formats, lies beside `out` meanwhile, hidden."""
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with hidden_directory(out) as scratch:
        everything = whole(scratch / "whole", RESIDENT)
        split = seal_split(make_split(everything, SPLIT_NAME, config))
        command = everything.command.removeprefix("semi-fast prepare ").removesuffix(" --out whole")
        manifest = publish(lambda: read_prepared(everything, split), out, command + flags(config), formats)
    save_split(renumbered(split, everything, manifest), manifest.root / "splits" / f"{SPLIT_NAME}.json")
    return manifest


def flags(config: SplitConfig) -> str:
    """The keys that are not the defaults, as flags of the command."""
    given = [(field.name, getattr(config, field.name)) for field in fields(config)]
    return "".join(
        f" --{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f" --{name.replace('_', '-')} {value}"
        for name, value in given
        if value != getattr(SplitConfig(), name)
    )
