"""The study's rows as a table: each arm at the learning rate that was best on held-out train."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.studies.columns.arms import ARMS, UNRESTRICTED

Results = Mapping[tuple[str, str], Mapping[int, Mapping[str, str]]]  # (arm, task): by seed, a row


def read(path: Path) -> list[dict[str, str]]:
    """All rows of the file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown: dev scores in points, mean and standard deviation over seeds.

    The learning rate of an arm and task is the one with the best mean on what was held out of
    train, among those that have the most seeds. ``difference`` is to ``UNRESTRICTED``, paired by
    task and seed, with the standard error of its mean; ``columns``, ``work`` and ``score``, the
    share of the unrestricted mask's scores that an arm's has, are means.
    """
    results = at_best_rate(rows)
    tasks = list(dict.fromkeys(task for _, task in results))
    found = {arm for arm, _ in results}
    heads = ["trained", "weights", "columns", "work", "score", *tasks, "difference", "pairs"]
    lines = [
        f"| {' | '.join(heads)} |",
        "|" + " --- |" * len(heads),
    ]
    for arm in (arm for arm in ARMS if arm in found):
        by_task = [list(results.get((arm, task), {}).values()) for task in tasks]
        of_arm = [row for by_seed in by_task for row in by_seed]
        cells = [
            f"{statistics.mean(int(row['trained']) for row in of_arm):,.0f}",
            _percent(of_arm, "columns"),
            _percent(of_arm, "work"),
            _percent(of_arm, "captured"),
            *(_mean_and_spread([float(row["dev"]) for row in by_seed]) for by_seed in by_task),
        ]
        pairs = differences(results, arm, tasks)
        if arm == UNRESTRICTED or not pairs:
            cells += ["", ""]
        else:
            cells += [_mean_and_error(pairs), str(len(pairs))]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_best_rate(rows: Iterable[Mapping[str, str]]) -> Results:
    """The rows of each arm and task at its learning rate, by seed."""
    by_rate: dict[tuple[str, str], dict[str, dict[int, Mapping[str, str]]]]
    by_rate = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_rate[row["arm"], row["task"]][row["lr"]][int(row["seed"])] = row
    return {key: max(rates.values(), key=_held_out) for key, rates in by_rate.items()}


def differences(results: Results, arm: str, tasks: Sequence[str]) -> list[float]:
    """Points above the unrestricted mask, for each task and seed that both have."""
    found = []
    for task in tasks:
        base = results.get((UNRESTRICTED, task), {})
        for seed, row in results.get((arm, task), {}).items():
            if seed in base:
                found.append(100 * (float(row["dev"]) - float(base[seed]["dev"])))
    return found


def _held_out(by_seed: Mapping[int, Mapping[str, str]]) -> tuple[int, float]:
    return len(by_seed), statistics.mean(float(row["held_out"]) for row in by_seed.values())


def _percent(rows: Sequence[Mapping[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row.get(name)]
    return f"{100 * statistics.mean(values):.0f} %" if values else ""


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _mean_and_error(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error}"
