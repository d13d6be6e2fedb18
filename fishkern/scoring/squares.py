"""Where squared gradients are added up: over the samples for each entry, and by sample if asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fishkern.interception import Rule
from fishkern.scoring.sample_scores import SampleScores
from fishkern.scoring.tied import scatter_rows_


class Squares:
    """The sums ``sum_n g_n^2`` of every parameter, by name.

    ``scores``: float32, of the parameters' shapes, perhaps on another device than these.
    ``by_sample``: takes each sample's sum over the entries, from the same squares.
    """

    def __init__(self, scores: dict[str, Tensor], by_sample: SampleScores | None = None) -> None:
        self.scores = scores
        self.by_sample = by_sample
        self.done: set[str] = set()  # parameters that something was added to in this batch

    def zero(self) -> None:
        """Forget the sums over the samples."""
        for scores in self.scores.values():
            scores.zero_()

    def add_layer(
        self, rule: Rule, module: nn.Module, names: dict[str, str], x: Tensor, grad_out: Tensor
    ) -> None:
        """Add a layer's squares to the scores of its parameters, ``names`` by local names."""
        targets = {local: self._target(name, x.device) for local, name in names.items()}
        if self.by_sample is None:
            rule.fisher_(module, targets, x, grad_out)
        else:
            self.by_sample.add_layer(rule, module, targets, names, x, grad_out)
        for local, name in names.items():
            self._finish(name, targets[local])

    def add_rows(self, name: str, x: Tensor, rows: Tensor) -> None:
        """Add ``rows`` ``[N, U, H]``, of the ids x ``[N, U]`` of each sample, to an embedding's."""
        target = self._target(name, x.device)
        if self.by_sample is None:
            scatter_rows_(target, x, rows)
        else:
            self.by_sample.add_rows(name, target, x, rows)
        self._finish(name, target)

    def add_grads(self, name: str, start: int, grads: Tensor) -> None:
        """Square and add the gradients ``[n, *shape]`` of samples ``start`` and after."""
        target = self._target(name, grads.device)
        squares = grads.to(target.dtype).square()
        if self.by_sample is None:
            target += squares.sum(0)
        else:
            self.by_sample.add_squares(name, target, start, squares)
        self._finish(name, target)

    def add_grad(self, n: int, name: str, grad: Tensor) -> None:
        """Square and add one sample's gradient, where the scores are."""
        scores = self.scores[name]
        square = grad.to_dense().to(scores).square()
        if self.by_sample is None:
            scores += square
        else:
            self.by_sample.add_squares(name, scores, n, square[None])

    def _target(self, name: str, device: torch.device) -> Tensor:
        """Where squares are added up: the scores, or a buffer beside the module, freed with it."""
        scores = self.scores[name]
        return scores if scores.device == device else torch.zeros_like(scores, device=device)

    def _finish(self, name: str, target: Tensor) -> None:
        scores = self.scores[name]
        if target is not scores:
            if target.is_cuda and scores.device.type == "cpu":
                # Through pinned memory, which torch keeps for the next parameter of this size.
                host = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
                target = host.copy_(target)
            scores.add_(target.to(scores.device))
        self.done.add(name)
