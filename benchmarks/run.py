"""``python -m benchmarks.run``: measure, append to the machine's CSV, and print what it shows."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.cases import CASES
from benchmarks.harness import (
    SUITES,
    Case,
    Config,
    Missing,
    Recorder,
    Run,
    Wrong,
    alternate,
    host_metrics,
    time_metrics,
)
from benchmarks.machine import RESULTS, describe
from benchmarks.memory import give_back, peak_mib

SECONDS = {"tiny": 0.2, "quick": 8.0, "full": 90.0}  # to spend on the rounds of one config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if fishkern was wrong; a peer that is wrong is a row."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    machine = describe(args.device)
    recorder = Recorder(args.results / f"{machine['machine']}.csv", machine)
    for name in args.case or CASES:
        case = CASES[name]
        for config in case.sweep(args.suite, args.device):
            print(f"{name}: {_text(config)}", flush=True)
            measure(case, config, args.device, recorder, args.seconds, args.memory)
            _print_rows(recorder, name, config)
    _print_targets(recorder)
    print(f"\nrows appended to {recorder.path}")
    return int(
        any(
            row["metric"] == "wrong" and row["contender"] == CASES[row["case"]].own
            for row in recorder.rows
        )
    )


def measure(
    case: Case, config: Config, device: str, recorder: Recorder, seconds: float, memory: bool
) -> None:
    """Gate, time and weigh every contender of a case at one point of its sweep."""
    runs: dict[str, Run] = {}
    try:
        workload = case.setup(config, device)
    except Missing as reason:
        for name in case.contenders:
            recorder.add(case.name, name, config, "missing", str(reason))
        return
    refused: set[str] = set()

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
        except (Missing, Wrong) as reason:
            recorder.add(case.name, name, config, type(reason).__name__.lower(), str(reason))
            refused.add(name)
        except Exception as error:  # whatever a peer raises is a row
            if name == case.own:
                raise
            text = f"{type(error).__name__}: {error}"
            recorder.add(case.name, name, config, "failed", text.splitlines()[0][:200])
            refused.add(name)

    for name in case.contenders:
        with noted(name):
            case.gate(config, device, name)
        gc.collect()
    give_back()  # else the first to be built would get what the gates have left, in pieces
    for name, build in case.contenders.items():
        if name not in refused:
            with noted(name):
                runs[name] = build(workload)
    if runs:
        times = alternate(runs, device, seconds, case.min_rounds)
        metrics = [
            *time_metrics(times, case.baselines),
            *case.metrics(config, workload, times),
            *(host_metrics(runs) if device == "cuda" else ()),
        ]
        for name, metric, value in metrics:
            recorder.add(case.name, name, config, metric, value)
    names = list(runs)
    del runs, workload
    if memory and case.measures_memory(config):
        peaks: dict[str, float] = {}
        for name in names:
            try:
                peaks[name] = peak_mib(case, config, device, name)
                recorder.add(case.name, name, config, "peak_mib", peaks[name])
            except Missing as reason:
                recorder.add(case.name, name, config, "missing", str(reason))
        for name, peak in peaks.items():
            if name != case.own and case.own in peaks and peak > 0:
                recorder.add(case.name, case.own, config, f"peak_of:{name}", peaks[case.own] / peak)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--case", choices=list(CASES), action="append", help="repeatable; all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--seconds", type=float, help="to spend on each point's rounds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if args.seconds is None:
        args.seconds = SECONDS[args.suite]
    return args


def _text(config: Config) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


def _print_rows(recorder: Recorder, case: str, config: Config) -> None:
    """A line for each contender: its time, then everything else that was found."""
    mine = [r for r in recorder.rows if r["case"] == case and r["settings"] == config]
    for contender in dict.fromkeys(row["contender"] for row in mine):
        values = {r["metric"]: r["value"] for r in mine if r["contender"] == contender}
        spread = f"{values.pop('time_ms_p20', '')}..{values.pop('time_ms_p80', '')}"
        if "time_ms" in values:
            values["time_ms"] += f" ({spread})"
        print(f"  {contender:16}", ", ".join(f"{k} {v}" for k, v in values.items()), flush=True)


def _print_targets(recorder: Recorder) -> None:
    """Every target, what was measured for it, and whether it was met."""
    table = [("target", "bound", "measured", "met")]
    for case in CASES.values():
        for target in case.targets:
            found = [
                float(row["value"])
                for row in recorder.rows
                if (row["case"], row["contender"]) == (case.name, target.contender)
                and row["metric"] == target.metric
                and target.where.items() <= row["settings"].items()
            ]
            bound = f"{'>=' if target.at_least else '<='} {target.bound:.3g}"
            verdicts = [(f"{v:.3g}", "yes" if target.met(v) else "NO") for v in found]
            table += [(target.what, bound, *verdict) for verdict in verdicts or [("-", "-")]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
