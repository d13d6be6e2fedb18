"""``FishSparseAdamW.step()`` against torch's AdamW, and against the bytes that it has to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

import fishkern
from benchmarks.harness import (
    Case,
    Config,
    Missing,
    Run,
    Target,
    Times,
    Wrong,
    check_error,
    median_ratio,
)
from benchmarks.workloads.steps import (
    LINE,
    Optimizer,
    Problem,
    held_bytes,
    lines_touched,
    step_problem,
)
from fishkern.functional import masked_adamw_

FISHKERN, FUSED, FOREACH = "fishkern", "AdamW(fused)", "AdamW(foreach)"
LEAVES, HOST = "fishkern (train_only)", "fishkern, one entry each"
OP = "fishkern, its op alone"
BYTES = "fishkern (8 bits)"
PASS = "in-place pass"
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
PASS_BYTES = 2**27  # half of it read, half written: more than any cache holds


def stepping(build: Optimizer) -> Callable[[Problem], Run]:
    """The contender that steps with this optimizer."""

    def contender(problem: Problem) -> Run:
        return build(problem.copy()).step

    return contender


def fishkern_optimizer(problem: Problem, **options: Any) -> torch.optim.Optimizer:
    return fishkern.FishSparseAdamW(problem.params.items(), mask=problem.mask, **ADAMW, **options)


def leaves_optimizer(problem: Problem) -> torch.optim.Optimizer:
    model = problem.attached()
    handle = fishkern.attached(model)
    optimizer = fishkern.FishSparseAdamW(handle.parameters(), **ADAMW)
    optimizer.model = model  # type: ignore[attr-defined]  # leaves hold it weakly
    return optimizer


def op_alone(problem: Problem) -> Any:
    """Steps that are a call of the op with what an optimizer hands to it, and nothing else."""
    params = list(problem.params.values())
    device, indices = params[0].device, [problem.mask[name] for name in problem.params]
    offsets = torch.tensor([0, *accumulate(map(len, indices))])
    some = [i for i, p in zip(indices, params, strict=True) if len(i) < p.numel()]
    exp_avg, exp_avg_sq = torch.zeros(2, int(offsets[-1]), device=device)
    args = (
        *([p.detach() for p in params], [p.grad for p in params], offsets, torch.cat(some)),
        *(exp_avg, exp_avg_sq, None, None, torch.zeros(len(params), device=device)),
        *(torch.tensor(ADAMW["lr"], dtype=torch.float64), *ADAMW["betas"]),
        *(ADAMW["eps"], ADAMW["weight_decay"]),
    )
    return SimpleNamespace(step=lambda: torch.ops.fishkern.masked_adamw_packed_(*args))


def adamw(**flags: bool) -> Optimizer:
    """torch.optim.AdamW on every weight, with flags such as ``fused=True``."""

    def build(problem: Problem) -> torch.optim.Optimizer:
        try:
            return torch.optim.AdamW(problem.params.items(), **ADAMW, **flags)
        except (RuntimeError, ValueError) as error:
            raise Missing(f"AdamW({flags}): {error}") from error

    return build


def passing(problem: Problem) -> Run:
    """What the machine moves at best, with as many threads: each line is read and written.

    Not a copy: that reads its target's lines as well before it writes them, uncounted.
    """
    device = next(iter(problem.params.values())).device
    buffer = torch.ones(PASS_BYTES // 8, device=device)
    return lambda: buffer.mul_(1.0)


OPTIMIZERS: dict[str, Optimizer] = {
    FISHKERN: fishkern_optimizer,
    LEAVES: leaves_optimizer,
    BYTES: lambda problem: fishkern_optimizer(problem, state_dtype=torch.uint8),
    HOST: lambda problem: fishkern_optimizer(problem.one_each()),
    OP: op_alone,
    FUSED: adamw(fused=True),
    FOREACH: adamw(foreach=True),
}


def _target(
    what: str, model: str, density: float, metric: str, bound: float, contender: str = FISHKERN
) -> Target:
    where = {"model": model, "density": density, "mask": "uniform"}
    who = {FISHKERN: "step", LEAVES: "step of leaves", BYTES: "step in 8 bits"}[contender]
    text = f"{who}, {model}, density {density}: {what}"
    return Target(text, where, contender, metric, bound, at_least=not metric.startswith("bytes"))


class OptimizerStep(Case):
    """Steps of all tensors of a model, with the gradients lying there, one after the other."""

    name = "optimizer_step"
    baselines = (FUSED, FOREACH)
    min_rounds = 15
    contenders: ClassVar = {
        **{name: stepping(build) for name, build in OPTIMIZERS.items()},
        PASS: passing,
    }
    targets = (
        _target("times faster than fused", "bert-base-lora", 0.1, f"speedup:{FUSED}", 4),
        _target("times faster than fused", "bert-base-lora", 0.5, f"speedup:{FUSED}", 1.2),
        _target("times faster than fused", "minilm", 0.005, f"speedup:{FUSED}", 8),
        _target("times faster than fused", "minilm", 0.1, f"speedup:{FUSED}", 1.7),
        _target("times faster than fused", "minilm", 0.005, f"speedup:{FUSED}", 12, LEAVES),
        _target("share of the byte floor", "minilm", 0.005, "floor_share", 0.3),
        _target("share of the byte floor", "minilm", 0.1, "floor_share", 0.6),
        _target(
            "bytes held per selected entry", "minilm", 0.1, "bytes_per_entry", 12.01
        ),  # and a step count
        _target("bytes held per selected entry", "minilm", 0.1, "bytes_per_entry", 6.2, BYTES),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        points = [("bert-base-lora", (0.1, 0.5)), ("minilm", (0.005, 0.1))]
        if suite == "tiny":
            points = [("tiny", (0.1,))]
        sweep = [
            {"model": model, "density": density, "mask": "uniform", "dtype": "float32"}
            for model, densities in points
            for density in densities
        ]
        if suite != "tiny":
            sweep += [{**sweep[0], "model": "500-small"}, {**sweep[2], "model": "4-large"}]
            sweep.append({**sweep[2], "mask": "fisher"})
        return [*sweep, {**sweep[-1], "density": 0.1}] if suite == "full" else sweep

    def setup(self, config: Config, device: str) -> Problem:
        return step_problem(config, device)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """Steps against the reference in float64; outside the mask not one bit changes."""
        if contender == PASS:
            return
        problem = self.setup(config, device).copy()
        before = {name: p.detach().clone() for name, p in problem.params.items()}
        mask = problem.one_each().mask if contender == HOST else problem.mask
        chosen = {
            name: torch.arange(p.numel(), device=p.device)
            if contender in (FUSED, FOREACH)
            else mask[name].long()
            for name, p in problem.params.items()
        }
        truth = {name: p.detach().double() for name, p in before.items()}
        moments = [[torch.zeros(len(i), device=i.device).double() for i in chosen.values()]
                   for _ in range(2)]  # fmt: skip
        grads = [problem.params[name].grad.double() for name in truth]
        optimizer = OPTIMIZERS[contender](problem)
        # In 8 bits only the first step is that of float32: others start from rounded moments.
        for step in range(1, 2 if contender == BYTES else 4):
            optimizer.step()
            with fishkern.use_backend("reference"):
                masked_adamw_(
                    list(truth.values()), grads, list(chosen.values()), *moments,
                    steps=[step] * len(truth), **ADAMW,
                )  # fmt: skip
        for name, index in chosen.items():
            found = problem.params[name].detach()
            check_error(found, truth[name], 1e-6, name)
            outside = torch.ones(found.numel(), dtype=torch.bool, device=found.device)
            outside[index] = False
            if not torch.equal(found.view(-1)[outside], before[name].view(-1)[outside]):
                raise Wrong(f"{name}: an entry outside the mask has changed")

    def metrics(
        self, config: Config, workload: Any, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        weights = sum(p.numel() for p in workload.params.values())
        lines = sum(lines_touched(i) * LINE for i in workload.mask.values())
        floors = dict.fromkeys((FUSED, FOREACH), 28.0 * weights)
        floors[FISHKERN] = 12.0 * lines + 20 * workload.mask.num_selected
        floors[BYTES] = 12.0 * lines + 8.125 * workload.mask.num_selected
        for name, floor in floors.items():
            if name not in times:
                continue
            yield name, "floor_bytes", floor
            if PASS in times:
                yield name, "floor_share", floor / PASS_BYTES * median_ratio(times, PASS, name)
            held, entries = held_bytes(OPTIMIZERS[name], workload)
            yield name, "persistent_bytes", float(held)
            yield name, "bytes_per_entry", held / entries
        for name in (n for n in (FISHKERN, LEAVES, BYTES, OP) if n in times):
            for baseline in (b for b in self.baselines if b in times):
                yield name, f"speedup:{baseline}", median_ratio(times, baseline, name)
        if {FISHKERN, HOST} <= times.keys():
            yield FISHKERN, "host_share", median_ratio(times, HOST, FISHKERN)
        if PASS in times:
            yield PASS, "gb_per_s", PASS_BYTES / 1e9 / torch.tensor(times[PASS]).median().item()

    def measures_memory(self, config: Config) -> bool:
        return config["model"] == "minilm" and config["mask"] == "uniform"
