"""``create_fish_optimizer``: warm up, score, rewind, select, build - in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fishkern.diagonal import FisherDiagonal
from fishkern.fisher import estimate_fisher
from fishkern.losses import LossFn, default_loss
from fishkern.masks import select as select_entries
from fishkern.names import match, named_parameters
from fishkern.optim import FishSparseAdamW
from fishkern.preserve import random_state
from fishkern.train_only import train_only as attach

__all__ = ["create_fish_optimizer"]

WARMUP_STEPS = 30  # enough to be level with LoRA where scoring at initialisation lost 2.5 points
WARMUP_LR = 1e-3


class _FishOptimizer(FishSparseAdamW):
    """FishSparseAdamW with the scores that its mask was chosen by."""

    fisher: FisherDiagonal


def create_fish_optimizer(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float,
    lr: float,
    num_samples: int = 128,
    warmup_steps: int | None = None,
    keep: str | Iterable[str] = (),
    train_only: bool = False,
    loss_fn: LossFn | None = None,
    progress: bool = True,
    **adamw_kwargs: Any,
) -> FishSparseAdamW:
    """Score the trainable parameters, select the best, and build their optimizer.

    A fresh adapter hides half of itself: LoRA's B is zero, so A's gradient is zero, whatever A may
    be good for. Therefore the model may be trained for a few ordinary steps before it is scored;
    its initial weights are put back afterwards (all but the mask is as if nothing had happened).
    Base weights beside a new head (``keep``) are better scored once the head has learnt something:
    then only the kept tensors are warmed up.

    Args:
        model: Its parameters that require a gradient are the candidates.
        batches: As for ``estimate_fisher``; iterated again from the start for each purpose if it
            can be (a list, a DataLoader), otherwise warm-up takes the first ones.
        density: Share of the candidates (without ``keep``) to train.
        lr: Learning rate of the optimizer.
        num_samples: How many samples to score with.
        warmup_steps: AdamW steps at ``1e-3`` before scoring. None: 30 where a whole matrix is
            zero, as in a fresh adapter, or where something is kept; else 0.
        keep: Globs of parameters to train whole, such as a new head: not ranked, not counted.
        train_only: Also make the selected entries the model's only trainable parameters
            (``fishkern.attached(model)`` is the handle).
        loss_fn: As for ``estimate_fisher``.
        progress: Show progress bars.
        **adamw_kwargs: Passed on to ``FishSparseAdamW``.

    Returns:
        The optimizer, with ``.mask`` and ``.fisher``.

    Raises:
        ValueError: As from ``estimate_fisher`` and ``select``.

    Example:
        >>> import torch, fishkern
        >>> model = torch.nn.Linear(3, 2)
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        >>> batches = [(torch.randn(8, 3), torch.randn(8, 2))]
        >>> optimizer = fishkern.create_fish_optimizer(
        ...     model, batches, density=0.5, lr=1e-3, num_samples=8, loss_fn=loss_fn,
        ...     progress=False)
        >>> optimizer.mask.num_selected
        4
    """
    candidates = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    kept = match(candidates, keep, "keep") if keep else []
    fresh = any(p.dim() > 1 and not bool(p.any()) for p in candidates.values())
    if warmup_steps is None:
        warmup_steps = WARMUP_STEPS if fresh or kept else 0
    supply = _Supply(batches)
    with ExitStack() as stack:
        if warmup_steps:
            warmed = candidates if fresh or not kept else {n: candidates[n] for n in kept}
            stack.enter_context(_rewound(warmed.values()))
            stack.enter_context(random_state())
            _warm_up(model, supply, warmed, warmup_steps, loss_fn, progress)
        fisher = estimate_fisher(
            model, supply, loss_fn=loss_fn, num_samples=num_samples, progress=progress
        )
    mask = select_entries(fisher, density=density, keep=keep)
    if train_only:
        attach(model, mask)
    optimizer = _FishOptimizer(model.named_parameters(), lr=lr, mask=mask, **adamw_kwargs)
    optimizer._mask_is_computed = True
    optimizer.fisher = fisher
    return optimizer


class _Supply:
    """Batches that are iterated from the start each time, or go on where they cannot be."""

    def __init__(self, batches: Iterable[Any]) -> None:
        iterator = iter(batches)
        self._batches = iterator if iterator is batches else batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def endless(self) -> Iterator[Any]:
        """Over and over, as long as there are any."""
        while True:
            empty = True
            for batch in self:
                empty = False
                yield batch
            if empty:
                raise ValueError("batches ended during the warm-up: pass more, or a list")


@contextmanager
def _rewound(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters' values and gradients are put back at the end."""
    before = [(param, param.detach().clone(), param.grad) for param in params]
    for param, _, _ in before:
        param.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value, grad in before:
                param.copy_(value)
                param.grad = grad


def _warm_up(
    model: nn.Module,
    supply: _Supply,
    params: dict[str, nn.Parameter],
    steps: int,
    loss_fn: LossFn | None,
    progress: bool,
) -> None:
    """Ordinary AdamW steps on the mean of the samples' losses."""
    optimizer = torch.optim.AdamW(list(params.values()), lr=WARMUP_LR, weight_decay=0.0)
    loss_fn = loss_fn or default_loss(model)
    training = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        batches = supply.endless()
        for _ in tqdm(range(steps), desc="Warm-up", unit="step", disable=not progress):
            loss_fn(model, next(batches)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        for module, mode in training:
            module.training = mode
