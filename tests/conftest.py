"""Fixtures: seeds, backends. Triton is interpreted where there is no CUDA device."""

import os
from contextlib import nullcontext

# Before torch is imported: tests are small, and threads of theirs would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from fishkern import _dispatch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=_dispatch.BACKENDS)
def backend(request):
    """Run the test once on each backend; one that is missing is a skip that says why.

    Where there is a CUDA device, the triton backend's tests make their tensors on it.
    """
    reason = _dispatch.why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda") if on_gpu else nullcontext(), _dispatch.use_backend(request.param):
        yield request.param


@pytest.fixture
def native():
    """Run the test on the C++ kernels; a skip that says why where there are none."""
    reason = _dispatch.why_not("native")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    with _dispatch.use_backend("native"):
        yield
