"""Per-sample squared gradients of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_accumulator, check_mask


def conv_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Add a convolution's per-sample squared weight gradients to ``fisher``, in place.

    For samples n, positions p of the output, and the patch of the input ``[C / groups, *K]`` that
    the kernel sees there::

        G[n]    = sum_p grad_out[n, :, p] patch(x[n], p)^T            [O, C / groups, *K]
        fisher += sum_n G[n]^2                                        squared after the sum over p
        bias_fisher      += sum_n (sum_p grad_out[n, :, p])^2
        sample_scores[n] += sum of G[n]^2 inside mask

    ``linear_fisher_`` with positions as tokens, but for the patches: they are read from ``x``
    where they are, and never written out for more than a few positions (in plain torch: for one
    sample). ``x`` is padded with zeros; for another ``padding_mode`` pad it first.

    Args:
        fisher: Accumulator of the weight's shape, float32 ``[O, C / groups, *K]``, with one to
            three spatial dimensions.
        x: The layer's input ``[N, *, C, *S]``, any floating dtype and strides. Dimensions between
            the first and the channels are several calls of the same layer, whose gradients are
            summed before the square; there may be none.
        grad_out: Gradient at the layer's output ``[N, *, O, *P]``, as ``x``.
        bias_fisher: Accumulator for the bias, float32 ``[O]``.
        stride: As of ``torch.nn.functional.conv2d``, and so are the next three.
        padding: Zeros on both sides of each spatial dimension.
        dilation: Distance of the kernel's entries.
        groups: Into how many convolutions side by side the channels are split.
        sample_scores: Accumulator per sample, float32 ``[N]``.
        mask: Which weights count in ``sample_scores``, bool of the weight's shape; None: all.

    Raises:
        ValueError: Shapes do not fit together, or not to stride, padding, dilation and groups.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(3, 2, kernel_size=3, padding=1, bias=False)
        >>> x, grad_out = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5)
        >>> fisher = torch.zeros_like(conv.weight)
        >>> conv_fisher_(fisher, x, grad_out, padding=1)
        >>> truth = torch.zeros_like(fisher)
        >>> for n in range(4):
        ...     grad, = torch.autograd.grad(conv(x[n : n + 1]), conv.weight, grad_out[n : n + 1])
        ...     truth += grad.square()
        >>> torch.testing.assert_close(fisher, truth)
    """
    dims = fisher.dim() - 2
    if not 1 <= dims <= 3:
        raise ValueError(
            f"fisher has shape {list(fisher.shape)}, expected [O, C / groups, *K] with one to "
            f"three spatial dimensions"
        )
    geometry = {
        name: _each(name, value, dims, least)
        for name, value, least in (
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        )
    }
    shape = tuple(fisher.shape)
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups is {groups}, but fisher has {shape[0]} outputs: one must divide")
    lead = x.dim() - dims - 1
    if lead < 1 or grad_out.dim() != x.dim() or x.shape[:lead] != grad_out.shape[:lead]:
        raise ValueError(
            f"x {list(x.shape)} and grad_out {list(grad_out.shape)} must be [N, *, C, *S] and "
            f"[N, *, O, *P] with the same leading dimensions, and {dims} spatial ones as fisher"
        )
    if x.shape[lead] != shape[1] * groups or grad_out.shape[lead] != shape[0]:
        raise ValueError(
            f"x has {x.shape[lead]} channels and grad_out {grad_out.shape[lead]}, but fisher "
            f"{list(shape)} with groups={groups} is of {shape[1] * groups} and {shape[0]}"
        )
    positions = [
        (size + 2 * geometry["padding"][d] - geometry["dilation"][d] * (shape[2 + d] - 1) - 1)
        // geometry["stride"][d]
        + 1
        for d, size in enumerate(x.shape[lead + 1 :])
    ]
    if list(grad_out.shape[lead + 1 :]) != positions:
        raise ValueError(
            f"grad_out has positions {list(grad_out.shape[lead + 1 :])}, but x {list(x.shape)} "
            f"with {', '.join(f'{k}={v}' for k, v in geometry.items())} makes {positions}"
        )
    for name, tensor in (("x", x), ("grad_out", grad_out)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: pass a floating-point tensor")
    check_accumulator("fisher", fisher, shape)
    if bias_fisher is not None:
        check_accumulator("bias_fisher", bias_fisher, shape[:1])
    if sample_scores is not None:
        check_accumulator("sample_scores", sample_scores, (x.shape[0],))
    check_mask("mask", mask, shape, sample_scores)
    torch.ops.fishkern.conv_fisher_(
        fisher,
        x,
        grad_out,
        bias_fisher=bias_fisher,
        **geometry,
        groups=groups,
        sample_scores=sample_scores,
        mask=mask,
    )


def _each(name: str, value: int | Sequence[int], dims: int, least: int) -> list[int]:
    """One number for each spatial dimension."""
    numbers = [value] * dims if isinstance(value, int) else list(value)
    if len(numbers) != dims or not all(isinstance(v, int) and v >= least for v in numbers):
        raise ValueError(f"{name} is {value!r}: pass an int of at least {least}, or {dims} of them")
    return numbers
