"""Scoring again and again: sums by sample and by entry, over fewer and fewer of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from fishkern.batches.samples import can_slice, pick
from fishkern.scoring.passes import Scoring
from fishkern.scoring.sample_scores import SampleScores
from fishkern.scoring.verification import require_finite
from fishkern.selection.masks import SparseMask
from fishkern.selection.ranking import split

__all__ = ["Rescoring", "Sums"]


class Sums(Protocol):
    """Sums over the current samples and entries, and how these become fewer."""

    def sums_by_sample(self) -> Tensor:
        """``[n]``: each sample's squares, summed over the current entries."""

    def sums_by_entry(self) -> dict[str, Tensor]:
        """``[k_i]`` by name: each entry's squares, summed over the current samples."""

    def keep_samples(self, kept: Tensor) -> None:
        """Only these positions, ascending, among the current samples."""

    def keep_entries(self, kept: SparseMask, mask: SparseMask) -> None:
        """Only these positions among the current entries, those of ``mask`` in the parameters."""


class Rescoring:
    """Scoring passes over what is left.

    A pass yields both sums. Those of the samples stay true until entries are dropped, those of the
    entries until samples are.
    """

    def __init__(self, scoring: Scoring, verify: int, bar: Any) -> None:
        self.batches: list[tuple[Any, int]] = []
        self._scoring, self._verify, self._bar = scoring, verify, bar
        self._mask: SparseMask
        self._by_sample: Tensor | None = None  # unknown
        self._entries_known = False  # they are in scoring.scores

    def run(
        self,
        batches: Iterable[tuple[Any, int | None]],
        by_sample: SampleScores,
        mask: SparseMask,
    ) -> None:
        """Score these batches and hold them; the sums by sample are over the mask."""
        self._scoring.restart(by_sample)
        held = []
        for batch, size in batches:
            found = self._scoring.add_verified(batch, size, self._verify)
            self._bar.update(found)
            held += [(batch, found)] if found else []
        self.batches, self._mask = held, mask
        self._bar.total = self._bar.n
        self._bar.refresh()
        require_finite(self._scoring.scores)
        self._by_sample, self._entries_known = by_sample.result(), True

    def _run_again(self) -> None:
        self._bar.total += sum(size for _, size in self.batches)
        self.run(self.batches, SampleScores(self._mask), self._mask)

    def sums_by_sample(self) -> Tensor:
        """See ``Sums``."""
        if self._by_sample is None:
            self._run_again()
        assert self._by_sample is not None
        return self._by_sample

    def sums_by_entry(self) -> dict[str, Tensor]:
        """See ``Sums``."""
        if not self._entries_known:
            self._run_again()
        scores = self._scoring.scores
        return {name: scores[name].flatten()[i.long()] for name, i in self._mask.items()}

    def keep_samples(self, kept: Tensor) -> None:
        """See ``Sums``."""
        assert self._by_sample is not None  # they have just been asked for
        parts = split(kept, [size for _, size in self.batches])
        self.batches = [
            (_picked(batch, part, size), len(part))
            for (batch, size), part in zip(self.batches, parts, strict=True)
            if len(part)
        ]
        self._by_sample, self._entries_known = self._by_sample[kept], False

    def keep_entries(self, kept: SparseMask, mask: SparseMask) -> None:
        """See ``Sums``."""
        self._by_sample, self._mask = None, mask


def _picked(batch: Any, chosen: Tensor, size: int) -> Any:
    if len(chosen) == size:
        return batch
    if not can_slice(batch):
        raise ValueError(
            f"the squares of all samples do not fit into cache_bytes, and samples cannot be cut "
            f"out of a {type(batch).__name__} to score them again: raise cache_bytes, or pass "
            f"mappings of tensors"
        )
    return pick(batch, chosen.tolist(), size)
