"""Train three methods on the bundled digits and compare them, in about a minute on a CPU."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from semi_fast.commands import PATH

METHODS = ("supervised_la", "fixmatch", "semi")
CONFIGS = Path(__file__).parents[1] / "configs" / "digits"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=PATH, metavar="DIR", help="where everything goes; default: a fresh directory under runs/"
    )


def run(*, out: str | None = None) -> None:
    """Prepare the digits, train, compare. Everything is written under `out`.

    Raises ValueError if `out` exists and is not empty; by default it is a fresh directory under runs/.
    """
    from semi_fast import train
    from semi_fast.data_prep.prepare import prepare_digits
    from semi_fast.disk import check_directory, fresh_directory
    from semi_fast.report import write_report
    from semi_fast.report.compare import comparison
    from semi_fast.report.run import read_run
    from semi_fast.schema.arguments import parse_config

    root = fresh_directory(Path("runs") / f"demo_{time.strftime('%Y%m%d-%H%M%S')}") if out is None else Path(out)
    check_directory(root, "--out")
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--out must be new or empty; {root} is not: choose another directory")
    prepare_digits(root / "data")
    runs = []
    for name in METHODS:
        config = parse_config([f"--config={CONFIGS / name}.yaml"])
        run_dir = root / name
        train.run(replace(config, data=replace(config.data, path=str(root / "data")), run_dir=str(run_dir)))
        runs.append(run_dir)
        print()
    page = write_report(runs, root / "report.html")
    print(comparison([read_run(run_dir) for run_dir in runs]).text())
    print("A demonstration on 450 test images: the numbers move by several points from seed to seed.")
    print(f"report: {page}")
