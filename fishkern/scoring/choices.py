"""Where a forward pass lets values decide how many rows there are.

A model that gathers tokens (``h[mask]``) may have exactly N rows of them that are not one a
sample, and no shape tells. So each place is noted at which values become lengths: a mask, repeats,
numbers that Python reads, a list of pieces to join. A batch's are harmless if they choose as many
from each sample: then rows lie as they did in the first batch, which was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishkern.interception import is_transformed
from fishkern.scoring.torch_functions import handling

Shape = tuple[int, ...]


class Choice(NamedTuple):
    """Values that decide how many rows there are.

    Args:
        name: The function's; the n-th choice of a name is compared with the n-th of other passes.
        shape: The values'.
        values: Each sample gives as many rows where all have the same numbers, or as many True;
            None: that is not known.
        constant: Whether values of the same shape for any number of samples choose the same rows
            from all (``h[:, mask]``).
    """

    name: str
    shape: Shape
    values: Tensor | None
    constant: bool


def watching(
    note: Callable[[Choice], None], differentiated: Callable[[], None] | None = None
) -> AbstractContextManager[None]:
    """Gives each choice to ``note`` as it is made; tells ``differentiated`` of inner gradients."""

    def chosen(function: Any, args: Any, kwargs: Any) -> Any:
        name = function.__name__
        for choice in _READERS[name](name, args, kwargs):
            note(choice)
        return function(*args, **kwargs)

    def derived(function: Any, args: Any, kwargs: Any) -> Any:
        if differentiated is not None and not is_transformed():
            differentiated()
        return function(*args, **kwargs)

    return handling(dict.fromkeys(_READERS, chosen) | dict.fromkeys(_DERIVATIVES, derived))


class KnownChoices:
    """What the first batch showed: along which axis each choice has its samples."""

    def __init__(self) -> None:
        self._axes: dict[tuple[str, int], int | None] = {}

    def learn(self, one: Sequence[Choice], many: Sequence[Choice], num_samples: int) -> None:
        """Compare the choices of a sample alone with those of its batch of ``num_samples``."""
        alone, self._axes = _numbered(one), {}
        for key, choice in _numbered(many).items():
            if key in alone and len(alone[key].shape) == len(choice.shape):
                pairs = enumerate(zip(alone[key].shape, choice.shape, strict=True))
                grown = [(axis, a, b) for axis, (a, b) in pairs if a != b]
                if not grown:
                    self._axes[key] = None
                elif len(grown) == 1 and grown[0][2] == num_samples * grown[0][1]:
                    self._axes[key] = grown[0][0]

    def first_uneven(self, choices: Sequence[Choice], num_samples: int) -> int:
        """The position of the first that may not choose the same from each sample."""
        for position, (key, choice) in enumerate(_numbered(choices).items()):
            if key not in self._axes or not _is_even(choice, self._axes[key], num_samples):
                return position
        return len(choices)


def _numbered(choices: Sequence[Choice]) -> dict[tuple[str, int], Choice]:
    """Each by its name and its number among those of that name, in order."""
    seen: dict[str, int] = {}
    numbered = {}
    for choice in choices:
        number = seen[choice.name] = seen.get(choice.name, -1) + 1
        numbered[choice.name, number] = choice
    return numbered


def _is_even(choice: Choice, axis: int | None, num_samples: int) -> bool:
    if axis is None:
        return choice.constant
    values = choice.values
    if values is None or values.dim() <= axis or values.shape[axis] % num_samples:
        return False
    values = values.unflatten(axis, (num_samples, -1)).movedim(axis, 0)
    if values.dtype == torch.bool:  # so many rows, whichever they are
        values = values.flatten(1).sum(1)
    return bool((values == values[:1]).all())


#: ``torch.autograd.grad``, ``Tensor.backward``.
_DERIVATIVES = ("grad", "backward")

# What is noted of a function's arguments: masks, numbers, pieces.

Choices = list[Choice]


def _mask(name: str, mask: Any) -> Choices:
    if not isinstance(mask, Tensor):
        return []
    mask = mask.detach() != 0  # a copy: it may be changed in place later on
    return [Choice(name, tuple(mask.shape), mask, constant=True)]


def _numbers(name: str, values: Any) -> Choices:
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        return []
    return [Choice(name, tuple(values.shape), values.detach().clone(), constant=False)]


def _indexed(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
    found: Choices = []
    for part in index:
        if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
            found += _mask(name, part)
        elif isinstance(part, slice):
            for bound in (part.start, part.stop, part.step):
                found += _numbers("slice", bound)
    return found


def _masked(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    return _mask(name, kwargs["mask"] if "mask" in kwargs else args[-1])


def _nonzero(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    return _mask("nonzero", args[0] if args else kwargs.get("input"))


def _where(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    return _nonzero(name, args, kwargs) if len(args) + len(kwargs) == 1 else []


def _read(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    tensor = args[0] if args else kwargs.get("input")
    scalar = isinstance(tensor, Tensor) and tensor.dtype == torch.bool and tensor.dim() == 0
    return [] if scalar else _numbers(name, tensor)  # a single yes or no is no length


def _counts(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    return [choice for value in (*args[:2], *kwargs.values()) for choice in _numbers(name, value)]


def _pieces(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    pieces = args[0] if args else kwargs.get("tensors", ())
    return [Choice(name, (len(pieces),), None, constant=True)]


def _unknown(name: str, args: Any, kwargs: Mapping[str, Any]) -> Choices:
    return [Choice(name, (), None, constant=False)]


_READERS: dict[str, Callable[[str, Any, Mapping[str, Any]], Choices]] = {
    "__getitem__": _indexed,
    "masked_select": _masked,
    "where": _where,
    **dict.fromkeys(("nonzero", "argwhere", "to_sparse"), _nonzero),
    **dict.fromkeys(("item", "tolist", "numpy", "__array__", "__int__", "__index__"), _read),
    **dict.fromkeys(("unique", "unique_consecutive"), _read),
    **dict.fromkeys(("repeat_interleave", "tensor_split", "_pack_padded_sequence"), _counts),
    **dict.fromkeys(("cat", "concat", "concatenate", "vstack", "hstack"), _pieces),
    **dict.fromkeys(("stack", "pad_sequence"), _pieces),
    "_nested_get_values": _unknown,
}
