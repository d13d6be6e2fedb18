"""What a layer keeps of its input: the columns that its selected entries need.

The gradient of a weight at an entry of column i needs feature i of the input alone. So of an input
``[N, T, I]`` only ``x[..., columns]`` has to live until the backward pass. Several layers may read
one tensor - query, key and value of attention, both branches of a gated MLP - and then the columns
of all of them are gathered and kept once. Where the input's maker keeps what they can be made of
again (``makers.py``), not even they are kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from fishkern.functional.selected_grad import MOST_KEPT
from fishkern.interception import Rule, Selection
from fishkern.training.makers import Made, gathered, made

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
        # A rule that reads the input elsewhere, too, is given all of it.
        self._may_remake = not rule.reads_input(()) if self._own is None else len(self._own) > 0
        self._as_made: dict[Any, bool] = {}  # whether a kind of maker makes them what they are
        self._remade = False  # in the last forward

    def share_kept(self, name: str) -> float:
        """Which share of the input's features is kept, for one parameter and its company."""
        own: Selection | None = self.selections[name]
        if self._remade:
            return 0.0
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
        source = self._made(x)
        self._remade = source is not None
        if source is not None:
            return Kept(source.tensors, Way(None, dtype, source.columns))
        if _is_kept_elsewhere() or x.is_inference():  # whose changes are not counted
            return _kept(x, self._own, dtype)
        found = _found.get(id(x))
        if found is not None and found.shows(x):
            values = found.values()
            if found.reader._company is not self._company:
                found.reader._join(self, x.shape[-1])
            elif found.columns is self.columns and values is not None and values.dtype == dtype:
                return Kept([values], Way(found.columns, dtype))
        kept = _kept(x, self.columns, dtype)
        if kept.tensors[0] is not x:
            _remember(x, kept, self)
        return kept

    def _made(self, x: Tensor) -> Made | None:
        """How columns of x can be made again, if that makes them what they are.

        It is tried once for each kind of maker: somebody may write to what it made unseen.
        """
        source = made(x) if self._may_remake else None
        if source is None:
            return None
        kind = (source.by, x.dtype, x.device)
        if kind not in self._as_made:
            if not x.numel() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                return None  # there is nothing to compare, or no way to
            columns = source.columns(self._own, *source.tensors)
            self._as_made[kind] = _equal(columns, gathered(x, self._own))
        return source if self._as_made[kind] else None

    def _join(self, other: Reader, width: int) -> None:
        """Keep the same columns as another reader of an input ``[*, width]`` from now on."""
        readers = [*self._company.readers, *other._company.readers]
        columns = _union((self.columns, other.columns))
        if columns is not None and len(columns) > MOST_KEPT * width:
            columns = None  # the input itself, of which there is no copy
        company = _Company(readers, columns)
        for reader in readers:
            reader._company = company


class Way(NamedTuple):
    """What was kept of an input, without the tensors themselves.

    Attributes:
        columns: Which features were kept, ascending ``[C]``; None: all.
        dtype: In which dtype the layer reads them.
        remake: Makes features again of what the input's maker keeps; None: they were kept.
    """

    columns: Tensor | None
    dtype: torch.dtype
    remake: Callable[..., Tensor] | None = None

    def features(self, columns: Tensor | None, kept: Sequence[Tensor]) -> Tensor:
        """Some of the features, ``[*, C]`` (None: all), of what was kept."""
        if columns is not None and not len(columns):  # nothing is read, as for a bias
            return kept[0][..., :0]
        if self.remake is not None:
            return self.remake(columns, *kept).to(self.dtype)
        (values,) = kept
        if columns is None or columns is self.columns:
            return values
        if self.columns is not None:
            columns = torch.searchsorted(self.columns, columns)
        return gathered(values, columns)


class Kept(NamedTuple):
    """What the backward pass needs of an input: tensors, and what they are."""

    tensors: Sequence[Tensor]
    way: Way


class _Found(NamedTuple):
    x: weakref.ref[Tensor]
    version: int  # the input's: it may be changed in place between two readers
    stream: object  # another one might read values that are not there yet, or not any more
    values: weakref.ref[Tensor]
    columns: Tensor | None
    reader: Reader

    def shows(self, x: Tensor) -> bool:
        """Whether this was found of x as it is now, and may be read here."""
        return self.x() is x and self.version == x._version and self.stream == _stream(x)


def _remember(x: Tensor, kept: Kept, reader: Reader) -> None:
    """Until its values are freed, which the backward pass does.

    An input that lives on may be filled anew where no version counts it: by numpy, through
    ``.data``, by a fused optimizer, or for a CUDA graph's replay.
    """
    key = id(x)
    values = WeakIdRef(kept.tensors[0], lambda _: _found.pop(key, None))
    columns = kept.way.columns
    _found[key] = _Found(weakref.ref(x), x._version, _stream(x), values, columns, reader)


def _stream(x: Tensor) -> object:
    """Where what is done with x now is queued."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


@dataclass(frozen=True, eq=False)
class _Company:
    """The readers of one tensor, and the columns that any of them needs."""

    readers: Sequence[Reader]
    columns: Tensor | None


def _is_kept_elsewhere() -> bool:
    """Whether what is saved here lives on in another form alone: nothing is there to be shared.

    ``save_on_cpu`` copies it. A checkpoint computes it again, and has to save the same then.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    where = ("torch.utils.checkpoint", "torch.autograd.graph")
    return hooks is not None and hooks[0].__module__ in where


def _kept(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Kept:
    return Kept([gathered(x, columns).to(dtype)], Way(columns, dtype))


def _equal(remade: Tensor, x: Tensor) -> bool:
    """Whether all that differs is the rounding; it may where a kernel's loop ends."""
    bound = 2 * torch.finfo(x.dtype).eps * x.detach().abs().max()
    return bool((remade - x.detach()).abs().max() <= bound)  # not of NaN


def _union(sets: Iterable[Tensor | None]) -> Tensor | None:
    """All columns of several sets, ascending; None, which stands for all, if one is None."""
    found = list(sets)
    parts = [columns for columns in found if columns is not None]
    if len(parts) < len(found):
        return None
    return parts[0] if len(parts) == 1 else torch.unique(torch.cat(parts))
