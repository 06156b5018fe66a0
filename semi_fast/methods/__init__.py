"""The methods, and how a configuration becomes one."""

from __future__ import annotations

from semi_fast.methods.base import Environment, Loss, Method, Needs, State
from semi_fast.methods.fixmatch import FixMatch
from semi_fast.methods.plugins import PLUGINS
from semi_fast.methods.released_semi import ReleasedSeMi
from semi_fast.methods.semi import SeMi
from semi_fast.methods.supervised import Supervised
from semi_fast.schema.method import MethodConfig

__all__ = ["METHODS", "Environment", "Loss", "Method", "Needs", "State", "make_method"]

METHODS = {
    "supervised": lambda options, plugins, clock: Supervised(plugins),
    "fixmatch": lambda options, plugins, clock: FixMatch(options.fixmatch, plugins),
    "semi": lambda options, plugins, clock: SeMi(options.semi, epoch_steps=options.epoch_steps, **clock),
    "released_semi": lambda options, plugins, clock: ReleasedSeMi(
        options.released_semi, epoch_steps=options.epoch_steps
    ),
}


def make_method(options: MethodConfig, *, steps: int, seed: int = 0) -> Method:
    """The method named in `options` for a run of `steps`, with its plug-ins in the order in which they are listed."""
    plugins = [PLUGINS[name](getattr(options, name)) for name in options.plugins]
    return METHODS[options.name](options, plugins, {"steps": steps, "seed": seed})
