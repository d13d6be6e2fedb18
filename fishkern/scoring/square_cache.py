"""The squared gradients of every sample, kept from one scoring pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishkern.interception import Rule
from fishkern.scoring.sample_scores import SampleScores
from fishkern.selection.masks import SparseMask
from fishkern.selection.ranking import split

__all__ = ["SquareCache"]

FLOAT_BYTES = 4


class SquareCache(SampleScores):
    """Keeps ``g[n, i]^2`` of all samples n and entries i, float32, as long as they fit.

    A block ``[N, P]`` a batch, P being the entries of all parameters in their order. The sums by
    sample are collected, too, so that the pass has not been for nothing if they do not fit.

    Args:
        mask: All entries; the squares are kept on the device of its first tensor.
        max_bytes: What all blocks together may take.
    """

    def __init__(self, mask: SparseMask, max_bytes: int) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []
        self.complete = True  # no batch is missing
        self._lay_out(mask)
        self._bytes_left, self._device = max_bytes, next(iter(mask.values())).device
        self._block: Tensor | None = None

    def begin(self, num_samples: int) -> None:
        """See ``SampleScores``."""
        super().begin(num_samples)
        self._block = None  # freed before another one is made
        if self.complete and FLOAT_BYTES * num_samples * self._width <= self._bytes_left:
            self._block = torch.zeros(num_samples, self._width, device=self._device)

    def end(self) -> None:
        """See ``SampleScores``."""
        super().end()
        block, self._block = self._block, None
        if block is None:
            self.complete = False
            self.blocks.clear()
        else:
            self._bytes_left -= FLOAT_BYTES * block.numel()
            self.blocks.append(block)

    def add_layer(
        self,
        rule: Rule,
        module: nn.Module,
        fishers: Mapping[str, Tensor],
        names: Mapping[str, str],
        x: Tensor,
        grad_out: Tensor,
    ) -> None:
        """See ``SampleScores``."""
        if self._block is None:
            super().add_layer(rule, module, fishers, names, x, grad_out)
            return
        for local, squares in rule.sample_squares(module, fishers, x, grad_out).items():
            self.add_squares(names[local], fishers[local], 0, squares)

    def add_squares(self, name: str, fisher: Tensor, start: int, squares: Tensor) -> None:
        """See ``SampleScores``."""
        super().add_squares(name, fisher, start, squares)
        if self._block is not None:
            rows = self._block[start : start + len(squares), self._columns[name]]
            rows += squares.flatten(1).to(rows.device)

    # Afterwards: the sums over what is kept, and less and less of it

    def sums_by_sample(self) -> Tensor:
        """float32 ``[n]``: each kept sample's squares, summed over the kept entries."""
        # In float64, so that a sample's sum does not depend on how many others are in its block.
        return torch.cat([block.sum(1, dtype=torch.float64) for block in self.blocks]).float()

    def sums_by_entry(self) -> dict[str, Tensor]:
        """float32 ``[k_i]`` by name: each kept entry's squares, summed over the kept samples."""
        total = self.blocks[0].sum(0)
        for block in self.blocks[1:]:
            total += block.sum(0)
        return {name: total[columns] for name, columns in self._columns.items()}

    def keep_samples(self, kept: Tensor) -> None:
        """Keep these of the kept samples: positions, ascending."""
        for i, part in enumerate(split(kept, [len(block) for block in self.blocks])):
            self.blocks[i] = self.blocks[i][part.to(self._device)]  # one by one: no second cache

    def keep_entries(self, kept: SparseMask, mask: SparseMask) -> None:
        """Keep these of the kept entries: positions among them; in the parameters, ``mask``."""
        parts = [index.long() + self._columns[name].start for name, index in kept.items()]
        columns = torch.cat(parts)
        for i, block in enumerate(self.blocks):
            self.blocks[i] = block.index_select(1, columns)
        self._lay_out(kept)

    def _lay_out(self, mask: SparseMask) -> None:
        """A column for each entry of the mask."""
        self._columns: dict[str, slice] = {}
        self._width = 0
        for name, index in mask.items():
            self._columns[name] = slice(self._width, self._width + len(index))
            self._width += len(index)
