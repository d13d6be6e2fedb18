"""``python -m benchmarks.studies.peft``: measure every PEFT method, and write docs/peft.md.

Each method that can be imported here becomes a row of results/peft.csv; rows of others stay as
they were, so that packages that cannot share an environment can share the table.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fishkern
from benchmarks.harness import Missing, Run, alternate, median_ratio
from benchmarks.machine import RESULTS, ROOT, describe
from benchmarks.studies.peft.methods import METHODS
from benchmarks.studies.peft.models import Method, kind, matches, widened
from tests.support.oracle import fisher_oracle
from tests.support.tolerances import SCORE, score_error

Row = dict[str, Any]
COLUMNS = (
    *("date", "commit", "fishkern", "torch", "machine", "threads", "package", "version"),
    *("transformers", "method", "model", "routes", "error", "cost", "rounds", "note"),
)
SAMPLES, TOKENS = 16, 32  # of the batch that is timed
FISHKERN, ORDINARY = "fishkern", "ordinary pass"
ROUTES = ("fused", "vmap", "loop")  # from the fastest to the slowest


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a row is not exact, or does not go the way that the catalogue says."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # what the packages say of each method
    logging.disable(logging.WARNING)
    rows = {row["method"]: row for row in read_rows(args.csv)}
    faults = []
    chosen = [
        method
        for method in METHODS
        if method.name in (args.method or [method.name])
        and method.package in (args.package or method.package)
    ]
    for method in (bar := tqdm(chosen, unit="method", disable=None)):
        bar.set_postfix_str(method.name)
        try:
            row = examine(method)
        except Missing as reason:
            tqdm.write(f"{method.name}: {reason}; its row stays as it was")
            continue
        if not args.times:
            before = rows.get(method.name, {})
            if before and before["routes"] == row.get("routes"):  # a cost is that of its routes
                row |= {key: before[key] for key in ("model", "cost", "rounds")}
        elif "error" in row:
            row |= measure(method, "tiny" if args.quick else "large", args.seconds)
        faults += [f"{method.name}: {fault}" for fault in faults_of(method, row)]
        rows[method.name] = row
        write_rows(args.csv, rows)
    args.output.write_text(document(read_rows(args.csv)), encoding="utf-8")
    print(f"{args.csv} and {args.output} written")
    for fault in faults:
        print(fault)
    return int(bool(faults))


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
    truth = fisher_oracle(widened(model), [batch], _summed(method), list(scores))
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


def _summed(method: Method) -> Callable[..., torch.Tensor]:
    return lambda model, batch: method.losses(model, batch).sum()


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
    if "error" in row and not float(row["error"]) <= SCORE:
        faults.append(f"error {row['error']} > {SCORE}")
    expected = {(route, pattern) for pattern, route in method.patterns()}
    if not method.refused and "routes" in row and _pairs(row["routes"]) != expected:
        faults.append(f"routes {row['routes']}, the catalogue says {dict(method.routes)}")
    return faults


def _pairs(routes: str) -> set[tuple[str, str]]:
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


def document(rows: Sequence[Row]) -> str:
    """docs/peft.md, made of the rows."""
    refused = [row for row in rows if not row["error"]]
    timed = [row for row in rows if row["error"]]
    worst = max((float(row["error"]) for row in timed), default=0.0)
    numbers = {"methods": len(rows), "exact": len(timed), "worst": f"{worst:.1e}"}
    numbers |= {"samples": SAMPLES, "tokens": TOKENS, "where": _where(rows)}
    table = ["| method | routes | max error | cost | timed on |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        routes = "; ".join(_with_code(part) for part in row["routes"].split("; ") if part)
        routes = routes or "refused"
        name = row["method"] + (f" ({row['note']})" if row["note"] and row["error"] else "")
        table.append(f"| {name} | {routes} | {row['error']} | {row['cost']} | {row['model']} |")
    reasons = "\n".join(
        f"- **{row['method']}**: {row['note'].removeprefix('refused: ')}." for row in refused
    )
    return TEXT.format(
        **numbers, table="\n".join(table), costs=_costs(timed), refused=reasons or "None."
    )


def _with_code(part: str) -> str:
    route, kinds = part.split(": ")
    return f"{route}: {', '.join(f'`{kind}`' for kind in kinds.split())}"


def _costs(rows: Sequence[Row]) -> str:
    """A line for each route: what the rows cost whose slowest route it is."""
    lines = ["| slowest route of a method | methods | median cost | range |"]
    lines.append("| --- | --- | --- | --- |")
    for route in ROUTES:
        costs = [
            float(row["cost"])
            for row in rows
            if row["cost"]
            and max(ROUTES.index(r) for r, _ in _pairs(row["routes"])) == ROUTES.index(route)
        ]
        if costs:
            middle = f"{statistics.median(costs):.2f}"
            lines.append(
                f"| {route} | {len(costs)} | {middle} | {min(costs):.2f} to {max(costs):.2f} |"
            )
    return "\n".join(lines)


def _where(rows: Sequence[Row]) -> str:
    """Machines and versions, each once."""

    def all_of(column: str) -> str:
        return ", ".join(sorted({row[column] for row in rows}))

    packages = sorted({f"{row['package']} {row['version']}" for row in rows})
    return (
        f"{all_of('machine')}; threads: {all_of('threads')}; torch {all_of('torch')}; "
        f"transformers {all_of('transformers')}; {', '.join(packages)}"
    )


TEXT = """# PEFT methods

