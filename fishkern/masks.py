"""SparseMask, the selected entries of a model's tensors, and ``select``, which chooses them."""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fishkern import files
from fishkern.diagonal import check_scores
from fishkern.names import (
    Patterns,
    by_canonical_name,
    canonical_name,
    match,
    named_parameters,
    some,
    suggest,
)
from fishkern.ranking import ORDERS, SCOPES, choose
from fishkern.summary import summarize

__all__ = ["BoundMask", "SparseMask", "select"]


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


def select(
    fisher: Mapping[str, Tensor],
    *,
    density: float | None = None,
    k: int | None = None,
    scope: str = "global",
    keep: Patterns = (),
    order: str = "largest",
    max_columns: float | None = None,
    seed: int | None = None,
) -> SparseMask:
    """Choose exactly k entries by their scores.

    The k largest scores of all candidates, in one ranking (Sung et al., 2021, section 3.1) or in
    equal shares per tensor. Ties go to the earlier tensor, then to the lower position, so that the
    mask does not depend on device or threads.

    Args:
        fisher: For each parameter a float32 tensor of scores, not negative: a ``FisherDiagonal`` or
            any other mapping.
        density: The share of the candidates to select: k = round(density * candidates), a half
            going to the even number as in Python's ``round``. Give this or ``k``.
        k: How many entries to select.
        scope: "global": one ranking. "tensor": the same share of each tensor, rounded so that the
            largest remainders make up k.
        keep: Globs of parameters to train whole: they are not ranked and not counted in k, but
            they are in the mask and in its ``num_selected``.
        order: "largest", or as controls "smallest" or "random" (which needs ``seed``).
        max_columns: The share, in (0, 1], of each matrix's columns that selected entries may use:
            the columns of the largest summed score (for a control: of the smallest, or random
            ones), rounded up. A column is an input feature of a linear weight [O, I]; a
            convolution counts as [O, I * kh * kw]; 1-D tensors are not limited. This bounds what
            ``train_only`` computes and keeps.
        seed: For "random": the same seed gives the same mask on every device.

    Returns:
        The mask, with an entry for each tensor, in the order of ``fisher``.

    Raises:
        ValueError: Both or none of ``density`` and ``k``, or one out of range; more entries asked
            for than ``max_columns`` leaves; a pattern in ``keep`` that matches nothing; scores that
            are NaN, infinite, negative, or zero everywhere.
        TypeError: Scores that are not float32 tensors.

    Warns:
        UserWarning: All scores of a tensor are zero, or zeros were selected to make up k.

    Example:
        >>> import torch
        >>> mask = select({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[1.0, 2.0]])}, k=3)
        >>> dict(mask)
        {'a': tensor([0, 1], dtype=torch.int32), 'b': tensor([1], dtype=torch.int32)}
    """
    _check_choices(density, scope, order, max_columns, seed)
    if not isinstance(fisher, Mapping):
        raise TypeError(f"fisher is a {type(fisher).__name__}: pass a mapping name -> scores")
    scores = by_canonical_name(fisher.items(), "fisher")
    if not scores:
        raise ValueError("fisher is empty: score at least one parameter")
    check_scores(scores)
    kept = set(match(scores, keep, "keep"))
    ranked = {name: score.detach() for name, score in scores.items() if name not in kept}
    k = _count(density, k, sum(score.numel() for score in ranked.values()))
    generator = torch.Generator().manual_seed(0 if seed is None else operator.index(seed))
    with_zeros = [] if order == "random" else _check_values(ranked)
    found = choose(list(ranked.values()), k, scope, order, max_columns, generator)
    chosen = dict(zip(ranked, found, strict=True))
    if order == "largest":
        _warn_of_zeros({name: (ranked[name], chosen[name]) for name in with_zeros}, k)
    for name in kept:
        chosen[name] = torch.arange(scores[name].numel(), device=scores[name].device)
    return SparseMask(
        {name: chosen[name] for name in scores},
        {name: score.shape for name, score in scores.items()},
    )


def _check_choices(
    density: float | None, scope: str, order: str, max_columns: float | None, seed: int | None
) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}: choose one of {', '.join(SCOPES)}")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: choose one of {', '.join(ORDERS)}")
    if order == "random" and seed is None:
        raise ValueError('order="random" needs a seed: pass seed=0, say')
    for what, share in (("density", density), ("max_columns", max_columns)):
        if share is not None and not isinstance(share, numbers.Real):
            raise TypeError(f"{what} is {share!r}: pass a number")
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density is {density}: it is a share from 0 to 1, 5 % being 0.05")
    if max_columns is not None and not 0 < max_columns <= 1:
        raise ValueError(f"max_columns is {max_columns}: it is a share above 0 and up to 1")


def _count(density: float | None, k: int | None, candidates: int) -> int:
    """How many entries to select of so many candidates."""
    if (density is None) == (k is None):
        given = "neither" if k is None else f"both (density={density}, k={k})"
        raise ValueError(f"{given} of density and k is given: pass exactly one of them")
    if density is not None:
        return round(float(density) * candidates)
    try:
        k = operator.index(k)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"k is {k!r}: pass an int") from error
    if not 0 <= k <= candidates:
        raise ValueError(f"k is {k}, the candidates are {candidates}: choose k from 0 up to that")
    return k


def _check_values(scores: Mapping[str, Tensor]) -> list[str]:
    """Refuse scores that cannot be ranked; the names of the tensors that hold a zero."""
    lowest: dict[str, float] = {}
    silent: list[str] = []
    for name, score in scores.items():
        if score.numel() == 0:
            continue
        low, high = (bound.item() for bound in score.aminmax())
        if not (low >= 0 and high < math.inf):  # NaN, which aminmax passes on, fails both
            value = "NaN" if math.isnan(low) else "negative" if low < 0 else "infinite"
            raise ValueError(
                f"a score of {name!r} is {value} (they are from {low} to {high}): scores are "
                f"squares; find what overflowed, or pass absolute values"
            )
        lowest[name] = low
        if high == 0:
            silent.append(name)
    if lowest and len(silent) == len(lowest):
        raise ValueError(
            "the scores are zero everywhere: there is nothing to rank by. The loss has no "
            "gradient here: check it, or train some steps before scoring a fresh adapter"
        )
    if silent:
        warnings.warn(
            f"all scores are zero in {len(silent)} of {len(lowest)} tensors: {some(silent)}. They "
            f"took no part in the loss, or have no gradient yet, as LoRA's A while B is zero: "
            f"score after some warm-up steps",
            stacklevel=3,
        )
    return [name for name, low in lowest.items() if low == 0]


def _warn_of_zeros(pairs: Mapping[str, tuple[Tensor, Tensor]], k: int) -> None:
    """Warn if any of the chosen scores is zero; from each tensor its scores and the chosen ones."""
    zeros = {n: int((score.reshape(-1)[i] == 0).sum()) for n, (score, i) in pairs.items()}
    names = [name for name, count in zeros.items() if count]
    if names:
        warnings.warn(
            f"{sum(zeros.values()):,} of the {k:,} selected entries have a score of zero, there "
            f"being no better ones: in {some(names)}. Select fewer, or score more samples",
            stacklevel=3,
        )


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
