"""What FishSparseAdamW is given, checked and put in order, and how torch wraps its step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fishkern.optim.quantized import check_state_dtype
from fishkern.optim.roles import UNLISTED
from fishkern.selection.masks import SparseMask
from fishkern.training.steps import are_only_hooks, before_step


def unwatched_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as torch wraps every optimizer's, for its hooks and profiler, if there are any.

    The wrapper takes as long as a small model's entries, so it is left out where it has nothing
    to do. Torch wraps no step that says that it is ``hooked``. Under ``torch.compile`` a step runs
    as it is between two graphs, as torch's own fused ones do: there are few launches and nothing to
    fuse it with, and a graph would be made anew for each learning rate.
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def unwatched(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return uncompiled(self, *args, **kwargs)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or not are_only_hooks(_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
            or torch.autograd.profiler._is_profiler_enabled
        ):
            return watched(self, *args, **kwargs)
        before_step(self)
        return step(self, *args, **kwargs)

    uncompiled = torch._disable_dynamo(unwatched)  # type: ignore[attr-defined]
    unwatched.hooked = True  # type: ignore[attr-defined]
    return unwatched


def as_groups(params: Any) -> Any:
    """Parameters as copied groups with lists in them; what torch refuses is left for it."""
    if isinstance(params, Tensor):
        return params
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [_with_list(group) if isinstance(group, dict) else group for group in groups]


def _with_list(group: dict[str, Any]) -> dict[str, Any]:
    params = group["params"]
    if not isinstance(params, set):
        params = [params] if isinstance(params, Tensor) else list(params)
    return {**group, "params": params}


CAPTURABLE = (
    "check_numerics=True reads what a step wrote, which a CUDA graph cannot: leave out "
    "capturable=True while you look"
)


def check_options(
    mask: Any,
    unlisted: str,
    differentiable: bool,
    capturable: bool,
    state_dtype: torch.dtype,
    check_numerics: bool,
) -> None:
    """Refuse options that are wrong or not available.

    Raises:
        TypeError: ``mask`` is not a SparseMask.
        ValueError: An option has no such value.
    """
    if mask is not None and not isinstance(mask, SparseMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}: pass a SparseMask, as fishkern.select returns it or "
            f"as SparseMask(indices, shapes) makes it"
        )
    if unlisted not in UNLISTED:
        raise ValueError(f"unlisted is {unlisted!r}: choose one of {', '.join(UNLISTED)}")
    if differentiable:
        raise ValueError(
            "differentiable=True, but selected entries are updated in place: use "
            "torch.optim.AdamW to differentiate through a step"
        )
    check_state_dtype(state_dtype)
    if check_numerics and capturable:
        raise ValueError(CAPTURABLE)
