"""Where the entries of a mask lie: its shares of columns, rows and tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import fishkern

TILE = 64


class Shares(NamedTuple):
    """Of all matrices of a mask, weighted by their sizes."""

    columns: float
    rows: float
    tiles: float


def shares(mask: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Shares:
    """The shares of columns, rows and tiles of 64 x 64 that hold a selected entry."""
    used, total = torch.zeros(3, dtype=torch.float64), 0
    for name, index in mask.items():
        shape = shapes[name]
        if len(shape) == 2:
            rows, columns = index // shape[1], index % shape[1]
            across = -(-shape[1] // TILE)
            tiles = rows // TILE * across + columns // TILE
            counts = ((columns, shape[1]), (rows, shape[0]), (tiles, -(-shape[0] // TILE) * across))
            share = [len(torch.unique(found)) / count for found, count in counts]
            used += shape.numel() * torch.tensor(share, dtype=torch.float64)
            total += shape.numel()
    return Shares(*(used / total).tolist())


def mask_of(scores: Mapping[str, Tensor], density: float) -> tuple[fishkern.SparseMask, Shares]:
    """The best entries, and where they lie."""
    mask = fishkern.select(scores, density=density)
    return mask, shares(mask, mask.shapes)
