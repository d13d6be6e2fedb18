"""Selected entries of a linear layer's weight gradient, accumulated."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Numbers of the gradient that are made at a time: far fewer than a large layer has.
_BLOCK = 1 << 18


def linear_selected_grad_(
    selected_grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    indices: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """``selected_grad += (sum_p grad_out[p, rows] x[p, columns]^T).flatten()[indices]``.

    Letters: p token of any sample, o output feature, i input feature. A block of rows at a time,
    so that the gradient is never there as a whole. Everything is computed in
    ``selected_grad.dtype``.
    """
    if rows is not None:
        grad_out = grad_out[..., rows.long()]
    if columns is not None:
        x = x[..., columns.long()]
    dtype, (size_o, size_i) = selected_grad.dtype, (grad_out.shape[-1], x.shape[-1])
    num_tokens = x.shape[:-1].numel()  # not -1: a size may be 0
    grad_out = grad_out.reshape(num_tokens, size_o)
    x = x.reshape(num_tokens, size_i).to(dtype)
    indices = indices.long()
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("indices must ascend, and none may be there twice: sort them")
    height = max(1, _BLOCK // max(size_i, 1))
    edges = torch.arange(0, size_o + height, height, device=indices.device) * size_i
    ends = torch.searchsorted(indices, edges).tolist()
    for block, (begin, end) in enumerate(pairwise(ends)):
        if begin < end:
            first = block * height
            part = grad_out[:, first : first + height].to(dtype).T @ x
            selected_grad[begin:end] += part.flatten()[indices[begin:end] - first * size_i]
