"""An embedding tied to the head: one weight ``[V, H]``, read by ids and multiplied by.

A sample's gradient is ``H_n + E_n``: the head's is dense, the embedding's only in the rows of the
sample's own ids. So ``sum_n (H_n + E_n)^2`` is the head's score by the layer's kernel, and then, on
those rows, ``2 H_n E_n + E_n^2``. The head's turn comes first in the backward pass, and its
grad_out ``[N, T, V]`` is the largest tensor there is: what is kept of it are the rows of ``H_n``
that will be needed, ``[N, U, H]`` for the U tokens that the embedding has read.

Both sides have exactly the rules of ``nn.Embedding`` and ``nn.Linear``: one derived from them may
have its weight the other way round (``Conv1D``) or scale its gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.tensors import wide_dtype

__all__ = ["HeadRows", "head_rows", "scatter_rows_"]


class HeadRows(NamedTuple):
    """Of each sample's gradient of the head the rows ``[N, U, H]`` of the sorted ids ``[N, U]``."""

    ids: Tensor
    rows: Tensor

    def cross(self, ids: Tensor, grad_out: Tensor) -> Tensor:
        """``2 H_n[ids] grad_out`` ``[N, T, H]``: summed by id it is ``2 H_n E_n``."""
        place = torch.searchsorted(self.ids, ids.contiguous()).unsqueeze(-1)
        rows = self.rows.gather(1, place.expand(-1, -1, self.rows.shape[-1]))
        return rows.mul_(2).mul_(grad_out)


def head_rows(ids: Tensor, x: Tensor, grad_out: Tensor) -> HeadRows:
    """The rows ``ids`` of ``sum_t grad_out[n, t] x[n, t]^T``.

    Args:
        ids: Integers ``[N, U]``, in any order, also repeated.
        x: The head's input ``[N, T, H]``.
        grad_out: The gradient at its output ``[N, T, V]``.
    """
    wide = wide_dtype(grad_out)
    ids = ids.sort(1).values
    taken = grad_out.gather(2, ids.unsqueeze(1).expand(-1, grad_out.shape[1], -1))
    return HeadRows(ids, taken.to(wide).mT @ x.to(wide))


def scatter_rows_(fisher: Tensor, ids: Tensor, values: Tensor) -> None:
    """``fisher[ids[n, t]] += values[n, t]``, in an order that is the same in each run."""
    ids, values = ids.flatten(), values.flatten(0, 1).to(fisher.dtype)
    if fisher.is_cuda:
        fisher.index_put_((ids,), values, accumulate=True)  # sorts; index_add_ is atomic there
    else:
        fisher.index_add_(0, ids, values)  # one thread; index_put_ is atomic here
