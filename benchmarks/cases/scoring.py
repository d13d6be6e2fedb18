"""Scoring by ``estimate_fisher`` against an ordinary pass and other exact per-sample ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

import fishkern
from benchmarks.contenders.scoring import (
    backpack,
    one_sample_loop,
    opacus,
    ordinary_pass,
    true_scores,
    vmap_of_grad,
)
from benchmarks.harness import Case, Config, Run, Target, Times, Wrong, median_ratio, score_error
from benchmarks.workloads.scoring import ADAPTERS, CLASSES, Work, scoring_work

FISHKERN, ORDINARY, LOOP = "fishkern", "ordinary pass", "one-sample loop"
VMAP, BACKPACK, OPACUS = "torch.func vmap", "BackPACK", "Opacus"
PEERS = (VMAP, BACKPACK, OPACUS)
# Of a tensor's largest score, or of the model's where a tensor's are zero but for rounding. Half
# precision rounds every gradient; what it must still tell is a square taken in the wrong place.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


def fishkern_scores(work: Work) -> Run:
    loss_fn = None if work.task is CLASSES else work.task.losses
    return lambda: fishkern.estimate_fisher(
        work.model, work.batches, loss_fn=loss_fn, verify=0, progress=False
    )


def _target(what: str, params: str, metric: str, bound: float, at_least: bool = False) -> Target:
    where = {"model": "minilm", "params": params, "dtype": "float32"}
    return Target(f"scoring, {params}: {what}", where, FISHKERN, metric, bound, at_least)


class Scoring(Case):
    """Whole calls over several batches, verification off."""

    name = "scoring"
    baselines = (ORDINARY, LOOP)
    contenders: ClassVar = {
        FISHKERN: fishkern_scores,
        ORDINARY: ordinary_pass,
        LOOP: one_sample_loop,
        VMAP: vmap_of_grad,
        BACKPACK: backpack,
        OPACUS: opacus,
    }
    targets = (
        *(
            _target("time / ordinary pass", params, f"ratio:{ORDINARY}", 1.05)
            for params in ADAPTERS
        ),
        _target("time / ordinary pass", "linears", f"ratio:{ORDINARY}", 1.25),
        _target("time / ordinary pass", "all", f"ratio:{ORDINARY}", 1.25),
        _target("gain over the loop / what batching gives", "lora", "gain_share", 0.95, True),
        _target("gain over the loop / what batching gives", "all", "gain_share", 0.95, True),
        *(
            Target(f"scoring: {what} / {peer}'s", {}, FISHKERN, f"{metric}:{peer}", 1)
            for what, metric in (("time", "time_of"), ("peak memory", "peak_of"))
            for peer in PEERS
        ),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        base = {"model": "minilm", "batches": 4 if suite == "full" else 2, "batch": 32}
        base |= {"tokens": 64, "dtype": "float32"}
        if suite == "tiny":
            base |= {"model": "tiny", "batches": 2, "batch": 4, "tokens": 8}
        sweep = [{**base, "params": params} for params in (*ADAPTERS, "linears", "all")]
        layer = {**base, "model": "linear", "batches": 8}
        shapes = [(768, 8, 64), (8, 768, 64), (768, 768, 64), (384, 1536, 128), (1536, 384, 1)]
        if suite == "tiny":
            shapes = [(16, 8, 4)]
        for inputs, outputs, tokens in shapes:
            sweep.append({**layer, "inputs": inputs, "outputs": outputs, "tokens": tokens})
        if device == "cuda":
            sweep += [{**config, "dtype": "bfloat16"} for config in sweep]
        return sweep

    def setup(self, config: Config, device: str) -> Work:
        return scoring_work(config, device)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """Scores of a few short samples, against the one-sample loop in float64."""
        if contender == ORDINARY:
            return
        small = {**config, "batches": 2, "batch": 3, "tokens": 9}
        work = scoring_work(small, device)
        found = self.contenders[contender](work)()
        error, name = score_error(found, true_scores(work))
        if not error <= TOLERANCE[config["dtype"]]:
            raise Wrong(f"{name}: error {error:.1e} of its largest score")

    def metrics(
        self, config: Config, workload: Any, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        candidates = sum(p.numel() for p in workload.candidates().values())
        for name, seconds in times.items():
            samples_per_second = workload.num_samples / torch.tensor(seconds).median().item()
            yield name, "samples_per_s", samples_per_second
        yield FISHKERN, "candidates", float(candidates)
        for peer in PEERS:
            if {FISHKERN, peer} <= set(times):
                yield FISHKERN, f"time_of:{peer}", median_ratio(times, FISHKERN, peer)
        if {FISHKERN, ORDINARY, LOOP} <= set(times):
            gain = median_ratio(times, LOOP, FISHKERN)
            yield FISHKERN, "gain_share", gain / median_ratio(times, LOOP, ORDINARY)
