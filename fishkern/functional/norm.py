"""Per-sample squared gradients of a scale and a shift by feature."""

from __future__ import annotations

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_accumulator, check_mask


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
    """Add the per-sample squared gradients of ``y = x_hat w + b`` to its accumulators, in place.

    For samples n, tokens t and features c::

        weight_fisher[c] += sum_n (sum_t grad_out[n, t, c] x_hat[n, t, c])^2
        bias_fisher[c]   += sum_n (sum_t grad_out[n, t, c])^2
        sample_scores[n] += the same squares, summed over c inside the masks

    in one pass over ``grad_out``. It serves every norm with a weight by feature (``x_hat``: its
    input, normalised), layers that only scale their features (``x_hat``: their input), and biases.

    Args:
        weight_fisher: Accumulator, float32 ``[C]``; None: there is no weight.
        bias_fisher: Accumulator, float32 ``[C]``; None: there is no bias.
        x_hat: What the weight is multiplied with, ``[N, *, C]``, any floating dtype and strides.
            All dimensions between the first and the last are tokens; there may be none. None
            where only the bias is asked for.
        grad_out: Gradient at the output ``[N, *, C]``, as ``x_hat``.
        sample_scores: Accumulator per sample, float32 ``[N]``.
        weight_mask: Which weights count in ``sample_scores``, bool ``[C]``; None: all.
        bias_mask: Which biases do, bool ``[C]``; None: all.

    Raises:
        ValueError: Shapes do not fit together, there is no accumulator, or no ``x_hat`` for
            ``weight_fisher``.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> x_hat, grad_out = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
        >>> fisher = torch.zeros(3)
        >>> norm_fisher_(fisher, None, x_hat, grad_out)
        >>> torch.testing.assert_close(fisher, (grad_out * x_hat).sum(1).square().sum(0))
    """
    if weight_fisher is None and bias_fisher is None:
        raise ValueError("weight_fisher and bias_fisher are None: pass one of them, or both")
    if grad_out.dim() < 2:
        raise ValueError(f"grad_out has shape {list(grad_out.shape)}, expected [N, *, C]")
    if not grad_out.is_floating_point():
        raise TypeError(f"grad_out has dtype {grad_out.dtype}: pass a floating-point tensor")
    if weight_fisher is not None:
        if x_hat is None:
            raise ValueError("x_hat is None, but weight_fisher is to be computed: pass both")
        if x_hat.shape != grad_out.shape:
            raise ValueError(
                f"x_hat has shape {list(x_hat.shape)}, grad_out {list(grad_out.shape)}: they must "
                f"be the same, [N, *, C]"
            )
        if not x_hat.is_floating_point():
            raise TypeError(f"x_hat has dtype {x_hat.dtype}: pass a floating-point tensor")
    shape = (grad_out.shape[-1],)
    for name, fisher, mask in (
        ("weight", weight_fisher, weight_mask),
        ("bias", bias_fisher, bias_mask),
    ):
        if fisher is not None:
            check_accumulator(f"{name}_fisher", fisher, shape)
        elif mask is not None:
            raise ValueError(f"{name}_mask is given, but {name}_fisher is None: pass both")
        check_mask(f"{name}_mask", mask, shape, sample_scores)
    if sample_scores is not None:
        check_accumulator("sample_scores", sample_scores, (len(grad_out),))
    torch.ops.fishkern.norm_fisher_(
        weight_fisher,
        bias_fisher,
        x_hat if weight_fisher is not None else None,
        grad_out,
        sample_scores=sample_scores,
        weight_mask=weight_mask,
        bias_mask=bias_mask,
    )
