"""Train a cell of the paper's tables and print it beside the paper's value."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semi_fast.commands import PATH, add_seeds, check_free, parse_seeds
from semi_fast.disk import check_directory, locked, write_json
from semi_fast.launch import check_environment
from semi_fast.rundir.trackers import check_trackers
from semi_fast.schema.arguments import CONFIG_FILE, key_of, ordered, read_arguments
from semi_fast.schema.config import Config, check, identity, leaves
from semi_fast.sealed_json import read_json

if TYPE_CHECKING:
    from semi_fast.prepared.manifest import Manifest
    from semi_fast.report.compare import Table
    from semi_fast.reproduce.cells import Cell

OWNED = {"seed": "--seeds", "run_dir": "--out", "data.path": "--data", "optim.steps": "--steps"}
EVALUATIONS, APART = 60, 50
"""Of a shortened run, so that the twenty that are averaged are its last third; but no fewer steps apart."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", nargs="?", metavar="CELL", help="table1/semi/cifar10_lt/n500_m4000_g100; see --list")
    parser.add_argument("--list", action="store_true", dest="listed", help="print all cells, and which can be trained")
    parser.add_argument("--print-config", action="store_true", help="print the cell's configuration, to be trained")
    add_seeds(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="shorten the runs; the result says so")
    parser.add_argument(
        "--data", type=PATH, metavar="DATA", help="the prepared data set; default: the cell's data.path"
    )
    parser.add_argument("--out", type=PATH, metavar="DIR", help="where the runs go; default: runs/paper/CELL")
    parser.set_defaults(keys=[])
    parser.epilog = "Further flags are keys of the configuration, --key=value; what they change is said."


def run(
    *,
    cell: str | None,
    listed: bool,
    print_config: bool,
    seeds: str | None,
    steps: int | None,
    data: str | None,
    out: str | None,
    keys: Sequence[str],
) -> None:
    """List the cells, or train one with every seed and print the comparison.

    Seed K goes to OUT/seed_K. A finished run there is taken as it is, an unfinished one is resumed. `keys` are of the
    configuration; whatever they change is said beside the result.
    Raises ValueError for a cell, a key or data that do not fit, for a run in OUT that is another one, and if another
    process reproduces a cell there.
    """
    from semi_fast.data_prep.long_tail import split_for
    from semi_fast.prepared.manifest import seal_split
    from semi_fast.reproduce.cells import find, listing
    from semi_fast.reproduce.configuration import text

    flagged = {"--print-config": print_config, "--seeds": seeds, "--steps": steps, "--data": data, "--out": out}
    given = [*([cell] if cell else []), *(flag for flag, value in flagged.items() if value), *keys]
    if listed:
        if given:
            raise ValueError(f"reproduce --list shows all cells; leave out {' '.join(given)}")
        print(listing())
        return
    if cell is None:
        raise ValueError("reproduce needs a CELL; semi-fast reproduce --list shows them")
    if print_config:
        if given[2:]:
            raise ValueError(
                f"reproduce --print-config prints the cell as published; leave out {' '.join(given[2:])}: seed, data, "
                "steps and other keys are flags of semi-fast train --config FILE"
            )
        print(text(find(cell)), end="")
        return
    files, flags = ordered(keys)
    if files:
        raise ValueError(f"reproduce takes the configuration of its cell; leave out --config {files[0]}")
    numbers, found = parse_seeds(seeds), find(cell)
    check_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"reproduce is one process; semi-fast reproduce {cell} --print-config > FILE, then train each seed with "
            "accelerate launch -m semi_fast.train --config FILE --seed K --run_dir OUT/seed_K, which reproduce "
            "--out OUT collects"
        )
    published, config, short = configured(found, steps=steps, data=data, flags=flags)
    manifest = prepared(found, Path(config.data.path))
    split_sha256 = seal_split(split_for(manifest, "run", config.split)).sha256
    root = Path(out) if out else Path("runs", "paper", cell if steps is None else f"{cell}_{steps}_steps")
    configs = {}
    for seed in numbers:
        run_dir = root / f"seed_{seed}"
        resume = "auto" if run_dir.exists() else "none"
        configs[seed] = replace(config, seed=seed, run_dir=str(run_dir), resume=resume)
    for one in configs.values():
        check(one)
    check_trackers(config.log.track)
    check_directory(root, "--out")
    with locked(root / "reproduce.lock", f"--out {root}"):
        train_and_compare(found, published, config, configs, split_sha256, root, short=short)


def train_and_compare(
    cell: Cell,
    published: Config,
    config: Config,
    configs: dict[int, Config],
    split_sha256: str,
    root: Path,
    *,
    short: dict[str, int],
) -> None:
    """Train what is not finished of `configs`, one for each seed, and compare."""
    from semi_fast import train
    from semi_fast.reproduce.compare import against_paper, verdict

    name, seeds = cell.name, tuple(configs)
    done = {seed: finished(one, split_sha256) for seed, one in configs.items()}
    summaries = []
    for seed, one in configs.items():
        summary = done[seed]
        print(f"{name}, seed {seed}: {one.run_dir}" + ("" if summary is None else " is finished, and taken as it is"))
        summaries.append(train.run(one) if summary is None else summary)
        print()
    result = against_paper(cell, summaries)
    comparable, remarks = verdict(cell, published, config, short=short, runs=len(seeds))
    path = root / "reproduce.json"
    write_json(path, document(cell, result, remarks, summaries, comparable=comparable))
    print(f"{cell.title} ({cell.source}: {name})\n\n{result.text()}")
    print(f"protocol: {protocol(summaries[0])}")
    for line in (*remarks, *(f"caveat: {caveat}" for caveat in cell.caveats)):
        print(line)
    print(f"written: {path}")


