"""AdamW on selected entries, with moments in bfloat16 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fishkern.backends.moments import narrow_, noise, widen
from fishkern.backends.reference.adamw import masked_adamw_


def masked_adamw_quantized_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
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
    """``masked_adamw_`` between reading and storing the moments (``backends/moments.py``).

    The update is made with the new moments before they are rounded. The scales are empty lists, and
    the moments bfloat16; or the moments are uint8, and there is a scale for each 32 of them.
    """
    if found_inf is not None and found_inf.item():
        return
    kinds = [(exp_avgs, exp_avg_scales, True), (exp_avg_sqs, exp_avg_sq_scales, False)]
    wide = [
        [widen(moment, scales[i] if scales else None, signed) for i, moment in enumerate(moments)]
        for moments, scales, signed in kinds
    ]
    masked_adamw_(
        params, grads, indices, wide[0], wide[1], [], masters,
        steps, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale,
    )  # fmt: skip
    for i, param in enumerate(params):
        odds = noise(exp_avgs[i].numel(), int(steps[i]), param.device)
        for values, (moments, scales, signed), up in zip(wide, kinds, odds, strict=True):
            narrow_(values[i], moments[i], scales[i] if scales else None, signed, up)
