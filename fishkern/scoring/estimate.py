"""``estimate_fisher``: diagonal Fisher information of every candidate, in one pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishkern.batches import samples
from fishkern.batches.labels import Draws, check_labels
from fishkern.batches.losses import LossFn, default_loss
from fishkern.names import Patterns, suggest
from fishkern.scoring.candidates import scored, unwrap
from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.scoring.passes import Scoring
from fishkern.scoring.ranks import gathered, rank_in
from fishkern.scoring.sample_scores import SampleScores
from fishkern.scoring.verification import FisherVerificationError, require_finite
from fishkern.selection.masks import SparseMask

__all__ = ["FisherVerificationError", "estimate_fisher"]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    params: Patterns | Callable[[str, nn.Parameter], bool] | None = None,
    num_samples: int | None = None,
    labels: str = "empirical",
    verify: int = 2,
    score_device: torch.device | str | None = None,
    progress: bool = True,
    generator: torch.Generator | None = None,
    process_group: Any = None,
    sample_scores: bool | SparseMask = False,
) -> FisherDiagonal:
    """Score parameters by the diagonal of the Fisher information, by default the empirical one.

    For each parameter ``F = 1/N sum_n (grad log p(y_n | x_n))^2``: a sample's gradient is summed
    over its tokens, then squared, then averaged over the samples (Sung et al., "Training Neural
    Networks with Fixed Sparse Masks", 2021; Xue et al., "FISH-Tuning", 2025, equation 3).

    ``.routes`` says how each parameter was scored, always exactly. "fused" costs about one ordinary
    forward and backward a batch: a rule covers the layer, and a kernel that squares per sample
    takes the place of its weight gradient; or a module multiplies or adds the parameter entry by
    entry. "vmap": the module around it is run again for each sample's gradients. "loop":
    one-sample passes over the same batch - of that module, where vmap cannot run it, or of the
    model, for a use that no rule saw and wherever loss_fn or the model takes gradients itself (a
    gradient penalty, forces). ``.reasons`` says why a parameter was not fused.

    The model is scored without dropout and with its norms in eval mode, and is left as it was:
    gradients, buffers, modes, hooks, classes, random state.

    Args:
        model: Any module; DDP's and ``torch.compile``'s wrappers are looked through.
        batches: Iterated once. Mappings with the samples in dimension 0 of each tensor, given to
            the model as ``model(**batch)``, or anything that ``loss_fn`` understands. Packed
            sequences: ``sample_ids`` [B, T] say which sample each token belongs to (0 to N - 1;
            -1: padding); the model is not given them, and keeps the samples apart by itself.
        loss_fn: ``(model, batch) -> losses [N]``, each sample's own negative log-likelihood,
            summed over its tokens. None: from the output's ``.logits`` and ``batch["labels"]``.
        params: The candidates: globs, or a predicate ``(name, param) -> bool``. None: every
            parameter that requires a gradient.
        num_samples: Stop after exactly this many. The last mapping is cut; batches of another
            kind must end on the boundary. None: all of them.
        labels: Which y to take the gradient at (the default loss only; a ``loss_fn`` decides that
            for itself). "empirical": the data's. "sampled": one drawn from the model's own
            distribution, ``y ~ p(y | x_n)``, for each sample, or for each of its tokens alone,
            given the data's inputs; a value: ``y ~ N(f, 1)``. "expected": the exact expectation,
            ``sum_c p(c | x_n) (grad log p(c | x_n))^2``, in C - 1 backward passes over one
            forward for C classes; a value: ``(grad f)^2``, in one. Not for tokens. Neither needs
            labels in the batch: they only say, by -100, what is left out (without labels, what
            the attention mask does). Multi-label classification has no default loss.
        verify: So many samples of the first batch (and of the first with more than one sample)
            are scored again by one-sample autograd.
        score_device: Where scores accumulate; None: beside each parameter.
        progress: Show a progress bar.
        generator: For drawn labels: one number is taken from it, to seed generators of our own.
            None: from torch's global one, which ends in the state it had, so that a second call
            draws the same. Ranks of a ``process_group`` draw differently, the rank being added to
            the seed.
        process_group: Sum over the ranks of this group; None: this process alone.
        sample_scores: Also sum each sample's squared gradient entries, in the same pass: over the
            entries in a mask of candidates, or over all (True).

    Returns:
        A mapping from names (as in ``model.named_parameters()``, wrappers' prefixes stripped, a
        tied weight once) to float32 scores of the parameters' shapes. A parameter that took no
        part has zeros. ``.sample_scores``, where asked for, is float32 ``[num_samples]`` in the
        order of the batches (one rank's after the other's); else None.

    Raises:
        TypeError: An argument of another type than above.
        ValueError: No candidate, no sample, a batch or loss that does not fit, ``labels`` that the
            model or ``loss_fn`` cannot have, a mask that names anything but candidates.
        FisherVerificationError: The re-scored samples disagree.
        RuntimeError: Scores overflowed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> fisher = estimate_fisher(model, batches, loss_fn=loss_fn, progress=False)
        >>> fisher["weight"].shape, fisher.num_samples, fisher.routes["weight"]
        (torch.Size([2, 3]), 8, 'fused')
    """
    check_labels(labels, loss_fn, generator)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module")
    samples.check_num_samples(num_samples)
    if not isinstance(verify, int) or isinstance(verify, bool):
        raise TypeError(f"verify is {verify!r}: pass a number of samples, 0 to switch it off")
    if verify < 0:
        raise ValueError(f"verify is {verify}: pass 0 to switch it off")
    model = unwrap(model)
    with ExitStack() as stack:
        candidates = stack.enter_context(scored(model, params))
        by_sample = _by_sample(sample_scores, candidates)
        if loss_fn is None:
            draws = Draws(generator, rank_in(process_group)) if labels == "sampled" else None
            losses = default_loss(model, labels, draws)
        else:
            losses = loss_fn
        scoring = Scoring(model, candidates, losses, score_device, labels, by_sample)
        bar = stack.enter_context(
            tqdm(total=num_samples, desc="Fisher scores", unit="sample", disable=not progress)
        )
        for batch, size in samples.cut_batches(batches, num_samples, model, loss_fn is None):
            size = scoring.add_verified(batch, size, verify)
            bar.update(size)
            if num_samples is not None and scoring.num_samples >= num_samples:
                break
        total = _reduce(scoring, process_group)
    samples.check_found(scoring.num_samples, num_samples, total)
    sums = None if by_sample is None else gathered(by_sample.result(), process_group)
    return _finished(scoring, total, labels, sums)


def _by_sample(sample_scores: Any, candidates: Mapping[str, nn.Parameter]) -> SampleScores | None:
    if isinstance(sample_scores, bool):
        return SampleScores() if sample_scores else None
    if not isinstance(sample_scores, SparseMask):
        kind = type(sample_scores).__name__
        raise TypeError(f"sample_scores is a {kind}: pass True, False or a SparseMask")
    for name, shape in sample_scores.shapes.items():
        if name not in candidates:
            raise ValueError(
                f"the mask of sample_scores names {name!r}, which is not scored"
                f"{suggest(name, candidates)}: choose candidates with params=, or another mask"
            )
        if candidates[name].shape != shape:
            raise ValueError(
                f"the mask of sample_scores has {name!r} in shape {list(shape)}, the model in "
                f"{list(candidates[name].shape)}: pass a mask of this model"
            )
    return SampleScores(sample_scores)


def _reduce(scoring: Scoring, process_group: Any) -> int:
    """Sum scores and counts over the group's ranks; the number of samples of all."""
    if process_group is None:
        return scoring.num_samples
    import torch.distributed as dist

    for scores in scoring.scores.values():
        dist.all_reduce(scores, group=process_group)
    device = next(iter(scoring.scores.values())).device
    total = torch.tensor(scoring.num_samples, device=device)
    dist.all_reduce(total, group=process_group)
    return int(total.item())


def _finished(
    scoring: Scoring, total: int, labels: str, sample_scores: Tensor | None
) -> FisherDiagonal:
    for scores in scoring.scores.values():
        scores /= total
    require_finite(scoring.scores)
    if sample_scores is not None:
        require_finite({"sample_scores": sample_scores})
    return FisherDiagonal(
        scoring.scores,
        num_samples=total,
        labels=labels,
        routes=scoring.routes(),
        reasons=scoring.why(),
        sample_scores=sample_scores,
    )
