"""Compiled C++ kernels: the library is loaded, or built once, or its absence explained."""

from __future__ import annotations

import os
from functools import cache

import torch

from fishkern.backends.native import build
from fishkern.backends.native.ops import linear_fisher_, masked_adamw_, topk_indices

__all__ = ["DEVICES", "linear_fisher_", "masked_adamw_", "topk_indices", "unavailable"]

DEVICES = ("cpu",)


@cache
def unavailable() -> str | None:
    """None once the library is loaded, else why it could not be, and the remedy."""
    if os.environ.get("FISHKERN_BUILD") == "none":
        return "FISHKERN_BUILD=none is set; unset it to build the C++ kernels on first use"
    try:
        torch.ops.load_library(build.library())
    except build.BuildError as error:
        return str(error)
    except OSError as error:
        return f"the C++ library could not be loaded ({error}); remove {build.cache_dir()}"
    return None
