"""The classes of the modules that own weights with leaves.

As torch's own parametrizations do, a module's class becomes a subclass in which the weight is a
property that reads as an alias (``alias.py``). Where a rule covers the weights, its forward needs
none (``layers.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fishkern.interception import ATTACHMENT, subclass
from fishkern.training.alias import read_alias
from fishkern.training.layers import forward_by_rule
from fishkern.training.tracing import is_traced


@functools.cache
def owner_members(
    names: tuple[str, ...], by_rule: bool, is_root: bool
) -> Callable[[type[nn.Module]], dict[str, Any]]:
    """The members of an owner's class: its weights ``names`` read as aliases.

    ``by_rule``: it has a rule that covers them, so that its forward needs no alias. ``is_root``: it
    is the attached model itself, whose attachment looks on at calls.
    """

    def members(cls: type[nn.Module]) -> dict[str, Any]:
        def set_attribute(self: nn.Module, name: str, value: Any) -> None:
            # transformers ties weights by assigning one module's weight to another's.
            cls.__setattr__(self, name, getattr(value, "_fishkern_weight", value))

        def reduce(self: nn.Module, protocol: int) -> Any:
            # Before Python 3.11 not every object has it.
            state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            return _rebuild, (cls, names, by_rule, is_root), state

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            attachment: Any = self.__dict__.get(ATTACHMENT)
            if attachment is None or is_traced():
                return cls.__call__(self, *args, **kwargs)
            return attachment.watched(functools.partial(cls.__call__, self, *args, **kwargs))

        members: dict[str, Any] = {
            name: property(functools.partial(read_alias, name)) for name in names
        }
        members |= {"__setattr__": set_attribute, "__reduce_ex__": reduce}
        if by_rule:
            members["forward"] = forward_by_rule
        if is_root:
            members["__call__"] = call
        return members

    return members


def _rebuild(cls: Any, names: tuple[str, ...], by_rule: bool, is_root: bool) -> nn.Module:
    """An owner without its content, for pickle and deepcopy."""
    attached = subclass(cls, owner_members(names, by_rule, is_root))
    return attached.__new__(attached)
