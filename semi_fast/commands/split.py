"""Write a hashed split file: labeled, unlabeled and validation samples."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import fields
from inspect import getsource
from pathlib import Path
from typing import Any, get_args, get_type_hints

from semi_fast.commands import PATH, as_help
from semi_fast.commands.inspect import class_rows, print_split, print_table
from semi_fast.schema.split import SplitConfig

NAME_LIMIT_BYTES = 200


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=PATH, metavar="DATA")
    parser.add_argument("--name", required=True, help="the file is DATA/splits/NAME.json")
    add_split_flags(parser)


def add_split_flags(parser: Any) -> None:
    """The keys of a split as flags, all but `file`, which names one that is there; their help stands below them."""
    texts = dict(re.findall(r'^    (\w+): [^\n]+\n    """(.+?)"""', getsource(SplitConfig), re.M | re.S))
    for field in fields(SplitConfig):
        if field.name != "file":
            kind = get_type_hints(SplitConfig)[field.name]
            first, *_ = choices = get_args(kind) or (kind,)
            kinds = {"choices": choices} if isinstance(first, str) else {"type": first, "metavar": "N"}
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, default=field.default, help=as_help(texts[field.name]), **kinds)


def run(*, data: str | Path, name: str, **keys: Any) -> None:
    """Write DATA/splits/NAME.json, never over another split; `keys` are those of a split."""
    from semi_fast.data_prep.long_tail import make_split
    from semi_fast.prepared.manifest import load_manifest, save_split

    if not is_plain(name):
        raise ValueError(
            f"--name must be a plain file name (no /, no leading dot, no control characters); got {name!r}"
        )
    manifest = load_manifest(data)
    path = manifest.root / "splits" / f"{name}.json"
    saved = save_split(make_split(manifest, name, SplitConfig(**keys)), path)
    print_table(("class", "labeled", "unlabeled"), class_rows(manifest, [saved]))
    print_split(saved)
    print(f"train on it with --split.file={shlex.quote(name)}")
    print(path)


def is_plain(name: str) -> bool:
    fits = len(name.encode("utf-8", "surrogateescape")) <= NAME_LIMIT_BYTES
    return fits and bool(name.strip()) and name.isprintable() and name[0] != "." and not {*name} & {*"/\\"}
