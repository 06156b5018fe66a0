"""The levels of a step: which one is chosen, that all compute the same, and how a level that fails ends."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from benchmarks import operations
from semi_fast import train
from semi_fast.data_prep.long_tail import split_for
from semi_fast.loop import levels
from semi_fast.loop.capture import WARM_UP, CaptureError, on_side_stream, rehearse
from semi_fast.loop.levels import Level, ladder
from semi_fast.loop.program import Program
from semi_fast.loop.step import TrainStep
from semi_fast.ops import door
from semi_fast.pipelines import source
from semi_fast.prepared.manifest import load_manifest, seal_split
from semi_fast.rundir import checkpoint
from semi_fast.schema.config import Config
from semi_fast.schema.engine import EngineConfig
from semi_fast.train import guarded, run

from . import generated, tape
from .conftest import DEVICE
from .tiny import config, on_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE = {"several_processes": False, "synchronised": False}
METHODS = {
    "supervised": ("--method.name=supervised", "--method.plugins=[la]"),
    "fixmatch": ("--method.name=fixmatch", "--method.plugins=[la]"),
    "semi": ("--method.name=semi",),
    "paper": ("--method.name=semi", "--method.semi.preset=paper", "--method.semi.bank_sampling=6"),
}


def names(found: tuple[list[Level], str]) -> list[tuple[str, bool]]:
    return [(level.name, level.compiled) for level in found[0]]


def test_auto_goes_down_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "OBSTACLE", "")
    whole = [("graph", True), ("graph", False), ("compile", True), ("eager", False)]
    assert names(ladder(EngineConfig(), CUDA, **ALONE)) == whole
    assert names(ladder(EngineConfig(), CUDA, several_processes=False, synchronised=True)) == [whole[1], whole[3]]
    monkeypatch.setattr(door, "OBSTACLE", "Triton is not installed")
    assert names(ladder(EngineConfig(), CUDA, **ALONE)) == [whole[1], whole[3]]
    assert ladder(EngineConfig(), CUDA, **ALONE)[1] == "Triton is not installed, and torch.compile needs it"
    assert names(ladder(EngineConfig(), CPU, **ALONE)) == [("eager", False)]
    assert "a cpu has no CUDA graphs" in ladder(EngineConfig(), CPU, **ALONE)[1]
    monkeypatch.setattr(levels.dist, "get_backend", lambda: "gloo")
    assert (
        "the processes exchange by gloo" in ladder(EngineConfig(), CUDA, several_processes=True, synchronised=False)[1]
    )


def test_a_level_that_cannot_be_is_refused_in_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(config(digits, tmp_path / "run", "--engine.level=graph")) == 2
    assert "engine.level=graph cannot be: a cpu has no CUDA graphs; use --engine.level=auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"engine\.level=compile cannot be: model\.bn=sync exchanges"):
        ladder(EngineConfig(level="compile"), CPU, several_processes=True, synchronised=True)


@pytest.fixture
def program(digits: Path, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """The program of a small run, in memory; with `made=on_device` on a GPU where there is one."""

    def build(*flags: str, made: Callable[..., Config] = config) -> Program:
        options = made(digits, tmp_path / "run", *flags)
        manifest = load_manifest(digits)
        split = seal_split(split_for(manifest, "run", options.split))
        accelerator = Accelerator(cpu=options.device == "cpu")
        return train.build(options, manifest, split, accelerator, run_dir=tmp_path, meta={}, stack=stack).program

    with ExitStack() as stack:
        yield build


def contents(program: Program) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in program.changed()}


def test_heads_are_evaluated_in_one_order(program: Callable[..., Program]) -> None:
    """Processes exchange their counts head by head; the order of a set is each process's own."""
    steps = program("--method.name=semi")
    needs = steps.train_step.method.needs
    assert list(steps.evaluations[0].counts) == list(needs.heads) == ["head", "balanced_head"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rehearsal_leaves_no_trace(program: Callable[..., Program], precision: str, device: torch.device) -> None:
    """At the start, and in the middle of a run and of a log interval."""
    steps = program(f"--precision={precision}", "--engine.level=eager", made=on_device)
    for begin in (0, 4):
        for step in range(begin, begin + 4):
            steps.draws.renew(step)
            before = contents(steps)
            rehearse(steps.work, steps.changed, device)
            after = contents(steps)
            later = [name for name in after if name not in before or before[name].shape != after[name].shape]
            assert later == (["interval.sums"] if step == 0 else [])
            assert all(not after[name].any() for name in later)
            assert all(torch.equal(before[name], after[name]) for name in before if name not in later)
            steps.one_step(step)
        assert any(not torch.equal(before[name], tensor) for name, tensor in contents(steps).items())


def test_a_rehearsal_reads_what_the_next_steps_read(
    program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a run goes on at the end of a block of orders, too: else it would meet sample 0, which has no label."""
    monkeypatch.setattr(TrainStep, "compile", lambda *_, **__: None)  # how is not the question
    steps = program("--engine.level=compile", "--split.rule=daso", "--split.seed=1")
    assert steps.labels[0] == -1
    labeled = steps.draws.streams[0]
    last = labeled.table[0].numel() // labeled.rows - 1  # of the first block
    steps.train_step.state.step.fill_(last)
    read, seen = steps.source.read, []

    def watched(ids: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(ids.tolist())
        read(ids, out)

    steps.source.read = watched  # type: ignore[method-assign]
    steps.one_step(last)
    wanted = (*range(last, last + WARM_UP), last)  # the rehearsal, then the step
    assert seen == [steps.batches.share(step).ids.tolist() for step in wanted]


def test_a_rehearsal_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps it for the stream of the rehearsal, on which nothing runs again."""
    done = MagicMock()
    for name in ("current_stream", "Stream", "stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(done, name))
    done.stream.return_value.__exit__.return_value = None
    on_side_stream(done.work, CUDA, 2)
    assert [call[0] for call in done.mock_calls if call[0] in ("work", "empty_cache")] == [
        "work",
        "work",
        "empty_cache",
    ]


def test_a_rehearsal_restores_after_a_failure_too(program: Callable[..., Program]) -> None:
    steps = program()
    steps.one_step(0)
    before = contents(steps)

    def failing() -> None:
        steps.work()
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        rehearse(failing, steps.changed, CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in contents(steps).items())


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "step_000000012" / "state.safetensors")


def records(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "rows_per_second")
    return [{key: value for key, value in record.items() if key not in clock} for record in found]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on steps are captured: on a GPU as a graph, elsewhere as a recording (see tests/tape.py), which
    needs fixed shapes, as a GPU does."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(door, "values_at_hand", lambda device: False)
        monkeypatch.setattr("semi_fast.ops.rand_augment.has_compiled_views", lambda device: False)
        monkeypatch.setattr("semi_fast.loop.program.Graph", tape.Replay)
    captured = [Level(captured=True, compiled=False)], ""
    return lambda: monkeypatch.setattr(train, "ladder", lambda *_, **__: captured)


def different(one: Path, other: Path) -> list[str]:
    """Names of what two runs do not share bit for bit."""
    ours, theirs = final(one), final(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(("method", "rows"), [*((method, "resident") for method in METHODS), ("semi", "read ahead")])
def test_a_step_that_is_captured_trains_the_same(
    method: str,
    rows: str,
    digits: Path,
    tmp_path: Path,
    device: torch.device,
    captures: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step, the sampling, the statistics and the evaluation; a thread that reads ahead goes on meanwhile."""
    monkeypatch.setattr(source, "FITS", 0.0 if rows == "read ahead" else source.FITS)
    flags = (*METHODS[method], "--engine.level=eager")
    run(on_device(digits, tmp_path / "eager", *flags))
    captures()
    run(on_device(digits, tmp_path / "graph", *flags))
    assert json.loads((tmp_path / "graph" / "env.json").read_text())["engine"]["level"] == "graph"
    assert different(tmp_path / "eager", tmp_path / "graph") == []
    assert records(tmp_path / "eager") == records(tmp_path / "graph")


def test_captured_fp16_steps_overflow_as_eager_ones_do(
    digits: Path, tmp_path: Path, device: torch.device, captures: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale that is too large: steps are left out until it has fallen, then the network learns."""
    if device.type == "cpu":
        pytest.skip("on a CPU the scaler of fp16 reads a value in every step, which no recording can hold")
    scaler, largest = torch.amp.GradScaler, 2.0**20
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=largest))
    flags = ("--precision=fp16", "--engine.level=eager")
    run(on_device(digits, tmp_path / "eager", *flags))
    captures()
    run(on_device(digits, tmp_path / "graph", *flags))
    assert different(tmp_path / "eager", tmp_path / "graph") == []
    for name in ("eager", "graph"):
        meta = checkpoint.load(tmp_path / name / "checkpoints" / "step_000000012").meta
        assert 2.0**10 < meta["scaler"]["scale"] < largest
    assert any("momentum" in name and tensor.any() for name, tensor in final(tmp_path / "graph").items())


@pytest.mark.parametrize("captured", [False, True])
def test_neither_steps_nor_evaluations_wait(
    captured: bool, program: Callable[..., Program], device: torch.device
) -> None:
    """On a GPU torch raises where the host would; the recording above and the counts of dispatched operations show it
    elsewhere."""
    if device.type == "cpu":
        pytest.skip("a CPU has nothing to wait for")
    steps = program("--precision=bf16", "--engine.level=eager", made=on_device)
    steps.levels = [Level(captured=captured, compiled=False)]
    evaluation = steps.evaluations[0]
    steps.one_step(0)
    evaluation.confusions()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 20):
            steps.one_step(step)
        evaluation.at.fill_(evaluation.first)
        for _ in range(evaluation.batches):
            evaluation.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps.check_finite()


def test_a_capture_notices_what_python_decides(
    digits: Path, tmp_path: Path, device: torch.device, captures: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: a schedule that counts in Python stands still in a graph."""
    calls: list[int] = []

    def counted(step: torch.Tensor, *, base: float, steps: int) -> torch.Tensor:
        calls.append(1)
        return torch.full((), base / len(calls), dtype=torch.float64, device=step.device)

    monkeypatch.setattr("semi_fast.loop.step.cosine_7_16", counted)
    flags = ("--method.name=supervised", "--engine.level=eager")
    run(on_device(digits, tmp_path / "eager", *flags))
    calls.clear()
    captures()
    run(on_device(digits, tmp_path / "graph", *flags))
    assert different(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_are_traced_once_and_compute_the_same(
    method: str, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps without a graph break or a second trace; in float64, where rounding does not hide a difference."""
    eager = program("--precision=fp64", *METHODS[method])
    torch._dynamo.reset()
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("semi_fast.loop.levels.torch.compile", lambda f, *, options, **kept: backend(f, **kept))
    compiled = program("--precision=fp64", "--engine.level=compile", *METHODS[method])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(20):
            eager.one_step(step)
            compiled.one_step(step)
    assert compiled.prepared["compiled"]
    ours, theirs = contents(eager), contents(compiled)
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-11)
        else:
            assert torch.equal(theirs[name], tensor), name


@pytest.mark.interpreted
@pytest.mark.parametrize("method", METHODS)
def test_the_form_that_a_gpu_compiles_is_traced_whole(
    method: str, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with kernels in place of references, as opaque operations, in float32."""
    torch._dynamo.reset()
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("semi_fast.loop.levels.torch.compile", lambda f, *, options, **kept: backend(f, **kept))
    with operations.as_on_a_gpu(), torch._dynamo.config.patch(error_on_recompile=True):
        eager = program(*METHODS[method])
        compiled = program("--engine.level=compile", *METHODS[method])
        for step in range(3):
            eager.one_step(step)
            compiled.one_step(step)
    ours, theirs = contents(eager), contents(compiled)
    for name, tensor in ours.items():
        if tensor.is_floating_point() and name.startswith(("model.", "average.", "interval.")):
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_code_that_a_gpu_would_run_trains_as_eager_does(
    precision: str, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's own kernels, written for an H200, and ours, in Triton's interpreter: two steps and an evaluation.

    In bf16 the code with small kernels made one gives the bits of the code without.
    """
    flags = (f"--precision={precision}", "--method.name=semi", "--batch.labeled=2", "--eval.batch=16")
    codes: list[str] = []

    def trained(options: dict[str, Any] | None) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        steps = program(*flags)
        if options is not None:
            made = generated.backend(levels.inductor_options(Level(captured=True, compiled=True)) | options, codes)
            steps.compile(functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=made))
        steps.run = steps.work
        for step in range(2):
            steps.one_step(step)
        steps.evaluations[0].run()
        return contents(steps) | dict(steps.evaluations[0].changed())

    with operations.as_on_a_gpu():
        ours = trained({})
        theirs = trained({"combo_kernels": False} if precision == "bf16" else None)
    parts = 6  # sampling, forward, backward, bookkeeping, sums, evaluation
    assert len(codes) == (2 if precision == "bf16" else 1) * parts
    for name, tensor in theirs.items():
        if precision == "bf16" or not tensor.is_floating_point():
            assert torch.equal(ours[name], tensor), name
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


COMPILED = [Level(captured, compiled=True) for captured in ((False, True) if DEVICE.type == "cuda" else (False,))]


@pytest.mark.parametrize("level", COMPILED, ids=lambda level: level.name)
def test_inductor_trains_as_eager_does(level: Level, program: Callable[..., Program], device: torch.device) -> None:
    """What runs by default: on a CPU its C++ code, on a GPU its kernels, captured too. Six steps of SeMi and an
    evaluation in float64, where rounding does not hide a difference."""
    torch._dynamo.reset()

    def trained(level: Level) -> dict[str, torch.Tensor]:
        steps = program("--precision=fp64", "--engine.level=eager", "--method.name=semi", made=on_device)
        steps.levels = [level]
        for step in range(6):
            steps.one_step(step)
        counts = steps.evaluations[0].confusions()
        assert (steps.prepared["level"], steps.prepared["compiled"]) == (level.name, level.compiled)
        return contents(steps) | {f"evaluation.{name}": torch.from_numpy(counts[name]) for name in counts}

    eager, compiled = trained(Level(captured=False, compiled=False)), trained(level)
    for name, tensor in eager.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-11)
        else:
            assert torch.equal(compiled[name], tensor), name


