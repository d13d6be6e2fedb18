"""``select_ird``: samples and parameters chosen together, by each other's Fisher information."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishkern.batches.labels import Draws, check_labels
from fishkern.batches.losses import LossFn, default_loss
from fishkern.batches.samples import cut_batches
from fishkern.functional import topk_indices
from fishkern.names import Patterns, match
from fishkern.scoring.candidates import scored, unwrap
from fishkern.scoring.passes import Scoring
from fishkern.scoring.ranks import RankSums, all_of, first_of, rank_in
from fishkern.scoring.rescoring import Rescoring, Sums
from fishkern.scoring.square_cache import SquareCache
from fishkern.selection.masks import SparseMask
from fishkern.selection.select import select

__all__ = ["IRDResult", "IRDStep", "select_ird"]

RANGES = ("samples", "parameters")


class IRDStep(NamedTuple):
    """One pair that was met: what was left after a half of a round."""

    round: int  # 0 for the start
    samples: Tensor  # int64 [n], ascending
    mask: SparseMask
    value: float | None = None  # what evaluate said of the pair


@dataclass(frozen=True)
class IRDResult:
    """What ``select_ird`` chose, and what it met on its way.

    Attributes:
        mask: The parameters' entries that are left; every candidate is named.
        samples: Indices of the samples that are left, int64, ascending.
        trace: Every pair met, from all samples and all candidates down to the targets.
        routes: How each parameter was scored (by this rank), as in ``FisherDiagonal``.
        reasons: For parameters that were not "fused" why, as there.
        cached: Whether the squared gradients were kept (by all ranks); if not, every half of a
            round was a pass.
    """

    mask: SparseMask
    samples: Tensor
    trace: tuple[IRDStep, ...]
    routes: dict[str, str]
    reasons: dict[str, str]
    cached: bool


def select_ird(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    density: float,
    num_samples: int,
    rounds: int,
    first: str = "samples",
    shrink_samples: float | None = None,
    shrink_parameters: float | None = None,
    loss_fn: LossFn | None = None,
    params: Patterns | Callable[[str, nn.Parameter], bool] | None = None,
    keep: Patterns = (),
    labels: str = "empirical",
    generator: torch.Generator | None = None,
    evaluate: Callable[[Tensor, SparseMask], float] | None = None,
    cache_bytes: int = 2**30,
    verify: int = 2,
    score_device: torch.device | str | None = None,
    progress: bool = True,
    process_group: Any = None,
) -> IRDResult:
    """Choose samples and parameters together by Iterative Range Decreasing (IRD).

    With ``g[n, i]`` the gradient of sample n's own loss (at its ``labels``) for entry i, a round
    keeps those current samples, and those current entries, that have the most Fisher information
    over what the other range still holds::

        samples:    the n in S with the largest  sum_{i in P} g[n, i]^2
        parameters: the i in P with the largest  sum_{n in S} g[n, i]^2

    What is the paper's (Dong, Xue, Zheng and He, "Targeted Efficient Fine-tuning", 2024; before
    that "Data-oriented Dynamic Fine-tuning Parameter Selection Strategy for FISH Mask"): that
    samples and parameters are searched for as a pair, and that an iteration keeps those of either
    with larger Fisher information, so that both ranges decrease. Only its abstract could be read.
    Our reading: the two sums above, the alternation within a round, the shrink factors and the
    targets; hence the arguments for the latter.

    Gradients do not change between the rounds. Where the squares of all samples and candidates fit
    into ``cache_bytes``, they are kept from one scoring pass, and the rounds only sum. Otherwise
    each half of a round is one more scoring pass over the samples that it still has, except where
    a sum is known already: with samples first and shares ``s_r = n_r / N0`` after round r that is
    ``1 + 2 (s_1 + ... + s_{R-1}) + s_R`` passes in all. ``.cached`` says which way was taken.

    Args:
        model: As for ``estimate_fisher``; it is left as it was.
        samples: The N0 samples to choose from, in batches as ``estimate_fisher`` takes them;
            iterated once, and held while they may be scored again. For that it must be possible to
            cut samples out of them: mappings, tuples or lists of tensors.
        density: The share of the candidates to end with: k = round(density * candidates).
        num_samples: How many samples to end with.
        rounds: How often both ranges shrink.
        first: Which of the two shrinks first in a round: "samples" or "parameters".
        shrink_samples: The share f in (0, 1] of the samples that a round keeps: round(N0 f^r) are
            left after round r, but never less than ``num_samples``, and exactly that after the
            last. None: the f that leads there in equal shares.
        shrink_parameters: The same of the parameters.
        loss_fn: As for ``estimate_fisher``.
        params: The candidates, as for ``estimate_fisher``.
        keep: Globs of parameters to train whole, as for ``select``: neither scored nor counted in
            k, but whole in every mask.
        labels: As for ``estimate_fisher``. "sampled" draws one label for each sample, once for all
            rounds; with "expected" ``g^2`` is the exact expectation.
        generator: For drawn labels, as for ``estimate_fisher``.
        evaluate: ``evaluate(samples, mask) -> float``, larger being better, asked of every pair in
            the trace once all are known. Then the best pair is the result (of equal ones the
            last), even if it is larger than the targets: return ``-inf`` for what is no choice.
            Every rank of a ``process_group`` asks; what the first one is told counts.
        cache_bytes: How much memory the kept squares may take: 4 bytes for each of N0 samples times
            the number of candidates. 0 keeps none.
        verify: As for ``estimate_fisher``.
        score_device: Where scores accumulate and squares are kept; None: beside the parameters.
        progress: Show a progress bar.
        process_group: Choose among the samples of all ranks of this group, numbered through, one
            rank's after the other's, with the same result on each; None: this process alone. The
            ranks may have different numbers of samples, and ``cache_bytes`` is each one's own.

    Returns:
        ``.mask``, ``.samples``, and ``.trace``, whose last pair they are unless ``evaluate`` chose
        another; also ``.routes``, ``.reasons`` and ``.cached``. Counts are exact in every round;
        ties go to the lower index.

    Raises:
        ValueError: A target or factor out of range, more samples asked for than there are, scores
            that are zero everywhere; besides all that ``estimate_fisher`` refuses.
        TypeError: An argument of another type than above.
        FisherVerificationError: As from ``estimate_fisher``.

    Warns:
        UserWarning: As ``select``: tensors without a gradient, zeros selected.

    Example:
        >>> import torch, fishkern
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> samples = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> result = fishkern.select_ird(
        ...     model, samples, density=0.25, num_samples=8, rounds=2, loss_fn=loss_fn,
        ...     progress=False)
        >>> [(len(step.samples), step.mask.num_selected) for step in result.trace]
        [(32, 8), (16, 8), (16, 4), (8, 4), (8, 2)]
        >>> result.mask.num_selected, result.samples.shape, result.cached
        (2, torch.Size([8]), True)
    """
    _check(model, density, num_samples, rounds, first, cache_bytes, verify, evaluate)
    _check_share("shrink_samples", shrink_samples)
    _check_share("shrink_parameters", shrink_parameters)
    check_labels(labels, loss_fn, generator)
    model = unwrap(model)
    with ExitStack() as stack:
        candidates = stack.enter_context(scored(model, params))
        kept = set(match(candidates, keep, "keep"))
        ranked = {name: param for name, param in candidates.items() if name not in kept}
        if not ranked:
            raise ValueError(f"keep is {keep!r}, which leaves no candidate to rank: keep fewer")
        everything = _everything(ranked, score_device)
        total = everything.num_selected
        k = round(float(density) * total)
        if k < 1:
            raise ValueError(
                f"density is {density}, which leaves none of {total:,} candidates: raise it"
            )
        cache = SquareCache(everything, cache_bytes)
        draws = Draws(generator, rank_in(process_group)) if labels == "sampled" else None
        losses = loss_fn or default_loss(model, labels, draws)
        scoring = Scoring(model, ranked, losses, score_device, labels)
        bar = stack.enter_context(tqdm(desc="IRD", unit="sample", disable=not progress))
        batches = cut_batches(samples, None, model, loss_fn is None)
        passes = Rescoring(scoring, verify, bar)
        passes.run(batches, cache, everything)
        ranks = all_of((scoring.num_samples, cache.complete), process_group)
        sizes, complete = [size for size, _ in ranks], all(whole for _, whole in ranks)
        found = sum(sizes)
        if not found:
            raise ValueError("samples is empty: pass at least one batch")
        if num_samples > found:
            raise ValueError(
                f"num_samples is {num_samples}, but samples holds {found}: choose no more"
            )
        own: Sums = passes
        if cache.complete and scoring.num_samples:
            own = cache
            passes.batches.clear()
        source = RankSums(own, sizes, process_group)
        trace = [IRDStep(0, torch.arange(found), everything)]
        order = RANGES if first == RANGES[0] else RANGES[::-1]
        for r in range(1, rounds + 1):
            left = {
                "samples": _left(found, num_samples, shrink_samples, r, rounds),
                "parameters": _left(total, k, shrink_parameters, r, rounds),
            }
            for half in order:
                _, chosen, mask, _ = trace[-1]
                if half == "samples" and left[half] < len(chosen):
                    chosen = chosen[_keep_samples(source, left[half])]
                elif half == "parameters" and left[half] < mask.num_selected:
                    mask = _keep_entries(source, left[half], mask)
                else:
                    continue
                trace.append(IRDStep(r, chosen, mask))
        routes, reasons = scoring.routes(), scoring.why()
        if kept:
            whole = _everything(candidates, score_device)
            trace = [step._replace(mask=_joined(whole, step.mask)) for step in trace]
    if evaluate is not None:
        values = first_of([_value(evaluate, step) for step in trace], process_group)
        trace = [step._replace(value=v) for step, v in zip(trace, values, strict=True)]
    best = _best(trace)
    return IRDResult(best.mask, best.samples, tuple(trace), routes, reasons, complete)


def _keep_samples(source: Sums, count: int) -> Tensor:
    """Keep the best samples; their positions among those before."""
    kept = topk_indices([source.sums_by_sample()], count)[0].cpu()
    source.keep_samples(kept)
    return kept


def _keep_entries(source: Sums, count: int, mask: SparseMask) -> SparseMask:
    """Keep the best of the mask's entries; the mask that is left."""
    kept = select(source.sums_by_entry(), k=count)
    indices = {name: index[kept[name].long().to(index.device)] for name, index in mask.items()}
    left = SparseMask(indices, mask.shapes)
    source.keep_entries(kept, left)
    return left


