"""Whether somebody looks on who wants operations that he knows: a compiler, or torch.func."""

from __future__ import annotations

import torch
from torch import nn


def is_traced() -> bool:
    """Whether a compiler, make_fx or torch.func looks on, which want operations that they know."""
    active: bool = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
    return active


def has_compiled_parts(model: nn.Module) -> bool:
    """A compiler would take who looks on for a part of the model."""
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
