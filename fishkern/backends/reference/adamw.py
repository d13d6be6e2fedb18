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
    for i, (param, index) in enumerate(zip(params, indices, strict=True)):
        _check_range(i, param, index)
    for i, (param, grad, index, m, v) in enumerate(
        zip(params, grads, indices, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if m.numel() == 0:
            continue
        where = index.long() if index.numel() else slice(None)
        dtype = torch.promote_types(param.dtype, torch.float32)
        flat, g, m, v = param.reshape(-1), grad.reshape(-1), m.view(-1), v.view(-1)
        g = (g[where] if g.numel() != m.numel() else g).to(dtype)
        if grad_scale is not None:
            g = g / grad_scale
        if maximize:
            g = -g
        has_master = len(masters) > 0 and masters[i].numel() > 0
        master = masters[i].view(-1) if has_master else flat[where]

        step, rate = float(steps[i]), float(lr)
        p = master.to(dtype) * (1 - rate * weight_decay)
        m.lerp_(g.to(m.dtype), 1 - beta1)
        v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - beta2)
        if len(max_exp_avg_sqs):
            v = torch.maximum(v, max_exp_avg_sqs[i].view(-1), out=max_exp_avg_sqs[i].view(-1))
        denominator = v.to(dtype).sqrt() / (1 - beta2**step) ** 0.5 + eps
        p = p - rate / (1 - beta1**step) * m.to(dtype) / denominator

        if has_master:
            master.copy_(p)
        flat[where] = p.to(param.dtype)
        if not param.is_contiguous():  # then flat may be a copy
            param.copy_(flat.view_as(param))


def _check_range(i: int, param: Tensor, index: Tensor) -> None:
    if index.numel() and (index[0] < 0 or index[-1] >= param.numel()):
        raise RuntimeError(
            f"indices[{i}] runs from {index[0]} to {index[-1]}, but params[{i}] has "
            f"{param.numel()} entries"
        )
