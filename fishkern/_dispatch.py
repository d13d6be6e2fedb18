"""Which backend runs an op, and why. No op names here.

A backend is a module in ``fishkern.backends``; an op is in a backend if the module has a
function of that name. Where nothing else is asked for, tensors on the CPU take the compiled
kernels (``native``) and CUDA tensors take ``triton``; ``reference`` (plain torch) stands
behind both. An explicit choice - ``use_backend`` or ``FISHKERN_BACKEND`` - is obeyed or
refused, never replaced.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

PREFERENCE = {
    "cpu": ("native", "reference"),
    "cuda": ("triton", "native", "reference"),
}
BACKENDS = ("native", "triton", "reference")

_forced: str | None = None


@cache
def backend(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and the reason why it cannot be used here."""
    module = importlib.import_module(f"fishkern.backends.{name}")
    reason: str | None = module.unavailable()
    return (None, reason) if reason is not None else (module, "")


def available() -> dict[str, str | None]:
    """Each backend with None where it works, else with the reason why not and the remedy."""
    return {name: backend(name)[1] or None for name in BACKENDS}


def choose(op: str, device_type: str) -> Callable[..., Any]:
    """The function that runs ``op`` on tensors of ``device_type``.

    Raises:
        RuntimeError: An explicitly chosen backend is not available or does not have the op.
    """
    return _choose(op, device_type, _forced or os.environ.get("FISHKERN_BACKEND") or None)


@cache
def _choose(op: str, device_type: str, forced: str | None) -> Callable[..., Any]:
    if forced is not None:
        return _explicit(op, device_type, forced)
    for name in PREFERENCE.get(device_type, ("reference",)):
        module, reason = backend(name)
        if module is None:
            warnings.warn(
                f"fishkern's {name} kernels are not available: {reason}. "
                f"Slower code runs in their place; `python -m fishkern` shows what is used.",
                RuntimeWarning,
                stacklevel=4,
            )
        elif device_type in module.DEVICES and hasattr(module, op):
            function: Callable[..., Any] = getattr(module, op)
            return function
    raise RuntimeError(f"no backend runs {op!r} on {device_type!r}")  # reference runs everything


def _explicit(op: str, device_type: str, name: str) -> Callable[..., Any]:
    if name not in BACKENDS:
        raise RuntimeError(f"no backend named {name!r}: choose one of {', '.join(BACKENDS)}")
    module, reason = backend(name)
    if module is None:
        raise RuntimeError(f"the backend {name!r} was asked for but is not available: {reason}")
    if device_type not in module.DEVICES or not hasattr(module, op):
        raise RuntimeError(
            f"the backend {name!r} was asked for but does not run {op!r} on {device_type!r}: "
            f"leave the choice open, or move the tensors"
        )
    function: Callable[..., Any] = getattr(module, op)
    return function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the context on one backend: "native", "triton" or "reference".

    Raises:
        RuntimeError: At the first op that the backend does not run.

    Example:
        >>> import torch, fishkern
        >>> fisher = torch.zeros(2, 3)
        >>> with fishkern.use_backend("reference"):
        ...     fishkern.functional.linear_fisher_(fisher, torch.ones(1, 3), torch.ones(1, 2))
        >>> fisher.sum().item()
        6.0
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
