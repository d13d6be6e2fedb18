"""Sums by sample, collected in the pass that sums over the samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishkern.interception import Rule
from fishkern.interception.rules import sum_by_sample
from fishkern.scoring.tied import scatter_rows_
from fishkern.selection.masks import SparseMask

__all__ = ["SampleScores"]


class SampleScores:
    """Each sample's squared gradient entries, summed over a mask, batch by batch.

    Args:
        mask: Which entries count; None: all that are scored.
    """

    def __init__(self, mask: SparseMask | None = None) -> None:
        self._mask_given = mask
        self._masks: dict[torch.device, SparseMask] = {}
        self._finished: list[Tensor] = []
        self._batch: dict[torch.device, Tensor] = {}
        self._size = 0

    def begin(self, num_samples: int) -> None:
        """A batch begins, perhaps once more: what was added of it before is dropped."""
        self._size = num_samples
        self._batch = {}

    def end(self) -> None:
        """The batch is complete."""
        self._finished.append(self._sum())
        self._batch = {}

    def result(self) -> Tensor:
        """float32 ``[N]``, in the order of the batches."""
        if not self._finished:
            return torch.zeros(0, dtype=torch.float32)
        return torch.cat([part.to(self._finished[0].device) for part in self._finished])

    def add_layer(
        self,
        rule: Rule,
        module: nn.Module,
        fishers: Mapping[str, Tensor],
        names: Mapping[str, str],
        x: Tensor,
        grad_out: Tensor,
    ) -> None:
        """``rule.fisher_`` on the whole batch, and its sums by sample.

        ``names``: the parameters' names in the model by their local ones; the rest is as there.
        """
        masks = {local: self._mask(names[local], fisher) for local, fisher in fishers.items()}
        if any(self._counts(name) for name in names.values()):
            sums = self._sums(x.device)
            rule.fisher_(module, fishers, x, grad_out, sample_scores=sums, masks=masks)
        else:
            rule.fisher_(module, fishers, x, grad_out)

    def add_squares(self, name: str, fisher: Tensor, start: int, squares: Tensor) -> None:
        """Squared gradients ``[n, *shape]`` of samples ``start`` and after, also for ``fisher``."""
        fisher += squares.sum(0)
        if self._counts(name):
            sums = self._sums(squares.device)[start : start + len(squares)]
            sums += sum_by_sample(squares, self._mask(name, fisher))

    def add_rows(self, name: str, fisher: Tensor, ids: Tensor, values: Tensor) -> None:
        """What to add in each sample's rows: ids ``[N, T]``, values ``[N, T, H]``."""
        scatter_rows_(fisher, ids, values)
        if self._counts(name):
            mask = self._mask(name, fisher)
            sums = self._sums(values.device)
            sums += sum_by_sample(values if mask is None else values * mask[ids], None)

    def _sum(self) -> Tensor:
        """``[N]`` of the batch, over all devices."""
        parts = list(self._batch.values()) or [torch.zeros(self._size, dtype=torch.float32)]
        total = parts[0]
        for part in parts[1:]:
            total += part.to(total.device)
        return total

    def _sums(self, device: torch.device) -> Tensor:
        if device not in self._batch:
            self._batch[device] = torch.zeros(self._size, dtype=torch.float32, device=device)
        return self._batch[device]

    def _counts(self, name: str) -> bool:
        return self._mask_given is None or len(self._mask_given.get(name, ())) > 0

    def _mask(self, name: str, fisher: Tensor) -> Tensor | None:
        """Which entries of the parameter count, bool of its shape; None: all."""
        if self._mask_given is None:
            return None
        if not self._counts(name):
            return torch.zeros((), dtype=torch.bool, device=fisher.device).expand(fisher.shape)
        if fisher.device not in self._masks:
            self._masks[fisher.device] = self._mask_given.to(fisher.device)
        mask = self._masks[fisher.device]
        return None if len(mask[name]) == fisher.numel() else mask.dense(name)
