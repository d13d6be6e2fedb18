"""Per-sample squared gradients of a linear layer, accumulated."""

from __future__ import annotations

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
    """``fisher += sum_n (sum_t grad_out[n, t] x[n, t]^T)^2``.

    Letters: n sample, t token, i input feature, o output feature. One sample at a time, so
    that the extra memory is one ``[O, I]`` buffer. Everything is computed in ``fisher.dtype``.
    """
    num_samples, dtype = x.shape[0], fisher.dtype
    num_tokens = x.shape[1:-1].numel()  # not -1: a size may be 0
    x = x.reshape(num_samples, num_tokens, x.shape[-1])
    grad_out = grad_out.reshape(num_samples, num_tokens, grad_out.shape[-1])
    for n in range(num_samples):
        g = grad_out[n].to(dtype)
        square = (g.T @ x[n].to(dtype)).square_()
        fisher += square
        if bias_fisher is not None:
            bias_fisher += g.sum(0).square_()
        if sample_scores is not None:
            sample_scores[n] += (square if mask is None else square[mask]).sum()
