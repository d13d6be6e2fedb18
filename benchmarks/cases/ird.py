"""``select_ird`` against one scoring pass over the same samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import fishkern
from benchmarks.cases.scoring import FISHKERN, fishkern_scores
from benchmarks.harness import Case, Config, Run, Target, Wrong
from benchmarks.workloads.scoring import Work, scoring_work

PASS, BY_PASSES = "scoring pass", "squares not kept"
DENSITY, SHARE, ROUNDS = 0.1, 1 / 8, 4  # of the candidates, and of the samples, to end with
DIFFERENT = 1e-3  # share of the entries: sums that are equal but for rounding may change places


def chosen(work: Work, cache_bytes: int, rounds: int) -> fishkern.IRDResult:
    return fishkern.select_ird(
        work.model,
        work.batches,
        density=DENSITY,
        num_samples=round(SHARE * work.num_samples),
        rounds=rounds,
        cache_bytes=cache_bytes,
        verify=0,
        progress=False,
    )


def squares_kept(work: Work) -> Run:
    return lambda: chosen(work, 2**30, ROUNDS)


def by_passes(work: Work) -> Run:
    return lambda: chosen(work, 0, ROUNDS)


class IRD(Case):
    """Selection of samples and entries included, verification off."""

    name = "ird"
    baselines = (PASS,)
    contenders: ClassVar = {FISHKERN: squares_kept, PASS: fishkern_scores, BY_PASSES: by_passes}
    targets = (
        Target("IRD: time / scoring pass", {"model": "minilm"}, FISHKERN, f"ratio:{PASS}", 1.3),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        config = {"model": "minilm", "batches": 32, "batch": 32, "tokens": 32}
        if suite == "quick":
            config |= {"batches": 4}
        if suite == "tiny":
            config |= {"model": "tiny", "batches": 2, "batch": 4, "tokens": 8}
        return [{**config, "dtype": "float32", "params": "lora"}]

    def setup(self, config: Config, device: str) -> Work:
        return scoring_work(config, device)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """One round by the definition: of each sample's squares, summed over what is left."""
        if contender == PASS:
            return
        work = scoring_work({**config, "batches": 2, "batch": 4}, device)
        result = chosen(work, 2**30 if contender == FISHKERN else 0, rounds=1)
        squares = _squares(work)
        samples = squares.sum(1).topk(len(result.samples)).indices
        entries = squares[samples].sum(0).topk(result.mask.num_selected).indices
        found = torch.cat([result.mask.dense(name).flatten() for name in result.mask])
        if set(samples.tolist()) != set(result.samples.tolist()):
            raise Wrong(f"samples {result.samples.tolist()}, by the definition {samples.tolist()}")
        missed = 1 - found[entries.cpu()].float().mean().item()
        if missed > DIFFERENT:
            raise Wrong(f"{missed:.1%} of the entries are others than by the definition")

    def measures_memory(self, config: Config) -> bool:
        return False  # the squares are what it says: 4 bytes for each sample and candidate


def _squares(work: Work) -> torch.Tensor:
    """Each sample's squared gradients [N, P] in float64, one backward pass for each."""
    candidates = list(work.candidates().values())
    rows = []
    for batch in work.batches:
        for n in range(len(batch["labels"])):
            sample: dict[str, Any] = {key: value[n : n + 1] for key, value in batch.items()}
            loss = work.task.losses(work.model, sample).sum()
            grads = torch.autograd.grad(loss, candidates)
            rows.append(torch.cat([grad.flatten() for grad in grads]).double().square())
    return torch.stack(rows)
