"""Selected entries of a linear layer's gradient: dot products in C++, or torch's dense product.

Where the caller restricts rows or columns, most of what is left is selected, and the product of
the restricted operands by torch's own library is hard to beat. It is made a block of rows at a
time, so that the gradient is never there as a whole.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_BLOCK = 1 << 18  # numbers of the gradient that are made at a time: 1 MiB of float32


def linear_selected_grad_(
    selected_grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    indices: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Without rows and columns, see ``csrc/cpu/selected_grad.cpp``; also for mixed operands.

    As in torch's own gradient, the dense product's sums of bfloat16 are taken in float32 and
    rounded once.
    """
    dense = {x.dtype, grad_out.dtype} in ({torch.float32}, {torch.bfloat16})
    if not dense or selected_grad.dtype != torch.float32 or (rows is None and columns is None):
        torch.ops.fishkern_native.linear_selected_grad_(
            selected_grad, x, grad_out, indices, rows=rows, columns=columns
        )
        return
    grad_out, x = _restricted(grad_out, rows), _restricted(x, columns)
    size_o, size_i = grad_out.shape[1], x.shape[1]
    height = max(1, _BLOCK // max(size_i, 1))
    ends = [0, len(indices)]
    if size_o > height:
        edges = torch.arange(0, size_o + height, height) * size_i
        ends = torch.searchsorted(indices.long(), edges).tolist()
    for block, (begin, end) in enumerate(pairwise(ends)):
        if begin == end:
            continue
        first = block * height
        g, at = grad_out[:, first : first + height], indices[begin:end] - first * size_i
        if size_i < g.shape[1]:  # a product is faster with its shorter side first
            row = at.div(size_i, rounding_mode="floor")
            part, at = x.T @ g, (at - row * size_i) * g.shape[1] + row
        else:
            part = g.T @ x
        selected_grad[begin:end] += part.flatten().index_select(0, at)


def _restricted(operand: Tensor, features: Tensor | None) -> Tensor:
    """``[*, F]`` as ``[tokens, features]``; what is whole already is not copied."""
    size = operand.shape[-1]
    operand = operand.reshape(operand.shape[:-1].numel(), size)
    if features is None or len(features) == size:  # ascending: all of them
        return operand
    return operand.index_select(1, features)
