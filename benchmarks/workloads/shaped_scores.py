"""Scores shaped like MiniLM's, for any transformer whose own are not there.

A layer's Fisher scores are nearly a product of a factor for each row and one for each column,
``F[o, i] ~ E[grad_out_o^2] E[x_i^2]``, and a few columns stand out. ``shaped_scores`` draws such
scores for the tensors of any transformer, with the spreads that MiniLM's have on SST-2 (128
samples): a mask of them has about the same shares of columns, rows and tiles, but at a density of
0.5 % up to twice as many columns, so that what is measured with it is rather too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Of the logarithm of the scores, measured on MiniLM.
COLUMN_SPREAD, ROW_SPREAD, ENTRY_SPREAD = 0.85, 1.2, 0.3
OUTLIERS = (8.0, 4.0)  # two columns of every matrix that reads the residual stream stand out
QUERY_AND_KEY = -2.2  # lower than other matrices
VECTORS = 4.6  # biases and norms are higher
DEEPEST, LAST = 1.35, 2.0  # from the first to the last layer in equal steps; the last one, beside


def shaped_scores(shapes: Mapping[str, Iterable[int]], hidden: int) -> dict[str, Tensor]:
    """Scores for the tensors of a transformer's layers.

    Args:
        shapes: By the parameters' names, in which BERT's or LLaMA's names of modules stand.
        hidden: The width of the residual stream.
    """
    generator = torch.Generator().manual_seed(0)
    layer_of = {name: int(re.findall(r"\.(\d+)\.", name)[0]) for name in shapes}
    last = max(layer_of.values())
    outliers = torch.randperm(hidden, generator=generator)[: len(OUTLIERS)]
    scores = {}
    for name, size in shapes.items():
        shape = torch.Size(size)
        level = DEEPEST * layer_of[name] / max(last, 1) + LAST * (layer_of[name] == last)
        drawn = ROW_SPREAD * torch.randn(shape[0], generator=generator)
        if len(shape) == 1:
            scores[name] = (level + VECTORS + drawn).exp()
            continue
        if re.search(r"query|key|q_proj|k_proj", name):
            level += QUERY_AND_KEY
        columns = COLUMN_SPREAD * torch.randn(shape[1], generator=generator)
        if shape[1] == hidden and not re.search(r"attention\.output|o_proj", name):
            columns[outliers] += torch.tensor(OUTLIERS)
        entries = ENTRY_SPREAD * torch.randn(shape, generator=generator)
        scores[name] = (entries + drawn[:, None] + columns + level).exp()
    return scores
