"""``python -m benchmarks.studies.mask_shares``: where MiniLM's masks lie, as Markdown.

For each of GLUE's tasks that ``GLUE_DIR`` holds, each kind of score and each density: the shares of
columns, rows and tiles of 64 x 64 that hold a selected entry, of all matrices of the layers,
weighted by their sizes. It is the same each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.harness import Missing
from benchmarks.workloads import glue
from benchmarks.workloads.masks import mask_of

KINDS = {"fisher": "Fisher", "gradient": "\\|g\\|", "weight_gradient": "\\|g w\\|"}
DENSITIES = (0.0005, 0.005, 0.05)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.mask_shares", description=__doc__
    )
    parser.add_argument("--task", choices=glue.TASKS, action="append", help="repeatable; all")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| task | score |" + "".join(f" {100 * density:g} % |" for density in DENSITIES))
    print("| --- | --- |" + " --- |" * len(DENSITIES))
    for task in args.task or glue.TASKS:
        for kind, label in KINDS.items():
            try:
                found = [mask_of(glue.scores(task, kind), density)[1] for density in DENSITIES]
            except Missing as reason:
                print(f"| {task} | {label} |" + f" {reason} |" * len(DENSITIES), flush=True)
                continue
            cells = (" / ".join(f"{100 * share:.3g}" for share in of_mask) for of_mask in found)
            print(f"| {task} | {label} | " + " | ".join(cells) + " |", flush=True)
        glue.scores.cache_clear()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
