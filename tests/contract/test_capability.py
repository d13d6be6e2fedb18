"""The kernels' variants for older CPUs: the same unit tests, in a process that is held back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fishkern import _dispatch, _ops
from fishkern.backends import native

ROOT = Path(__file__).resolve().parents[2]
LEVELS = list(native.build.INSTRUCTION_SETS)
KERNEL_TESTS = [
    path
    for op in _ops.SCHEMAS
    for path in (ROOT / "tests/kernels").glob(f"test_{op.rstrip('_')}*.py")
]


def run(capability, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"FISHKERN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module", autouse=True)
def here():
    """What this machine can do."""
    if reason := _dispatch.why_not("native"):
        pytest.skip(reason)
    return native.cpu_capability()


@pytest.mark.slow
@pytest.mark.parametrize("capability", LEVELS[:-1])
def test_kernels_of_older_cpus(here, capability):
    if LEVELS.index(capability) > LEVELS.index(here):
        pytest.skip(f"this machine has {here} only")
    result = run(capability, "-m", "pytest", "-q", "-m", "not slow", "-k", "native", *KERNEL_TESTS)
    assert result.returncode == 0, result.stdout[-3000:]


def test_capability_is_lowered_but_not_raised(here):
    code = "from fishkern.backends import native; print(native.cpu_capability())"
    assert run("baseline", "-c", code).stdout.strip() == "baseline"
    assert run("avx512", "-c", code).stdout.strip() == here
    result = run("avx1024", "-c", code)
    assert "FISHKERN_CPU_CAPABILITY is 'avx1024': set baseline, avx2 or avx512" in result.stderr
