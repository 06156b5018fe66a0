"""What a run tells of itself: records, trackers, the screen, seconds, and what a checkpoint says beside its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from semi_fast import processes
from semi_fast.loop.program import Program
from semi_fast.rundir.runlog import Clock, MetricsFile, Screen, changes


class Journal:
    """Every process keeps one; files, trackers and the screen are the main process's."""

    def __init__(
        self,
        metrics: MetricsFile | None,
        screen: Screen,
        track: Callable[[dict[str, float], int], None],
        meta: dict[str, Any],
    ):
        """`metrics` is None but on the main process; `meta` is what `rundir.directory.provenance` gives."""
        self.metrics, self.screen, self.track, self.meta = metrics, screen, track, meta
        self.clock = Clock()
        self.start = 0  # the step that this process went on from
        self.latest: dict[str, tuple[int, str]] = {}  # of each set: step of the last evaluation, and what it said

    def begin(self, start: int) -> None:
        self.start = start
        self.screen.begin(start)
        self.clock.lap()

    def training_until_now(self) -> None:
        """Count what has passed since the last lap as training; the device must be idle."""
        seconds = self.clock.lap()
        self.clock.training += seconds
        self.clock.interval += seconds

    def ready(self, program: Program) -> None:
        """The first step is done: what its first rows and its level took before was no training."""
        before = program.ready_at - self.clock.started
        self.clock.training -= before
        self.clock.interval -= before
        now = str(program.level)
        was = self.meta.get("level", now)
        if was != now:
            self.note_changes([f"engine.level was {was}, is {now}"])
        self.meta["level"] = now

    def note_changes(self, found: list[str]) -> None:
        """Say what is not as it was before a resume, here and in what is saved."""
        if found:
            self.screen.line(f"warning: {', '.join(found)}: goes on equal but for rounding, not bit for bit")
        self.meta["changed_on_resume"] = [
            *self.meta["changed_on_resume"],
            *(f"after step {self.start}: {one}" for one in found),
        ]

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(record)

    def record_steps(self, program: Program, done: int) -> None:
        """Read the sums of the interval that ends at step `done`, write them, begin the next one."""
        interval, steps = program.interval, program.interval.steps
        terms, stats, pseudo_labels = interval.read()
        self.training_until_now()
        per_second = steps * processes.count() / max(self.clock.interval, 1e-9)
        interval.reset()
        self.clock.interval = 0.0
        record = {
            "kind": "train",
            "step": done,
            "seconds": round(self.clock.total, 3),
            "lr": float(program.train_step.lr),
            "images_per_second": per_second * program.layout.images,
            "rows_per_second": per_second * program.layout.total,
            "terms": terms,
            "stats": stats,
            "pseudo_labels": pseudo_labels,
        }
        self.write(record)
        self.track({**terms, **{f"stat.{name}": value for name, value in stats.items()}, "lr": record["lr"]}, done)
        used = f"  used {100 * pseudo_labels['used_fraction']:.0f}%" if pseudo_labels else ""
        rate = f"{record['images_per_second']:.0f} images/s"
        evaluated = "".join(text if at == done else f"{text} (step {at})" for at, text in self.latest.values())
        self.screen.news(done, f"loss {terms['total']:.3f}{used}  {rate}{evaluated}")
        self.clock.lap()  # files, trackers and screen are no training

    def record_evaluation(
        self, name: str, done: int, heads: Mapping[str, dict[str, Any]], *, predicts: str, seconds: float
    ) -> None:
        """Of the set `name` after step `done`: scores by head, `predicts` the one that the method predicts with."""
        record = {"kind": "eval", "step": done, "split": name, "predicts": predicts, "heads": heads}
        self.write({**record, "seconds": round(seconds, 3)})
        own = heads[predicts]
        self.track({f"{name}.{k}": own[k] for k in ("top1", "balanced_accuracy")}, done)
        few = "" if own["few"] is None else f" few {own['few']:.1f}"
        self.latest[name] = done, f"  {name} {own['top1']:.1f}% balanced {own['balanced_accuracy']:.1f}{few}"

    def checkpoint_meta(self, done: int, program: Program) -> dict[str, Any]:
        """What a checkpoint after step `done` says beside its tensors; the records are on the disk."""
        assert self.metrics is not None
        self.meta |= {
            "step": done,
            "seconds": self.clock.total,
            "cpu_seconds": self.clock.cpu,
            "training_seconds": self.clock.training,
            "interval_seconds": self.clock.interval,
            "metrics_bytes": self.metrics.flush(),
            "interval_steps": program.interval.steps,
            "interval_terms": program.interval.terms,
            "interval_stats": program.interval.stats,
            "scaler": program.train_step.state.scaler.state_dict(),
        }
        return self.meta

    def resume(self, meta: dict[str, Any]) -> None:
        """Go on from what a checkpoint says."""
        self.start = meta["step"]
        seconds = (meta[key] for key in ("seconds", "cpu_seconds", "training_seconds", "interval_seconds"))
        self.clock = Clock(*seconds)
        self.meta |= {"level": meta["level"], "changed_on_resume": meta["changed_on_resume"]}
        self.note_changes(changes(meta["environment"], self.meta["environment"]))
