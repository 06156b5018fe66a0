"""From the arguments of a training program, files and flags, to a configuration; or one line that says why not."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from semi_fast.schema.config import Config
from semi_fast.schema.effects import without_effect
from semi_fast.schema.semi import OFFICIAL, PRESETS
from semi_fast.schema.split import SplitConfig

TRAIN_HELP = """semi-fast train --config FILE [--key=value ...]

Every key of the configuration is a flag (`--optim.lr=0.1`); defaults < file < flags, wherever a flag stands.
`semi-fast train --resume RUN` goes on with a run; it needs no other flag.
`accelerate launch -m semi_fast.train` takes the same arguments. `semi-fast train --help` lists the keys."""
PATHS = ("data.path", "split.file", "run_dir", "resume")
"""Keys whose values may begin with `~`."""
CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
"""What makes a directory a run that can go on."""


def parse_config(argv: Sequence[str]) -> Config:
    """The configuration that the arguments of `semi-fast train` describe; ValueError in one line if they do not."""
    config, flags = read_arguments(argv)
    for reason in without_effect(config, flags).values():
        raise ValueError(reason)
    return config


def read_arguments(argv: Sequence[str]) -> tuple[Config, set[str]]:
    """(the configuration, the keys given as flags), the latter with or without effect."""
    from jsonargparse import ArgumentError, ArgumentParser

    from semi_fast.schema.yaml_file import check_file

    parser = ArgumentParser(prog="semi-fast train", exit_on_error=False, description=TRAIN_HELP)
    parser.add_argument("--config", action="config", help="YAML file of keys; may be given more than once")
    parser.add_class_arguments(Config)
    files, flags = ordered(argv)
    files, flags = resolve_resume(files, flags)
    keys_of = {file: check_file(Path(file)) for file in files}
    in_files = {key for keys in keys_of.values() for key in keys}
    as_flags = {key_of(flag) for flag in flags}
    arguments = [*(f"--config={file}" for file in files), *flags]
    try:
        parsed = parser.parse_args(arguments)
        preset = parsed.method.semi.preset
        parser.set_defaults({f"method.semi.{key}": value for key, value in PRESETS[preset].items()})
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(readable(" ".join(str(error).split()))) from error
    except (LookupError, AttributeError) as error:  # PyYAML's, for a value that is not what its !!tag says
        raise ValueError("a flag's value does not fit its tag; leave out what begins with !!") from error
    except RecursionError as error:
        raise ValueError("a flag's value is nested too deep; write it out") from error
    if "method.semi.preset" in as_flags:
        for key, value in PRESETS[preset].items():
            found = getattr(parsed.method.semi, key)
            if found != value and f"method.semi.{key}" in in_files - as_flags:
                raise ValueError(
                    f"method.semi.preset={preset} has {key} {value}, but the file sets {found}: "
                    f"give --method.semi.{key} too, to say which"
                )
    del parsed["config"]
    for key in PATHS:
        if parsed[key] is not None:
            parsed[key] = os.path.expanduser(parsed[key])
    values = parser.instantiate(parsed)
    config = Config(**{key: values[key] for key in Config.__dataclass_fields__})
    if "run_dir" not in as_flags and config.resume == "auto":
        setters = [file for file, keys in keys_of.items() if "run_dir" in keys]
        check_own_directory(config, setters[-1] if setters else None)
    return drop_split_keys(config, as_flags), as_flags


def key_of(flag: str) -> str:
    """`optim.weight_decay` of `--optim.weight-decay=0.1`."""
    return flag[2:].partition("=")[0].replace("-", "_")


def below(flags: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """`flags`, after those of `defaults` whose keys they do not give."""
    given = {key_of(flag) for flag in flags}
    return [*(flag for flag in defaults if key_of(flag) not in given), *flags]


def resolve_resume(files: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """The same with what `--resume` of a run or of a checkpoint stands for: the run's own configuration where no file
    is given, and its directory. ValueError if that is no run, or if run_dir is given and another."""
    given = {key_of(flag): flag.partition("=")[2] for flag in flags}
    path = Path(given.get("resume", "none"))
    if given.get("resume") in (None, "none", "auto"):
        return files, flags
    whole = any((path / name).exists() for name in (CONFIG_FILE, CHECKPOINTS))
    run_dir = path if whole else run_of(path)
    own = run_dir / CONFIG_FILE
    if not files and not own.is_file():
        raise ValueError(f"resume must name a run or a checkpoint of one; {path} is in none that has a {CONFIG_FILE}")
    if not whole:  # whether it is one of run_dir is looked at where it is loaded
        return files or [str(own)], flags if files or "run_dir" in given else [*flags, f"--run_dir={run_dir}"]
    if "run_dir" in given and Path(given["run_dir"]).resolve() != run_dir.resolve():
        raise ValueError(f"resume must name run_dir; got {path} and {given['run_dir']}: leave run_dir out")
    kept = [flag for flag in flags if key_of(flag) not in ("resume", "run_dir")]
    return files or [str(own)], [*kept, f"--run_dir={run_dir}", "--resume=auto"]


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in; ValueError if there is no such checkpoint."""
    if not checkpoint.is_dir():
        raise ValueError(f"resume must be none, auto, a run or a checkpoint; {checkpoint} is no directory")
    return checkpoint.resolve().parent.parent


