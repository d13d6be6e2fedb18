"""What every case shares: contenders that alternate, what is measured, and the rows that it makes.

A measurement is a row of a long table: where it was made, of what, and one number. Nothing is
timed that has not just been compared with the truth, and no ratio is taken between times that were
not measured one right after the other.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch

Config = dict[str, Any]
Run = Callable[[], Any]
Times = dict[str, list[float]]  # contender -> seconds per call, one for each round

SUITES = ("tiny", "quick", "full")
COLUMNS = (
    *("date", "commit", "fishkern", "torch", "triton", "python", "machine", "device", "threads"),
    *("case", "contender", "config", "metric", "value"),
)
SHORTEST = 0.02  # seconds: calls that take less are repeated, so that the clock resolves them
MOST_ROUNDS = 100
WARMUPS = 2  # calls that are not counted
BRIEF = 0.1  # seconds: such calls feel what the caches hold when they begin


class Missing(RuntimeError):
    """What cannot run here; the message says why, and how to get it."""


class Wrong(RuntimeError):
    """What disagrees with the truth: reported, not timed."""


def require(package: str, install: str) -> ModuleType:
    """An optional package.

    Raises:
        Missing: It is not installed.
    """
    # Some packages put a module without a spec in their own place once they are imported.
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed: pip install {install}")
    return importlib.import_module(package)


@dataclass(frozen=True)
class Target:
    """A bound on one metric of one contender, wherever the config holds all of ``where``."""

    what: str
    where: Mapping[str, Any]
    contender: str
    metric: str
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


class Case:
    """One comparison. ``contenders``: from a workload, make the function that is measured."""

    name: ClassVar[str]
    own: ClassVar[str] = "fishkern"
    baselines: ClassVar[tuple[str, ...]] = ()  # "ratio:<baseline>" is measured for every other
    contenders: ClassVar[Mapping[str, Callable[[Any], Run]]] = {}
    targets: ClassVar[Sequence[Target]] = ()
    min_rounds: ClassVar[int] = 3

    def sweep(self, suite: str, device: str) -> list[Config]:
        raise NotImplementedError  # every case has its own

    def setup(self, config: Config, device: str) -> Any:
        """The workload, the same each time. It may complete ``config`` by what it found here."""
        raise NotImplementedError  # every case has its own

    def gate(self, config: Config, device: str, contender: str) -> None:
        """Raise Wrong if the contender computes something else than the truth."""
        raise NotImplementedError  # every case has its own

    def metrics(
        self, config: Config, workload: Any, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        """What else this case tells: (contender, metric, value)."""
        return iter(())

    def measures_memory(self, config: Config) -> bool:
        """Whether the peak is measured; on a CPU each takes a process of its own."""
        return True


def check_error(actual: torch.Tensor, truth: torch.Tensor, bound: float, what: str) -> None:
    """Refuse an error above ``bound`` of the largest true value."""
    truth = truth.double()
    error = (actual.double() - truth).abs().max() / truth.abs().max()
    if not error <= bound:
        raise Wrong(f"{what}: relative error {error:.1e} > {bound:.0e}")


def score_error(
    found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest error of Fisher scores, with the name of the tensor that it is in.

    Relative to the tensor's largest true score; a tensor that is zero but for rounding is measured
    by 1e-4 of the model's largest.

    Raises:
        Wrong: The scores are of other parameters.
    """
    if set(found) != set(truth):
        raise Wrong(f"scores of other parameters: {sorted(set(found) ^ set(truth))[:3]}")
    largest = {name: true.max().item() for name, true in truth.items()}
    least = 1e-4 * max(largest.values())
    errors = []
    for name, true in truth.items():
        apart = (found[name].double() - true).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        errors.append((apart.max().item() / max(largest[name], least), name))
    return max(errors)


def alternate(runs: Mapping[str, Run], device: str, seconds: float, min_rounds: int) -> Times:
    """Time all in turn, round by round (A B C A B C ...), for about so many seconds.

    Whoever comes next has to write back to memory what the one before has left in the caches,
    tens of MB where that was an optimizer of all weights. That is paid by a call that is not
    counted.
    """
    found = {name: enough(run, device) for name, run in runs.items()}
    times: Times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, run in runs.items():
            repeats, once = found[name]
            if once < BRIEF:
                run()
            times[name].append(timed(run, device, repeats))
    return times


def enough(run: Run, device: str) -> tuple[int, float]:
    """How many calls take the shortest time that is measured, and one of them later on.

    The first calls compile, fill caches and get pages.
    """
    for _ in range(WARMUPS):
        timed(run, device, 1)
    repeats = 1
    while repeats * (once := timed(run, device, repeats)) < SHORTEST:
        repeats *= 2
    return repeats, once


def timed(run: Run, device: str, repeats: int) -> float:
    """Seconds per call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def host_metrics(runs: Mapping[str, Run], calls: int = 5) -> Iterator[tuple[str, str, float]]:
    """On a GPU: the time until a call returns, with its work maybe only queued."""
    for name, run in runs.items():
        seconds = []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        yield name, "host_ms", 1e3 * statistics.median(seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_metrics(times: Times, baselines: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Medians and spread, and the median of the ratios pair by pair."""
    for name, seconds in times.items():
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
        yield name, "time_ms", 1e3 * statistics.median(seconds)
        yield name, "time_ms_p20", 1e3 * low
        yield name, "time_ms_p80", 1e3 * high
        yield name, "rounds", len(seconds)
        for baseline in baselines:
            if baseline in times and baseline != name:
                yield name, f"ratio:{baseline}", median_ratio(times, name, baseline)


def median_ratio(times: Times, name: str, baseline: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))


@dataclass
class Recorder:
    """Appends rows to the machine's CSV as they come, and keeps those of this run."""

    path: Path
    machine: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: str, contender: str, config: Config, metric: str, value: Any) -> None:
        text = " ".join(f"{key}={item}" for key, item in config.items())
        value = f"{value:.6g}" if isinstance(value, float) else value
        own = {"case": case, "contender": contender, "config": text}
        row = {**self.machine, **own, "metric": metric, "value": value}
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({**row, "settings": dict(config)})
