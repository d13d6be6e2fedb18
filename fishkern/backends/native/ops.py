"""Calls into the C++ library, ``torch.ops.fishkern_native``: same names, same signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_fisher_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/fisher.cpp``."""
    torch.ops.fishkern_native.linear_fisher_(*args, **kwargs)


def embedding_fisher_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/embedding.cpp``."""
    torch.ops.fishkern_native.embedding_fisher_(*args, **kwargs)


def norm_fisher_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/norm.cpp``."""
    torch.ops.fishkern_native.norm_fisher_(*args, **kwargs)


def conv_fisher_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/conv.cpp``."""
    torch.ops.fishkern_native.conv_fisher_(*args, **kwargs)


def topk_indices(scores: list[Tensor], k: int) -> list[Tensor]:
    """See ``csrc/cpu/topk.cpp``."""
    indices: list[Tensor] = torch.ops.fishkern_native.topk_indices(scores, k)
    return indices


def masked_adamw_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/adamw.cpp``."""
    torch.ops.fishkern_native.masked_adamw_(*args, **kwargs)


def masked_adamw_packed_(params: list[Tensor], grads: list[Tensor], *args: Any) -> None:
    """See ``csrc/cpu/adamw.cpp``; tensors that lie as most do go by their addresses."""
    every = [*params, *grads]
    numels = [*map(Tensor.numel, params)]
    if (
        all(map(Tensor.is_contiguous, every))
        and [t.dtype for t in params].count(params[0].dtype) == len(params)
        and [t.dtype for t in grads].count(grads[0].dtype) == len(params)
        and [*map(Tensor.numel, grads)] == numels
    ):
        at = [*map(Tensor.data_ptr, params)], [*map(Tensor.data_ptr, grads)]
        torch.ops.fishkern_native.masked_adamw_packed_at_.default(
            params[0], grads[0], *at, numels, *args
        )
    else:
        torch.ops.fishkern_native.masked_adamw_packed_(params, grads, *args)
