"""AdamW on the selected entries of a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of number ``steps[i]`` (the first is 1) for each tensor i.

    With g the selected gradient (negated for ``maximize``, divided by ``grad_scale``) and p the
    selected values, all in float32 (float64 for float64 parameters)::

        p     = p (1 - lr weight_decay)
        m     = beta1 m + (1 - beta1) g
        v     = beta2 v + (1 - beta2) g^2          (amsgrad: vmax = max(vmax, v) in its place)
        p     = p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    Nothing is changed where ``found_inf`` is not zero.

    An empty index list beside moments of the parameter's size means every entry. ``masters``
    and ``max_exp_avg_sqs`` are empty or hold a tensor for each parameter (``masters``: an empty
    tensor where the parameter has none).
    """
    if found_inf is not None and found_inf.item():
        return
    for i, (param, grad, index, m, v) in enumerate(
        zip(params, grads, indices, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if m.numel() == 0:
            continue
        dtype = torch.promote_types(param.dtype, torch.float32)
        whole = index.numel() == 0
        where = slice(None) if whole else index.long()
        m, v = m.view(-1), v.view(-1)
        g = grad.reshape(-1)
        if not whole and g.numel() == param.numel() != index.numel():
            g = g[where]
        g = g.to(dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(dtype)
        if maximize:
            g = -g
        master = masters[i] if len(masters) and masters[i].numel() else None
        # reshape(-1) of a strided parameter would be a copy: write through flat positions
        flat = param.view(-1) if param.is_contiguous() else None
        p = master.view(-1) if master is not None else (flat if flat is not None else param.reshape(-1))[where]
        p = p.to(dtype)

        step = float(steps[i])
        rate = float(lr)
        p = p * (1 - rate * weight_decay)
        m.lerp_(g.to(m.dtype), 1 - beta1)
        v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - beta2)
        second = v
        if len(max_exp_avg_sqs):
            second = max_exp_avg_sqs[i].view(-1)
            torch.maximum(second, v, out=second)
        denom = second.to(dtype).sqrt() / (1 - beta2**step) ** 0.5 + eps
        p = p - rate / (1 - beta1**step) * m.to(dtype) / denom

        if master is not None:
            master.view(-1).copy_(p)
        if flat is not None:
            flat[where] = p.to(param.dtype)
        else:
            dense = param.reshape(-1)
            dense[where] = p.to(param.dtype)
            param.copy_(dense.view_as(param))
