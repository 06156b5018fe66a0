"""What stacks on supervised training and FixMatch: from a plug-in's name to its class."""

from collections.abc import Callable
from typing import Any

from semi_fast.methods.plugins.base import Plugin
from semi_fast.methods.plugins.logit_adjustment import LogitAdjustment

PLUGINS: dict[str, Callable[[Any], Plugin]] = {"la": LogitAdjustment}  # from the options under `method.<name>`
