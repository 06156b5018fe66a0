"""Configurations as YAML: strict reading, plain writing, and the nearest name for a key that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from semi_fast.schema.config import Config, plain

MAX_BYTES = 2**20


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"the key {sorted(twice)[0]} stands twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def config_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every leaf of the configuration, dotted."""
    keys: list[str] = []
    for field in dataclasses.fields(schema):
        factory = field.default_factory
        nested = isinstance(factory, type) and dataclasses.is_dataclass(factory)
        keys += config_keys(factory, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return keys


def check_keys(keys: list[str], where: str) -> None:
    """Raise ValueError for the first dotted key that the configuration does not have, with the nearest that it has."""
    known = config_keys()
    for key in keys:
        if key not in known:
            last = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or last
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: there is no key {key}{hint}")


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as dotted leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_file(path: Path) -> None:
    """Raise ValueError in one line unless the file is YAML whose every key the configuration has, once."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: a configuration has at most {MAX_BYTES} bytes")
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a configuration is a mapping of keys; got {type(tree).__name__}")
    check_keys(list(leaves(tree)), str(path))


def dump(config: Config) -> str:
    """The whole configuration as YAML; reading it back gives an equal configuration."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
