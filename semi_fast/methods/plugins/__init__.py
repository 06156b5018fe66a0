"""What stacks on supervised training and FixMatch: from a plug-in's name to its class."""

from semi_fast.methods.plugins.base import Plugin
from semi_fast.methods.plugins.logit_adjustment import LogitAdjustment

PLUGINS: dict[str, type[Plugin]] = {"la": LogitAdjustment}
