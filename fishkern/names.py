"""Parameters' names: without what wrappers add to them, and matched by patterns.

DDP, FSDP, ``torch.compile`` and activation checkpointing prefix the names of what they wrap. A
score, a mask and a pattern speak of the model inside, so that they fit the wrapped and the bare.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

__all__ = ["by_canonical_name", "canonical_name", "match", "named_parameters", "some", "suggest"]

Patterns = str | Iterable[str] | Callable[[str, Any], bool]
T = TypeVar("T")

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical_name(name: str) -> str:
    """The name without wrappers' prefixes.

    ``_orig_mod.``, ``_fsdp_wrapped_module.`` and ``_checkpoint_wrapped_module.`` go wherever they
    stand; ``module.`` goes only at the start, where DDP puts it: further in it is a user's name.

    Example:
        >>> canonical_name("module._orig_mod.encoder.module.weight")
        'encoder.module.weight'
    """
    *path, last = name.split(".")
    path = [part for part in path if part not in _WRAPPERS]
    while path and path[0] == "module":
        del path[0]
    return ".".join([*path, last])


def by_canonical_name(entries: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
    """The entries by canonical name, in their order.

    Raises:
        TypeError: A name is not a string.
        ValueError: Two names become one.
    """
    found: dict[str, T] = {}
    origin: dict[str, str] = {}
    for name, value in entries:
        if not isinstance(name, str):
            raise TypeError(f"{what}: the name {name!r} is a {type(name).__name__}, not a string")
        canonical = canonical_name(name)
        if canonical in found:
            raise ValueError(
                f"{what}: {origin[canonical]!r} and {name!r} are both {canonical!r} without "
                f"wrappers' prefixes: rename one of them"
            )
        found[canonical], origin[canonical] = value, name
    return found


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by canonical name, in its order; a tied weight by its first name.

    Raises:
        ValueError: Two parameters have the same canonical name.
    """
    return by_canonical_name(model.named_parameters(), f"the parameters of {type(model).__name__}")


def match(names: Iterable[str] | Mapping[str, Any], patterns: Patterns, what: str) -> list[str]:
    """The names that a pattern matches, in their own order.

    Args:
        names: Canonical names; for a predicate, a mapping from them to what it is to see.
        patterns: One glob or several (``*`` also crosses dots; case counts; wrappers' prefixes are
            dropped), or a predicate ``(name, value) -> bool``.
        what: The argument that the patterns came in, for the message.

    Raises:
        ValueError: A glob matches no name, or the predicate no parameter.
        TypeError: A pattern is not a string.

    Example:
        >>> match(["encoder.weight", "encoder.bias", "head.weight"], "encoder.*", "keep")
        ['encoder.weight', 'encoder.bias']
    """
    if callable(patterns):
        if not isinstance(names, Mapping):
            raise TypeError(f"{what}: a predicate needs the values beside the names")
        chosen = [name for name, value in names.items() if patterns(name, value)]
        if not chosen:
            raise ValueError(f"{what}: the predicate chose none of {len(names)} parameters")
        return chosen
    names = list(names)
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what}: the pattern {pattern!r} is not a string: pass globs")
        glob = canonical_name(pattern)
        hits = [name for name in names if name == glob or fnmatchcase(name, glob)]
        if not hits:
            raise ValueError(
                f"{what}: the pattern {pattern!r} matches none of {len(names)} names"
                f"{suggest(glob.replace('*', ''), names)}"
            )
        matched.update(hits)
    return [name for name in names if name in matched]


def suggest(name: str, names: Iterable[str]) -> str:
    """Text to end a message with: the names closest to one that was not found, if any are."""
    names, core = list(names), name.strip(".")
    inside = [candidate for candidate in names if core and core in candidate]
    close = inside[:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"; close to it: {', '.join(map(repr, close))}" if close else ""


def some(names: Iterable[str]) -> str:
    """The names for a message: the first three, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + rest
