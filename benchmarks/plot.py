"""``python -m benchmarks.plot``: the README's three pictures, from a machine's CSV.

training.svg: time and memory of a training step; speed.svg: the time of an optimizer's step and of
scoring; memory.svg: what an optimizer keeps and scoring takes. Drawn from each point's latest rows,
and none of another device or number of threads than the last.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS

# Okabe and Ito's colours, which everyone can tell apart; fishkern is the dark one.
COLOURS = {
    "fishkern": "#0072B2",
    "AdamW(fused)": "#E69F00",
    "AdamW(foreach)": "#999999",
    "LoRA, as many weights": "#009E73",
    "LoRA r=8, all linears": "#56B4E9",
    "ordinary pass": "#E69F00",
    "torch.func vmap": "#CC79A7",
    "one-sample loop": "#999999",
}
Row = dict[str, str]
USUAL = {"mask": "uniform", "dtype": "float32", "dropout": "the model's"}


class Group(NamedTuple):
    """Bars that are compared with each other: label, heights by contender, a row they are of."""

    label: str
    bars: dict[str, float]
    row: Row


# Which point of a case makes a group, and what it is called.
STEP = {
    "LoRA of BERT,\n10 % of it": {"model": "bert-base-lora", "density": "0.1"},
    "LoRA of BERT,\n50 % of it": {"model": "bert-base-lora", "density": "0.5"},
    "all of MiniLM,\n0.5 % of it": {"model": "minilm", "density": "0.005"},
    "all of MiniLM,\n10 % of it": {"model": "minilm", "density": "0.1"},
}
TRAINING = {
    f"{percent} % of\nMiniLM's layers": {"model": "minilm", "density": density}
    for percent, density in (("0.05", "0.0005"), ("0.5", "0.005"), ("5", "0.05"))
}
SCORING = {
    "LoRA of MiniLM": {"model": "minilm", "params": "lora"},
    "linear layers": {"model": "minilm", "params": "linears"},
    "every weight": {"model": "minilm", "params": "all"},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, help="benchmarks/results/<machine>.csv")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    args = parser.parse_args(argv)
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if all(row[k] == rows[-1][k] for k in ("device", "threads"))]
    rows.sort(key=itemgetter("date"))
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = {"training": draw_training, "speed": draw_speed, "memory": draw_memory}
    for name, draw in pictures.items():
        path = args.output / f"{name}.{args.format}"
        draw(rows, path)
        print(path)
    return 0


def draw_training(rows: Sequence[Row], path: Path) -> None:
    """Time of a training step to that of AdamW(fused), and all memory that it takes."""
    times = list(ratios(rows, "training_step", "AdamW(fused)", TRAINING))
    memory = list(groups(rows, "training_step", "training_mib", TRAINING))
    figure, (left, right) = _figure(2)
    _bars(left, times, "training step: time, AdamW(fused) = 1")
    _bars(right, memory, "training step: MiB beside the model")
    _line_at_one(left)
    _finish(figure, [*times, *memory], path)


def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """Two panels of ratios: steps to AdamW(fused), scoring to an ordinary pass."""
    steps = list(ratios(rows, "optimizer_step", "AdamW(fused)", STEP))
    scoring = list(ratios(rows, "scoring", "ordinary pass", SCORING))
    figure, (left, right) = _figure(2)
    _bars(left, steps, "optimizer step: time, AdamW(fused) = 1")
    _bars(right, scoring, "scoring: time, forward and backward pass = 1")
    for axes in (left, right):
        _line_at_one(axes)
    _finish(figure, [*steps, *scoring], path)


def draw_memory(rows: Sequence[Row], path: Path) -> None:
    """MiB that the optimizer keeps between steps, and MiB that scoring takes at its peak."""
    own = {label: where for label, where in STEP.items() if where["model"] == "minilm"}
    kept = [
        group._replace(bars={name: value / 2**20 for name, value in group.bars.items()})
        for group in groups(rows, "optimizer_step", "persistent_bytes", own)
    ]
    peaks = list(groups(rows, "scoring", "peak_mib", SCORING))
    figure, (left, right) = _figure(2)
    _bars(left, kept, "optimizer state and indices: MiB")
    _bars(right, peaks, "scoring: peak extra MiB")
    _finish(figure, [*kept, *peaks], path)


def ratios(
    rows: Sequence[Row], case: str, baseline: str, points: dict[str, dict[str, str]]
) -> Iterator[Group]:
    """The ratios to a baseline as they were measured, pair by pair; its own is 1."""
    for group in groups(rows, case, f"ratio:{baseline}", points):
        yield group._replace(bars={**group.bars, baseline: 1.0})


def groups(
    rows: Sequence[Row], case: str, metric: str, points: dict[str, dict[str, str]]
) -> Iterator[Group]:
    """The values of a metric at each point, all of the last commit with every contender there is.

    Where rows differ in more than the point says, those that are USUAL count.
    """
    for label, where in points.items():
        found = [row for row in rows if row["case"] == case and row["metric"] == metric]
        found = [row for row in found if row["contender"] in COLOURS and _fits(row, where)]
        runs: dict[str, dict[str, Row]] = {}
        for row in found:
            runs.setdefault(row["commit"], {})[row["contender"]] = row
        if found:
            latest = max(runs.values(), key=lambda run: (len(run), last_date(run)))
            bars = {name: float(row["value"]) for name, row in latest.items()}
            yield Group(label, bars, next(iter(latest.values())))


def last_date(run: dict[str, Row]) -> str:
    """When the last of its rows was measured."""
    return max(row["date"] for row in run.values())


def _fits(row: Row, where: dict[str, str]) -> bool:
    config = dict(part.split("=", 1) for part in row["config"].split())
    usual = all(config.get(key, value) == value for key, value in USUAL.items())
    return usual and where.items() <= config.items()


def _figure(panels: int) -> Any:
    import matplotlib  # optional: the extra "bench" installs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "svg.hashsalt": "fishkern",  # the same picture from the same rows, byte for byte
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
        }
    )
    return plt.subplots(1, panels, figsize=(5 * panels, 3.4), layout="constrained",
                        gridspec_kw={"wspace": 0.08})  # fmt: skip


def _bars(axes: Any, found: Sequence[Group], title: str) -> None:
    """Grouped bars with their numbers; the same colour is the same contender everywhere."""
    names = [name for name in COLOURS if any(name in group.bars for group in found)]
    heights = sorted(value for group in found for value in group.bars.values())
    width = 0.8 / max(len(names), 1)
    for j, name in enumerate(names):
        at = [i for i, group in enumerate(found) if name in group.bars]
        values = [found[i].bars[name] for i in at]
        places = [i + (j - (len(names) - 1) / 2) * width for i in at]
        axes.bar(places, values, width * 0.92, color=COLOURS[name], label=name)
        for place, value in zip(places, values, strict=True):
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.annotate(text, (place, value), (0, 2), textcoords="offset points", ha="center",
                          fontsize=7.5, bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
    axes.set_title(title)
    axes.set_xticks(range(len(found)), [group.label for group in found])
    axes.tick_params(length=0)
    axes.set_yticks([])
    lines = 1 if len(names) <= 3 else 2  # of the legend
    axes.set_ylim(0, heights[-1] * (1.13 + 0.12 * lines) if heights else 1)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=-(-len(names) // lines), loc="upper left",
                    handlelength=1, handletextpad=0.5, columnspacing=1.2)  # fmt: skip


def _line_at_one(axes: Any) -> None:
    axes.axhline(1, color="#555555", linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)


def _finish(figure: Any, drawn: Sequence[Group], path: Path) -> None:
    last = max((group.row for group in drawn), key=itemgetter("date"))
    commits = ", ".join(sorted({group.row["commit"] for group in drawn}))
    caption = (
        f"{last['machine']}, {last['device']}, {last['threads']} thread(s), float32, "
        f"torch {last['torch']}, fishkern {last['fishkern']} at {commits}, "
        f"{last['date'][:10]}; medians, less is better"
    )
    figure.supxlabel(caption, fontsize=7, color="#555555", x=0.01, ha="left")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)


if __name__ == "__main__":
    raise SystemExit(main())
