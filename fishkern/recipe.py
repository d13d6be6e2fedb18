"""``create_fish_optimizer``: warm up, score, rewind, select, build - in one call."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fishkern.batches import samples
from fishkern.batches.losses import LossFn, default_loss
from fishkern.names import match, named_parameters
from fishkern.optim import FishSparseAdamW
from fishkern.optim.checkpoint import unpack_masks
from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.scoring.estimate import estimate_fisher
from fishkern.scoring.preserve import (
    hooks_aside,
    random_state,
    restored_attributes,
    restored_buffers,
)
from fishkern.selection.masks import SparseMask
from fishkern.selection.ranking import SCOPES
from fishkern.selection.select import select as select_entries
from fishkern.training.train_only import Handle, attached
from fishkern.training.train_only import train_only as attach

__all__ = ["create_fish_optimizer"]

WARMUP_STEPS = 30  # enough to be level with LoRA where scoring at initialisation lost 2.5 points
WARMUP_LR = 1e-3


class _FishOptimizer(FishSparseAdamW):
    """FishSparseAdamW with the scores that its mask was chosen by."""

    fisher: FisherDiagonal
    _handle: Handle | None = None  # of train_only, where it was attached here; no copy has it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fisher": self.fisher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, whose mask takes the computed one's place, in ``train_only`` too.

        Raises:
            ValueError: As in ``FishSparseAdamW``; nothing is changed then.
            RuntimeError: The leaves would have to change, but other ranks are at work: DDP holds
                the ones there are.
        """
        saved = unpack_masks(state_dict["param_groups"])
        if self._handle is None or not self._mask_is_computed or saved in (None, self.mask):
            super().load_state_dict(state_dict)
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "the checkpoint's mask is another than the one computed now, and DDP holds the "
                "leaves of the latter: call fishkern.train_only(model, the checkpoint's mask) "
                "before DDP, or resume with FishTrainer, which does"
            )
        before, own = deepcopy(self.state_dict()), self._handle.mask
        self._handle.set_mask(saved, self)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._handle.set_mask(own, self)
            super().load_state_dict(before)
            self._mask_is_computed = True
            raise


