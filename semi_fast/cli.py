"""The command line: finds the command of `semi-fast <command>`, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import semi_fast
from semi_fast.commands import as_help, demo, doctor, inspect, prepare, report, reproduce, split, sweep, train, verify
from semi_fast.errors import EXPECTED, exit_code, one_line
from semi_fast.screen import check_taken, tolerate_closed_pipes

COMMANDS = (train, prepare, split, inspect, verify, demo, reproduce, sweep, doctor, report)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but train, whose flags are the configuration's keys."""
    parser = OneLineParser(prog="semi-fast", description=semi_fast.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=semi_fast.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, help = module.__name__.rpartition(".")[2], as_help((module.__doc__ or "").partition("\n")[0])
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=module.run)
        module.arguments(command)
    return parser


def run_command(argv: list[str]) -> int:
    """Carry out one command; returns the exit code."""
    if argv[:1] == ["train"]:
        return train.run(words=argv[1:])
    words = [normal(word) for word in argv]
    check_once(words)
    known, others = make_parser().parse_known_args(words)
    values = vars(known)
    name, run = values.pop("command"), values.pop("run")
    if values.get("out") == "":
        raise ValueError("--out must name where the output goes; it is empty: give it a name")
    if "keys" in values:  # of the configuration
        values["keys"] = others
    elif others:
        raise ValueError(f"{name} does not take {' '.join(others)}; see semi-fast {name} --help")
    return run(**values) or 0


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
