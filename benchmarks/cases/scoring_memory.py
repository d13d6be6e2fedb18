"""What scoring takes beyond an ordinary pass, to the byte, at several batch and token counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.cases.scoring import FISHKERN, Scoring, fishkern_scores
from benchmarks.contenders.scoring import ordinary_pass
from benchmarks.harness import Case, Config, Run, Target, Times
from benchmarks.memory import allocated_peak
from benchmarks.workloads.scoring import Work, scoring_work

DROPPED = "ordinary pass, gradients dropped"


def gradients_dropped(work: Work) -> Run:
    """Forward and backward, each weight's gradient freed once it is there: activations alone."""
    run = ordinary_pass(work)

    def drop(param: Tensor) -> None:
        param.grad = None

    def dropping() -> None:
        hooks = [p.register_post_accumulate_grad_hook(drop) for p in work.candidates().values()]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()

    return dropping


def layer_bytes(work: Work) -> int:
    """The working set of the largest layer: its input, and the gradient at its output."""
    largest = 0

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if args and torch.is_tensor(args[0]) and torch.is_tensor(output):
            largest = max(largest, args[0].nbytes + output.nbytes)

    layers = [module for module in work.model.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        ordinary_pass(work)()
    finally:
        for hook in hooks:
            hook.remove()
    return largest


class ScoringMemory(Case):
    """Bytes of torch's CPU allocator, for whole calls with verification off."""

    name = "scoring_memory"
    contenders: ClassVar = {FISHKERN: fishkern_scores, DROPPED: gradients_dropped}
    targets = (
        Target("scoring memory: extra / (scores + a layer)", {}, FISHKERN, "extra_share", 1.1),
        Target(
            "scoring memory, all: extra / scores", {"params": "all"}, FISHKERN, "extra_scores", 1.1
        ),
    )
    min_rounds = 2

    def sweep(self, suite: str, device: str) -> list[Config]:
        if device != "cpu":
            return []  # there, peak_mib of the case `scoring` is the allocator's
        base = {"model": "tiny" if suite == "tiny" else "minilm", "batches": 1, "dtype": "float32"}
        shapes = [(2, 8), (4, 8)] if suite == "tiny" else [(8, 32), (32, 32), (8, 128)]
        return [
            {**base, "batch": batch, "tokens": tokens, "params": params}
            for params in ("lora", "all")
            for batch, tokens in shapes
        ]

    def setup(self, config: Config, device: str) -> Work:
        return scoring_work(config, device)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """The scores are those of the case `scoring`."""
        if contender == FISHKERN:
            Scoring().gate(config, device, contender)

    def metrics(
        self, config: Config, workload: Any, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        peaks = {}
        for name, build in self.contenders.items():
            run = build(workload)
            run()
            peaks[name] = allocated_peak(run)
            yield name, "allocated_peak_mib", peaks[name] / 2**20
        scores = 4 * sum(p.numel() for p in workload.candidates().values())
        extra = peaks[FISHKERN] - peaks[DROPPED]
        yield FISHKERN, "extra_mib", extra / 2**20
        yield FISHKERN, "extra_scores", extra / scores
        yield FISHKERN, "extra_share", extra / (scores + layer_bytes(workload))

    def measures_memory(self, config: Config) -> bool:
        return False  # measured above
