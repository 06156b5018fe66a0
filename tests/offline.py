"""Compiles Triton kernels for GPUs that are not here and reads what ptxas says of registers and spills.

`fused` counts the multiplications that are, or may yet be, fused with an addition: none where rounding must be exact.

Run as a program, apart from the tests, whose kernels are interpreted: `python -m tests.offline MODULE KERNEL JSON`,
where JSON is a list of cases {"signature": {argument: type or "constexpr"}, "constants": {...}, "num_warps": n}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)


def compile_offline(module: str, kernel: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What `measure` says of each case on each architecture, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.offline", module, kernel, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def measure(function: Any, case: dict[str, Any], architecture: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, signature=case["signature"], constexprs=case["constants"])
    options = {"num_warps": case["num_warps"]}
    if "enable_fp_fusion" in case:
        options["enable_fp_fusion"] = case["enable_fp_fusion"]
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [str(ptxas), "-v", f"--gpu-name=sm_{architecture}{suffix}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        command += [] if case.get("enable_fp_fusion", True) else ["--fmad=false"]  # as Triton calls it
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    fused = len(re.findall(r"\b(?:fma\.rn|mul)(?:\.ftz)?\.f(?:32|64)\b", compiled.asm["ptx"]))
    return {"architecture": architecture, "registers": registers, "spills": spills, "fused": fused}


def main(module: str, kernel: str, cases: str) -> None:
    function = getattr(importlib.import_module(module), kernel)
    print(json.dumps([measure(function, case, a) for case in json.loads(cases) for a in ARCHITECTURES]))


if __name__ == "__main__":
    main(*sys.argv[1:])
