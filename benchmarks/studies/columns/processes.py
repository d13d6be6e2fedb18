"""Runs shared among processes, which import what they do from here: ``__main__`` they cannot."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from queue import Empty
from typing import Any

from benchmarks.studies.columns.runs import Row, Run, Settings, perform

PATIENCE = 10.0  # seconds without a row, before it is asked whether all processes live


def perform_shared(runs: Sequence[Run], settings: Settings, jobs: int) -> Iterator[Row]:
    """The rows of all runs, done by so many processes that take them one by one."""
    jobs = min(jobs, len(runs))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting, found = context.Queue(), context.Queue()
    waiting.cancel_join_thread()  # what nobody took before the deadline
    for run in [*runs, *([None] * jobs)]:
        waiting.put(run)
    workers = [
        context.Process(target=_work, args=(waiting, found, settings), daemon=True)
        for _ in range(jobs)
    ]
    for worker in workers:
        worker.start()
    running = jobs
    while running:
        try:
            row = found.get(timeout=PATIENCE)
        except Empty:
            if any(worker.exitcode for worker in workers):
                break  # one died before it could say that it is through
            continue
        if row is None:
            running -= 1
        else:
            yield row
    waiting.close()
    for worker in workers:
        worker.join() if running == 0 else worker.terminate()
    failed = sum(bool(worker.exitcode) for worker in workers)
    if failed:
        raise RuntimeError(f"{failed} of {jobs} processes failed, see above: start again to go on")


def _work(waiting: Any, found: Any, settings: Settings) -> None:
    try:
        for row in perform(iter(waiting.get, None), settings):
            found.put(row)
    finally:
        found.put(None)
