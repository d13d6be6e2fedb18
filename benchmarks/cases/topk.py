"""Global top-k over a list of tensors against ``torch.topk`` on their concatenation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import fishkern
from benchmarks.harness import Case, Config, Run, Target, Wrong
from fishkern.functional import topk_indices

FISHKERN, TORCH = "fishkern", "torch.topk"
NUM_TENSORS = 100


class Scores(list[Tensor]):
    """Tensors of about equal sizes, and how many to select."""

    k: int


def fishkern_topk(scores: Scores) -> Run:
    return lambda: topk_indices(scores, scores.k)


def torch_topk(scores: Scores) -> Run:
    """Not even sorted, and not cut into the tensors' own positions."""
    return lambda: torch.cat([s.view(-1) for s in scores]).topk(scores.k, sorted=False).indices


class TopK(Case):
    """Scores as Fisher scores are: squares, over many orders of magnitude."""

    name = "topk"
    baselines = (TORCH,)
    contenders: ClassVar = {FISHKERN: fishkern_topk, TORCH: torch_topk}
    targets = (
        Target(
            "top-k of 50 M scores: time / torch.topk on the concatenation",
            {"scores": 50_000_000},
            FISHKERN,
            f"ratio:{TORCH}",
            1 / 5,
        ),
        Target(
            "top-k of 50 M scores: peak MiB / bytes of the scores (no copy)",
            {"scores": 50_000_000},
            FISHKERN,
            "peak_mib",
            0.25 * 50e6 * 4 / 2**20,
        ),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        sizes = {"tiny": [50_000], "quick": [5_000_000], "full": [5_000_000, 50_000_000]}
        if suite == "quick" and device == "cuda":
            sizes["quick"] = sizes["full"]
        return [{"scores": size, "density": 0.005, "dtype": "float32"} for size in sizes[suite]]

    def setup(self, config: Config, device: str) -> Scores:
        generator = torch.Generator(device).manual_seed(0)
        size = config["scores"] // NUM_TENSORS
        # sizes from a half to one and a half times the mean
        sizes = [size * (NUM_TENSORS + 2 * i) // (2 * NUM_TENSORS) for i in range(NUM_TENSORS)]
        sizes[-1] += config["scores"] - sum(sizes)
        noise = (torch.randn(n, generator=generator, device=device) for n in sizes)
        scores = Scores(t.pow_(4) for t in noise)
        scores.k = round(config["density"] * config["scores"])
        return scores

    def gate(self, config: Config, device: str, contender: str) -> None:
        """The same selection as the reference's; torch.topk may choose among equals."""
        scores = self.setup(config, device)
        with fishkern.use_backend("reference"):
            truth = topk_indices(scores, scores.k)
        found = self.contenders[contender](scores)()
        if contender == TORCH:
            values = torch.cat(scores)[found].sort().values
            chosen = [s[i] for s, i in zip(scores, truth, strict=True)]
            right = torch.equal(values, torch.cat(chosen).sort().values)
        else:
            right = all(map(torch.equal, found, truth))
        if not right:
            raise Wrong("another selection than the reference's")
