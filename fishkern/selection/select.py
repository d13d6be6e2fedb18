"""``select``: the k entries that are trained, chosen by their scores."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from fishkern.names import Patterns, by_canonical_name, match, some
from fishkern.selection.masks import SparseMask
from fishkern.selection.ranking import ORDERS, SCOPES, check_scores, choose

__all__ = ["select"]


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
            ``train_only`` computes and keeps. At a density of 0.05 take 0.1: as accurate as no
            limit in the runs of docs/train-only.md, at the same or a lower learning rate.
        seed: For "random": the same seed gives the same mask on every device.

    Returns:
        The mask, with an entry for each tensor, in the order of ``fisher``.

    Raises:
        ValueError: Both or none of ``density`` and ``k``, or one out of range; more entries asked
            for than ``max_columns`` leaves; a pattern in ``keep`` that matches nothing; scores that
            are NaN, infinite, negative, or zero everywhere.
        TypeError: Scores that are not float32 tensors.

    Warns:
        UserWarning: All scores of a tensor are zero, zeros were selected to make up k, or a density
            above zero selects nothing.

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
        k = round(float(density) * candidates)
        if density and candidates and not k:
            warnings.warn(
                f"density={density} of {candidates:,} candidates is less than one entry, so that "
                f"none is selected: raise it, or pass k",
                stacklevel=3,
            )
        return k
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