def switches_of_torch() -> list[object]:
    cudnn = torch.backends.cudnn
    tag = torch.compiler.config.cache_key_tag
    return [tag, torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.deterministic]


@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_is_left_as_it_was(deterministic: bool) -> None:
    """After a failure too; while the run lasts, what it compiles later finds the switches as the first step did."""
    before = switches_of_torch()

    def fails() -> None:
        with levels.switches(EngineConfig(deterministic=deterministic), CUDA):
            tag = f"semi_fast {levels.sources_of_operations()}"
            assert switches_of_torch() == [tag, "high", not deterministic, deterministic]
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails()
    assert switches_of_torch() == before


def test_a_run_leaves_torch_as_it_was_and_tells_the_compiler_of_its_own_code_alone(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's switches are a thread's, and on a GPU another one compiles the backward: they come as options."""
    from torch._inductor import config as inductor

    told: list[dict[str, object]] = []

    def compile(f: Callable[..., Any], *, options: dict[str, object], **_: object) -> Callable[..., Any]:
        told.append(options)
        assert torch.compiler.config.cache_key_tag.startswith("semi_fast ")
        return f

    monkeypatch.setattr("semi_fast.loop.levels.torch.compile", compile)
    before = switches_of_torch()
    flags = ("--engine.level=compile", "--optim.steps=2", "--eval.every=2", "--method.name=supervised")
    run(config(digits, tmp_path / "a", "--engine.deterministic=true", *flags))
    run(config(digits, tmp_path / "b", "--engine.autotune=true", *flags))
    common = {"combo_kernels": True}
    tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
    parts = 5  # sampling, forward and loss, bookkeeping, sums; an evaluation
    assert told == [common | {"deterministic": True}] * parts + [common | {"deterministic": False} | tuned] * parts
    assert switches_of_torch() == before
    assert not inductor.deterministic


def failing_levels(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    original = Program.at

    def at(self: Program, level: Level) -> Callable[[], None]:
        if level.name != "eager":
            rehearse(self.work, self.changed, CPU, times=1)
            raise error
        return original(self, level)

    monkeypatch.setattr(Program, "at", at)


def test_a_level_that_fails_is_named_and_the_next_one_trains_as_if_it_had_not_been(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(digits, tmp_path / "eager"))
    failing_levels(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore of it"))
    both = [Level(captured=True, compiled=False), Level(captured=False, compiled=False)]
    monkeypatch.setattr(train, "ladder", lambda *_, **__: (both, ""))
    capsys.readouterr()
    run(config(digits, tmp_path / "fallen"))
    said = capsys.readouterr().out
    assert "engine: graph failed (operation not permitted when stream is capturing); trying the next level" in said
    assert "engine: eager: every operation is dispatched" in said
    ours, theirs = final(tmp_path / "eager"), final(tmp_path / "fallen")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_compilers_may_raise_anything_and_memory_may_be_the_reason(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OutOfResources(Exception):
        """As Triton's, which is no RuntimeError."""

    both = [Level(captured=True, compiled=True), Level(captured=False, compiled=False)]
    monkeypatch.setattr(train, "ladder", lambda *_, **__: (both, ""))
    failing_levels(monkeypatch, OutOfResources("shared memory"))
    run(config(digits, tmp_path / "fallen"))
    assert "engine: graph failed (shared memory); trying the next level" in capsys.readouterr().out
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    failing_levels(monkeypatch, wrapped)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    assert guarded(config(digits, tmp_path / "full", "--precision=bf16")) == 3
    error = capsys.readouterr().err.strip()
    assert error.startswith("semi-fast: out of memory at the first step: CUDA out of memory.")
    assert error.endswith("lower --batch.labeled or --eval.batch"), "a bf16 run is not told to use bf16"


def test_a_capture_that_fails_ends_the_run_with_its_cause(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch ends a capture with an error of its own, which hides what led to it."""

    class Failing:
        """torch.cuda.graph as it behaves."""

        def __init__(self, *_: object, **__: object): ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def refuse(*_: object) -> None:
        raise RuntimeError("this operation waits")

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(train, "ladder", lambda *_, **__: ([Level(captured=True, compiled=False)], ""))
    monkeypatch.setattr("semi_fast.loop.program.rehearse", lambda *_, **__: None)
    monkeypatch.setattr("semi_fast.loop.evaluation.Evaluation.one_batch", refuse)
    assert guarded(config(digits, tmp_path / "run")) == 3
    error = capsys.readouterr().err.strip()
    assert error == (
        "semi-fast: the step could not be captured: RuntimeError: this operation waits; use --engine.level=compile"
    )


SHORT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
)


@pytest.mark.parametrize("cause", SHORT_OF_MEMORY, ids=str)
def test_memory_is_named_before_the_level_that_met_its_end(
    cause: Exception, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A capture, whose end raises an error of its own; libraries, which have allocators of their own."""
    ended = RuntimeError("operation failed due to a previous error during capture")
    ended.__context__ = cause
    failed = CaptureError(f"{type(cause).__name__}: {cause}")
    failed.__cause__ = ended
    failing_levels(monkeypatch, failed)
    monkeypatch.setattr(train, "ladder", lambda *_, **__: ([Level(captured=True, compiled=False)], ""))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    assert guarded(config(digits, tmp_path / "run")) == 3
    assert capsys.readouterr().err.startswith(f"semi-fast: out of memory at the first step: {cause}")


def test_what_is_no_lack_of_memory_is_not_taken_for_one() -> None:
    for text in ("out of resource: shared memory", "CUDNN_STATUS_NOT_SUPPORTED", "an illegal memory access"):
        assert levels.out_of_memory(RuntimeError(text)) is None


def test_a_run_that_goes_on_at_another_level_says_so(
    digits: Path, tmp_path: Path, captures: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint.every=6", "--checkpoint.keep=9")
    run(config(digits, tmp_path / "run", *flags))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000012")
    captures()
    capsys.readouterr()
    run(config(digits, tmp_path / "run", *flags, resume="auto"))
    assert "warning: engine.level was eager" in capsys.readouterr().out


def test_the_only_level_ends_the_run_in_one_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_levels(monkeypatch, RuntimeError("graph break in user code"))
    assert guarded(config(digits, tmp_path / "run", "--engine.level=compile")) == 3
    error = capsys.readouterr().err.strip()
    assert error == "semi-fast: engine.level=compile failed: graph break in user code; use --engine.level=eager"


def test_a_memory_that_is_too_small_is_said_with_numbers_and_flags(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_levels(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 135 * 2**30)
    assert guarded(config(digits, tmp_path / "run", "--engine.level=compile")) == 3
    assert capsys.readouterr().err.strip() == (
        "semi-fast: out of memory at the first step: CUDA out of memory. Tried to allocate 2.00 GiB. This run had "
        "taken 135.0 GiB, 3.0 of 140.0 GiB are free; lower --batch.labeled or --eval.batch, or use --precision=bf16"
    )
