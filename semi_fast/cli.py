"""The command line: `semi-fast <command>`; the only place that parses arguments."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from semi_fast import __version__
from semi_fast.errors import EXPECTED, exit_code, one_line
from semi_fast.schema.config import Config
from semi_fast.schema.semi import PRESETS, REQUIRED

TRAIN_HELP = """semi-fast train --config FILE [--key=value ...]

Every key of the configuration is a flag (`--optim.lr=0.1`); defaults < file < flags, wherever a flag stands.
`accelerate launch -m semi_fast.train` takes the same arguments. `semi-fast train --help` lists the keys."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parse_config(argv: Sequence[str]) -> Config:
    """The configuration that the arguments of `semi-fast train` describe; ValueError in one line if they do not."""
    from jsonargparse import ArgumentError, ArgumentParser

    from semi_fast.schema.yaml_file import check_file

    parser = ArgumentParser(prog="semi-fast train", exit_on_error=False, description=TRAIN_HELP)
    parser.add_argument("--config", action="config", help="YAML file of keys; may be given more than once")
    parser.add_class_arguments(Config)
    files, flags = ordered(argv)
    in_files = {key for file in files for key in check_file(Path(file))}
    as_flags = {flag[2:].partition("=")[0] for flag in flags}
    arguments = [*(f"--config={file}" for file in files), *flags]
    try:
        parsed = parser.parse_args(arguments)
        preset = parsed.method.semi.preset
        parser.set_defaults({f"method.semi.{key}": value for key, value in PRESETS[preset].items()})
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(readable(" ".join(str(error).split()))) from error
    if "method.semi.preset" in as_flags:
        for key, value in PRESETS[preset].items():
            found = getattr(parsed.method.semi, key)
            if found != value and f"method.semi.{key}" in in_files - as_flags:
                raise ValueError(
                    f"method.semi.preset={preset} has {key} {value}, but the file sets {found}: "
                    f"give --method.semi.{key} too, to say which"
                )
    for key in REQUIRED.get(preset, ()):
        if f"method.semi.{key}" not in in_files | as_flags:
            raise ValueError(
                f"method.semi.{key} must be given with preset {preset}: its sources differ; see docs/methods.md"
            )
    del parsed["config"]
    values = parser.instantiate(parsed)
    return Config(**{key: values[key] for key in Config.__dataclass_fields__})


def readable(message: str) -> str:
    """What jsonargparse says of a value of the wrong type, as rule and value; any other message as it is."""
    found = re.fullmatch(r'Parser key "(.+?)": Expected an? (.+?)\. Got value: (.*)', message)
    if found is None:
        return message
    key, kind, value = found.groups()
    if kind.startswith("typing.Literal["):
        rule = "be one of " + kind.removeprefix("typing.Literal[").removesuffix("]").replace("'", "")
    elif kind == "<class 'tuple'>":
        rule = "be a list, [NAME, ...]"
    else:
        rule = "be of type " + re.sub(r"<class '(\w+)'>", r"\1", kind)
    return f"{key} must {rule}; got {value}"


