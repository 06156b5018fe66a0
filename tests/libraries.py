"""Optional libraries: a missing one is a failure in CI and a visible skip elsewhere."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def needs(name: str) -> None:
    """Skip the test unless the packages of an extra are installed; in CI all are."""
    package = {"cpu": "numba", "ffcv": "ffcv", "dali": "nvidia"}[name]
    if os.environ.get("CI") != "true" and (
        find_spec(package) is None or (name == "dali" and find_spec("nvidia.dali") is None)
    ):
        pytest.skip(f"{name} is not installed: pip install 'semi-fast[{name}]'")
