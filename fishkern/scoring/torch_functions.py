"""The model's calls of torch's functions: shown to whoever handles them, or hidden from all.

A ``TorchFunctionMode`` is shown whatever is done with a tensor, down to reading its shape, and
takes longer over it than the shape does. So there is one for all, and what is computed between the
model's functions, from gradients and shapes, runs past it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

#: Called in a function's place with (function, args, kwargs); returns the result.
Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class _Handled(TorchFunctionMode):
    """Leaves each function to the handler of its name."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.handlers = handlers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = self.handlers.get(getattr(func, "__name__", ""))
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, args, kwargs or {})


_MODE: ContextVar[_Handled | None] = ContextVar("mode", default=None)


@contextmanager
def handling(handlers: Mapping[str, Handler]) -> Iterator[None]:
    """Handle torch's functions by name (``dropout``), whether functions or methods.

    Within another such block its handlers stay, but for those of the same names.
    """
    mode = _MODE.get()
    if mode is not None:
        before, mode.handlers = mode.handlers, {**mode.handlers, **handlers}
        try:
            yield
        finally:
            mode.handlers = before
        return
    with _Handled(handlers) as mode:
        token = _MODE.set(mode)
        try:
            yield
        finally:
            _MODE.reset(token)


def unwatched(function: Callable[P, R]) -> Callable[P, R]:
    """For our own arithmetic: it runs past every ``TorchFunctionMode``, the caller's as well."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run
