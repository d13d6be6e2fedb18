"""What is compared: which weights are trained beside the head, and at which learning rates.

A rule for the columns is tried here by zeroing the scores outside the chosen ones: ``select``,
which takes the best k entries, then stays within them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

import fishkern
from fishkern.functional.selected_grad import plan_restricted

Scores = Mapping[str, Tensor]
Rule = Callable[[Scores, float, int, int], dict[str, Tensor]]  # of scores, share, k, seed: ranks

DENSE_RATES, SPARSE_RATES, FULL_RATES = (3e-4, 1e-3), (1e-3, 3e-3), (1e-4, 3e-4)


@dataclass(frozen=True)
class Arm:
    """One way of training, beside the same new head: a mask, LoRA, every weight or nothing."""

    name: str
    rates: tuple[float, ...]
    density: float | None = None  # of a mask by Fisher scores
    share: float | None = None  # of the columns
    rule: str = ""  # by which these are chosen

    def mask(self, scores: Scores, seed: int) -> fishkern.SparseMask:
        """The entries that this arm trains."""
        if self.rule in ("", "sum"):  # the package's own
            return fishkern.select(scores, density=self.density, max_columns=self.share)
        assert self.density is not None
        assert self.share is not None
        k = round(self.density * sum(score.numel() for score in scores.values()))
        ranks = RULES[self.rule](scores, self.share, k, seed)
        best = best_columns if self.rule != "global" else best_columns_of_all
        with warnings.catch_warnings():  # matrices may be left without a column
            warnings.filterwarnings("ignore", "all scores are zero in")
            return fishkern.select(best(scores, ranks, self.share), k=k)


def count_of_selected(scores: Scores, share: float, k: int, seed: int) -> dict[str, Tensor]:
    """How many of the k best entries lie in the column; where as many, the larger sum."""
    mask = fishkern.select(scores, k=k)
    ranks = {}
    for name, score in scores.items():
        if score.dim() == 2:
            sums = score.sum(0, dtype=torch.float64)
            ranks[name] = mask.dense(name).to(score.device).sum(0) + sums / (sums.sum() * 2 + 1e-30)
    return ranks


def largest_entry(scores: Scores, share: float, k: int, seed: int) -> dict[str, Tensor]:
    """The column's largest score."""
    return {name: score.amax(0) for name, score in scores.items() if score.dim() == 2}


def mean_score(scores: Scores, share: float, k: int, seed: int) -> dict[str, Tensor]:
    """The column's mean score, which compares columns of different heights."""
    return {name: score.mean(0) for name, score in scores.items() if score.dim() == 2}


def at_random(scores: Scores, share: float, k: int, seed: int) -> dict[str, Tensor]:
    """A number drawn for each column: the control."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(score.shape[1], generator=generator).to(score.device)
        for name, score in scores.items()
        if score.dim() == 2
    }


RULES: dict[str, Rule] = {
    "selected": count_of_selected,
    "largest": largest_entry,
    "global": mean_score,
    "random": at_random,
}


def best_columns(scores: Scores, ranks: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The scores, zero outside the share of each matrix's columns that rank highest."""
    kept = dict(scores)
    for name, rank in ranks.items():
        best = rank.argsort(descending=True, stable=True)[: ceil(share * len(rank) - 1e-9)]
        allowed = torch.zeros(len(rank), dtype=torch.bool, device=rank.device)
        allowed[best] = True
        kept[name] = scores[name] * allowed
    return kept


def best_columns_of_all(
    scores: Scores, ranks: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The scores, zero outside the columns that rank highest over all matrices.

    As many columns as hold the share of the matrices' entries, no more.
    """
    names = list(ranks)
    heights = torch.cat(
        [torch.full((len(ranks[name]),), scores[name].shape[0]) for name in names]
    ).to(ranks[names[0]].device)
    order = torch.cat([ranks[name] for name in names]).argsort(descending=True, stable=True)
    allowed = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    allowed[order] = heights[order].cumsum(0) <= share * heights.sum()
    parts = allowed.split([len(ranks[name]) for name in names])
    kept = dict(scores)
    for name, part in zip(names, parts, strict=True):
        kept[name] = scores[name] * part
    return kept


def captured(mask: fishkern.SparseMask, scores: Scores) -> float:
    """The sum of the mask's scores, as a share of that of as many entries without restriction."""
    best = fishkern.select(scores, k=mask.num_selected)
    ours, most = (
        sum(float(scores[name].flatten()[i.long()].double().sum()) for name, i in found.items())
        for found in (mask, best)
    )
    return ours / most


def expected_work(mask: fishkern.SparseMask) -> float:
    """The share of the matrices' dense weight gradients that ``train_only`` works out."""
    work = total = 0.0
    for name, index in mask.items():
        shape = mask.shapes[name]
        if len(shape) == 2:
            total += shape.numel()
            if len(index):
                work += plan_restricted(index.cpu(), (shape[0], shape[1]))[2] * shape.numel()
    return work / total


LORA, EVERY, HEAD = "LoRA r=8", "every weight", "head only"
UNRESTRICTED = "Fisher 5 %"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(UNRESTRICTED, DENSE_RATES, 0.05),
        Arm("best 10 %", DENSE_RATES, 0.05, 0.10, "sum"),
        Arm("best 6 %", DENSE_RATES, 0.05, 0.06, "sum"),
        Arm("best 25 %", DENSE_RATES, 0.05, 0.25, "sum"),
        Arm("10 % global", DENSE_RATES, 0.05, 0.10, "global"),
        Arm("6 % global", DENSE_RATES, 0.05, 0.06, "global"),
        Arm("25 % global", DENSE_RATES, 0.05, 0.25, "global"),
        Arm("10 % random", DENSE_RATES, 0.05, 0.10, "random"),
        Arm("Fisher 0.5 %", SPARSE_RATES, 0.005),
        Arm(LORA, SPARSE_RATES),
        Arm(EVERY, FULL_RATES),
        Arm(HEAD, SPARSE_RATES),
        Arm("10 % by selected", DENSE_RATES, 0.05, 0.10, "selected"),
        Arm("10 % by largest", DENSE_RATES, 0.05, 0.10, "largest"),
    )
}
