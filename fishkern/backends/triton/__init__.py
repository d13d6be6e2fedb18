"""Triton kernels, for CUDA tensors; with ``TRITON_INTERPRET=1`` also for CPU tensors, slowly.

The kernels live in one file per op and are imported when an op is first asked for: importing
fishkern does not load triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

# Triton fixes at decoration time whether a kernel is compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)

_FILES = {
    "conv_fisher_": "conv",
    "embedding_fisher_": "embedding",
    "linear_fisher_": "linear",
    "linear_selected_grad_": "selected_grad",
    "masked_adamw_": "adamw",
    "masked_adamw_packed_": "adamw",
    "masked_adamw_quantized_": "adamw_quantized",
    "norm_fisher_": "norm",
}


def unavailable() -> str | None:
    """None where Triton kernels can run, else why not and the remedy."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device; set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
    return None


def __getattr__(name: str) -> Any:
    """Load an op's file when the op is first used."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
