"""SparseMask: the selected entries of a model's tensors."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fishkern import files
from fishkern.names import (
    by_canonical_name,
    canonical_name,
    named_parameters,
    some,
    suggest,
)
from fishkern.selection.summary import summarize

__all__ = ["BoundMask", "SparseMask"]


class SparseMask(Mapping[str, Tensor]):
    """Which entries of which parameters are selected: a mapping from names to flat indices.

    Every parameter that was a candidate has an entry, which is empty where nothing was selected.
    Indices are row-major positions in the parameter, ascending, int32 where its size allows. A mask
    does not change: do not write into its tensors.

    Args:
        indices: For each parameter a 1-D integer tensor of strictly ascending positions. Copied.
        shapes: For each the parameter's shape.

    Raises:
        TypeError: Indices that are not an integer tensor.
        ValueError: Names that differ between the two, or indices that are not 1-D, not ascending
            or out of range.

    Example:
        >>> import torch
        >>> mask = SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
        >>> mask.dense("weight")
        tensor([[False,  True, False],
                [False, False,  True]])
    """

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        given = by_canonical_name(indices.items(), "indices")
        sizes = by_canonical_name(shapes.items(), "shapes")
        if odd := sorted(given.keys() ^ sizes.keys()):
            raise ValueError(f"only one of indices and shapes names {some(odd)}: name it in both")
        self._shapes = {name: torch.Size(sizes[name]) for name in given}
        self._indices = {
            name: _checked(name, index, self._shapes[name]) for name, index in given.items()
        }
        self._fingerprint: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[canonical_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        """The same entries of the same parameters, whatever the order, device or binding."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        used = sum(len(index) > 0 for index in self.values())
        return (
            f"{type(self).__name__}({self.num_selected:,} of {self._num_candidates:,} entries, "
            f"{self.density:.3%}, in {used} of {len(self)} tensors)"
        )

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each parameter."""
        return MappingProxyType(self._shapes)

    @property
    def num_selected(self) -> int:
        """How many entries are selected, those of parameters kept whole included."""
        return sum(len(index) for index in self.values())

    @property
    def density(self) -> float:
        """The selected share of all entries of the named parameters."""
        return self.num_selected / max(self._num_candidates, 1)

    @property
    def _num_candidates(self) -> int:
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over names, shapes and indices: equal for equal masks, in every process."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name in sorted(self):
                digest.update(f"{name!r} {list(self._shapes[name])} {len(self[name])}".encode())
                digest.update(self[name].cpu().numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def dense(self, name: str) -> Tensor:
        """The parameter's mask as a bool tensor of its shape, on the indices' device."""
        index, shape = self[name], self._shapes[canonical_name(name)]
        dense = torch.zeros(shape.numel(), dtype=torch.bool, device=index.device)
        dense[index.long()] = True
        return dense.view(shape)

    def to(self, device: torch.device | str | int) -> SparseMask:
        """The same mask with its indices on another device; a bound mask stays bound."""
        return self._with_indices({name: index.to(device) for name, index in self.items()})

    def _with_indices(self, indices: Mapping[str, Tensor]) -> SparseMask:
        """The same mask, holding these tensors in place of its own, which are equal to them."""
        other = object.__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other._indices = {**self._indices, **indices}
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to a safetensors file, whole or not at all."""
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        files.save(path, "mask", self._indices, {"shapes": shapes, "k": self.num_selected})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseMask:
        """Read what ``save`` wrote, onto the CPU and bound to no model.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file was cut or edited, or holds something else.
        """
        indices, fields = files.load(path, "mask")
        return SparseMask(indices, fields["shapes"])

    def summary(self) -> str:
        """A table to read: the selection in total, by layer and by type of module."""
        return summarize({n: index.cpu() for n, index in self.items()}, self._shapes)

    def bind(self, model: nn.Module) -> BoundMask:
        """The mask, knowing this model's parameters as objects, for loops that pass no names.

        Raises:
            ValueError: The mask names a parameter that the model does not have, or has in another
                shape.
        """
        return BoundMask(self, model)


class BoundMask(SparseMask):
    """A mask that can name a model's bare parameters. Copied or pickled, it is a SparseMask."""

    def __init__(self, mask: SparseMask, model: nn.Module) -> None:
        params = named_parameters(model)
        kind = type(model).__name__
        for name, shape in mask.shapes.items():
            if name not in params:
                raise ValueError(
                    f"the mask names {name!r}, which {kind} does not have"
                    f"{_tied(name, model) or suggest(name, params)}"
                )
            if params[name].shape != shape:
                raise ValueError(
                    f"the mask has {name!r} in shape {list(shape)}, {kind} in shape "
                    f"{list(params[name].shape)}: bind a mask to the model it was selected for, "
                    f"before that is sharded"
                )
        self.__dict__.update(mask.__dict__)
        # By identity: two parameters with equal values are two. Weakly: a mask keeps no model.
        self._names = {id(param): (weakref.ref(param), name) for name, param in params.items()}

    def name_of(self, param: Tensor) -> str | None:
        """The parameter's canonical name in the model, in the mask or not; None for a stranger."""
        reference, name = self._names.get(id(param), (None, None))
        return name if reference is not None and reference() is param else None

    def __reduce__(self) -> tuple[type[SparseMask], tuple[dict[str, Tensor], dict[str, list[int]]]]:
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return SparseMask, (self._indices, shapes)


def _checked(name: str, index: Tensor, shape: torch.Size) -> Tensor:
    """The mask's own copy of one parameter's indices, in the dtype that its size needs."""
    if not isinstance(index, Tensor):
        raise TypeError(f"the indices of {name!r} are a {type(index).__name__}: pass a tensor")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(
            f"the indices of {name!r} are {index.dtype}: pass integers, which for a bool mask are "
            f"mask.flatten().nonzero().flatten()"
        )
    if index.dim() != 1:
        raise ValueError(f"the indices of {name!r} have shape {list(index.shape)}: pass 1-D ones")
    size = shape.numel()
    if len(index):
        if not bool((index[1:] > index[:-1]).all()):
            raise ValueError(f"the indices of {name!r} do not ascend strictly: pass index.unique()")
        first, last = int(index[0]), int(index[-1])
        if first < 0 or last >= size:
            raise ValueError(
                f"the indices of {name!r} run from {first} to {last}: its shape {list(shape)} has "
                f"the positions 0 to {size - 1}"
            )
    return index.to(torch.int32 if size < 2**31 else torch.int64, copy=True)


def _tied(name: str, model: nn.Module) -> str:
    """Text for a name that is a parameter's second one."""
    for other, param in model.named_parameters(remove_duplicate=False):
        if canonical_name(other) == name:
            first = next(n for n, p in named_parameters(model).items() if p is param)
            return f": it is tied to {first!r}, which is the name to use"
    return ""
