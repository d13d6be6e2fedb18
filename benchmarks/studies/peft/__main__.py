"""``python -m benchmarks.studies.peft``: measure every PEFT method, and write docs/peft.md.

Each method that can be imported here becomes a row of results/peft.csv; rows of others stay as
they were, so that packages that cannot share an environment can share the table. So does the row
of a method that raises: it is told at the end, and the others are measured.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Missing
from benchmarks.machine import RESULTS, ROOT
from benchmarks.studies.peft.document import document
from benchmarks.studies.peft.methods import METHODS
from benchmarks.studies.peft.rows import examine, faults_of, measure, read_rows, write_rows


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
    for number, method in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {method.name}: ", end="", flush=True)
        start = time.monotonic()
        try:
            row = examine(method)
            if args.times and "error" in row:
                row |= measure(method, "tiny" if args.quick else "large", args.seconds)
        except Missing as reason:
            print(f"{reason}; its row stays as it was", flush=True)
            continue
        except Exception as error:  # of one method: the others are still measured
            faults.append(f"{method.name}: {type(error).__name__}: {error}")
            print(f"{type(error).__name__}; its row stays as it was", flush=True)
            continue
        before = rows.get(method.name)
        if not args.times and before and before["routes"] == row.get("routes"):
            row |= {key: before[key] for key in ("model", "cost", "rounds")}  # that of its routes
        faults += [f"{method.name}: {fault}" for fault in faults_of(method, row)]
        rows[method.name] = row
        write_rows(args.csv, rows)
        found = [f"{key} {row[key]}" for key in ("routes", "error", "cost", "note") if row.get(key)]
        print(f"{', '.join(found)} ({time.monotonic() - start:.0f} s)", flush=True)
    args.output.write_text(document(read_rows(args.csv)), encoding="utf-8")
    print(f"{args.csv} and {args.output} written")
    for fault in faults:
        print(fault)
    return int(bool(faults))


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
