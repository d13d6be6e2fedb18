"""The rows of the table: where each was measured, which ways the scores went, error and cost."""

from __future__ import annotations

import csv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fishkern
from benchmarks.contenders.scoring import true_scores
from benchmarks.harness import Run, alternate, median_ratio, score_error
from benchmarks.machine import describe
from benchmarks.studies.peft.methods import METHODS
from benchmarks.studies.peft.models import Method, kind, matches, widened
from benchmarks.workloads.scoring import Work

Row = dict[str, Any]
COLUMNS = (
    *("date", "commit", "fishkern", "torch", "machine", "threads", "package", "version"),
    *("transformers", "method", "model", "routes", "error", "cost", "rounds", "note"),
)
SAMPLES, TOKENS = 16, 32  # of the batch that is timed
FISHKERN, ORDINARY = "fishkern", "ordinary pass"
TOLERANCE = 1e-5  # of a tensor's largest score
ROUTES = ("fused", "vmap", "loop")  # from the fastest to the slowest


def examine(method: Method) -> Row:
    """Where it was, which ways the scores went, and how exact they are, on the tiny model."""
    model = method.build()
    row = {key: value for key, value in describe("cpu").items() if key in COLUMNS}
    row |= {"package": method.package, "version": version(method.package)}
    row |= {"transformers": version("transformers"), "method": method.name}
    batch, loss_fn = method.batch(model), method.loss_fn()
    try:
        scores = fishkern.estimate_fisher(model, [batch], loss_fn=loss_fn, progress=False)
    except fishkern.FisherVerificationError as error:
        expected = method.refused and method.refused in str(error)
        return {**row, "note": f"refused: {method.why if expected else error}"}
    truth = true_scores(Work(widened(model).eval(), [batch], method))
    row |= {"routes": _routes_text(method, scores.routes)}
    row |= {"error": f"{score_error(scores, truth)[0]:.1e}"}
    return {**row, "note": "" if method.default_loss else "with a loss_fn"}


def measure(method: Method, size: str, seconds: float) -> Row:
    """What scoring costs on a model of the given size."""
    model = method.build(size).eval()
    times = alternate(_runs(method, model), "cpu", seconds, min_rounds=3)
    cost = f"{median_ratio(times, FISHKERN, ORDINARY):.2f}"
    return {"model": _described(model), "cost": cost, "rounds": len(times[FISHKERN])}


def _runs(method: Method, model: torch.nn.Module) -> dict[str, Run]:
    batch, loss_fn = method.batch(model, SAMPLES, TOKENS), method.loss_fn()

    def score() -> None:
        fishkern.estimate_fisher(model, [batch], loss_fn=loss_fn, verify=0, progress=False)

    def train() -> None:
        method.losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    return {FISHKERN: score, ORDINARY: train}


def _described(model: torch.nn.Module) -> str:
    """The model under the adapters, and how many of its weights are trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = type(base).__name__.split("For")[0].removesuffix("LMHeadModel")
    return f"{name} {base.num_parameters() / 1e6:.1f} M, {trained:,} trained"  # type: ignore[operator]


def _routes_text(method: Method, routes: dict[str, str]) -> str:
    """As in ``fused: lora_A lora_B; loop: ia3_l``, by the catalogue's patterns where one fits."""
    found: dict[str, dict[str, None]] = {}
    for name, route in routes.items():
        fitting = [pattern for pattern, _ in method.patterns() if matches(name, pattern)]
        found.setdefault(route, {})[fitting[0] if fitting else kind(name)] = None
    return "; ".join(f"{r}: {' '.join(found[r])}" for r in ROUTES if r in found)


def faults_of(method: Method, row: Row) -> list[str]:
    """What is not as the catalogue says."""
    faults = []
    if method.refused and "error" in row:
        faults.append("scored, where the catalogue says that it is refused")
    if "error" not in row and row["note"] != f"refused: {method.why}":
        faults.append(row["note"])
    if "error" in row and not float(row["error"]) <= TOLERANCE:
        faults.append(f"error {row['error']} > {TOLERANCE}")
    expected = {(route, pattern) for pattern, route in method.patterns()}
    if not method.refused and "routes" in row and pairs(row["routes"]) != expected:
        faults.append(f"routes {row['routes']}, the catalogue says {dict(method.routes)}")
    return faults


def pairs(routes: str) -> set[tuple[str, str]]:
    """(route, kind) of a row's text."""
    parts = [part.split(": ") for part in routes.split("; ") if part]
    return {(route, kind) for route, kinds in parts for kind in kinds.split()}


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: dict[str, Row]) -> None:
    """In the catalogue's order; methods that it has no more are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[method.name] for method in METHODS if method.name in rows)
