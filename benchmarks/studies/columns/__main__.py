"""``python -m benchmarks.studies.columns``: accuracy where masks use few columns, on GLUE's tasks.

First ``--prepare FOLDER`` (with ``GLUE_DIR`` and MiniLM's weights), then ``--data FOLDER``, with
FOLDER on PYTHONPATH where the weights are not installed. Each run is a row of the file, appended as
it comes; what the file has is not run again. ``--table`` prints what the rows say.

Runs are ordered by seed, task, arm and learning rate, so that a study that is cut off has whole
seeds. ``--jobs`` shares them among processes.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, describe
from benchmarks.studies.columns.arms import ARMS
from benchmarks.studies.columns.data import prepare
from benchmarks.studies.columns.processes import perform_shared
from benchmarks.studies.columns.runs import Row, Run, Settings, perform
from benchmarks.studies.columns.table import read, table
from benchmarks.workloads.glue import TASKS

OUTPUT = RESULTS / "columns.csv"
DEFAULT_TASKS = ("sst2", "qqp", "stsb", "qnli")
COLUMNS = ("task", "arm", "share", "rule", "density", "trained", "seed", "lr", "steps", "batch")
COLUMNS += ("device", "dev", "held_out", "columns", "work", "captured", "weights", "seconds")
COLUMNS += ("date", "commit", "fishkern", "torch", "machine")
SHOWN = ("task", "arm", "seed", "lr", "dev", "held_out", "seconds")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    tasks = args.task or DEFAULT_TASKS
    if args.prepare:
        prepare(args.prepare, args.task or TASKS)
    elif not args.table:
        if args.data is None:
            _parser().error("--data FOLDER is missing: make one with --prepare FOLDER")
        return study(args, tasks)
    else:
        print(table(read(args.output)))
    return 0


def study(args: argparse.Namespace, tasks: Sequence[str]) -> int:
    """Do what the file has not, and print the table."""
    done = {_key(row) for row in read(args.output)}
    runs = [run for run in planned(args, tasks) if _key(vars(run)) not in done]
    print(f"{len(runs)} runs, {len(done)} rows already there", flush=True)
    machine = describe(args.device)
    with tempfile.TemporaryDirectory() as scores:
        settings = Settings(
            args.data, Path(scores), args.model, time.time() + args.deadline, args.threads
        )
        rows = (
            perform(runs, settings) if args.jobs == 1 else perform_shared(runs, settings, args.jobs)
        )
        for row in rows:
            append(args.output, machine | row)
            print(
                *(row[name] for name in ("task", "arm", "seed", "lr", "dev", "held_out")),
                flush=True,
            )
    print(table(read(args.output)))
    return 0


def planned(args: argparse.Namespace, tasks: Sequence[str]) -> list[Run]:
    """All runs, the most valuable first."""
    return [
        Run(task, arm, seed, lr, args.steps, args.batch, args.device)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for task in tasks
        for arm in args.arm or ARMS
        for lr in ARMS[arm].rates
    ]


def append(path: Path, row: Row) -> None:
    """Add one row, whole, and the header where the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _key(row: Any) -> tuple[str, ...]:
    """What a run is known by."""
    return tuple(str(row[name]) for name in Run.__dataclass_fields__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.columns", description=__doc__
    )
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the data, and stop")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="what --prepare wrote")
    parser.add_argument("--table", action="store_true", help="print what the rows say, and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable")
    parser.add_argument("--arm", choices=tuple(ARMS), action="append", help="repeatable; all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--threads", type=int, default=1, help="of each process on the CPU (1)")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--model", choices=("minilm", "tiny"), default="minilm")
    return parser


if __name__ == "__main__":
    sys.exit(main())
