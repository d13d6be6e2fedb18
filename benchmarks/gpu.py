"""``make gpu``: on a machine with a CUDA GPU, the tests and quick benchmarks, within some minutes.

``--minutes`` says how many: each step may take its share of them, is stopped when it is over, and
has failed then. Needed are torch, triton and pytest. The results are in benchmarks/results:
<gpu>.csv has the measurements, <gpu>.log says how each step went. ``--dry`` takes the same steps on
a CPU, small, to see that they would run; ``--only`` leaves the others out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import RESULTS, ROOT, describe, machine_name, num_cores

MINUTES = 10.0  # for all steps
PYTHON = sys.executable
# Of the ops' tests those that run on the GPU, and all that are for it alone.
TESTS = ("-k", "triton or gpu", "tests/kernels", "tests/gpu")
EVERY_OP = "tests/gpu/test_every_op.py"
# The machine's own versions: what they deprecate, and which plugins they bring, is not tested here.
PYTEST = (
    *(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"),
    *("-W", "default::DeprecationWarning", "-W", "default::FutureWarning"),
    *("-W", "default:Attempting to run cuBLAS"),  # in a thread that is new to CUDA
)


@dataclass
class Step:
    """A command, and the most that it may take of all the time. ``skip``: why it is left out."""

    what: str
    command: Sequence[str] = ()
    share: float = 1.0
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def gpu_steps() -> Iterator[Step]:
    """What is run on a GPU, most important first."""
    yield Step("environment", (PYTHON, "-m", "fishkern"), 0.25)
    # Most of the time goes into compiling kernels, on the CPU.
    parallel = ("-n", str(min(num_cores(), 14))) if importlib.util.find_spec("xdist") else ()
    yield Step("tests", (*PYTEST, *parallel, *TESTS), 0.4)
    yield sanitizer_step()
    bench = (PYTHON, "-m", "benchmarks.run", "--suite", "quick", "--device", "cuda")
    yield Step("benchmarks", (*bench, "--seconds", "1"), 0.5)


def sanitizer_step() -> Step:
    """Memory checks of every kernel on small tensors, if the CUDA toolkit is there."""
    tool = shutil.which("compute-sanitizer")
    bundled = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    tool = tool or (str(bundled) if bundled.exists() else None)
    if tool is None:
        return Step("sanitizer", skip="compute-sanitizer is not installed (CUDA toolkit)")
    check = (tool, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all")
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    return Step("sanitizer", (*check, *PYTEST, EVERY_OP), 0.2, env)


def dry_steps(folder: Path) -> Iterator[Step]:
    """The same on a CPU: kernels interpreted, the CPU in the GPU's place, results elsewhere."""
    env = {"TRITON_INTERPRET": "1", "FISHKERN_TEST_DEVICE": "cpu"}
    yield Step("environment", (PYTHON, "-m", "fishkern"))
    yield Step("tests are found", (*PYTEST, "--collect-only", *TESTS), env=env)
    yield Step("tests", (*PYTEST, "tests/gpu"), env=env)
    bench = (PYTHON, "-m", "benchmarks.run", "--suite", "tiny", "--no-memory")
    yield Step("benchmarks", (*bench, "--results", str(folder)))


def run_steps(steps: Sequence[Step], log: Path, minutes: float = MINUTES) -> int:
    """Run one after the other; 0 if none failed. The log gets the end of each one's output."""
    budget = 60 * minutes
    end = time.monotonic() + budget
    log.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with log.open("w", encoding="utf-8") as file:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(*(f"{key} {value}" for key, value in describe(device).items()), sep="\n", file=file)
        for step in steps:
            print(f"\n== {step.what}: {' '.join(step.command)}", flush=True)
            start = time.monotonic()
            verdict, output = run_step(step, min(step.share * budget, end - start))
            failed += verdict.startswith("failed")
            line = f"== {step.what}: {verdict}, {time.monotonic() - start:.0f} s"
            print(line, flush=True)
            print("", line, *output[-60:], sep="\n", file=file, flush=True)
    print(f"\n{failed} failed; the log is {log}")
    return min(failed, 1)


def run_step(step: Step, seconds: float) -> tuple[str, list[str]]:
    """How it went in so much time, and the lines that it printed."""
    if step.skip:
        return f"skipped: {step.skip}", []
    if seconds < 5:
        return "failed: no time was left", []
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        verdict = f"failed: exit status {process.returncode}" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers as well
        output, _ = process.communicate()
        verdict = f"failed: stopped after {seconds:.0f} s"
    print(output, flush=True)
    return verdict, output.splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="the same steps on a CPU, small")
    parser.add_argument("--only", action="append", help="a step's name; repeatable")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps (10)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        steps = list(dry_steps(Path(folder)) if args.dry else gpu_steps())
        names = [step.what for step in steps]
        if unknown := set(args.only or ()) - set(names):
            parser.error(f"--only {unknown.pop()}: choose from {', '.join(names)}")
        if not (args.dry or torch.cuda.is_available()):
            print("torch sees no CUDA device; `make gpu-dry` shows the steps", file=sys.stderr)
            return 1
        log = Path(folder, "dry.log") if args.dry else RESULTS / f"{machine_name('cuda')}.log"
        chosen = [step for step in steps if step.what in (args.only or names)]
        return run_steps(chosen, log, args.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
