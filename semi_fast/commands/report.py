"""Write one page over one or several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from semi_fast.commands import PATH
from semi_fast.report import write_report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=PATH, metavar="RUN")
    parser.add_argument(
        "--out", type=PATH, metavar="FILE", help="default: report.html in the run, or in the folder of the first"
    )


def run(*, runs: Sequence[str], out: str | None = None) -> None:
    paths = [Path(one) for one in runs]
    default = (paths[0] if len(paths) == 1 else paths[0].parent) / "report.html"
    print(write_report(paths, Path(out or default)))
