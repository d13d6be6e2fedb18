"""AdamW on selected entries, with moments in bfloat16 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.backends import moments as storage
from fishkern.functional.adamw import check_entry, check_lengths, step_vector

SCALE_BLOCK = storage.BLOCK
NARROW = (torch.bfloat16, torch.uint8)
NEAREST = 0x8000  # the odds that round every value to its nearest neighbour


def masked_adamw_quantized_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[Tensor | float] | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``masked_adamw_`` with moments in fewer bits: read, updated in float32, and stored again.

    Stored values are rounded up or down at random, with the odds that give the right mean: rounded
    to nearest, second moments would stand still, since a step changes them by a share 1 - beta2 of
    1e-3, and neighbours in bfloat16 are 1/256 to 1/128 apart. The random number is a hash of the
    step and of the entry's place in its list, so that the same step gives the same bits.

    Moments in bfloat16 are the upper half of float32. In 8 bits, each 32 entries share a power of
    two (as in the OCP microscaling formats, 2023), relative to which a first moment has a sign, 3
    bits of exponent and 4 of mantissa, a second moment 4 and 4. The error is below 1/16 of the
    value or, where that is more, below 2^-9 of the block's largest first moment and 2^-17 of its
    largest second one. A positive second moment is never stored as zero, and a block with an
    infinity or NaN is NaN throughout.

    Args:
        params: The parameters, any shape and strides; float32, bfloat16 or float16.
        grads: For each its gradient, of the parameter's shape, or ``[k_i]``, already selected.
        indices: For each the selected flat positions ``[k_i]``, as in ``masked_adamw_``.
        exp_avgs: First moments ``[k_i]``, bfloat16 or uint8.
        exp_avg_sqs: Second moments ``[k_i]``, of the same dtype.
        steps: The number of this step for each tensor, counted from 1.
        lr: Learning rate, a number or a 0-d tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, of the selected entries only.
        exp_avg_scales: For moments in uint8, the blocks' exponents, uint8 ``[ceil(k_i / 32)]``, as
            float32 has them. Zeros, beside moments of zeros, to begin with.
        exp_avg_sq_scales: The same for the second moments.
        masters: Selected values in float32, as in ``masked_adamw_``.
        maximize: Ascend instead of descend.
        grad_scale: 0-d float32: gradients are divided by it first.
        found_inf: 0-d float32: nothing at all is changed if it is not zero.

    Raises:
        ValueError: As ``masked_adamw_``; scales beside bfloat16, or none or another number of
            them beside uint8.
        TypeError: A dtype that is not the one named above.

    Example:
        >>> import torch
        >>> param, grad, index = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([1, 5])
        >>> m, v = (torch.zeros(2, dtype=torch.uint8) for _ in range(2))
        >>> m_scale, v_scale = (torch.zeros(1, dtype=torch.uint8) for _ in range(2))
        >>> masked_adamw_quantized_([param], [grad], [index], [m], [v], steps=[1], lr=0.1,
        ...                         betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        ...                         exp_avg_scales=[m_scale], exp_avg_sq_scales=[v_scale])
        >>> param
        tensor([[1.0000, 0.9000, 1.0000],
                [1.0000, 1.0000, 0.9000]])
        >>> dequantize_moment(m, m_scale, signed=True)
        tensor([0.0977, 0.1016])
    """
    lists = {"grads": grads, "indices": indices, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"masters": masters} if len(masters) else {}
    check_lengths(len(params), {**lists, "steps": steps})
    scales = {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales}
    for i, param in enumerate(params):
        if param.dtype == torch.float64:
            raise TypeError(f"params[{i}] is float64: use masked_adamw_, with moments in float64")
        check_entry(i, param, {name: tensors[i] for name, tensors in lists.items()}, NARROW)
        if exp_avgs[i].dtype != exp_avgs[0].dtype or exp_avg_sqs[i].dtype != exp_avgs[0].dtype:
            raise TypeError(
                f"exp_avgs[0] is {exp_avgs[0].dtype}, but exp_avgs[{i}] and exp_avg_sqs[{i}] are "
                f"{exp_avgs[i].dtype} and {exp_avg_sqs[i].dtype}: pass one dtype"
            )
    for name, tensors in scales.items():
        _check_scales(name, tensors, exp_avgs)
    if not params:
        return
    torch.ops.fishkern.masked_adamw_quantized_(
        list(params),
        list(grads),
        list(indices),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(exp_avg_scales),
        list(exp_avg_sq_scales),
        list(masters),
        step_vector(steps),
        lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu"),
        *betas,
        eps,
        weight_decay,
        maximize,
        grad_scale,
        found_inf,
    )


