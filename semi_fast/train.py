"""The composition root: from a configuration to objects, a finished run and its report.

`accelerate launch -m semi_fast.train --config C ...` and `semi-fast train --config C ...` are this program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from semi_fast import disk
from semi_fast.batch import RowLayout
from semi_fast.data_prep.long_tail import split_for
from semi_fast.errors import EXPECTED, NonFiniteError, exit_code, one_line
from semi_fast.launch import started_alone
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.evaluation import EvalSet, Evaluation
from semi_fast.loop.fit import TrainingRun
from semi_fast.loop.journal import Journal
from semi_fast.loop.levels import ladder, switches
from semi_fast.loop.metrics import Interval
from semi_fast.loop.preemption import Preemption, end_with_launcher
from semi_fast.loop.program import Program
from semi_fast.loop.sampling import Batches, first_visit_counts, label_tables
from semi_fast.loop.step import NEVER, TrainState, TrainStep, make_optimizer
from semi_fast.methods import Environment, Method, make_method
from semi_fast.models import make_classifier
from semi_fast.models.sync_batch_norm import synchronise_batch_norm
from semi_fast.ops.door import numbered
from semi_fast.pipelines.augment import Augmenter
from semi_fast.pipelines.source import open_source, read_part
from semi_fast.prepared.manifest import Manifest, Split, load_manifest, save_split, seal_split
from semi_fast.processes import all_or_none, lost_ones_named
from semi_fast.report import check_page, write_report
from semi_fast.rundir import directory, runlog
from semi_fast.rundir.checkpoint import Checkpoint
from semi_fast.rundir.runlog import MetricsFile
from semi_fast.rundir.summary import summarise
from semi_fast.rundir.trackers import log, tracked
from semi_fast.schema.arguments import CHECKPOINTS, CONFIG_FILE, parse_config
from semi_fast.schema.config import Config, identity, leaves
from semi_fast.schema.yaml_file import dump
from semi_fast.screen import tolerate_closed_pipes
from semi_fast.sealed_json import read_json

PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # accelerate's name -> ours
VIEWS = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: Config) -> dict[str, Any]:
    """Train as configured; returns what `summary.json` holds (on all processes but the main one: nothing).

    Raises ValueError for what the user must change, RuntimeError for the machine, NonFiniteError for numerics.
    """
    directory.check_usable(config)
    with session(config) as accelerator:
        return run_in(accelerator, config)


@contextmanager
def session(config: Config) -> Iterator[Accelerator]:
    """The device and the processes of a launch, in which runs of this `device` and timeout may follow one another."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no CUDA device; use --device cpu, or auto")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not on_cpu and processes > gpus:
        raise RuntimeError(f"{processes} processes on this machine need as many GPUs; it has {gpus}: launch no more")
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=config.engine.timeout_seconds))
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[timeout])
    try:
        if alone := started_alone(accelerator.num_processes):
            print(alone)
        yield accelerator
    finally:
        accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_in(accelerator: Accelerator, config: Config) -> dict[str, Any]:
    """`run` in a session; the configuration has been checked."""
    fresh = directory.run_dir_of(config) is None
    manifest = load_manifest(config.data.path)
    split = seal_split(split_for(manifest, "run", config.split))
    config, run_dir = decided(config, manifest, accelerator)
    check_page(run_dir / "report.html")
    where = accelerator.device, config.precision, accelerator.num_processes
    environment = runlog.environment(*where, manifest.num_classes)
    meta = directory.provenance(config, manifest, split, environment)
    saved = directory.checkpoint_to_resume(
        run_dir, config.resume, meta, warn=lambda text: accelerator.print(f"warning: {text}")
    )
    with ExitStack() as stack:
        if fresh and accelerator.is_main_process:
            stack.callback(directory.remove_empty, run_dir)
        training = build(config, manifest, split, accelerator, run_dir=run_dir, meta=meta, stack=stack)
        accelerator.wait_for_everyone()  # all have looked at the directory before anyone writes
        preemption = stack.enter_context(Preemption(config.engine.timeout_seconds))
        with lost_ones_named(), all_or_none():
            if accelerator.is_main_process:
                stack.enter_context(directory.locked_run(run_dir, config.resume, saved))
            trackers = run_dir / directory.TRACKERS
            stack.enter_context(tracked(accelerator, config.log.track, trackers, leaves(identity(config))))
        stack.enter_context(lost_ones_named())
        summary = conduct(training, manifest, split, environment, saved, preemption)
        accelerator.wait_for_everyone()
        return summary


