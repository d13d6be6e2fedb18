"""The device of the GPU's tests. FISHKERN_TEST_DEVICE=cpu runs them, as far as that goes, there."""

import os

import pytest
import torch


@pytest.fixture
def device():
    name = os.environ.get("FISHKERN_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device(name)
