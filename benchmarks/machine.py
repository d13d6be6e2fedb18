"""Where a row was measured, and with which versions of what."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fishkern

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe(device: str) -> dict[str, Any]:
    """The columns that say where and with what a row was measured."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M"),
        "commit": _commit(),
        "fishkern": fishkern.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": machine_name(device),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def machine_name(device: str) -> str:
    """The model of the GPU, or of the CPU with its cores, in letters fit for a file's name."""
    if device == "cuda":
        model = torch.cuda.get_device_name()
    else:
        model = f"{_cpu_model()} {num_cores()} cores"
    return "-".join("".join(c if c.isalnum() else " " for c in model.lower()).split())


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit, marked where the code that is measured differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fishkern", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        # A copy without its repository, as it is brought to a machine with a GPU, is told it.
        return os.environ.get("GIT_COMMIT", "unknown")
