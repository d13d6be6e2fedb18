"""Per-sample squared gradients of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_accumulator, check_mask


def embedding_fisher_(
    fisher: Tensor,
    ids: Tensor,
    grad_out: Tensor,
    *,
    padding_idx: int | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Add an embedding's per-sample squared weight gradients to ``fisher``, in place.

    For samples n, tokens t and rows v::

        G[n, v]    = sum of grad_out[n, t] over the t with ids[n, t] = v           [H]
        fisher[v] += sum_n G[n, v]^2                            squared after the sum over t
        sample_scores[n] += sum_{v,h in mask} G[n, v, h]^2

    Only the rows that occur are read and written: the work grows with N T H, whatever V is.

    Args:
        fisher: Accumulator, float32 ``[V, H]``.
        ids: Which row each token took, int32 or int64 ``[N, *]``, from 0 to V - 1.
        grad_out: Gradient at the output ``[N, *, H]``, any floating dtype and strides.
        padding_idx: A row that gets nothing, as in ``torch.nn.Embedding``.
        sample_scores: Accumulator per sample, float32 ``[N]``.
        mask: Which weights count in ``sample_scores``, bool ``[V, H]``; None: all.

    Raises:
        ValueError: Shapes do not fit together, or ids or ``padding_idx`` are out of range. Ids on
            a GPU, or inside ``torch.compile``, are not read here: those stop the op itself, with
            a RuntimeError on a CPU and a device-side assertion on a GPU, as an embedding does.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[2, 0, 2], [2, 1, 1]])
        >>> fisher = torch.zeros(3, 1)
        >>> embedding_fisher_(fisher, ids, torch.ones(2, 3, 1))
        >>> fisher[:, 0]  # row 2: twice in the first sample, once in the second
        tensor([1., 4., 5.])
    """
    if ids.dim() < 1 or grad_out.dim() != ids.dim() + 1 or grad_out.shape[:-1] != ids.shape:
        raise ValueError(
            f"ids {list(ids.shape)} and grad_out {list(grad_out.shape)} must be [N, *] and "
            f"[N, *, H] with the same leading dimensions"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids have dtype {ids.dtype}: pass int32 or int64")
    if not grad_out.is_floating_point():
        raise TypeError(f"grad_out has dtype {grad_out.dtype}: pass a floating-point tensor")
    if fisher.dim() != 2:
        raise ValueError(f"fisher has shape {list(fisher.shape)}, expected [V, H]")
    shape = (fisher.shape[0], grad_out.shape[-1])
    check_accumulator("fisher", fisher, shape)
    if sample_scores is not None:
        check_accumulator("sample_scores", sample_scores, (len(ids),))
    check_mask("mask", mask, shape, sample_scores)
    if padding_idx is not None and not 0 <= padding_idx < len(fisher):
        raise ValueError(f"padding_idx is {padding_idx}, but fisher has {len(fisher)} rows")
    _check_range(ids, len(fisher))
    torch.ops.fishkern.embedding_fisher_(
        fisher, ids, grad_out, padding_idx=padding_idx, sample_scores=sample_scores, mask=mask
    )


def _check_range(ids: Tensor, num_rows: int) -> None:
    if ids.numel() == 0 or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for value in (int(ids.min()), int(ids.max())):
        if not 0 <= value < num_rows:
            raise ValueError(f"ids hold {value}, but fisher has {num_rows} rows")