def decided(config: Config, manifest: Manifest, accelerator: Accelerator) -> tuple[Config, Path]:
    """The configuration with everything left open decided, the same on all processes, and its run directory."""
    precision = config.precision
    if precision == "auto":
        precision = PRECISION[accelerator.mixed_precision.lower()]
    run_dir = directory.run_dir_of(config)
    if run_dir is None and accelerator.is_main_process:
        run_dir = directory.fresh_run_dir(config, manifest.dataset)  # which the others are told
    run_dir = broadcast_object_list([str(run_dir)])[0]
    return replace(config, precision=precision, run_dir=run_dir), Path(run_dir)


def build(
    config: Config,
    manifest: Manifest,
    split: Split,
    accelerator: Accelerator,
    *,
    run_dir: Path,
    meta: dict[str, Any],
    stack: ExitStack,
) -> TrainingRun:
    """Every part of the run, in memory; nothing is written. `stack` ends what must be ended."""
    device, precision, main = numbered(accelerator.device), config.precision, accelerator.is_main_process
    stack.enter_context(switches(config.engine, device))
    method = make_method(config.method, steps=config.optim.steps, seed=config.seed)
    layout, batches = divided(config, split, method.needs, accelerator)
    state = make_state(config, method, manifest, split, accelerator, device=device)
    augmenter = Augmenter(
        config.augment,
        seed=config.seed,
        resolution=manifest.resolution,
        mean=manifest.mean,
        std=manifest.std,
        device=device,
        dtype=VIEWS.get(precision, torch.float32),
        memory_format=memory_format(config),
    )
    labels, truth = label_tables(manifest, split)
    threads = config.data.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes)
    source = open_source(config.data.source, manifest, device, lambda step: batches.share(step).ids, threads=threads)
    stack.callback(source.close)
    accelerator.print(f"source: {source.description}")
    step = TrainStep(state, method, augmenter.views, optim=config.optim, ema=config.ema, precision=precision)

    def predict(images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every head's logits of the averaged weights; the method's own prediction under its name."""
        outputs = step.forward(state.average.model, augmenter.plain(images))
        return outputs.logits | {method.predicts: method.logits(state.method, outputs)}

    screen = runlog.Screen(config.method.name, steps=config.optim.steps, quiet=not main)
    several, synchronised = accelerator.num_processes > 1, config.model.bn == "sync"
    levels, why = ladder(config.engine, device, several_processes=several, synchronised=several and synchronised)
    program = Program(
        step,
        source,
        batches,
        layout=layout,
        images=torch.empty(layout.images, *manifest.resolution, 3, dtype=torch.uint8, device=device),
        labels=labels.to(device),
        interval=Interval(truth.to(device), manifest.num_classes),
        evaluations=[
            Evaluation(
                eval_set,
                predict,
                names=dict.fromkeys((*method.needs.heads, method.predicts)),  # in the same order on all processes
                classes=manifest.num_classes,
                batch=config.eval.batch,
                rank=batches.rank,
            )
            for eval_set in eval_sets(manifest, split, device, threads=threads)
        ],
        levels=levels,
        why=why,
        seed=config.seed,
        say=screen.line,
    )
    stack.callback(program.close)
    journal = Journal(MetricsFile(run_dir / "metrics.jsonl") if main else None, screen, partial(log, accelerator), meta)
    return TrainingRun(config, program, journal, split.labeled_counts, run_dir / CHECKPOINTS)


def make_state(
    config: Config, method: Method, manifest: Manifest, split: Split, accelerator: Accelerator, *, device: torch.device
) -> TrainState:
    """Network, average, optimizer and method state at step 0; the same on all processes."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    torch.manual_seed(config.seed)
    model = make_classifier(config.model, manifest.num_classes, method.needs.heads, manifest.resolution)
    model = model.to(device=device, dtype=dtype).to(memory_format=memory_format(config))  # type: ignore[call-overload]
    if accelerator.num_processes > 1 and config.model.bn == "sync":
        synchronise_batch_norm(model)
    return TrainState(
        model=model,
        average=WeightAverage(model),
        optimizer=make_optimizer(model, config.optim, device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        method=method.init(
            Environment(
                split.labeled_counts,
                model.features,
                device,
                dtype,
                first_visit_counts(manifest, split, seed=config.seed, rows=config.batch.labeled),
            )
        ),
        step=torch.zeros((), dtype=torch.int64, device=device),
        bad_step=torch.full((), NEVER, dtype=torch.int64, device=device),
    )


def memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.engine.channels_last else torch.contiguous_format


def conduct(
    run: TrainingRun,
    manifest: Manifest,
    split: Split,
    environment: dict[str, Any],
    saved: Checkpoint | None,
    preemption: Preemption,
) -> dict[str, Any]:
    """Resume if there is what to resume, write what the run is, train, and summarise."""
    config, program, journal, run_dir = run.config, run.program, run.journal, run.checkpoints.parent
    start = run.resume(saved) if saved else 0
    if journal.metrics is not None:
        journal.metrics.cut(saved.meta["metrics_bytes"] if saved else 0)
        if saved is not None and (run_dir / "env.json").exists():
            before = read_json(run_dir / "env.json")
            environment["before_resume"] = [*before.pop("before_resume", []), before]  # the newest last
        disk.write_text(run_dir / CONFIG_FILE, dump(config))
        disk.write_json(run_dir / "env.json", environment)
        for name in ("summary.json", "split.json"):
            (run_dir / name).unlink(missing_ok=True)
        with disk.writing(run_dir / "split.json"):
            save_split(split, run_dir / "split.json")
        parameters = sum(p.numel() for p in program.train_step.state.model.parameters())
        said = runlog.opening(config, manifest, split, environment, parameters=parameters, rows=program.layout.total)
        journal.screen.line(said)
        if saved is not None or config.resume == "auto":
            nothing = f"nothing to resume in {run_dir}: starting at step 0"
            journal.screen.line(f"resumed from {saved.path}" if saved else nothing)
    try:
        run.fit(start, preemption)
    except NonFiniteError as error:
        if journal.metrics is not None:
            with suppress(RuntimeError):  # of a disk that is full: the error says the same
                disk.write_json(run_dir / "nonfinite.json", {"step": error.step, "sample_ids": error.ids})
        raise
    finally:
        journal.screen.close()
    if journal.metrics is None:
        return {}
    changed = journal.meta["changed_on_resume"]
    repeats = program.device.type == "cpu" or config.engine.deterministic
    environment |= {"engine": program.prepared, "bit_exact": repeats and not changed, "changed_on_resume": changed}
    summary = summarise(config, manifest, split, environment, journal.metrics, journal.clock, program.layout)
    disk.write_json(run_dir / "env.json", environment)
    disk.write_json(run_dir / "summary.json", summary)
    try:
        page = write_report([run_dir], run_dir / "report.html")
    except BaseException:
        (run_dir / "summary.json").unlink()  # which says that the run is finished
        raise
    journal.screen.line(f"report: {page}")
    return summary


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


def eval_sets(manifest: Manifest, split: Split, device: torch.device, *, threads: int) -> list[EvalSet]:
    """The test set, and the validation images where the split holds some out."""

    def on_device(array: Any) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    sets = [
        EvalSet("test", on_device(read_part(manifest, "test", threads=threads)), on_device(manifest.labels("test")))
    ]
    if len(split.validation):
        images = read_part(manifest, "train", threads=threads, rows=split.validation)
        labels = manifest.labels("train")[split.validation]
        sets.append(EvalSet("validation", on_device(images), on_device(labels)))
    return sets


def guarded(config: Config) -> int:
    """Run, and turn every expected failure into one line and an exit code."""
    try:
        run(config)
    except EXPECTED as error:
        print(one_line(error), file=sys.stderr)
        return exit_code(error)
    return 0


def main(argv: list[str] | None = None) -> int:
    end_with_launcher()
    with tolerate_closed_pipes():
        try:
            config = parse_config(sys.argv[1:] if argv is None else argv)
        except EXPECTED as error:
            print(one_line(error), file=sys.stderr)
            return exit_code(error)
        return guarded(config)


if __name__ == "__main__":
    sys.exit(main())
