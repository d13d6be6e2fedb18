"""Compile every kernel variant ahead of time, without a GPU, and refuse spilled registers.

``python -m fishkern.backends.triton.aot`` compiles the launches of ``variants.py`` for each GPU
architecture, and reads registers, stack and shared memory from the machine code. A variant that
fails to compile, spills (its registers overflow into memory), or needs more shared memory than
every GPU has, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fishkern.backends.triton import INTERPRETED
from fishkern.backends.triton.launch import Launch
from fishkern.backends.triton.variants import TYPES, variants

ARCHITECTURES = (80, 90)
SHARED_LIMIT = 99 * 1024  # bytes: what a program may use on the smallest GPUs since Ampere


def source(launch: Launch) -> ASTSource:
    """The launch as source to compile, its arguments specialised as Triton's launcher does.

    Constants, None and integers equal to 1 are compiled in; addresses and integers that are
    multiples of 16 are promised to be.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        by_value = not param.do_not_specialize
        aligned = by_value and not param.do_not_specialize_on_alignment
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and by_value):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[param.name], aligned = "fp32", False
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = aligned and value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


class Usage(NamedTuple):
    """What one variant takes on one architecture."""

    name: str
    architecture: int
    registers: int = 0
    stack: int = 0  # bytes per thread, spilled registers among them
    shared: int = 0  # bytes per program
    seconds: float = 0.0
    error: str = ""


def measure(number: int, architecture: int, quick: bool) -> Usage:
    """Compile one variant of the table and read its resources from the machine code."""
    name, launch = list(variants(quick))[number]
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options
        )
        usage = _resources(compiled.asm["cubin"])
    except Exception as error:  # every variant is to be reported, whatever befell it
        return Usage(name, architecture, error=f"{type(error).__name__}: {error}")
    shared, seconds = compiled.metadata.shared, time.perf_counter() - start
    stack = usage["STACK"] + usage["LOCAL"]
    problems = []
    if stack > 0:
        problems.append(f"spills {stack} bytes per thread")
    if shared > SHARED_LIMIT:
        problems.append(f"needs {shared} bytes of shared memory, {SHARED_LIMIT} are there")
    return Usage(
        name, architecture, usage["REG"], stack, shared, seconds, error="; ".join(problems)
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on, of the one function in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", listing)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise RuntimeError(f"no resource usage in cuobjdump's listing: {listing!r}")
    return usage


def _cuobjdump() -> str:
    """The tool that triton's package carries, else the one on the PATH."""
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(carried) if carried.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump is neither in triton's package nor on the PATH")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line per variant and architecture, and count the failures."""
    parser = argparse.ArgumentParser(
        prog="python -m fishkern.backends.triton.aot",
        description="Compile every Triton kernel without a GPU.",
    )
    parser.add_argument("--quick", action="store_true", help="one variant or two of each kernel")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=ARCHITECTURES,
        help="compute capabilities, 80 90 100 120 (default: 80 90)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it")

    names = [name for name, _ in variants(options.quick)]
    jobs = [(i, arch, options.quick) for arch in options.arch for i in range(len(names))]
    width = max(map(len, names))
    print(f"{'':9} {'variant':{width}} arch  registers  stack  shared  seconds")
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        results = pool.map(measure, *zip(*jobs, strict=True))
        for done, usage in enumerate(results, 1):
            failed += bool(usage.error)
            print(
                f"{done:4}/{len(jobs):<4} {usage.name:{width}} {usage.architecture:4} "
                f"{usage.registers:10} {usage.stack:6} {usage.shared:7} {usage.seconds:8.1f}"
                f"{'  FAILED: ' + usage.error if usage.error else ''}",
                flush=True,
            )
    print(f"{len(jobs)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
