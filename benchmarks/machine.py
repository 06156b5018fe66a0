"""What a machine has of what this checkout needs: `python -m benchmarks.machine`; ends with 1 and one line if not all.

Nothing is installed: `make wheels` fetches what a machine without an index lacks.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
PROGRAMS = ("semi_fast.train", "benchmarks.step", "benchmarks.reference.loop", "tests.conftest")
"""Modules that import all that the steps of `make gpu` do."""


def requirements() -> list[str]:
    """Of the package, and of its tests as far as a GPU runs them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = [line for line in project["optional-dependencies"]["dev"] if line.partition(">")[0] in TESTS]
    return [*project["dependencies"], *tests]


def unmet(wanted: Sequence[str]) -> list[str]:
    """Requirements that the installed versions do not meet, and what there is instead."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, wanted):
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            found.append(f"{requirement} (installed: {there})")
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device: str = parser.parse_args(words).device
    missing = unmet(requirements())
    if missing:
        print(f"missing: {', '.join(missing)}; run `make wheels` where there is an index, and bring .whl along")
        return 1
    for name in PROGRAMS:
        try:
            import_module(name)
        except ImportError as error:
            print(f"missing: {error}, without which {name} cannot be imported")
            return 1
    import torch

    from benchmarks import measure
    from semi_fast.ops.door import backend

    if device == "cuda" and not torch.cuda.is_available():
        print("missing: a GPU that torch can use; `make gpu SMALL=1` tries the steps out on a CPU")
        return 1
    origin = measure.provenance(measure.find_device(device), "")
    told = [f"{name} {value}" for name, value in origin.items() if name not in ("clock", "spread", "command")]
    print("; ".join([platform.platform(), *told, backend(torch.device(device))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