def check_own_directory(config: Config, file: str | None) -> None:
    """Raise ValueError if `file` is a run's own configuration that names another run directory: a copy, or a run that
    was begun elsewhere; whoever goes on must say with which."""
    if file is None or config.run_dir is None:
        return
    here = Path(file).parent
    own = Path(file).name == CONFIG_FILE and (here / CHECKPOINTS).is_dir()
    if own and Path(config.run_dir).resolve() != here.resolve():
        raise ValueError(
            f"run_dir of {file} is {config.run_dir}, another directory than its own: say with which to go on, "
            f"--resume {here} or --resume {config.run_dir}"
        )


def drop_split_keys(config: Config, as_flags: set[str]) -> Config:
    """With `--split.file`, the keys of a split that a file holds and no flag repeats are not used: their defaults."""
    if config.split.file is None or "split.file" not in as_flags:
        return config
    repeated = {key: value for key, value in vars(config.split).items() if f"split.{key}" in as_flags}
    return replace(config, split=SplitConfig(**repeated))


def readable(message: str) -> str:
    """What jsonargparse says of a value of the wrong type, as rule and value; any other message as it is."""
    from semi_fast.schema.yaml_file import config_keys

    found = re.fullmatch(r'Parser key "(.+?)": Expected an? (.+?)\. Got value: ?(.*)', message)
    if found is None:
        pattern = r'Parser key "(.+?)": Does not validate against any of the Union subtypes .* Given value: ?(.*)'
        if (found := re.fullmatch(pattern, message)) is None:
            return message
        key, value = found.groups()
        kinds = [kind.__name__ for kind in get_args(config_keys()[key]) if kind is not type(None)]
        return f"{key} must be of type {' or '.join(kinds)}, or null; got {value or 'nothing'}"
    key, kind, value = found.groups()
    if kind.startswith("typing.Literal["):
        rule = "be one of " + kind.removeprefix("typing.Literal[").removesuffix("]").replace("'", "")
    elif kind == "<class 'tuple'>":
        rule = "be a list, [NAME, ...]"
    else:
        rule = "be of type " + re.sub(r"<class '(\w+)'>", r"\1", kind)
    return f"{key} must {rule}; got {value or 'nothing'}" + (f": {OFFICIAL}" if value == "official" else "")


def ordered(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(configuration files, flags as `--key=value`), with `-` and `_` the same and every key known, whole and once."""
    from semi_fast.schema.yaml_file import check_keys, config_keys

    files: list[str] = []
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            flags["help"] = "--help"
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
        if key == "config" or key in PATHS:
            value = os.path.expanduser(value)
        if key == "config":
            files.append(value)
            continue
        if key in flags:
            raise ValueError(f"--{name} is given twice, {flags[key].partition('=')[2]} and {value}; keep one")
        if is_number(config_keys()[key]) and ":" in value:
            raise ValueError(f"{key} must be a decimal number; got {value}, which YAML would read to the base of 60")
        flags[key] = f"--{key}={value}"
    return files, list(flags.values())


def is_number(kind: Any) -> bool:
    return bool({int, float} & {kind, *get_args(kind)})
