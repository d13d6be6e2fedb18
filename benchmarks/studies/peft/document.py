"""docs/peft.md, made of the rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.studies.peft.rows import ROUTES, SAMPLES, TOKENS, Row, pairs


def document(rows: Sequence[Row]) -> str:
    """docs/peft.md, made of the rows."""
    refused = [row for row in rows if not row["error"]]
    exact = [row for row in rows if row["error"]]
    worst = max((float(row["error"]) for row in exact), default=0.0)
    numbers = {"methods": len(rows), "exact": len(exact), "worst": f"{worst:.1e}"}
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
        **numbers, table="\n".join(table), costs=_costs(exact), refused=reasons or "None."
    )


def _with_code(part: str) -> str:
    route, kinds = part.split(": ")
    return f"{route}: {', '.join(f'`{kind}`' for kind in kinds.split())}"


def _costs(rows: Sequence[Row]) -> str:
    """A line for each route: what the rows that were timed cost whose slowest route it is."""
    lines = ["| slowest route of a method | methods timed | median cost | range |"]
    lines.append("| --- | --- | --- | --- |")
    for route in ROUTES:
        costs = [
            float(row["cost"])
            for row in rows
            if row["cost"]
            and max(ROUTES.index(r) for r, _ in pairs(row["routes"])) == ROUTES.index(route)
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
  score of the tensor; a tensor that is zero but for rounding is measured by 1e-4 of the model's
  largest.
- **cost**: the time of `estimate_fisher(verify=0)` over that of an ordinary forward and backward
  pass of the same {samples} samples of {tokens} tokens, which trains the same parameters. The two
  alternate; the cost is the median of their ratios. A row without a cost has not been timed.
  One small batch: what a call does once - the modules found, the first sample run alone - weighs
  more here than where several batches are scored (`python -m benchmarks.run --case scoring`).
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