def ordered(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(configuration files, flags as `--key=value`), with `-` and `_` the same and every key known and whole."""
    from semi_fast.schema.yaml_file import check_keys

    files: list[str] = []
    flags: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            flags.append("--help")
            continue
        if not word.startswith("--"):
            raise ValueError(f"arguments are flags, --key=value; got {word!r}")
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if key != "config":
            check_keys([key], "command line")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name}=VALUE")
            value = words.pop(0)
        if key == "config":
            files.append(value)
        else:
            flags.append(f"--{key}={value}")
    return files, flags


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
    prepare.add_argument("--raw", metavar="DIR", help="the raw data, as published or train/<class>/*, test/<class>/*")
    prepare.add_argument("--out", required=True, metavar="DIR", help="where the prepared data set goes")
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
    split.add_argument("data", metavar="DATA")
    split.add_argument("--name", required=True, help="the file is DATA/splits/NAME.json")
    add_split_flags(split)

    inspect = command("inspect", "print classes, counts and splits of a prepared data set")
    inspect.add_argument("data", metavar="DATA")
    verify = command("verify", "hash a prepared data set again and compare")
    verify.add_argument("data", metavar="DATA")
    demo = command("demo", "train three methods on the bundled digits and compare them, in about a minute on a CPU")
    demo.add_argument("--out", metavar="DIR", help="where everything goes; default: a fresh directory under runs/")
    reproduce = command("reproduce", "train a cell of the paper's tables and print it beside the paper's value")
    reproduce.add_argument("cell", nargs="?", metavar="CELL", help="table1/semi/cifar10_lt/n500_m4000_g100; see --list")
    reproduce.add_argument(
        "--list", action="store_true", dest="listed", help="print all cells, and which can be trained"
    )
    reproduce.add_argument("--seeds", default="0,1,2", metavar="K,...", help="one run each; default 0,1,2")
    reproduce.add_argument("--steps", type=int, metavar="N", help="shorten the runs; the result says so")
    reproduce.add_argument("--data", metavar="DATA", help="the prepared data set; default: the cell's data.path")
    reproduce.add_argument("--out", metavar="DIR", help="where the runs go; default: runs/paper/CELL")
    reproduce.epilog = "Further flags are keys of the configuration, --key=value; what they change is said."
    sweep = command("sweep", "train several configurations with several seeds, one process each, on all devices")
    sweep.add_argument("files", nargs="+", metavar="FILE", help="configurations; a run is OUT/<name of FILE>/seed_K")
    sweep.add_argument("--seeds", default="0,1,2", metavar="K,...", help="one run each; default 0,1,2")
    sweep.add_argument("--out", required=True, metavar="DIR", help="where the runs and their comparison go")
    sweep.add_argument("--per-device", type=int, default=1, metavar="N", help="runs at a time on a GPU, or on the CPU")
    sweep.epilog = "Further flags are keys of the configuration, --key=value, for all runs."
    command("doctor", "say what is installed, what is missing, and the command that mends it")
    report = command("report", "write one page over one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run, or in the folder of the first")
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
        from semi_fast.rundir import check_usable

        check_usable(config)
        from semi_fast.train import guarded  # which takes seconds to load

        return guarded(config)
    known, others = make_parser().parse_known_args([normal(word) for word in argv])
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
        from semi_fast.doctor import doctor

        doctor()
        return 0
    if name == "demo":
        from semi_fast.demo import demo

        demo(Path(arguments["out"]) if arguments["out"] else None)
        return 0
    if name == "report":
        from semi_fast.report import write_report

        runs = [Path(run) for run in arguments["runs"]]
        default = (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
        print(write_report(runs, Path(arguments["out"] or default)))
        return 0
    from semi_fast.data_prep import commands

    {"prepare": commands.prepare, "split": commands.split, "inspect": commands.inspect, "verify": commands.verify}[
        name
    ](**arguments)
    return 0


def run_reproduce(
    others: list[str],
    *,
    cell: str | None,
    listed: bool,
    seeds: str,
    steps: int | None,
    data: str | None,
    out: str | None,
) -> int:
    """`semi-fast reproduce`; `others` are the words that are keys of the configuration."""
    if listed:
        from semi_fast.reproduce.cells import listing

        print(listing())
        return 0
    if cell is None:
        raise ValueError("reproduce needs a CELL; semi-fast reproduce --list shows them")
    files, flags = ordered(others)
    if files:
        raise ValueError(f"reproduce takes the configuration of its cell; leave out --config {files[0]}")
    from semi_fast.reproduce.command import reproduce

    reproduce(cell, seeds=parse_seeds(seeds), steps=steps, data=data, out=out, flags=flags)
    return 0


def run_sweep(others: list[str], *, files: list[str], seeds: str, out: str, per_device: int) -> int:
    """`semi-fast sweep`; `others` are keys of the configuration. 1 if a run failed, as a launcher has it."""
    more, flags = ordered(others)
    from semi_fast.sweep import sweep

    failed = sweep([*files, *more], seeds=parse_seeds(seeds), out=Path(out), per_device=per_device, flags=flags)
    return 1 if failed else 0


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) != len(words):
        raise ValueError(f"--seeds must be different whole numbers, K,K,...; got {text}")
    return tuple(map(int, words))


def normal(word: str) -> str:
    """`--labeled_max=5` as `--labeled-max=5`; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def main(argv: list[str] | None = None) -> int:
    """The entry point: expected failures are one line and exit code 2 (the user's to mend) or 3 (the machine's)."""
    try:
        return run_command(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as error:
        print(one_line(error), file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
