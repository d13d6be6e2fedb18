"""The quickstart's table and figure."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # draws to files only, on machines without a display too

import matplotlib.pyplot as plt
import torch
from _data import Data
from _training import Run
from matplotlib.axes import Axes

import fishkern

COLORS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito's, told apart by the colour-blind too
MARKERS = ("o", "s", "^")


def print_table(runs: list[Run], data: Data) -> None:
    """One column per run."""
    rows = {
        "optimizer": [run.optimizer for run in runs],
        "learning rate": [f"{run.lr:g}" for run in runs],
        "trained weights": [f"{run.trained:,}" for run in runs],
        "  beside them, the head's": [f"{run.head:,}" for run in runs],
        "test accuracy": [f"{run.curve[-1][1]:.3f}" for run in runs],
        "scoring, ms a sample": [_time(run.scoring_ms) for run in runs],
        "  by the one-sample loop": [_time(run.loop_ms) for run in runs],
        "training step, ms": [_time(median(run.step_ms)) for run in runs],
        "  of it the optimizer's, ms": [_time(median(run.optimizer_ms)) for run in runs],
        "bytes beside the model": [f"{run.bytes:,}" for run in runs],
    }
    width = max(map(len, rows))
    columns = [max(len(run.what), len(run.optimizer)) for run in runs]

    def line(label: str, cells: list[str]) -> str:
        padded = (f"{cell:>{size}}" for cell, size in zip(cells, columns, strict=True))
        return "  ".join([f"{label:{width}}", *padded])

    print(f"\n{data.name}: {len(data.train):,} to train on, {len(data.test):,} to test on,")
    print(f"{len(data.labels)} classes; the majority class has {data.majority_accuracy:.3f}\n")
    print(line("", [run.what for run in runs]))
    for label, cells in rows.items():
        print(line(label, cells))
    print()


def _time(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.2f}"


def draw(runs: list[Run], path: Path) -> None:
    """Where the last run's entries lie in the model, and how all runs learned."""
    style = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.15, 1)
        )
        _draw_mask(left, runs[-1])
        _draw_curves(right, runs)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    print(f"The figure is in {path}.")


def _draw_mask(axes: Axes, run: Run) -> None:
    shares = _shares(run.mask)
    layers = list(dict.fromkeys(layer for layer, _ in shares))
    modules = list(dict.fromkeys(module for _, module in shares))
    grid = torch.full((len(modules), len(layers)), torch.nan)
    for (layer, module), share in shares.items():
        grid[modules.index(module), layers.index(layer)] = 100 * share
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xlabel("layer")
    axes.set_title(f"Where the {run.trained:,} best base weights lie")
    axes.figure.colorbar(image, ax=axes, label="selected, % of the matrix")


def _shares(mask: fishkern.SparseMask) -> dict[tuple[str, str], float]:
    """For each layer and module of it the selected share."""
    shares = {}
    for name, indices in mask.items():
        if found := re.search(r"\.(\d+)\.(.+)\.weight$", name):
            shares[found[1], found[2]] = len(indices) / mask.shapes[name].numel()
    return shares


def _draw_curves(axes: Axes, runs: list[Run]) -> None:
    for run, color, marker in zip(runs, COLORS, MARKERS, strict=True):
        steps, accuracies = zip(*run.curve, strict=True)
        label = f"{run.what}: {accuracies[-1]:.2f}"
        axes.plot(steps, accuracies, color=color, marker=marker, label=label)
    axes.set_xlabel("training step")
    axes.set_title("Test accuracy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