def configured(
    cell: Cell, *, steps: int | None, data: str | None, flags: Sequence[str]
) -> tuple[Config, Config, dict[str, int]]:
    """(the cell as published, the cell as asked for, those of its keys that follow from the number of steps)."""
    from semi_fast.reproduce.configuration import resolved

    check_free(flags, OWNED, "reproduce")
    if "resume" in map(key_of, flags):
        raise ValueError("--resume is set by reproduce, which goes on with what is in --out; leave it out")
    where = [] if data is None else [f"--data.path={data}"]
    published = resolved(cell, where)
    config = resolved(cell, [*where, *flags])
    short: dict[str, int] = {}
    if steps is not None:
        whole = config.optim.steps
        if not 1 <= steps <= whole:
            raise ValueError(f"--steps must lie in 1..{whole}, the cell's own; got {steps}")
        given = {key_of(flag) for flag in flags}
        short = {key: value for key, value in shortened(config, steps).items() if key not in given}
        fitted = [f"--{key}={value}" for key, value in short.items()]
        config = resolved(cell, [*where, *fitted, *flags])
    return published, config, short


def shortened(config: Config, steps: int) -> dict[str, int]:
    """What must change for a run of `steps`: schedules keep their share of the run, and evaluations fit into it.

    The number of epochs stays, so that mixing and warm-up cover the same share; with less than a step for each, an
    epoch is one step and the warm-up has fewer. Learning rate and mixing follow from `optim.steps`. Everything else
    stays, the averages of weights and statistics too, whose span is about 1,000 steps.
    """
    if steps == config.optim.steps:
        return {}
    short = {"optim.steps": steps, "eval.every": min(config.eval.every, steps, max(APART, steps // EVALUATIONS))}
    if config.method.name == "semi":
        epochs = config.optim.steps // config.method.epoch_steps
        short["method.epoch_steps"] = max(1, steps // epochs)
        short["method.semi.warmup_epochs"] = config.method.semi.warmup_epochs * min(steps, epochs) // epochs
    return short


def prepared(cell: Cell, root: Path) -> Manifest:
    """The prepared data set of the cell; ValueError with the command that makes it if it is not there."""
    from semi_fast.prepared.manifest import MANIFEST_FILE, load_manifest

    data = cell.data
    if not (root / MANIFEST_FILE).is_file():
        raise ValueError(
            f"{root} holds no prepared data set; make it from RAW, the published archive unpacked: "
            f"{data.prepare} {shlex.quote(str(root))}"
        )
    manifest = load_manifest(root)
    found = manifest.dataset, manifest.num_classes, manifest.resolution
    if found != (data.dataset, data.classes, (data.resolution, data.resolution)):
        raise ValueError(
            f"--data must hold {data.dataset}, {data.classes} classes at {data.resolution}x{data.resolution}; {root} "
            f"holds {found[0]}, {found[1]} classes at {found[2][0]}x{found[2][1]}: name another directory"
        )
    return manifest


def finished(config: Config, split_sha256: str) -> dict[str, Any] | None:
    """The summary of the finished run in `run_dir`, None if none is finished there.

    Raises ValueError if it is a run of another configuration, or on another split or other data.
    """
    run_dir = Path(config.run_dir or "")
    if not (run_dir / "summary.json").is_file():
        return None
    summary = read_json(run_dir / "summary.json")
    if summary.get("status") != "finished":
        return None
    own, _ = read_arguments([f"--config={run_dir / CONFIG_FILE}", f"--run_dir={run_dir}"])  # it may have moved
    mine, its = leaves(identity(config)), leaves(identity(own))
    for key in mine:
        if mine[key] != its[key] and (key, mine[key]) != ("precision", "auto"):
            raise ValueError(
                f"{run_dir} is a finished run of another configuration: {key} is {its[key]} there, {mine[key]} here; "
                "choose another --out"
            )
    if summary["split_sha256"] != split_sha256:
        raise ValueError(f"{run_dir} is a finished run on other data or another split; choose another --out")
    return summary


def protocol(summary: dict[str, Any]) -> str:
    """What was measured, and how, in one line."""
    from semi_fast.reproduce.compare import mean_of

    return (
        f"{summary['protocol']}; {summary['predicts']} of the averaged weights on the test set, "
        f"{mean_of(summary['averaged'])}; ± is the sample standard deviation over seeds"
    )


def document(
    cell: Cell,
    result: Table,
    remarks: Sequence[str],
    summaries: Sequence[dict[str, Any]],
    *,
    comparable: bool,
) -> dict[str, Any]:
    """What `reproduce.json` holds."""
    kept = ("seed", "predicts", "averaged", "top1_last20", "balanced_accuracy_last20", "top1_final", "best", "steps",
            "seconds", "precision", "hardware", "commit", "versions", "split_sha256", "manifest_sha256")  # fmt: skip
    return {
        "cell": cell.name,
        "title": cell.title,
        "paper": {"source": cell.source, "mean": cell.paper.mean, "std": cell.paper.std, "metric": cell.metric},
        "table": [dict(zip((key for key, _, _ in result.columns), row, strict=True)) for row in result.rows],
        "comparable": comparable,
        "remarks": list(remarks),
        "caveats": list(cell.caveats),
        "protocol": protocol(summaries[0]),
        "runs": [{"run_dir": f"seed_{one['seed']}"} | {key: one[key] for key in kept} for one in summaries],
    }
