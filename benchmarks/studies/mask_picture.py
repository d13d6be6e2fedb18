"""``python -m benchmarks.studies.mask_picture``: docs/train-only.png, where a mask's entries lie.

Three matrices of MiniLM and their entries in the mask of 0.5 % of all layers by Fisher scores on
SST-2, a dot for each; and as many as in the first at random. ``GLUE_DIR`` names the folder with
``sst2/train.tsv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fishkern
from benchmarks.machine import ROOT
from benchmarks.workloads import glue

OUTPUT = ROOT / "docs" / "train-only.png"
DENSITY = 0.005
SHOWN = {
    "value, layer 5": "bert.encoder.layer.5.attention.self.value.weight",
    "value, layer 4": "bert.encoder.layer.4.attention.self.value.weight",
    "attention's output, layer 5": "bert.encoder.layer.5.attention.output.dense.weight",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.mask_picture", description=__doc__
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    mask = fishkern.select(glue.scores("sst2"), density=DENSITY)
    dense = {title: mask.dense(name) for title, name in SHOWN.items()}
    (title, first), *_ = dense.items()
    chance = torch.randperm(first.numel(), generator=torch.Generator().manual_seed(0))
    dense[f"as many as in {title}, at random"] = (chance < int(first.sum())).view(first.shape)
    draw(dense, args.output)
    print(args.output)
    return 0


def draw(dense: Mapping[str, Tensor], path: Path) -> None:
    """The masks ``[O, I]``, all of one shape, side by side: a pixel for each entry."""
    import matplotlib  # optional: the extra "bench" installs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    height, width = next(iter(dense.values())).shape
    margin, title, dpi = 12, 44, 100
    size = (len(dense) * (width + margin) + margin, height + title + margin)
    figure = plt.figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi)
    for i, (name, mask) in enumerate(dense.items()):
        left = margin + i * (width + margin)
        box = (left / size[0], margin / size[1], width / size[0], height / size[1])
        axes = figure.add_axes(box)
        axes.imshow(~mask, cmap="gray", vmin=0, vmax=1, interpolation="none")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name}\n{int(mask.sum()):,} entries", fontsize=9, pad=4)
    figure.canvas.draw()
    colours = np.asarray(figure.canvas.buffer_rgba())
    Image.fromarray(colours).convert("L").quantize(16).save(path, optimize=True)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
