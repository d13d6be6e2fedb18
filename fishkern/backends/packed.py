"""``masked_adamw_packed_`` for backends that take lists: packed state is handed on as views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def raised(steps_before: Tensor, found_inf: Tensor | None) -> Tensor:
    """The number of this step, counted from 1; where ``found_inf`` skips it, that of the last."""
    return steps_before + (1 if found_inf is None else (found_inf == 0).to(steps_before))


def by_lists(masked_adamw_: Callable[..., None]) -> Callable[..., None]:
    """The packed op that calls a backend's ``masked_adamw_``."""

    def masked_adamw_packed_(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Tensor,
        indices: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None,
        master: Tensor | None,
        steps_before: Tensor,
        lr: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        counts = offsets.diff().tolist()
        stored = [0 if n == p.numel() else n for n, p in zip(counts, params, strict=True)]
        state = [
            [] if packed is None else packed.split(counts)
            for packed in (exp_avg, exp_avg_sq, max_exp_avg_sq, master)
        ]
        steps = raised(steps_before, found_inf)
        masked_adamw_(
            *(params, grads, indices.split(stored), *state),
            *(steps, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf),
        )
        steps_before.copy_(steps)

    return masked_adamw_packed_
