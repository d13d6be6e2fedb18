"""Per-sample squared gradients of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_accumulator, check_mask


def linear_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Add a linear layer's per-sample squared weight gradients to ``fisher``, in place.

    For samples n, tokens t, input features i and output features o::

        G[n]    = sum_t grad_out[n, t] x[n, t]^T                      [O, I]
        fisher += sum_n G[n]^2                                        squared after the sum over t
        bias_fisher      += sum_n (sum_t grad_out[n, t])^2
        sample_scores[n] += sum_{o,i in mask} G[n]^2

    This is the diagonal of the empirical Fisher information, up to the factor 1/N, if
    ``grad_out`` is the gradient of the sum of the samples' own losses (Sung et al., "Training
    Neural Networks with Fixed Sparse Masks", 2021, section 3.1).

    Args:
        fisher: Accumulator, float32 ``[O, I]``.
        x: The layer's input ``[N, *, I]``, any floating dtype and strides. All dimensions between
            the first and the last are tokens; there may be none.
        grad_out: Gradient at the layer's output ``[N, *, O]``, as ``x``.
        bias_fisher: Accumulator for the bias, float32 ``[O]``.
        sample_scores: Accumulator per sample, float32 ``[N]``.
        mask: Which weights count in ``sample_scores``, bool ``[O, I]``; None: all.

    Raises:
        ValueError: Shapes do not fit together.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> x, grad_out = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
        >>> fisher = torch.zeros(2, 3)
        >>> linear_fisher_(fisher, x, grad_out)
        >>> per_sample = torch.einsum("nto,nti->noi", grad_out, x)
        >>> torch.testing.assert_close(fisher, per_sample.square().sum(0))
    """
    if x.dim() < 2 or grad_out.dim() != x.dim() or x.shape[:-1] != grad_out.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)} and grad_out {list(grad_out.shape)} must be [N, *, I] and "
            f"[N, *, O] with the same leading dimensions"
        )
    shape = (grad_out.shape[-1], x.shape[-1])
    check_accumulator("fisher", fisher, shape)
    for name, tensor in (("x", x), ("grad_out", grad_out)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: pass a floating-point tensor")
    if bias_fisher is not None:
        check_accumulator("bias_fisher", bias_fisher, shape[:1])
    if sample_scores is not None:
        check_accumulator("sample_scores", sample_scores, (x.shape[0],))
    check_mask("mask", mask, shape, sample_scores)
    torch.ops.fishkern.linear_fisher_(
        fisher, x, grad_out, bias_fisher=bias_fisher, sample_scores=sample_scores, mask=mask
    )
