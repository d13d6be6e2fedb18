"""Calls into the C++ library, ``torch.ops.fishkern_native``: same names, same signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See ``csrc/cpu/linear.cpp``, but samples of one token are torch's: their squares factor.

    ``sum_n (g_n x_n^T)^2 = (g^2)^T x^2``, a plain matrix product, which torch may be allowed to do
    in less than float32; then it is not asked.
    """
    if (
        x.shape[1:-1].numel() == 1
        and sample_scores is None
        and fisher.dtype == torch.float32
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    ):
        squares = grad_out.flatten(1).float().square()
        fisher.addmm_(squares.T, x.flatten(1).float().square())
        if bias_fisher is not None:
            bias_fisher += squares.sum(0)
    else:
        torch.ops.fishkern_native.linear_fisher_(
            fisher, x, grad_out, bias_fisher=bias_fisher, sample_scores=sample_scores, mask=mask
        )


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


def masked_adamw_packed_(*args: Any) -> None:
    """See ``csrc/cpu/adamw.cpp``; the overload is named: finding it takes a small step long."""
    torch.ops.fishkern_native.masked_adamw_packed_.default(*args)


def masked_adamw_quantized_(*args: Any, **kwargs: Any) -> None:
    """See ``csrc/cpu/adamw_quantized.cpp``."""
    torch.ops.fishkern_native.masked_adamw_quantized_(*args, **kwargs)
