"""Compiled C++ kernels: the library is loaded, or built once, or its absence explained."""

from __future__ import annotations

from functools import cache

import torch

from fishkern.backends.native import build
from fishkern.backends.native.build import cache_dir
from fishkern.backends.native.ops import (
    conv_fisher_,
    embedding_fisher_,
    linear_fisher_,
    masked_adamw_,
    masked_adamw_packed_,
    masked_adamw_quantized_,
    norm_fisher_,
    topk_indices,
)
from fishkern.backends.native.selected_grad import linear_selected_grad_

__all__ = [
    "DEVICES",
    "cache_dir",
    "conv_fisher_",
    "cpu_capability",
    "embedding_fisher_",
    "linear_fisher_",
    "linear_selected_grad_",
    "masked_adamw_",
    "masked_adamw_packed_",
    "masked_adamw_quantized_",
    "norm_fisher_",
    "topk_indices",
    "unavailable",
]

DEVICES = ("cpu",)


@cache
def unavailable() -> str | None:
    """None once the library is loaded, else why it could not be, and the remedy.

    Raises:
        BuildError: ``FISHKERN_BUILD`` insists on the library, and it cannot be built or loaded.
    """
    mode = build.mode()
    if mode == "none":
        return "FISHKERN_BUILD=none is set; unset it to build the C++ kernels on first use"
    try:
        _load()
    except build.BuildError as error:
        if mode != "auto":
            raise
        return str(error)
    return None


def cpu_capability() -> str:
    """The vector instructions that the kernels use here: "baseline", "avx2" or "avx512"."""
    if unavailable() is not None:
        return "unknown without the native backend"
    level: int = torch.ops.fishkern_native.cpu_capability()
    return list(build.INSTRUCTION_SETS)[level]


def _load() -> None:
    library = build.library()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise build.BuildError(
            f"the C++ library does not load ({error}); remove {library} to have it built again"
        ) from error
