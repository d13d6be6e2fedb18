"""What every op's kernels are put through: threads, instruction sets, memory that is not theirs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]


def assert_same_with_any_threads(run):
    """``run() -> tensors`` gives the same bits with one, two and three threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def pass_on_instruction_set(check, isa):
    """Call a test module's ``check()`` with the C++ kernels for ``isa``, or skip on an older CPU.

    In a process of its own: the instruction set is chosen once.
    """
    program = (
        "import torch, fishkern\n"
        f"from {check.__module__} import {check.__name__} as check\n"
        "with fishkern.use_backend('native'): check()\n"
        "print(torch.ops.fishkern_native.cpu_capability())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "FISHKERN_CPU_CAPABILITY": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    used = INSTRUCTION_SETS[int(done.stdout)]
    if used != isa:
        pytest.skip(f"this CPU has {used} at most")


def poisoned(tensor, *, step=1):
    """The same values as a view, of every ``step``-th entry, into a tensor full of NaN."""
    *sizes, last = tensor.shape
    large = torch.full(
        [*(size + 4 for size in sizes), last * step + 4], math.nan, dtype=tensor.dtype
    )
    view = large[(*(slice(2, -2) for _ in sizes), slice(2, 2 + last * step, step))]
    view.copy_(tensor)
    return view
