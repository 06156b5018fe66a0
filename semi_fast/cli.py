"""The command line: `semi-fast <command>`; what `train` takes is read by `semi_fast.schema.arguments`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from semi_fast import __version__
from semi_fast.errors import EXPECTED, exit_code, one_line
from semi_fast.schema.arguments import ordered, parse_config
from semi_fast.screen import check_taken, tolerate_closed_pipes

PATH = os.path.expanduser
"""Of an argument: `~`, which shells leave as it is behind an equals sign."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but train, whose flags are the configuration's keys."""
    parser = OneLineParser(prog="semi-fast", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    command("train", "train as a configuration says (all its keys: semi-fast train --help)")
    prepare = command("prepare", "turn raw data into a prepared data set")
    prepare.add_argument("dataset", choices=["cifar10", "cifar100", "stl10", "imagenet127", "folder", "digits"])
    prepare.add_argument(
        "--raw", type=PATH, metavar="DIR", help="the raw data, as published or train/<class>/*, test/<class>/*"
    )
    prepare.add_argument("--out", required=True, type=PATH, metavar="DIR", help="where the prepared data set goes")
    prepare.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the images (not of CIFAR)")

    prepare.add_argument(
        "--formats", default="resident", metavar="F,F", help="of resident, ffcv, dali; default: resident"
    )
    prepare.add_argument(
        "--image-format", choices=["raw", "png", "jpeg"], default="raw", help="in DALI's shards; jpeg loses"
    )
    prepare.add_argument("--quality", type=int, default=95, help="of jpeg, 1..100")
    images = prepare.add_argument_group("what is accepted of images (folder, imagenet127)")
    images.add_argument(
        "--on-bad",
        choices=["fail", "skip"],
        default="fail",
        help="skip leaves out up to 1 %% and lists them in bad.csv",
    )
    images.add_argument("--scale16", action="store_true", help="of 16 bits a channel, take the upper 8")
    images.add_argument("--first-frame", action="store_true", help="of an animation, take the first frame")
    images.add_argument("--follow", action="store_true", help="follow links out of the folder")
    add_split_flags(prepare.add_argument_group("a split, whose rows alone are then prepared"))

    split = command("split", "write a hashed split file: labeled, unlabeled and validation samples")
    split.add_argument("data", type=PATH, metavar="DATA")
    split.add_argument("--name", required=True, help="the file is DATA/splits/NAME.json")
    add_split_flags(split)

    inspect = command("inspect", "print classes, counts and splits of a prepared data set")
    inspect.add_argument("data", type=PATH, metavar="DATA")
    verify = command("verify", "hash a prepared data set again and compare")
    verify.add_argument("data", type=PATH, metavar="DATA")
    demo = command("demo", "train three methods on the bundled digits and compare them, in about a minute on a CPU")
    demo.add_argument(
        "--out", type=PATH, metavar="DIR", help="where everything goes; default: a fresh directory under runs/"
    )
    reproduce = command("reproduce", "train a cell of the paper's tables and print it beside the paper's value")
    reproduce.add_argument("cell", nargs="?", metavar="CELL", help="table1/semi/cifar10_lt/n500_m4000_g100; see --list")
    reproduce.add_argument(
        "--list", action="store_true", dest="listed", help="print all cells, and which can be trained"
    )
    reproduce.add_argument("--print-config", action="store_true", help="print the cell's configuration, to be trained")
    reproduce.add_argument("--seeds", metavar="K,...", help="one run each; default 0,1,2")
    reproduce.add_argument("--steps", type=int, metavar="N", help="shorten the runs; the result says so")
    reproduce.add_argument(
        "--data", type=PATH, metavar="DATA", help="the prepared data set; default: the cell's data.path"
    )
    reproduce.add_argument("--out", type=PATH, metavar="DIR", help="where the runs go; default: runs/paper/CELL")
    reproduce.epilog = "Further flags are keys of the configuration, --key=value; what they change is said."
    sweep = command("sweep", "train several configurations with several seeds, one process each, on all devices")
    sweep.add_argument(
        "files", nargs="+", type=PATH, metavar="FILE", help="configurations; a run is OUT/<name of FILE>/seed_K"
    )
    sweep.add_argument("--seeds", default="0,1,2", metavar="K,...", help="one run each; default 0,1,2")
    sweep.add_argument("--out", required=True, type=PATH, metavar="DIR", help="where the runs and their comparison go")
    sweep.add_argument("--per-device", type=int, default=1, metavar="N", help="runs at a time on a GPU, or on the CPU")
    sweep.epilog = "Further flags are keys of the configuration, --key=value, for all runs."
    command("doctor", "say what is installed, what is missing, and the command that mends it")
    report = command("report", "write one page over one or several runs")
    report.add_argument("runs", nargs="+", type=PATH, metavar="RUN")
    report.add_argument(
        "--out", type=PATH, metavar="FILE", help="default: report.html in the run, or in the folder of the first"
    )
    return parser


def add_split_flags(parser: Any) -> None:
    """The keys of a split as flags."""
    parser.add_argument("--labeled-max", type=int, metavar="N1", help="labeled images of the largest class")
    parser.add_argument("--unlabeled-max", type=int, metavar="M1", help="unlabeled images of the largest class")
    parser.add_argument("--imbalance-labeled", type=float, default=1.0, metavar="G", help="largest over smallest class")
    parser.add_argument(
        "--imbalance-unlabeled", type=float, default=1.0, metavar="G", help="largest over smallest class"
    )
    parser.add_argument("--unlabeled-shape", choices=["consistent", "uniform", "reversed"], default="consistent")
    parser.add_argument("--rule", choices=["semi", "daso", "cossl", "usb"], default="semi", help="whose protocol")
    parser.add_argument("--labeled-fraction", type=float, metavar="F", help="labeled share of every class; not with N1")
    parser.add_argument("--validation-per-class", type=int, default=0, metavar="V")
    parser.add_argument("--seed", type=int, default=0)


def run_command(argv: list[str]) -> int:
    """Carry out one command; returns the exit code."""
    if argv[:1] == ["train"]:
        config = parse_config(argv[1:])
        from semi_fast.rundir.directory import check_usable

        check_usable(config)
        from semi_fast.train import guarded  # which takes seconds to load

        return guarded(config)
    words = [normal(word) for word in argv]
    check_once(words)
    known, others = make_parser().parse_known_args(words)
    arguments = vars(known)
    name = arguments.pop("command")
    if arguments.get("out") == "":
        raise ValueError("--out must name where the output goes; it is empty: give it a name")
    if name == "reproduce":
        return run_reproduce(others, **arguments)
    if name == "sweep":
        return run_sweep(others, **arguments)
    if others:
        raise ValueError(f"{name} does not take {' '.join(others)}; see semi-fast {name} --help")
    if name == "doctor":
        from semi_fast.commands.doctor import doctor

        doctor()
        return 0
    if name == "demo":
        from semi_fast.commands.demo import demo

        demo(Path(arguments["out"]) if arguments["out"] else None)
        return 0
    if name == "report":
        from semi_fast.report import write_report

        runs = [Path(run) for run in arguments["runs"]]
        default = (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
        print(write_report(runs, Path(arguments["out"] or default)))
        return 0
    from semi_fast.commands import prepare as commands

    {"prepare": commands.prepare, "split": commands.split, "inspect": commands.inspect, "verify": commands.verify}[
        name
    ](**arguments)
    return 0


def run_reproduce(
    others: list[str],
    *,
    cell: str | None,
    listed: bool,
    print_config: bool,
    seeds: str | None,
    steps: int | None,
    data: str | None,
    out: str | None,
) -> int:
    """`semi-fast reproduce`; `others` are the words that are keys of the configuration."""
    given = [word for word in (steps and "--steps", data and "--data", out and "--out", *others) if word]
    if listed:
        if given := [word for word in (cell, print_config and "--print-config", *given) if word]:
            raise ValueError(f"reproduce --list shows all cells; leave out {' '.join(given)}")
        from semi_fast.reproduce.cells import listing

        print(listing())
        return 0
    if cell is None:
        raise ValueError("reproduce needs a CELL; semi-fast reproduce --list shows them")
    if print_config:
        if given := [*([] if seeds is None else ["--seeds"]), *given]:
            raise ValueError(
                f"reproduce --print-config prints the cell as published; leave out {' '.join(given)}: seed, data, "
                "steps and other keys are flags of semi-fast train --config FILE"
            )
        from semi_fast.reproduce.cells import find
        from semi_fast.reproduce.configuration import text

        print(text(find(cell)), end="")
        return 0
    files, flags = ordered(others)
    if files:
        raise ValueError(f"reproduce takes the configuration of its cell; leave out --config {files[0]}")
    from semi_fast.commands.reproduce import reproduce

    reproduce(
        cell, seeds=parse_seeds("0,1,2" if seeds is None else seeds), steps=steps, data=data, out=out, flags=flags
    )
    return 0


def run_sweep(others: list[str], *, files: list[str], seeds: str, out: str, per_device: int) -> int:
    """`semi-fast sweep`; `others` are keys of the configuration. 1 if a run failed, as a launcher has it."""
    more, flags = ordered(others)
    from semi_fast.commands.sweep import sweep

    failed = sweep([*files, *more], seeds=parse_seeds(seeds), out=Path(out), per_device=per_device, flags=flags)
    return 1 if failed else 0


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) != len(words):
        raise ValueError(f"--seeds must be different whole numbers, K,K,...; got {text}")
    return tuple(map(int, words))


def check_once(words: Sequence[str]) -> None:
    """Raise ValueError for a flag that stands twice, of which one would be dropped; `--config` may."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1 and flag != "--config":
            raise ValueError(f"{flag} is given twice; keep one")


def normal(word: str) -> str:
    """`--labeled_max=5` as `--labeled-max=5`; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def main(argv: list[str] | None = None) -> int:
    """The entry point: expected failures are one line and exit code 2 (the user's to mend) or 3 (the machine's)."""
    words = list(sys.argv[1:] if argv is None else argv)
    with tolerate_closed_pipes():
        try:
            code = run_command(words)
            if words[:1] != ["train"]:  # whose results are files
                check_taken()
        except EXPECTED as error:
            print(one_line(error), file=sys.stderr)
            return exit_code(error)
        return code


if __name__ == "__main__":
    sys.exit(main())
