"""Configurations as YAML: strict reading, plain writing, and the nearest name for a key that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from semi_fast.schema.config import Config, leaves, plain
from semi_fast.schema.semi import REMOVED

MAX_BYTES = 2**20
OCTAL = re.compile(r"[-+]?0[0-7_]+")


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and aliases, with which a short file can become endless."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(f"the alias *{event.anchor} (line {event.start_mark.line + 1}) must be written out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {text for text, times in Counter(map(str, keys)).items() if times > 1}
        if twice:
            raise ValueError(f"the key {sorted(twice)[0]} stands twice (line {node.start_mark.line + 1}); keep one")
        dotted = [key for key in keys if isinstance(key, str) and "." in key]
        if dotted:  # a second spelling of a nested key, which could give it twice
            raise ValueError(f"the key {dotted[0]} has a dot; write its last part indented under its section")
        return super().construct_mapping(node, deep)


def plain_number(loader: StrictLoader, node: yaml.ScalarNode) -> int | float:
    """A number; ValueError for what YAML 1.1 reads to another base than it looks: 010 is 8 there, and 1:30 is 90."""
    whole = node.tag.endswith(":int")
    number = loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)
    if ":" in node.value or (whole and OCTAL.fullmatch(node.value)):
        where = node.start_mark.line + 1
        raise ValueError(f"{node.value} (line {where}) would be read as {number}; write it in decimal, or quote text")
    return number


for tag in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{tag}", plain_number)


def config_keys(schema: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf of the configuration, dotted, and its type."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        nested = dataclasses.is_dataclass(kind)
        keys |= config_keys(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return keys


def check_keys(keys: list[str], where: str) -> None:
    """Raise ValueError for the first dotted key that the configuration does not have, with the nearest that it has."""
    known = config_keys()
    for key in keys:
        if key in REMOVED:
            raise ValueError(f"{where}: {key} {REMOVED[key]}")
        inside = [k for k in known if k.startswith(f"{key}.")]
        if inside:
            raise ValueError(f"{where}: {key} is a section, not a key; give its keys, such as {inside[0]}")
        if key not in known:
            last = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or last
            hint = f"did you mean {near[0]}?" if near else "semi-fast train --help lists them"
            raise ValueError(f"{where}: there is no key {key}; {hint}")


def check_file(path: Path) -> list[str]:
    """A file's dotted keys; ValueError in one line unless it is YAML whose every key the configuration has, once."""
    try:
        if not path.is_file():  # a pipe, too: the file is read twice
            raise ValueError(f"no such configuration file; {instead_of(path)}")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"a configuration has at most {MAX_BYTES} bytes")
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506, a SafeLoader
        if not isinstance(tree, dict):
            raise ValueError(f"a configuration is a mapping of keys; got {type(tree).__name__}")
        values = leaves(tree)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, AttributeError) as error:  # PyYAML's, for a value that is not what its !!tag says
        raise ValueError(f"{path}: a value does not fit its tag; leave out what begins with !!") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep; write the keys out") from error
    check_keys(list(values), str(path))
    kinds = config_keys()
    for key, value in values.items():
        if value is None and type(None) not in get_args(kinds[key]):
            raise ValueError(f"{path}: {key} must have a value; got null: give one, or leave the key out")
    return list(values)


def instead_of(path: Path) -> str:
    """Where to look for a configuration that is not there; the paper's cells once were files under configs/paper/."""
    paper = re.search(r"(?:^|/)configs/paper(?:$|/)(.*)", path.as_posix())
    if paper is None:
        return "see configs/ for some"
    if paper[1].count("/") == 3:  # table, method, data set, setting
        return (
            f"the paper's cells are printed: semi-fast reproduce {paper[1].removesuffix('.yaml')} --print-config > FILE"
        )
    return "the paper's cells are printed: semi-fast reproduce CELL --print-config > FILE; reproduce --list shows them"


class QuotingDumper(yaml.SafeDumper):
    """A safe dumper that quotes text which a YAML 1.2 reader takes for a number, such as 1e-3."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


QuotingDumper.add_representer(str, _text)


def dump(config: Config) -> str:
    """The whole configuration as YAML; reading it back gives an equal configuration."""
    return yaml.dump(plain(config), Dumper=QuotingDumper, sort_keys=False, allow_unicode=True)
