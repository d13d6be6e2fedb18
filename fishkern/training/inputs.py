"""What a layer keeps of its input: the columns that its selected entries need.

The gradient of a weight at an entry of column i needs feature i of the input alone. So of an input
``[N, T, I]`` only ``x[..., columns]`` has to live until the backward pass. Several layers may read
one tensor - query, key and value of attention, both branches of a gated MLP - and then the columns
of all of them are gathered and kept once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from fishkern.interception import Rule, Selection, Site

#: What was kept of each input last, by the input's id, as long as a backward pass needs it.
_found: dict[int, _Found] = {}


class Reader:
    """A module with selected entries, as a reader of its input.

    Args:
        module: The module.
        rule: Its rule.
        indices: Flat positions by the local names of the parameters; None: one is trained whole.
    """

    def __init__(self, module: nn.Module, rule: Rule, indices: Mapping[str, Tensor | None]) -> None:
        self.indices = indices
        self.selections = {
            name: None if selected is None else rule.prepare(module, name, selected)
            for name, selected in indices.items()
        }
        # Of a parameter that is trained whole the gradient needs all columns.
        self._own = _union(None if s is None else s.columns for s in self.selections.values())
        self._company = _Company([self], self._own)

    def share_kept(self, name: str) -> float:
        """Which share of the input's features is kept, for one parameter and its company."""
        own: Selection | None = self.selections[name]
        if own is None or own.columns is None or self.columns is None:
            return 1.0
        return own.kept * len(self.columns) / len(own.columns) if len(own.columns) else 0.0

    @property
    def columns(self) -> Tensor | None:
        """What is kept of the input, ascending ``[C]``: all if None."""
        return self._company.columns

    def serves(self, indices: Mapping[str, Tensor | None]) -> bool:
        """Whether it was made for these very tensors."""
        return self.indices.keys() == indices.keys() and all(
            self.indices[name] is selected for name, selected in indices.items()
        )

    def keep(self, x: Tensor, dtype: torch.dtype) -> Kept:
        """The columns of x in this dtype; if another reader has kept them of x already, those.

        Who shares an input is found out here, and holds from the next forward on.
        """
        if _is_checkpointed() or x.is_inference():  # whose changes are not counted
            return _kept(x, self._own, dtype)
        found = _found.get(id(x))
        if found is not None and found.x() is x and found.version == x._version:
            values = found.values()
            if found.reader._company is not self._company:
                found.reader._join(self)
            elif found.columns is self.columns and values is not None and values.dtype == dtype:
                return Kept(values, found.columns)
        kept = _kept(x, self.columns, dtype)
        if kept.columns is not None:
            _remember(x, kept, self)
        return kept

    def _join(self, other: Reader) -> None:
        """Keep the same columns as another reader from now on."""
        readers = [*self._company.readers, *other._company.readers]
        company = _Company(readers, _union((self.columns, other.columns)))
        for reader in readers:
            reader._company = company


class Kept(NamedTuple):
    """What is left of an input: ``[*, C]``, and which features these are (None: all)."""

    values: Tensor
    columns: Tensor | None

    def narrowed(self, columns: Tensor | None) -> Tensor:
        """Some of the features that were kept."""
        if columns is None or columns is self.columns:
            return self.values
        if self.columns is not None:
            columns = torch.searchsorted(self.columns, columns)
        return _gathered(self.values, columns)


class _Found(NamedTuple):
    x: weakref.ref[Tensor]
    version: int  # the input's: it may be changed in place between two readers
    values: weakref.ref[Tensor]
    columns: Tensor
    reader: Reader


def _remember(x: Tensor, kept: Kept, reader: Reader) -> None:
    """Until its values are freed, which the backward pass does.

    An input that lives on may be filled anew where no version counts it: by numpy, through
    ``.data``, by a fused optimizer, or for a CUDA graph's replay.
    """
    assert kept.columns is not None
    key = id(x)
    values = WeakIdRef(kept.values, lambda _: _found.pop(key, None))
    _found[key] = _Found(weakref.ref(x), x._version, values, kept.columns, reader)


@dataclass(frozen=True, eq=False)
class _Company:
    """The readers of one tensor, and the columns that any of them needs."""

    readers: Sequence[Reader]
    columns: Tensor | None


class TrainingCall:
    """One call of a module in training, as the consumer of what is intercepted.

    Args:
        reader: The module as a reader.
        dtypes: Those of the gradients to be made, by the parameters' local names.
    """

    def __init__(self, reader: Reader, dtypes: Mapping[str, torch.dtype]) -> None:
        self._reader, self._dtypes = reader, dtypes
        self._columns: Tensor | None = None

    def keep(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the backward pass needs of the input."""
        kept = self._reader.keep(x, dtype)
        self._columns = kept.columns
        return kept.values

    def __call__(self, site: Site, x: Tensor, grad_out: Tensor) -> list[Tensor]:
        """The gradients of the leaves, and of the parameters that are trained whole."""
        kept, grads = Kept(x, self._columns), []
        for name, dtype in self._dtypes.items():
            selection = self._reader.selections[name]
            if selection is None:
                grad = site.rule.param_grad(site.module, name, x, grad_out)
            else:
                features = kept.narrowed(selection.columns)
                grad = site.rule.selected_grad(site.module, name, selection, features, grad_out)
            grads.append(grad.to(dtype))
        return grads


def _is_checkpointed() -> bool:
    """Whether this forward will be computed again, and has to keep the same then.

    It keeps nothing for long, so there is nothing to be shared.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _kept(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Kept:
    return Kept((x if columns is None else _gathered(x, columns)).to(dtype), columns)


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """``x[..., columns]``, by torch's faster way, which is for matrices."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat.index_select(1, columns).view(*x.shape[:-1], len(columns))


def _union(sets: Iterable[Tensor | None]) -> Tensor | None:
    """All columns of several sets, ascending; None, which stands for all, if one is None."""
    found = list(sets)
    parts = [columns for columns in found if columns is not None]
    if len(parts) < len(found):
        return None
    return parts[0] if len(parts) == 1 else torch.unique(torch.cat(parts))
