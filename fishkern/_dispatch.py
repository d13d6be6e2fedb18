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
    "cuda": ("triton", "reference"),
}
BACKENDS = ("native", "triton", "reference")

# Not per thread: autograd runs backward passes, and the ops in them, in threads of its own.
_forced: str | None = None


@cache
def backend(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and the reason why it cannot be used here."""
    module = importlib.import_module(f"fishkern.backends.{name}")
    reason: str | None = module.unavailable()
    return (None, reason) if reason is not None else (module, "")


def why_not(name: str) -> str | None:
    """The reason why the backend cannot be used here, and the remedy; None where it can."""
    return backend(name)[1] or None


def choose(op: str, device_type: str) -> Callable[..., Any]:
    """The function that runs ``op`` on tensors of ``device_type``.

    Raises:
        ValueError: ``FISHKERN_BACKEND`` is not a backend's name.
        RuntimeError: An explicitly chosen backend is not available or does not have the op.
    """
    return _choose(op, device_type, _explicit())[1]


def chosen(op: str, device_type: str) -> str:
    """The name of the backend that ``choose`` takes."""
    return _choose(op, device_type, _explicit())[0]


def _explicit() -> str | None:
    if _forced:
        return _forced
    name = os.environ.get("FISHKERN_BACKEND")
    return _known(name, "FISHKERN_BACKEND is set, but ") if name else None


def _known(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"{source}no backend is named {name!r}: choose one of {known}")
    return name


@cache
def _choose(op: str, device_type: str, explicit: str | None) -> tuple[str, Callable[..., Any]]:
    if explicit is not None:
        return explicit, _insist(op, device_type, explicit)
    for name in PREFERENCE.get(device_type, ("reference",)):
        if device_type not in importlib.import_module(f"fishkern.backends.{name}").DEVICES:
            continue  # before it is built or loaded
        module, reason = backend(name)
        if module is None:
            _warn_missing(name, reason)
        elif hasattr(module, op):
            return name, getattr(module, op)
    raise RuntimeError(
        f"no backend runs {op!r} on {device_type!r}: move the tensors to the CPU or a CUDA device"
    )


def _insist(op: str, device_type: str, name: str) -> Callable[..., Any]:
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


@cache  # once per process, whatever the warning filters are
def _warn_missing(name: str, reason: str) -> None:
    warnings.warn(
        f"fishkern's {name} kernels are not available: {reason}. "
        f"Slower code runs in their place; `python -m fishkern` shows what is used.",
        RuntimeWarning,
        stacklevel=5,
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the context on one backend: "native", "triton" or "reference".

    Raises:
        ValueError: No backend has this name.
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
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before
