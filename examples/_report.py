"""The quickstart's table and figure."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # draws to files only, on machines without a display too

import matplotlib.pyplot as plt
import torch
from _data import Data
from _training import Run
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

import fishkern

COLORS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito's, told apart by the colour-blind too
MARKERS = ("o", "s", "^")
LEAST_SHARE = 0.01  # per cent; what is less has the darkest colour


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
    style = {"font.size": 11, "axes.titlelocation": "left", "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1.25, 1)
        )
        _draw_mask(left, runs[-1].mask)
        _draw_curves(right, runs)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    print(f"The figure is in {path}.")


def _draw_mask(axes: Axes, mask: fishkern.SparseMask) -> None:
    """A cell for each matrix: the selected share of it, as a colour and in per cent."""
    cells = {cell: 100 * share for cell, share in _shares(mask).items()}
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = torch.full((len(modules), len(layers)), torch.nan)  # NaN, no such matrix: stays blank
    for (layer, module), share in cells.items():
        grid[modules.index(module), layers.index(layer)] = max(share, LEAST_SHARE)
    top = max(*cells.values(), 10 * LEAST_SHARE)
    image = axes.imshow(grid, cmap="cividis", norm=LogNorm(LEAST_SHARE, top), aspect="auto")
    for (layer, module), share in cells.items():
        x, y = layers.index(layer), modules.index(module)
        color = "white" if image.norm(max(share, LEAST_SHARE)) < 0.6 else "black"
        axes.text(x, y, _percent(share), color=color, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(modules)), modules)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    axes.set_title("Selected base weights, % of each matrix")


def _shares(mask: fishkern.SparseMask) -> dict[tuple[str, str], float]:
    """The selected share of each matrix by its layer, "top" outside the layers, and module."""
    shares = {}
    for name, indices in mask.items():
        *path, kind = name.split(".")
        layer = next((part for part in path if part.isdecimal()), None)
        if kind == "weight" and layer is not None:
            module = ".".join(path[path.index(layer) + 1 :])
            shares[layer, module] = len(indices) / mask.shapes[name].numel()
        elif kind == "weight" and len(indices) < mask.shapes[name].numel():  # not the head
            shares["top", path[-2:][0]] = len(indices) / mask.shapes[name].numel()
    return shares


def _percent(share: float) -> str:
    return "0" if share == 0 else "<0.01" if share < 0.01 else f"{share:.2g}"


def _draw_curves(axes: Axes, runs: list[Run]) -> None:
    for run, color, marker in zip(runs, COLORS, MARKERS, strict=True):
        steps, accuracies = zip(*run.curve, strict=True)
        axes.plot(steps, accuracies, color=color, marker=marker, label=run.what)
    axes.set_xlabel("training step")
    axes.set_title("Test accuracy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
