"""The composition root: from a configuration to objects, a finished run and its report.

`accelerate launch -m semi_fast.train --config C ...` and `semi-fast train --config C ...` are this program.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from semi_fast import checkpoint, runlog
from semi_fast.batch import RowLayout
from semi_fast.data_prep.long_tail import split_for
from semi_fast.ema import WeightAverage
from semi_fast.engine import Engine, EvalSet, NonFiniteError
from semi_fast.manifest import Manifest, Split, load_manifest, save_split, seal_split
from semi_fast.methods import Environment, make_method
from semi_fast.metrics import Interval
from semi_fast.models import make_classifier
from semi_fast.models.sync_batch_norm import synchronise_batch_norm
from semi_fast.pipelines.augment import Augmenter
from semi_fast.pipelines.source import open_source
from semi_fast.report import write_report
from semi_fast.sampling import Batches
from semi_fast.schema.config import Config, check, identity
from semi_fast.schema.yaml_file import dump, leaves
from semi_fast.step import NEVER, TrainState, TrainStep, make_optimizer
from semi_fast.summary import summarise

PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # accelerate's name -> ours


def run(config: Config) -> dict[str, Any]:
    """Train as configured; returns what `summary.json` holds.

    Raises ValueError for what the user must change, RuntimeError for the machine, NonFiniteError for numerics.
    """
    check(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no CUDA device; use --device cpu, or auto")
    manifest = load_manifest(config.data.path)
    split = seal_split(split_for(manifest, "run", config.split))
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(), log_with=list(config.log.track) or None
    )
    try:
        config = settled(config, manifest, accelerator)
        meta = provenance(config, manifest, split, accelerator.num_processes)
        run_dir, saved = open_run_dir(config, meta, warn=lambda text: accelerator.print(f"warning: {text}"))
        with ending(run_dir) if accelerator.is_main_process else nullcontext():
            return run_with(config, manifest, split, accelerator, run_dir=run_dir, saved=saved)
    finally:
        accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_with(
    config: Config,
    manifest: Manifest,
    split: Split,
    accelerator: Accelerator,
    *,
    run_dir: Path,
    saved: checkpoint.Checkpoint | None,
) -> dict[str, Any]:
    """Build every part, train, and summarise in a run directory that is ours."""
    main = accelerator.is_main_process
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    device, precision = accelerator.device, config.precision
    dtype = torch.float64 if precision == "fp64" else torch.float32

    method = make_method(config.method, steps=config.optim.steps)
    layout, batches = divided(config, split, method.needs, accelerator)
    torch.manual_seed(config.seed)
    model = make_classifier(config.model, manifest.num_classes, method.needs.heads)
    features = model.features
    model = model.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if accelerator.num_processes > 1 and config.model.bn == "sync":
        synchronise_batch_norm(model)
    average = WeightAverage(model)
    state = TrainState(
        model=model,
        average=average,
        optimizer=make_optimizer(model, config.optim, device),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        method=method.init(Environment(split.labeled_counts, features, device, dtype)),
        step=torch.zeros((), dtype=torch.int64, device=device),
        bad_step=torch.full((), NEVER, dtype=torch.int64, device=device),
    )
    views = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    augmenter = Augmenter(
        config.augment,
        seed=config.seed,
        resolution=manifest.resolution,
        mean=manifest.mean,
        std=manifest.std,
        device=device,
        dtype=views,
    )
    labels, truth = label_tables(manifest, split)
    engine = Engine(
        config,
        TrainStep(state, method, augmenter.views, optim=config.optim, ema=config.ema, precision=precision),
        open_source(config.data.source, manifest, device).read,
        batches,
        layout=layout,
        resolution=manifest.resolution,
        labels=labels.to(device),
        interval=Interval(truth.to(device), manifest.num_classes),
        eval_sets=eval_sets(manifest, split, device),
        labeled_counts=split.labeled_counts,
        plain_view=augmenter.plain,
        metrics=runlog.MetricsFile(run_dir / "metrics.jsonl", saved.meta["metrics_bytes"] if saved else 0)
        if main
        else None,
        screen=runlog.Screen(
            f"{config.method.name}", steps=config.optim.steps, start=saved.meta["step"] if saved else 0, quiet=not main
        ),
        checkpoints=run_dir / "checkpoints",
        meta=provenance(config, manifest, split, accelerator.num_processes),
        track=accelerator.log,
    )
    if config.log.track:
        accelerator.init_trackers("semi_fast", {key: str(value) for key, value in leaves(identity(config)).items()})
    environment = runlog.environment(device, precision, accelerator.num_processes)
    if main:
        runlog.write_text(run_dir / "config.yaml", dump(config))
        runlog.write_json(run_dir / "env.json", environment)
        (run_dir / "split.json").unlink(missing_ok=True)
        save_split(split, run_dir / "split.json")
        engine.screen.line(opening(config, manifest, split, environment, layout, model))
    start = engine.resume(saved) if saved else 0
    if start:
        engine.screen.line(f"resumed from {saved.path}" if saved else "")
    try:
        engine.fit(start)
    except NonFiniteError as error:
        if main:
            runlog.write_json(run_dir / "nonfinite.json", {"step": error.step, "sample_ids": error.ids})
        raise
    finally:
        engine.screen.close()
    summary: dict[str, Any] = {}
    if engine.metrics is not None:
        summary = summarise(config, manifest, split, environment, engine.metrics, engine.clock)
        runlog.write_json(run_dir / "summary.json", summary)
        write_report([run_dir], run_dir / "report.html")
        engine.screen.line(f"report: {run_dir / 'report.html'}")
    accelerator.wait_for_everyone()
    return summary


def settled(config: Config, manifest: Manifest, accelerator: Accelerator) -> Config:
    """The configuration with everything that was left open decided, the same on all processes."""
    precision = config.precision
    if precision == "auto":
        if accelerator.mixed_precision not in PRECISION:
            raise ValueError(
                f"precision must be fp32, bf16, fp16 or fp64; accelerate says {accelerator.mixed_precision}"
            )
        precision = PRECISION[accelerator.mixed_precision]
    run_dir = config.run_dir
    if run_dir is None and config.resume not in ("none", "auto"):
        run_dir = str(Path(config.resume).resolve().parent.parent)
    if run_dir is None:
        stem = f"{manifest.dataset}_{config.method.name}_{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = str(Path("runs") / stem)
        run_dir = broadcast_object_list([run_dir])[0]
    return replace(config, precision=precision, run_dir=run_dir)


def open_run_dir(
    config: Config, meta: dict[str, Any], *, warn: Callable[[str], None]
) -> tuple[Path, checkpoint.Checkpoint | None]:
    """The run directory, and the checkpoint to go on from; ValueError if it is in use, or not of the run of `meta`."""
    assert config.run_dir is not None
    run_dir = Path(config.run_dir)
    checkpoints = run_dir / "checkpoints"
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir must be a directory; {run_dir} is a file: choose another")
    if config.resume == "none":
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ValueError(f"run_dir must be new or empty; {run_dir} is not: choose another, or --resume auto")
        saved = None
    elif config.resume == "auto":
        saved = checkpoint.newest(checkpoints, warn)
    else:
        path = Path(config.resume)
        if not path.is_dir():
            raise ValueError(f"resume must be none, auto or a checkpoint directory; {path} is no directory")
        if path.resolve().parent.parent != run_dir.resolve():
            raise ValueError(
                f"resume must name a checkpoint of run_dir; got {path} and {run_dir}: leave run_dir out, or mend it"
            )
        saved = checkpoint.load(path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # all have looked before anyone writes
    run_dir.mkdir(parents=True, exist_ok=True)
    if saved is not None:
        mine, its = leaves(meta["config"]), leaves(saved.meta["config"])
        differ = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
        if differ:
            key = differ[0]
            raise ValueError(
                f"checkpoint {saved.path} is of another config: {key} is {its.get(key)} there, {mine.get(key)} here; "
                "use its config.yaml, or a new run_dir"
            )
        for key in ("manifest_sha256", "split_sha256"):
            if saved.meta[key] != meta[key]:
                raise ValueError(
                    f"checkpoint {saved.path} is of other data: {key} is {saved.meta[key][:12]} there and "
                    f"{meta[key][:12]} here; mend data.path or split.file, or use a new run_dir"
                )
    return run_dir, saved


def provenance(config: Config, manifest: Manifest, split: Split, processes: int) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {
        "config": identity(config),
        "manifest_sha256": manifest.sha256,
        "split_sha256": split.sha256,
        "processes": processes,
        "versions": runlog.versions(),
    }


def divided(config: Config, split: Split, needs: Any, accelerator: Accelerator) -> tuple[RowLayout, Batches]:
    """This process's share of the global batch."""
    labeled = config.batch.labeled
    unlabeled = labeled * config.batch.unlabeled_ratio if needs.unlabeled else 0
    if needs.unlabeled and not len(split.unlabeled):
        raise ValueError(f"method.name {config.method.name} needs unlabeled images; the split has none: check split.*")
    processes = accelerator.num_processes
    batches = Batches(
        split.labeled,
        split.unlabeled,
        seed=config.seed,
        labeled_rows=labeled,
        unlabeled_rows=unlabeled,
        rank=accelerator.process_index,
        processes=processes,
    )
    strong = needs.strong_views if needs.unlabeled else 0
    return RowLayout(labeled // processes, unlabeled // processes, strong), batches


def label_tables(manifest: Manifest, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels of labeled samples, truth of unlabeled ones that are no labeled copies): int64 [samples], else -1.

    Two tables, so that what a method is given holds nothing that it must not know.
    """
    known = torch.from_numpy(manifest.labels("train").copy())
    labels = torch.full((manifest.length("train") + manifest.length("unlabeled"),), -1, dtype=torch.int64)
    truth = labels.clone()
    truth[: len(known)] = known
    labels[split.labeled] = known[split.labeled]
    truth[split.labeled] = -1
    return labels, truth


def eval_sets(manifest: Manifest, split: Split, device: torch.device) -> list[EvalSet]:
    """The test set, and the validation images where the split holds some out."""

    def on_device(array: Any) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    sets = [EvalSet("test", on_device(manifest.images("test")), on_device(manifest.labels("test")))]
    if len(split.validation):
        images, labels = manifest.images("train")[split.validation], manifest.labels("train")[split.validation]
        sets.append(EvalSet("validation", on_device(images), on_device(labels)))
    return sets


def opening(
    config: Config, manifest: Manifest, split: Split, env: dict[str, Any], layout: RowLayout, model: torch.nn.Module
) -> str:
    """What a run says first."""
    unlabeled = (
        "unknown classes" if split.unlabeled_counts is None else f"{sum(split.unlabeled_counts)} not labeled too"
    )
    parameters = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"{config.method.name} on {manifest.dataset}: {len(split.labeled)} labeled, {len(split.unlabeled)} "
            f"unlabeled ({unlabeled}), {manifest.length('test')} test images, {manifest.num_classes} classes",
            f"{config.model.name}, {parameters:,} parameters; {env['precision']} on {env['hardware']}; "
            f"{env['processes']} process(es), {layout.total} rows each; {config.optim.steps} steps",
            f"run: {config.run_dir}",
        ]
    )


@contextmanager
def ending(run_dir: Path) -> Iterator[None]:
    """Say in `status.json` how the run ended: exit code and message; while it runs there is no such file."""
    status = run_dir / "status.json"
    status.unlink(missing_ok=True)
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if (run_dir / "config.yaml").exists():  # a start that was refused leaves the directory empty
            runlog.write_json(status, {"exit_code": exit_code(error), "message": str(error)})
        raise
    runlog.write_json(status, {"exit_code": 0, "message": "finished"})


def exit_code(error: Exception) -> int:
    """4 for numerics, 2 for what the user must change, 3 for the machine."""
    if isinstance(error, NonFiniteError):
        return 4
    return 2 if isinstance(error, ValueError) else 3


def guarded(config: Config) -> int:
    """Run, and turn every expected failure into one line and an exit code."""
    try:
        run(config)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"semi-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_code(error)
    return 0


def main(argv: list[str] | None = None) -> int:
    from semi_fast.cli import parse_config

    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"semi-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return guarded(config)


if __name__ == "__main__":
    sys.exit(main())