Made by `make peft-table` from benchmarks/results/peft.csv; do not edit by hand.

{methods} methods of PEFT and of the `adapters` package. {exact} are scored exactly: against
one-sample autograd in float64, the largest error of any score is {worst}. The rest is refused,
with the reason.

## How to read the table

- **routes**: which way the scores of each kind of parameter go, as in `fisher.routes`. A kind is a
  parameter's name without its layer; `*` and `?` stand for more of them.
- **max error**: on a small random model with padded batches, the adapter's weights moved away from
  their initialisation (where half of a LoRA has no gradient). It is relative to the largest true
  score of the tensor; a tensor that is zero but for rounding is measured by 1e-3 of the model's
  root mean square.
- **cost**: the time of `estimate_fisher(verify=0)` over that of an ordinary forward and backward
  pass of the same {samples} samples of {tokens} tokens, which trains the same parameters. The two
  alternate; the cost is the median of their ratios. A row without a cost has not been timed.
- **timed on**: the model, its size, and how many weights the method trains. Bert is
  all-MiniLM-L6-v2 with its real weights, the others have random weights.

Measured on: {where}.

## What each route costs

- **fused**: a rule covers the layer, and its kernel takes the place of the weight gradient in the
  one backward pass; or the parameter is multiplied with activations entry by entry (or added to
  them), where its gradient still has the samples. About the ordinary pass, with any number of them.
- **vmap**: that one module is run again on its own inputs for the gradients of each sample: more
  than the ordinary pass, less than the loop.
- **loop**: a forward and backward pass for each sample of the batch, for these parameters alone;
  the others stay on their own routes. Its price is what batching gives on the machine at hand: a
  few times the ordinary pass on one thread of a CPU, more on a GPU.

{costs}

## The methods

{table}

## Refused

{refused}

Where PEFT trains on another loss than the default one, pass `loss_fn(model, batch) -> losses [N]`.
Whatever is scored, its first samples are compared with plain autograd (`verify=2`), also of methods
that are not in this table.
"""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.peft", description=__doc__)
    names, packages = [m.name for m in METHODS], sorted({m.package for m in METHODS})
    parser.add_argument("--method", choices=names, action="append", help="repeatable; all")
    parser.add_argument("--package", choices=packages, action="append", help="repeatable; all")
    parser.add_argument("--seconds", type=float, help="to spend on each method's rounds (3)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--quick", action="store_true", help="time tiny models, three rounds each")
    parser.add_argument(
        "--no-times", dest="times", action="store_false", help="routes and errors; costs stay"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "peft.csv", help="the rows")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "peft.md")
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = 0.0 if args.quick else 3.0
    return args


if __name__ == "__main__":
    raise SystemExit(main())
