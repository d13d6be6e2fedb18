"""The gradient of a linear layer's selected entries, by every route, against the dense gradient."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.harness import Case, Config, Run, Target, Times, check_error
from fishkern.functional import (
    SelectedGradPlan,
    linear_selected_grad_,
    plan_selected_grad,
    restrict_columns,
)

PLANNED, DENSE = "fishkern", "dense + gather"
ROUTES = ("tiles", "columns", "rows")
# At each density, the share of columns that hold a selected entry in MiniLM's mask on SST-2.
COLUMN_SHARE = {0.0005: 0.004, 0.005: 0.08, 0.05: 0.55}
# How a mask is drawn: uniformly; uniformly in a share of the columns, which are drawn too, as many
# as in a real mask; or as few columns as can hold the entries, nearly whole.
MASKS = ("uniform", "uniform_in_drawn_columns", "nearly_whole_columns")


@dataclass
class Layer:
    """What backward hands over, and what is selected of the weight."""

    x: Tensor
    grad_out: Tensor
    kept: Tensor  # x, or those of its columns that hold a selected entry
    indices: Tensor  # into [O, I]
    local: Tensor  # into the columns that are kept
    selected_grad: Tensor

    def plan(self, route: str | None = None) -> SelectedGradPlan:
        shape = (self.grad_out.shape[-1], self.kept.shape[-1])
        return plan_selected_grad(self.local, shape, dtype=self.x.dtype, route=route)


def selected(layer: Layer, route: str | None = None) -> Run:
    plan = layer.plan(route)

    def run() -> Tensor:
        linear_selected_grad_(layer.selected_grad.zero_(), layer.kept, layer.grad_out, plan)
        return layer.selected_grad

    return run


def dense(layer: Layer) -> Run:
    """What autograd and a gather do."""
    x, grad_out = layer.x.flatten(0, -2), layer.grad_out.flatten(0, -2)

    def run() -> Tensor:
        gathered = (grad_out.T @ x).flatten().index_select(0, layer.indices)
        return layer.selected_grad.zero_().add_(gathered)

    return run


def draw(config: Config, generator: torch.Generator) -> Tensor:
    """The positions of a mask."""
    outputs, inputs = config["outputs"], config["inputs"]
    count = round(config["density"] * outputs * inputs)
    width = inputs
    if config["mask"] != "uniform":
        width = -(-count // outputs)
        if config["mask"] == "uniform_in_drawn_columns":
            width = max(width, round(COLUMN_SHARE[config["density"]] * inputs))
    columns = torch.randperm(inputs, generator=generator)[:width].sort().values
    inside = torch.randperm(outputs * width, generator=generator)[:count].sort().values
    return inside // width * inputs + columns[inside % width]


class SelectedGrad(Case):
    """One layer's backward, with what it keeps of x: all, or the columns that are needed."""

    name = "selected_grad"
    baselines = (DENSE,)
    contenders: ClassVar[dict[str, Callable[[Layer], Run]]] = {
        PLANNED: selected,
        **{route: partial(selected, route=route) for route in ROUTES},
        DENSE: dense,
    }
    targets = (
        Target(
            "selected gradient, planned route: time / best route",
            {},
            PLANNED,
            "time_of:best route",
            1.25,
        ),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        layers = {
            "tiny": [(96, 64)],
            "quick": [(1536, 384)],
            "full": [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)],
        }[suite]
        dtypes = {
            "tiny": ["float32"],
            "quick": ["float32", "bfloat16"],
            "full": ["float32", "bfloat16"],
        }
        return [
            {
                "outputs": outputs,
                "inputs": inputs,
                "tokens": 64 if suite == "tiny" else 2048,
                "density": density,
                "mask": mask,
                "x": "whole" if mask == "uniform" else "columns",
                "dtype": dtype,
            }
            for outputs, inputs in layers
            for dtype in dtypes[suite]
            for mask in MASKS
            for density in COLUMN_SHARE
        ]

    def setup(self, config: Config, device: str) -> Layer:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, config["dtype"])
        x, grad_out = (
            torch.randn(32, config["tokens"] // 32, size, generator=generator).to(device, dtype)
            for size in (config["inputs"], config["outputs"])
        )
        indices = draw(config, generator).int().to(device)
        kept, local = x, indices
        columns, restricted = restrict_columns(indices, (config["outputs"], config["inputs"]))
        if config["x"] == "columns":
            kept, local = x[..., columns].contiguous(), restricted
        layer = Layer(x, grad_out, kept, indices, local, torch.zeros(len(indices), device=device))
        config["columns"] = len(columns)
        config["planned"] = layer.plan().route
        return layer

    def gate(self, config: Config, device: str, contender: str) -> None:
        """Against the dense gradient in float64."""
        layer = self.setup(config, device)
        x, grad_out = (t.double().flatten(0, -2) for t in (layer.x, layer.grad_out))
        truth = (grad_out.T @ x).flatten()[layer.indices.long()]
        bound = 1e-5 if config["dtype"] == "float32" else 1e-2
        check_error(self.contenders[contender](layer)(), truth, bound, contender)

    def metrics(
        self, config: Config, workload: Layer, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        """The planned route against the one that was fastest here."""
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        routes = [medians[route] for route in ROUTES if route in medians]
        if config["planned"] in medians:
            yield PLANNED, "time_of:best route", medians[config["planned"]] / min(routes)
