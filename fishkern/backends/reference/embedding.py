"""Per-sample squared gradients of an embedding, accumulated."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_fisher_(
    fisher: Tensor,
    ids: Tensor,
    grad_out: Tensor,
    *,
    padding_idx: int | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``fisher[v] += sum_n (sum_{t: ids[n, t] = v} grad_out[n, t])^2`` for v not ``padding_idx``.

    One sample at a time, and of it the rows of its own ids. Everything is computed in
    ``fisher.dtype``.
    """
    num_samples, num_tokens = ids.shape[0], ids.shape[1:].numel()
    ids = ids.reshape(num_samples, num_tokens)
    grad_out = grad_out.reshape(num_samples, num_tokens, grad_out.shape[-1])
    _check_range(ids, len(fisher))
    for n in range(num_samples):
        rows, place = torch.unique(ids[n], return_inverse=True)
        sums = fisher.new_zeros(len(rows), fisher.shape[1])
        square = sums.index_add_(0, place, grad_out[n].to(fisher.dtype)).square_()
        if padding_idx is not None:
            square[rows == padding_idx] = 0.0
        fisher.index_add_(0, rows, square)
        if sample_scores is not None:
            sample_scores[n] += (square if mask is None else square[mask[rows]]).sum()


def _check_range(ids: Tensor, num_rows: int) -> None:
    if ids.numel() and not (ids.min() >= 0 and ids.max() < num_rows):
        raise RuntimeError(
            f"ids run from {ids.min()} to {ids.max()}, but fisher has {num_rows} rows"
        )
