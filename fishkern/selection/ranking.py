"""Which k positions of a list of score tensors: the largest, the smallest, or random ones.

Exactly k each time, independent of device and threads, and without a copy of all the scores. The
tensors are one long list here, in their order; names and errors are the business of ``select``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishkern.functional import topk_indices

__all__ = ["ORDERS", "SCOPES", "check_scores", "choose", "split"]

SCOPES = ("global", "tensor")
ORDERS = ("largest", "smallest", "random")


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise TypeError unless every score is a float32 tensor."""
    for name, score in scores.items():
        if not isinstance(score, Tensor) or score.dtype != torch.float32:
            found = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"the score of {name!r} is {found}: pass a float32 tensor")


def choose(
    scores: Sequence[Tensor],
    k: int,
    scope: str,
    order: str,
    max_columns: float | None,
    generator: torch.Generator,
) -> list[Tensor]:
    """For each tensor the flat positions of its part of the k first in ``order``, ascending.

    Args:
        scores: float32 tensors, not negative and without NaN (of any value for "random").
        k: How many positions, over all tensors.
        scope: "global", or "tensor": each tensor gives the same share of its entries.
        order: One of ``ORDERS``. Ties: the earlier tensor, then the lower position.
        max_columns: The share of each matrix's columns that may be used, or None.
        generator: On the CPU; drawn from for "random" only.

    Raises:
        ValueError: ``max_columns`` leaves fewer than k candidates, or too few in some tensor.
    """
    limits = [_limit(score, max_columns, order, generator) for score in scores]
    allowed = [
        score if limit is None else limit.restrict()
        for score, limit in zip(scores, limits, strict=True)
    ]
    sizes, room = [score.numel() for score in scores], [score.numel() for score in allowed]
    if scope == "tensor":
        quotas = _proportional(k, sizes)
        if any(quota > space for quota, space in zip(quotas, room, strict=True)):
            fits = min(
                space * sum(sizes) // size for space, size in zip(room, sizes, strict=True) if size
            )
            raise ValueError(_too_few(k, fits, max_columns))
        chosen = [
            _rank([score], quota, order, generator)[0]
            for score, quota in zip(allowed, quotas, strict=True)
        ]
    else:
        if k > sum(room):
            raise ValueError(_too_few(k, sum(room), max_columns))
        chosen = _rank(allowed, k, order, generator)
    return [
        index if limit is None else limit.expand(index)
        for index, limit in zip(chosen, limits, strict=True)
    ]


def _limit(
    score: Tensor, share: float | None, order: str, generator: torch.Generator
) -> _ColumnLimit | None:
    if share is None or share == 1 or score.dim() < 2 or score.numel() == 0:
        return None
    return _ColumnLimit(score, share, order, generator)


def _too_few(k: int, possible: int, max_columns: float | None) -> str:
    return (
        f"max_columns={max_columns} leaves too few candidates for k = {k}: the largest k possible "
        f"is {possible}; raise max_columns, or select no more than that"
    )


def _rank(scores: Sequence[Tensor], k: int, order: str, generator: torch.Generator) -> list[Tensor]:
    """The k first positions over all of the tensors."""
    if order == "largest":
        return _largest(scores, k)
    if order == "smallest":
        return _smallest(scores, k)
    sizes = [score.numel() for score in scores]
    parts = split(_sample(sum(sizes), k, generator), sizes)
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]


def _proportional(k: int, sizes: Sequence[int]) -> list[int]:
    """Share k out in proportion to the sizes; the largest remainders get what is left over."""
    total = sum(sizes)
    if total == 0:
        return [0] * len(sizes)
    shares = [k * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in by_remainder[: k - sum(shares)]:
        shares[i] += 1
    return shares


class _ColumnLimit:
    """The best columns of one matrix, and the way from positions among them to positions in it.

    A tensor of two dimensions or more is a matrix [shape[0], *]: the columns of a linear weight
    [O, I] are its input features, a convolution's are [I * kh * kw]. Best are the columns of the
    largest sum (smallest, or drawn, by ``order``); their number is the share, rounded up.
    """

    def __init__(self, score: Tensor, share: float, order: str, generator: torch.Generator) -> None:
        self._matrix = score.reshape(score.shape[0], -1)
        self._width = self._matrix.shape[1]
        # Not one column more because 0.07 * 100 is 7.000000000000001.
        count = max(1, math.ceil(share * self._width - 1e-9)) if self._width else 0
        if order == "random":
            columns = _sample(self._width, count, generator)
        else:
            sums = self._matrix.sum(0, dtype=torch.float64)
            best = sums.argsort(descending=order == "largest", stable=True)
            columns = best[:count].sort().values
        self._columns = columns.to(score.device)

    def restrict(self) -> Tensor:
        """The scores in the best columns, a copy [rows, count]."""
        return self._matrix[:, self._columns]

    def expand(self, positions: Tensor) -> Tensor:
        """Flat positions in ``restrict()`` as flat positions in the whole matrix; order stays."""
        count = len(self._columns)
        if count == 0:
            return positions
        rows = positions.div(count, rounding_mode="floor")
        return rows * self._width + self._columns[positions - rows * count]


def _largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The op's answer; scores spread over several devices are ranked on the CPU."""
    if len({score.device for score in scores}) <= 1:
        return topk_indices(scores, k)
    chosen = topk_indices([score.cpu() for score in scores], k)
    return [index.to(score.device) for index, score in zip(chosen, scores, strict=True)]


def _smallest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Every score below the k-th smallest, and the first of those equal to it."""
    if k == 0:
        return [torch.empty(0, dtype=torch.int64, device=score.device) for score in scores]
    threshold = _kth_smallest(scores, k)
    ties = k - sum(int((score < threshold).sum()) for score in scores)
    chosen = []
    for score in scores:
        score = score.reshape(-1)
        below, equal = score < threshold, (score == threshold).nonzero().view(-1)[:ties]
        ties -= len(equal)
        below[equal] = True
        chosen.append(below.nonzero().view(-1))
    return chosen


def _kth_smallest(scores: Sequence[Tensor], k: int) -> float:
    """The k-th smallest score, counted from 1, found digit by digit.

    The bits of floats that are not negative are ordered as the floats. Two histograms, of the
    upper and then the lower 16 bits, leave one value.
    """
    prefix = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores:
            bits = score.reshape(-1).abs().view(torch.int32)  # abs: -0.0 is 0.0
            if shift == 0:
                bits = bits[bits >> 16 == prefix] & 0xFFFF
            counts += torch.bincount(bits >> shift, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        digit = int(torch.searchsorted(reached, k))
        k -= int(reached[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()


def _sample(total: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k of the numbers below ``total``, every subset equally likely; int64, ascending.

    Draw what is missing, drop what is there already, and again: no number is treated otherwise
    than another, so the subset is uniform. Beyond a half, what is left out is drawn in its place.
    """
    if k > total // 2:
        chosen = torch.ones(total, dtype=torch.bool)
        if k < total:
            chosen[_sample(total, total - k, generator)] = False
        return chosen.nonzero().view(-1)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < k:
        more = torch.randint(total, (k - len(drawn),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn


def split(positions: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Ascending positions in a row of parts as positions in each part."""
    ends = torch.tensor([0, *sizes]).cumsum(0)
    cuts = torch.searchsorted(positions, ends).tolist()
    return [positions[cuts[i] : cuts[i + 1]] - start for i, start in enumerate(ends[:-1].tolist())]