def _everything(candidates: Mapping[str, nn.Parameter], score_device: Any) -> SparseMask:
    indices = {
        name: torch.arange(param.numel(), device=score_device or param.device)
        for name, param in candidates.items()
    }
    return SparseMask(indices, {name: param.shape for name, param in candidates.items()})


def _joined(whole: SparseMask, mask: SparseMask) -> SparseMask:
    """All of ``whole``, but of what ``mask`` names only its entries."""
    return SparseMask({name: mask.get(name, index) for name, index in whole.items()}, whole.shapes)


def _left(start: int, target: int, share: float | None, r: int, rounds: int) -> int:
    """How many are left after round r."""
    if r == rounds:
        return target
    if share is None:
        share = (target / start) ** (1 / rounds)
    return max(target, round(start * share**r))


def _value(evaluate: Callable[[Tensor, SparseMask], float], step: IRDStep) -> float:
    value = float(evaluate(step.samples, step.mask))
    if math.isnan(value):
        raise ValueError(
            f"evaluate returned NaN for {len(step.samples)} samples and "
            f"{step.mask.num_selected:,} entries: return -inf for a pair that is no choice"
        )
    return value


def _best(trace: list[IRDStep]) -> IRDStep:
    """The pair of the largest value, of equal ones the last; the last one if none has a value."""
    return max(reversed(trace), key=lambda step: 0.0 if step.value is None else step.value)


