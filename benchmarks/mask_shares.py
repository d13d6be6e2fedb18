"""``python -m benchmarks.mask_shares``: where the masks of MiniLM lie, as a table of Markdown.

For each of GLUE's tasks that ``GLUE_DIR`` holds, each kind of score and each density: the shares of
columns, rows and tiles of 64 x 64 that hold a selected entry, of all matrices of the layers,
weighted by their sizes. It is the same each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fishkern
from benchmarks import glue
from benchmarks.harness import Missing

KINDS = {"fisher": "Fisher", "gradient": "\\|g\\|", "weight_gradient": "\\|g w\\|"}
DENSITIES = (0.0005, 0.005, 0.05)
TILE = 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_shares", description=__doc__)
    parser.add_argument("--task", choices=glue.TASKS, action="append", help="repeatable; all")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| task | score |" + "".join(f" {100 * density:g} % |" for density in DENSITIES))
    print("| --- | --- |" + " --- |" * len(DENSITIES))
    for task in args.task or glue.TASKS:
        for kind, label in KINDS.items():
            try:
                found = [mask_of(glue.scores(task, kind), density)[1] for density in DENSITIES]
            except Missing as reason:
                print(f"| {task} | {label} |" + f" {reason} |" * len(DENSITIES), flush=True)
                continue
            cells = (" / ".join(f"{100 * share:.3g}" for share in of_mask) for of_mask in found)
            print(f"| {task} | {label} | " + " | ".join(cells) + " |", flush=True)
        glue.scores.cache_clear()
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())