def create_fish_optimizer(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float,
    lr: float,
    num_samples: int | None = 128,
    warmup_steps: int | None = None,
    rewind: bool = True,
    scope: str = "global",
    keep: str | Iterable[str] = (),
    train_only: bool = False,
    loss_fn: LossFn | None = None,
    progress: bool = True,
    **adamw_kwargs: Any,
) -> FishSparseAdamW:
    """Score the trainable parameters, select the best, and build their optimizer.

    A fresh adapter hides half of itself: LoRA's B is zero, so A's gradient is zero, whatever A may
    be good for. Therefore the model may be trained for a few ordinary steps before it is scored;
    its initial weights are put back afterwards (all but the mask is as if nothing had happened),
    or the warmed ones kept with ``rewind=False``. On SST-2 a LoRA scored at initialisation
    (``warmup_steps=0``) had a mask without one entry of A and lost 2.5 points; after 30 steps,
    rewound, it was level with a plain LoRA of as many weights. Base weights beside a new head
    (``keep``) are better scored once the head has learnt something: then only the kept tensors are
    warmed up.

    Args:
        model: Its parameters that require a gradient are the candidates.
        batches: As for ``estimate_fisher``. What can be iterated again (a list, a DataLoader) is:
            from the start for each purpose, and over and over during the warm-up. Of an iterator
            the warm-up takes the first ``warmup_steps`` batches, and scoring those after them.
        density: Share of the candidates (without ``keep``) to train.
        lr: Learning rate of the optimizer.
        num_samples: How many samples to score with; None: all.
        warmup_steps: AdamW steps at ``1e-3`` before scoring. None: 30 where a whole matrix is
            zero, as in a fresh adapter, or where something is kept; else 0.
        rewind: Put the initial weights back after scoring. False: go on from the warmed weights
            (and running statistics), which is a few unmasked steps more for the tensors warmed.
        scope: As for ``select``: "global", or the same share of each "tensor".
        keep: Globs of parameters to train whole, such as a new head: not ranked, not counted.
        train_only: Also make the selected entries the model's only trainable parameters
            (``fishkern.attached(model)`` is the handle).
        loss_fn: As for ``estimate_fisher``.
        progress: Show progress bars.
        **adamw_kwargs: Passed on to ``FishSparseAdamW``.

    Returns:
        The optimizer, with ``.mask`` and ``.fisher``.

    Raises:
        ValueError: As from ``estimate_fisher``, ``select`` and ``FishSparseAdamW``; a wrong
            argument is refused before any work is done.
        TypeError: An argument of another type than above, or one that ``FishSparseAdamW`` does not
            have.
        RuntimeError: ``train_only`` is attached to the model or to a part of it.

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
    # The optimizer's own arguments are refused by itself, and before the work.
    FishSparseAdamW([torch.zeros(1)], lr=lr, mask=None, **adamw_kwargs)
    choice = choose_mask(
        model,
        batches,
        density=density,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        rewind=rewind,
        scope=scope,
        keep=keep,
        loss_fn=loss_fn,
        progress=progress,
    )
    handle = None
    before = choice.warmed.put()
    try:
        handle = attach(model, choice.mask) if train_only else None
        optimizer = _FishOptimizer(
            model.named_parameters(), lr=lr, mask=choice.mask, **adamw_kwargs
        )
    except BaseException:
        if handle is not None:
            handle.remove()
        before.put()
        raise
    optimizer._mask_is_computed = True
    optimizer._handle = handle
    optimizer.fisher = choice.fisher
    return optimizer


class Choice(NamedTuple):
    """What ``choose_mask`` found; the model itself is as it was."""

    mask: SparseMask
    fisher: FisherDiagonal
    warmed: Values  # with ``rewind=False`` the warmed values, to be put; else none


def choose_mask(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float,
    num_samples: int | None = 128,
    warmup_steps: int | None = None,
    rewind: bool = True,
    scope: str = "global",
    keep: str | Iterable[str] = (),
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> Choice:
    """Warm up, score, rewind and select: arguments and errors of ``create_fish_optimizer``."""
    _check(model, density, num_samples, warmup_steps, scope)
    candidates = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    kept = match(candidates, keep, "keep") if keep else []
    fresh = any(p.dim() > 1 and not bool(p.any()) for p in candidates.values())
    if warmup_steps is None:
        warmup_steps = WARMUP_STEPS if fresh or kept else 0
    supply = _Supply(batches)
    after = Values()
    with ExitStack() as stack:
        if warmup_steps:
            warmed = candidates if fresh or not kept else {n: candidates[n] for n in kept}
            stack.enter_context(_rewound(model, warmed.values()))
            _warm_up(model, supply, warmed, warmup_steps, loss_fn, progress)
            if not rewind:
                after = Values([*warmed.values(), *model.buffers()])
        fisher = estimate_fisher(
            model, supply, loss_fn=loss_fn, num_samples=num_samples, progress=progress
        )
    mask = select_entries(fisher, density=density, scope=scope, keep=keep)
    return Choice(mask, fisher, after)


def _check(
    model: nn.Module,
    density: float,
    num_samples: int | None,
    warmup_steps: int | None,
    scope: str,
) -> None:
    """Refuse before the work what would be refused after it."""
    parts = [name for name, module in model.named_modules() if attached(module) is not None]
    if parts:
        where = f"its part {parts[0]!r}" if parts[0] else "it"
        raise RuntimeError(
            f"train_only is attached to {where} already: call "
            f"fishkern.attached(...).remove() first, or set a new mask on its handle"
        )
    if not isinstance(density, numbers.Real):
        raise TypeError(f"density is {density!r}: pass a number")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}: it is a share from 0 to 1, 5 % being 0.05")
    samples.check_num_samples(num_samples)
    if warmup_steps is not None and warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}: pass 0 for none, or None to choose")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}: choose one of {', '.join(SCOPES)}")


class _Supply:
    """Batches that are iterated from the start each time, or go on where they cannot be."""

    def __init__(self, batches: Iterable[Any]) -> None:
        iterator = iter(batches)
        self._batches = iterator if iterator is batches else batches

    def __iter__(self) -> Iterator[Any]:
        """From the start, or what is left."""
        empty = True
        for batch in self._batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches held none, or none after those of the warm-up: pass more, a list (which "
                "can be iterated again), or fewer warmup_steps"
            )

    def endless(self, model: nn.Module, move: bool) -> Iterator[Any]:
        """Over and over, as long as there are any; ``move``: to the model's device."""
        while True:
            empty = True
            for batch, _size in samples.cut_batches(self, None, model, move):
                empty = False
                yield batch
            if empty:
                raise ValueError("batches held no samples: pass at least one batch")


class Values:
    """Copies of tensors' values, to be put back."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put(self) -> Values:
        """Write them into the tensors; returns the values that were there."""
        before = Values([tensor for tensor, _ in self._copies])
        with torch.no_grad():
            for tensor, value in self._copies:
                tensor.copy_(value)
        return before


@contextmanager
def _rewound(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """At the end all is as before: ``params``, every gradient, buffers, modes, random states."""
    params = list(params)
    values = Values(params)
    grads = [(param, param.grad) for param in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(restored_attributes(model))
        stack.enter_context(restored_buffers(model))
        stack.enter_context(hooks_aside(params))
        for param, _ in grads:
            param.grad = None
        try:
            yield
        finally:
            values.put()
            for param, grad in grads:
                param.grad = grad


@contextmanager
def _only_trainable(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """No other parameter requires a gradient; flags as before at the end."""
    trained = {id(param) for param in params}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        others = []  # its reducer waits for every gradient that it was built for
    for param in others:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in others:
            param.requires_grad_(True)


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
    losses_of = loss_fn or default_loss(model)
    training = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with _only_trainable(model, params.values()):
            batches = supply.endless(model, move=loss_fn is None)  # as estimate_fisher does
            for _ in tqdm(range(steps), desc="Warm-up", unit="step", disable=not progress):
                losses_of(model, next(batches)).mean().backward()
                optimizer.step()
                model.zero_grad()
    finally:
        for module, mode in training:
            module.training = mode
