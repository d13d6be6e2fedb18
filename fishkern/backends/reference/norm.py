"""Per-sample squared gradients of a scale and a shift by feature, accumulated."""

from __future__ import annotations

from torch import Tensor


def norm_fisher_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    x_hat: Tensor | None,
    grad_out: Tensor,
    *,
    sample_scores: Tensor | None = None,
    weight_mask: Tensor | None = None,
    bias_mask: Tensor | None = None,
) -> None:
    """``weight_fisher += sum_n (sum_t grad_out x_hat)^2``, ``bias_fisher`` the same without x_hat.

    One sample at a time. Each is computed in its accumulator's dtype.
    """
    for n, grad in enumerate(grad_out.flatten(1, -2) if grad_out.dim() > 2 else grad_out[:, None]):
        for fisher, mask, factor in (
            (weight_fisher, weight_mask, x_hat),
            (bias_fisher, bias_mask, None),
        ):
            if fisher is None:
                continue
            terms = grad.to(fisher.dtype)
            if factor is not None:
                terms = terms * factor[n].reshape(terms.shape).to(fisher.dtype)
            square = terms.sum(0).square_()
            fisher += square
            if sample_scores is not None:
                sample_scores[n] += (square if mask is None else square[mask]).sum()
