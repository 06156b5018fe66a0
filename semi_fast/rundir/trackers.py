"""Trackers that a run reports to, through accelerate: what a run says to others, who never end it once it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # with torch, which takes seconds; whether a tracker is there is asked before
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

NAMES = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Of accelerate's trackers; but for tensorboard also of their packages."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for the first name that accelerate does not know, or whose package is not installed."""
    installed = list(filter(is_installed, NAMES))
    for name in names:
        if name == "all":
            here = f"here: {', '.join(installed) or 'none'}"
            raise ValueError(
                f"log.track must name each tracker, as installed ones may have no account ({here}); got all"
            )
        if name not in NAMES:
            raise ValueError(f"log.track must be of {', '.join(NAMES)}; got {name}")
        if name not in installed:
            raise ValueError(f"log.track names {name}, which is not installed: pip install {name}, or leave it out")


def is_installed(name: str) -> bool:
    """Whether a tracker can be imported; a folder of its name, such as the one W&B writes to, is none."""
    specs = map(find_spec, ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,))
    return any(spec is not None and spec.origin is not None for spec in specs)


@contextmanager
def tracked(accelerator: Accelerator, names: Sequence[str], folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Meanwhile `log` reaches the trackers `names`, which are begun with `config` and ended; they write to `folder`,
    where they can be told.

    Raises ValueError, which names it, for the first one that does not begin, such as one without an account.
    """
    from accelerate.tracking import filter_trackers

    told = {key: str(value) for key, value in config.items()}
    begun: list[GeneralTracker] = []
    try:
        if names and accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
        where = {"wandb": {"dir": str(folder)}, "dvclive": {"dir": str(folder / "dvclive")}}
        accelerator.project_configuration.logging_dir = str(folder)
        for name in dict.fromkeys(names):
            accelerator.log_with, accelerator.trackers = filter_trackers([name], folder), []
            if not accelerator.log_with:
                raise ValueError(f"log.track: accelerate does not take {name} as it is installed: leave it out")
            try:
                accelerator.init_trackers("semi_fast", told, init_kwargs=where)
            except Exception as error:  # they raise what they like
                raise ValueError(f"log.track: {name} does not begin: {error}; mend that, or leave it out") from error
            begun += accelerator.trackers
        accelerator.trackers = begun
        yield
    finally:
        accelerator.trackers = begun
        for tracker in tuple(begun):
            carry_out(accelerator, tracker, tracker.finish)
        accelerator.trackers = []


def log(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Report to every tracker."""
    for tracker in tuple(accelerator.trackers):
        carry_out(accelerator, tracker, tracker.log, values, step=step)


def carry_out(accelerator: Accelerator, tracker: Any, call: Any, *args: Any, **kwargs: Any) -> None:
    """A call of a tracker; one that fails is said, and gets no more."""
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001, they raise what they like, and the run goes on
        accelerator.trackers.remove(tracker)
        accelerator.print(
            f"warning: log.track: {tracker.name} failed ({' '.join(str(error).split())}): it gets no more"
        )
