"""Peak memory of one call, beyond what was held before it.

CUDA's allocator counts it. On a CPU the kernel does, for a whole process: each contender gets one
of its own, in which the high-water mark is set back after a first call, so that what is loaded,
compiled or kept for good does not count. No sampling: a short peak is seen as well.

``allocated_peak`` counts what torch's CPU allocator hands out instead: exact to the byte and the
same each time, so that small differences between two ways show, and a test can hold a bound.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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
