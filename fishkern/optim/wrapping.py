"""How torch wraps an optimizer's step, and when it need not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fishkern.training.steps import are_only_hooks, before_step


def without_idle_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as torch wraps every optimizer's, for its hooks and profiler, if there are any.

    The wrapper takes as long as a small model's entries, so it is left out where it has nothing
    to do. Torch wraps no step that says that it is ``hooked``. Under ``torch.compile`` a step runs
    as it is between two graphs, as torch's own fused ones do: there are few launches and nothing to
    fuse it with, and a graph would be made anew for each learning rate.
    """
    with_hooks = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def as_needed(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return uncompiled(self, *args, **kwargs)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or not are_only_hooks()
            or torch.autograd.profiler._is_profiler_enabled
        ):
            return with_hooks(self, *args, **kwargs)
        before_step(self)
        return step(self, *args, **kwargs)

    uncompiled = torch._disable_dynamo(as_needed)  # type: ignore[attr-defined]
    as_needed.hooked = True  # type: ignore[attr-defined]
    return as_needed