def quantize_moment(
    value: Tensor, dtype: torch.dtype, *, signed: bool
) -> tuple[Tensor, Tensor | None]:
    """A float32 moment as ``masked_adamw_quantized_`` stores it, rounded to nearest.

    Args:
        value: Any shape.
        dtype: ``torch.bfloat16`` or ``torch.uint8``.
        signed: True for a first moment, False for a second one.

    Returns:
        The stored moment, of the same shape, and its scales: uint8 ``[ceil(n / 32)]``, None for
        bfloat16.

    Raises:
        TypeError: Another dtype.

    Example:
        >>> stored, scale = quantize_moment(torch.tensor([1.0, 0.26]), torch.uint8, signed=False)
        >>> dequantize_moment(stored, scale, signed=False)
        tensor([1.0000, 0.2656])
    """
    if dtype not in NARROW:
        raise TypeError(f"dtype is {dtype}: pass {' or '.join(map(str, NARROW))}")
    value = value.float().contiguous()
    stored = torch.empty_like(value, dtype=dtype)
    scale = None
    if dtype == torch.uint8:
        scale = torch.empty(scale_count(value.numel()), dtype=torch.uint8, device=value.device)
    storage.narrow_(
        value, stored, scale, signed, torch.full_like(stored, NEAREST, dtype=torch.int64).view(-1)
    )
    return stored, scale


def dequantize_moment(stored: Tensor, scale: Tensor | None = None, *, signed: bool) -> Tensor:
    """A stored moment in float32, exactly: the other way round.

    Args:
        stored: bfloat16, or uint8 with ``scale``.
        scale: uint8, one for each 32 entries.
        signed: True for a first moment, False for a second one.

    Raises:
        TypeError: ``stored`` or ``scale`` has another dtype.
        ValueError: ``scale`` beside bfloat16, or none or another number of them beside uint8.

    Example:
        >>> dequantize_moment(torch.ones(2, dtype=torch.bfloat16), signed=True)
        tensor([1., 1.])
    """
    if stored.dtype not in NARROW:
        raise TypeError(f"stored is {stored.dtype}: pass {' or '.join(map(str, NARROW))}")
    _check_scales("scale", [] if scale is None else [scale], [stored])
    return storage.widen(stored.contiguous(), scale, signed)


def scale_count(entries: int) -> int:
    """How many scales so many moments in 8 bits have."""
    return -(-entries // SCALE_BLOCK)


def _check_scales(name: str, scales: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    in_bytes = len(moments) > 0 and moments[0].dtype == torch.uint8
    expected = len(moments) if in_bytes else 0
    if len(scales) != expected:
        raise ValueError(
            f"{name} has {len(scales)} entries, but needs {expected}: one for each tensor with "
            f"moments in uint8, none for bfloat16"
        )
    for i, (scale, moment) in enumerate(zip(scales, moments, strict=False)):
        if scale.dtype != torch.uint8:
            raise TypeError(f"{name}[{i}] has dtype {scale.dtype}: pass uint8")
        if scale.numel() != scale_count(moment.numel()):
            raise ValueError(
                f"{name}[{i}] has {scale.numel()} entries, but {moment.numel()} moments have "
                f"{scale_count(moment.numel())} scales, one for each {SCALE_BLOCK}"
            )
