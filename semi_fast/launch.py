"""What launchers leave in the environment: a run refuses what it would not, or wrongly, follow, before it begins."""

from __future__ import annotations

import os

LAUNCHED = "SEMI_FAST_LAUNCHED"
"""Set in the environment of a sweep's runs."""
OF_A_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher of several processes sets all of them; `accelerate launch` of one sets the last two alone."""
NUMBERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
OF_MPI = NUMBERS[-3:]
OFF = ("false", "no", "off", "0")
ALLOWED = {
    "ACCELERATE_USE_DEEPSPEED": OFF,
    "ACCELERATE_USE_FSDP": OFF,
    "ACCELERATE_USE_MEGATRON_LM": OFF,
    "ACCELERATE_USE_PARALLELISM_CONFIG": OFF,
    "ACCELERATE_USE_SAGEMAKER": OFF,
    "ACCELERATE_USE_CPU": (*OFF, "true", "yes", "on", "1"),
    "ACCELERATE_TORCH_DEVICE": (),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": OFF,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": OFF,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": OFF,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16", "fp16"),
}
"""What the engine, which has no other way, can take of accelerate's choices, in small letters."""


def check_environment() -> None:
    """Raise ValueError, which names the variable, for the first one that does not fit a run."""
    given = os.environ
    for name, values in ALLOWED.items():
        if name in given and given[name].lower() not in values:
            rule = f"must be {' or '.join(values)}, or not be set" if values else "must not be set"
            raise ValueError(
                f"{name} in the environment {rule}; got {given[name]!r}: unset it, or mend accelerate's own "
                "configuration if that sets it"
            )
    ranks = [name for name in OF_A_PROCESS[:3] if name in given]
    if ranks and (missing := [name for name in OF_A_PROCESS if not given.get(name)]):
        raise ValueError(
            f"{', '.join(OF_A_PROCESS)} in the environment come from a launcher, all of them or none; {ranks[0]} is "
            f"set, {', '.join(missing)} without a value: unset {', '.join(ranks)}, or start by torchrun or accelerate"
        )
    for name in NUMBERS:
        if name in given and not given[name].isdecimal():
            raise ValueError(f"{name} in the environment must be a whole number; got {given[name]!r}: unset it")
    for name in OF_MPI:
        if not ranks and int(given.get(name, "1")) > 1:
            raise ValueError(
                f"{name} in the environment must be 1 where {', '.join(OF_A_PROCESS[:3])} are not set; got "
                f"{given[name]}: unset it, or start by torchrun or accelerate"
            )
    if ranks and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        got = f"{given['RANK']} and {given['WORLD_SIZE']}"
        raise ValueError(f"RANK in the environment must be less than WORLD_SIZE; got {got}: unset {', '.join(ranks)}")


def started_alone(processes: int) -> str:
    """A line if `accelerate launch` was asked for several processes and has started one; else nothing."""
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if not asked or processes > 1 or "LOCAL_RANK" in os.environ:
        return ""
    return (
        "note: one process: without --multi_gpu, accelerate launch starts no more, whatever --num_processes says; "
        "on a CPU torchrun --nproc_per_node=N -m semi_fast.train starts N"
    )
