"""One sample at a time, by plain autograd: the exact way for whatever has no faster one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.batches import samples
from fishkern.batches.losses import LossFn, require_losses
from fishkern.interception import elementwise
from fishkern.scoring.preserve import backward
from fishkern.scoring.torch_functions import unwatched

#: Reentrant checkpointing's warning that a segment gets no gradient.
CUT_OFF = "None of the inputs have requires_grad"


class OneSamplePasses:
    """The model's losses, and the gradients of single samples' losses for the candidates."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Parameter],
        loss_fn: LossFn,
        labels: str = "empirical",
    ) -> None:
        self.model, self.candidates, self.loss_fn = model, candidates, loss_fn
        self.labels = labels
        self._all_params = list(model.parameters())
        self.attached = False  # whether a loss has required a gradient
        #: Whether the losses are made of gradients that loss_fn or the model takes itself.
        self.differentiates = False

    def one_sample_passes(
        self,
        batch: Any,
        size: int,
        chosen: Iterable[int],
        names: Iterable[str],
        use: Callable[[int, str, Tensor], None],
    ) -> None:
        """Plain autograd, a sample at a time: ``use(n, name, gradient)`` for each parameter."""
        names = [name for name in self.candidates if name in set(names)]
        if not names:
            return
        self._require_grad(names)
        chosen = list(chosen)
        each = self._each_loss(batch, size, chosen)
        for n, (terms, shared) in zip(chosen, each, strict=True):
            for k, term in enumerate(terms):
                self._backward(term, batch, retain_graph=shared or k + 1 < len(terms))
                for name in names:
                    param = self.candidates[name]
                    if param.grad is not None:
                        use(n, name, param.grad.detach())
                self._clear_grads()

    def losses_alone(self, batch: Any, size: int, chosen: Iterable[int]) -> list[Tensor]:
        """The losses of the one-sample passes, without a graph."""
        with self._without_graph():
            return [terms.detach().sum() for terms, _ in self._each_loss(batch, size, chosen)]

    def batch_losses(self, batch: Any, size: int) -> Tensor:
        """All losses [N] of the batch, without a graph."""
        with self._without_graph():
            return self._losses(batch, size).detach().sum(0)

    def _each_loss(
        self, batch: Any, size: int, chosen: Iterable[int]
    ) -> Iterator[tuple[Tensor, bool]]:
        """The chosen samples' terms [K], each of a batch of its own; whether they share a graph.

        They do where only loss_fn can read the batch: one graph, N backwards.
        """
        whole = None if samples.can_slice(batch) else self._losses(batch, size)
        for n in chosen:
            if whole is None:
                part = samples.take(batch, n, n + 1, size)
                objects = samples.holds_objects(batch)
                losses = self._losses(part, None if objects else 1)
                if losses.shape[1] == 1:
                    yield losses[:, 0], False
                    continue
                whole = self._losses(batch, size)  # the samples are in the batch's objects
            yield whole[:, n], True

    def _losses(self, batch: Any, size: int | None) -> Tensor:
        """``[K, N]``: a sample's score is the sum of its K terms' squared gradients.

        K is 1, a sample's own loss, but for expected labels (``labels.expected_terms``).
        """
        losses = elementwise.settled(self._call_loss_fn(batch))
        if self.labels == "expected":
            terms: Tensor = losses
            return terms
        return require_losses(losses, batch, size)[None]

    def _call_loss_fn(self, batch: Any) -> Any:
        """The caller's losses, with the gradient of every candidate asked for where it must be.

        Reentrant checkpointing gives none to a segment of which no input requires one, and only
        warns: what comes before the segment may be frozen just for this pass.
        """
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(CUT_OFF):
                raise
        self._require_grad(self.candidates)
        self._forward_again()
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(CUT_OFF):
                raise
            raise RuntimeError(
                "reentrant checkpointing cuts off the gradient of a segment whose inputs require "
                "none: checkpoint with use_reentrant=False, or call "
                "model.enable_input_require_grads()"
            ) from warning

    def _forward_again(self) -> None:
        """What was noted in a forward pass that was given up is to be forgotten."""

    def _backward(self, loss: Tensor, batch: Any, retain_graph: bool = False) -> None:
        if loss.requires_grad:
            self.attached = True
            backward(loss, self.candidates.values(), retain_graph)
        elif not self.attached:
            # Perhaps none of these parameters took part: would any other?
            flags = [(param, param.requires_grad) for param in self.model.parameters()]
            for param, _ in flags:
                param.requires_grad_(param.is_floating_point() or param.is_complex())
            self.attached = self._call_loss_fn(batch).requires_grad
            for param, flag in flags:
                param.requires_grad_(flag)
            if not self.attached:
                raise ValueError(
                    "the losses require no gradient: compute them from the model's outputs in "
                    "loss_fn without detach(), item() or no_grad()"
                )

    @contextmanager
    def _without_graph(self) -> Iterator[None]:
        """No gradient is wanted, so none is missed by a checkpointed segment."""
        with torch.set_grad_enabled(self.differentiates), warnings.catch_warnings():
            warnings.filterwarnings("ignore", CUT_OFF)
            yield

    @unwatched
    def _require_grad(self, names: Iterable[str]) -> None:
        """Only these parameters need a gradient: nothing is computed for any other."""
        chosen = {id(self.candidates[name]) for name in names}
        for param in self._all_params:
            param.requires_grad_(id(param) in chosen)

    @unwatched
    def _clear_grads(self) -> None:
        for param in self.candidates.values():
            param.grad = None