def _check(
    model: Any,
    density: Any,
    num_samples: Any,
    rounds: Any,
    first: Any,
    cache_bytes: Any,
    verify: Any,
    evaluate: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module")
    if not isinstance(density, numbers.Real) or isinstance(density, bool):
        raise TypeError(f"density is {density!r}: pass a number")
    if not 0 < float(density) <= 1:
        raise ValueError(f"density is {density}: it is a share above 0 and up to 1, 5 % being 0.05")
    least = {"num_samples": 1, "rounds": 1, "cache_bytes": 0, "verify": 0}
    given = (num_samples, rounds, cache_bytes, verify)
    for (name, bound), value in zip(least.items(), given, strict=True):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: pass an int")
        if value < bound:
            raise ValueError(f"{name} is {value}: pass {bound} or more")
    if first not in RANGES:
        raise ValueError(f"first is {first!r}: choose one of {', '.join(RANGES)}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate is {evaluate!r}: pass a callable (samples, mask) -> float")


def _check_share(name: str, share: Any) -> None:
    if share is None:
        return
    if not isinstance(share, numbers.Real) or isinstance(share, bool):
        raise TypeError(f"{name} is {share!r}: pass a number, or None")
    if not 0 < float(share) <= 1:
        raise ValueError(f"{name} is {share}: it is the share that a round keeps, above 0, up to 1")
