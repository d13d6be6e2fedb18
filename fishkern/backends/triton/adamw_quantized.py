"""AdamW on selected entries, with moments in bfloat16 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fishkern.backends.triton.adamw import check, step_all


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
    """The kernel of ``masked_adamw_``, with moments as ``backends/moments.py`` says.

    Raises:
        TypeError: A dtype that the kernel does not have.
        ValueError: State that is not contiguous.
    """
    narrow = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    narrow |= {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales}
    check(params, grads, {"masters": masters}, narrow)
    step_all(
        params, grads, indices, exp_avgs, exp_avg_sqs, (), exp_avg_scales, exp_avg_sq_scales,
        masters, steps, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf,
    )  # fmt: skip
