"""Packed sequences: several samples in a row of tokens, and which token belongs to which sample.

A batch says so by ``sample_ids``, integers [B, T]: token t of row b belongs to sample
``sample_ids[b, t]``, counted from 0 over the batch; -1 is padding. A sample lies in one row.

It is the model that keeps the samples apart: by a mask, or by positions that begin anew (models of
transformers do so if they get ``position_ids``, ``use_cache=False`` and no attention mask).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAMPLE_IDS", "Packing", "packing_of"]

#: The key of a batch's sample ids; the model is not given it.
SAMPLE_IDS = "sample_ids"


def packing_of(batch: Any) -> Packing | None:
    """How the batch is packed; None if it holds no ``sample_ids``.

    Raises:
        TypeError: They are no integer tensor.
        ValueError: They do not count the samples.
    """
    ids = batch.get(SAMPLE_IDS) if isinstance(batch, Mapping) else None
    return None if ids is None else Packing(ids)


class Packing:
    """Which tokens of ``[B, T]`` are each sample's.

    Args:
        sample_ids: Integers ``[B, T]``: 0 to N - 1, each there, in one row; -1 for padding.

    Raises:
        TypeError: They are no integer tensor.
        ValueError: They are not ``[B, T]``, leave a number out, or spread a sample over two rows.

    Example:
        >>> packing = Packing(torch.tensor([[0, 0, 0, 1, 1, -1]]))
        >>> packing.by_sample(torch.arange(6)[None])
        tensor([[0, 1, 2],
                [3, 4, 3]])
        >>> packing.by_sample(torch.arange(6)[None], fill=-1)
        tensor([[ 0,  1,  2],
                [ 3,  4, -1]])
    """

    def __init__(self, sample_ids: Tensor) -> None:
        if not isinstance(sample_ids, Tensor) or sample_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{SAMPLE_IDS} is {_kind(sample_ids)}: pass int32 or int64 [B, T], -1 for padding"
            )
        if sample_ids.dim() != 2:
            raise ValueError(f"{SAMPLE_IDS} has shape {list(sample_ids.shape)}: pass [B, T]")
        self.sample_ids = sample_ids
        flat = sample_ids.flatten()
        tokens = (flat >= 0).nonzero().flatten()
        ids = flat[tokens].long()
        lengths = ids.bincount()
        self.num_samples = len(lengths)
        self.first_length = int(lengths[0]) if len(lengths) else 0
        if bool((lengths == 0).any()) or bool((flat < -1).any()):
            raise ValueError(
                f"{SAMPLE_IDS} holds {ids.unique().tolist()[:8]}...: number the samples of the "
                f"batch from 0, leave none out, and mark padding by -1"
            )
        # Tokens sample by sample, in their order; each sample's start there.
        tokens = tokens[ids.argsort(stable=True)]
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=flat.device)
        self._outside = place >= lengths[:, None]
        self._index = tokens[(starts[:, None] + place).where(~self._outside, starts[:, None])]
        self.rows = self._index[:, 0] // sample_ids.shape[1] if len(lengths) else lengths
        spread = self._index // sample_ids.shape[1] != self.rows[:, None]
        if bool(spread.any()):
            raise ValueError(
                f"{SAMPLE_IDS}: sample {int(spread.any(1).nonzero()[0])} lies in two rows: number "
                f"the samples over the whole batch, not row by row"
            )

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an input whose dimensions before the features are these is ``[B, T, ...]``."""
        return tuple(shape[:2]) == tuple(self.sample_ids.shape)

    def is_first(self, shape: Sequence[int]) -> bool:
        """Whether the first sample alone could have brought an input of this shape."""
        return tuple(shape[:2]) == (1, self.first_length)

    def by_sample(self, tensor: Tensor, fill: float | None = None) -> Tensor:
        """``[N, longest, *]`` of ``[B, T, *]``.

        Where a sample is shorter than the longest: ``fill``, or its first token once more.
        """
        taken = tensor.flatten(0, 1)[self._index]
        if fill is None:
            return taken
        outside = self._outside.view(*self._outside.shape, *(1,) * (taken.dim() - 2))
        return taken.masked_fill(outside, fill)

    def starts(self) -> Tensor:
        """Bool ``[B, T]``: the tokens of which the one before belongs to another sample."""
        before = torch.nn.functional.pad(self.sample_ids[:, :-1], (1, 0), value=-1)
        return self.sample_ids != before

    def cut(self, batch: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
        """The batch with the chosen samples alone.

        A single one gets a batch ``[1, its length]`` of its own; of several the rows stay, and the
        other samples' tokens become padding, without labels.

        Raises:
            ValueError: A tensor of the batch is neither ``[B, T, ...]`` nor ``[B, 1, T, T]``.
        """
        if len(chosen) == 1:
            row = int(self.rows[chosen[0]])
            columns = (self.sample_ids[row] == chosen[0]).nonzero().flatten()
            parts = {key: self._own(key, value, row, columns) for key, value in batch.items()}
            return {**parts, SAMPLE_IDS: torch.zeros_like(parts[SAMPLE_IDS])}
        numbers = self.sample_ids.new_full((self.num_samples + 1,), -1)  # the last: padding's
        numbers[list(chosen)] = torch.arange(
            len(chosen), dtype=numbers.dtype, device=numbers.device
        )
        ids = numbers[self.sample_ids.long()]
        parts = {**batch, SAMPLE_IDS: ids}
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            parts["labels"] = labels.masked_fill(ids < 0, -100)
        return parts

    def _own(self, key: str, value: Any, row: int, columns: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        size = tuple(self.sample_ids.shape)
        if value.shape[:2] == size:
            return value[row, columns].unsqueeze(0)
        if value.dim() == 4 and value.shape[-2:] == (size[1],) * 2 and len(value) in (1, size[0]):
            own = value[row if len(value) > 1 else 0][..., columns, :]
            return own[..., columns].unsqueeze(0)
        raise ValueError(
            f"the packed batch's {key!r} has shape {list(value.shape)}, which cannot be cut by "
            f"sample: pass tensors [B, T, ...] or masks [B, 1, T, T] with B, T = {size}"
        )


def _kind(value: Any) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
