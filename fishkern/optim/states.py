"""An optimizer's states, and what was found in them as long as nobody writes to one.

Checkpoint libraries, offloading and users may exchange a state or a tensor in it between any two
steps. Looking for that takes longer than the update of a small tensor; being told costs nothing.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import MappingKey, register_pytree_node

Groups = list[dict[str, Any]]  # an optimizer's, or a checkpoint's
State = MutableMapping[Tensor, dict[str, Any]]  # an optimizer's, which need not be ``States``

AVERAGES = ("exp_avg", "exp_avg_sq")
MOMENTS = (*AVERAGES, "max_exp_avg_sq")  # with amsgrad

D = TypeVar("D", bound=dict[Any, Any])

_kept: weakref.WeakSet[Memo] = weakref.WeakSet()


class Memo:
    """Keeps something until an entry of any ``States`` or ``Entry`` is written."""

    def __init__(self) -> None:
        self.value: Any = None

    def keep(self, value: Any) -> None:
        """``value`` is this, and None again from the next write on."""
        self.value = value
        _kept.add(self)


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        with suppress(KeyError):  # another thread may take the last one
            while _kept:
                _kept.pop().value = None
        return method(self, *args, **kwargs)

    return write


def _telling_class(cls: type[D]) -> type[D]:
    """Let every method of a dict's subclass that writes to it end what memos keep."""
    for name in (
        *("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault"),
        "update",
    ):
        setattr(cls, name, _telling(getattr(cls, name)))
    return cls


@_telling_class
class Entry(dict[str, Any]):
    """One parameter's state."""

    def __reduce__(self) -> Any:
        # What is saved of it alone can be read with weights_only=True.
        return OrderedDict, (), None, None, iter(self.items())


@_telling_class
class States(defaultdict[Tensor, dict[str, Any]]):
    """The states by parameters; others may put in dicts of other kinds, which tell nothing."""

    @classmethod
    def of(cls, states: Mapping[Tensor, Any]) -> States:
        """The same states, each of which tells."""
        pairs = states.items()
        return cls(Entry, {p: Entry(entry) if type(entry) is dict else entry for p, entry in pairs})


def _flat(own: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(own.values()), list(own)


def _flat_with_keys(own: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    return [(MappingKey(key), value) for key, value in own.items()], list(own)


# Whoever maps functions over nested dicts finds the tensors in these, too.
register_pytree_node(
    Entry,
    _flat,
    lambda values, keys: Entry(zip(keys, values, strict=True)),
    serialized_type_name="fishkern.optim.Entry",
    flatten_with_keys_fn=_flat_with_keys,
)
register_pytree_node(
    States,
    _flat,
    lambda values, keys: States(Entry, zip(keys, values, strict=True)),
    serialized_type_name="fishkern.optim.States",
    flatten_with_keys_fn=_flat_with_keys,
)
