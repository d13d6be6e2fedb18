"""An optimizer's states, which tell when somebody has written to them.

Checkpoint libraries, offloading and users may exchange a state or a tensor in it between any two
steps. Looking for that takes longer than the update of a small tensor; being told costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

_writes = 0


def writes() -> int:
    """A number that grows whenever an entry of any ``States`` or ``Entry`` may have changed."""
    return _writes


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _writes
        _writes += 1
        return method(self, *args, **kwargs)

    return write


def _telling_class(cls: type) -> type:
    """A dict's subclass whose every writing method is counted."""
    for name in (
        *("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault"),
        "update",
    ):
        setattr(cls, name, _telling(getattr(cls, name)))
    return cls


@_telling_class
class Entry(dict[str, Any]):
    """One parameter's state."""


@_telling_class
class States(defaultdict[Tensor, dict[str, Any]]):
    """The states by parameters; others may put in plain dicts, which tell nothing."""

    @classmethod
    def of(cls, states: Mapping[Tensor, dict[str, Any]]) -> States:
        """The same states, each of which tells."""
        return cls(Entry, {param: Entry(entry) for param, entry in states.items()})


def all_tell(states: object, entries: Iterable[dict[str, Any]]) -> bool:
    """Whether ``writes()`` grows before any of these can change."""
    return type(states) is States and all(type(entry) is Entry for entry in entries)
