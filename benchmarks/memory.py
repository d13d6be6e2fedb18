"""Peak memory of one call, beyond what was held before it; and what is held.

CUDA's allocator counts it. On a CPU the kernel does, for a whole process: each contender gets one
of its own, in which the high-water mark is set back after a first call, so that what is loaded,
compiled or kept for good does not count. No sampling: a short peak is seen as well.

``allocated_peak`` counts what torch's CPU allocator hands out instead: exact to the byte and the
same each time, so that small differences between two ways show, and a test can hold a bound.
``storages`` counts what is held, by a graph for its backward pass (``kept_tensors``), a model or an
optimizer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Config, Missing, Run

# Freed blocks go back to the system at once; malloc would keep them, and show no second peak.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_mib(case: Case, config: Config, device: str, contender: str) -> float:
    """The peak of one call in MiB.

    Raises:
        Missing: The system does not count it, or the process failed.
    """
    if device == "cuda":
        return cuda_peak(case.contenders[contender](case.setup(dict(config), device)))
    if not RESET.exists():
        raise Missing("peak memory on a CPU is read from /proc, which only Linux has")
    job = [case.name, dict(config), contender, torch.get_num_threads()]
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(job)]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"the process that measures memory failed: {done.stderr.strip()[-200:]}")
    return float(done.stdout.split()[-1])


def cuda_peak(run: Run) -> float:
    """The peak of a second call in MiB, by CUDA's allocator."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _cpu_peak(run: Run) -> float:
    run()
    gc.collect()
    before = _kib("VmRSS")
    RESET.write_text("5")
    run()
    return (_kib("VmHWM") - before) / 2**10


def allocated_peak(run: Run) -> int:
    """The most bytes that torch's CPU allocator held during one call, beyond those held before.

    Without what C++ code takes from the system itself (our kernels: under a MiB for each thread).
    """
    gc.collect()  # else what an earlier call left would be returned during this one
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def kept_tensors(output: Tensor) -> list[Tensor]:
    """What the graph behind an output keeps for the backward pass, asked of its nodes.

    Hooks on saved tensors would see as much, but change what a layer may keep.
    """
    seen: set[Any] = set()
    found: list[Any] = []
    left: list[Any] = [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        found += getattr(node, "saved_tensors", ())  # of a function that is written in Python
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            found += value if isinstance(value, (tuple, list)) else [value]
    return [value for value in found if isinstance(value, Tensor)]


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """The bytes of each storage under these tensors, by its place in memory."""
    found = []
    for tensor in tensors:
        if tensor is not None:
            dense = (tensor,)
            if tensor.is_sparse:
                dense = (tensor._indices(), tensor._values())
            found += [part.untyped_storage() for part in dense]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def give_back() -> None:
    """Memory that is free goes back to the system, where malloc is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what modules hold otherwise."""
    seen: set[int] = set()
    return [t for module in model.modules() for t in tensors_in(vars(module), seen)]


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached through containers and attributes."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, Callable)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts = list(value.values()) if isinstance(value, Mapping) else []
    parts += list(value) if isinstance(value, (list, tuple, set)) else []
    parts += list(getattr(value, "__dict__", {}).values())
    parts += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    for part in parts:
        yield from tensors_in(part, seen)


def _kib(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    from benchmarks.cases import CASES

    name, config, contender, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = CASES[name]
    print(_cpu_peak(case.contenders[contender](case.setup(config, "cpu"))))


if __name__ == "__main__":
    main()
