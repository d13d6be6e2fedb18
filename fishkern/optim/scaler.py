"""What a ``torch.amp.GradScaler`` and the step have to say to each other."""

from __future__ import annotations

import torch
from torch import Tensor


def scaling(optimizer: torch.optim.Optimizer) -> tuple[Tensor | None, Tensor | None] | None:
    """What a GradScaler asks for: (grad_scale, found_inf); None to skip the step.

    The scaler sets both as attributes around ``step()``. Unless everything is capturable the
    verdict is read here once, so that the step counts may stay on the host.

    Raises:
        RuntimeError: The scaler has looked at no gradient.
    """
    grad_scale, found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    if found_inf is None:
        return grad_scale, None
    if not isinstance(found_inf, Tensor):
        raise RuntimeError(
            f"the GradScaler made no inf checks (found_inf is {found_inf!r}, not a tensor): no "
            f"parameter of this optimizer has a gradient; call backward() on the scaled loss "
            f"before scaler.step(optimizer), and unfreeze what is to be trained"
        )
    if all(group["capturable"] for group in optimizer.param_groups):
        return grad_scale, found_inf
    return None if found_inf.item() else (grad_scale, None)
