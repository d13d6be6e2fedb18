"""Other exact ways to the scores: torch's own, and packages that may not be installed.

Each takes a ``Work`` and returns the function to be measured, whose result are the scores, by name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.harness import Run, require
from benchmarks.workloads.scoring import Work

VMAP_BYTES = 2**30  # per-sample gradients that may exist at once


def ordinary_pass(work: Work) -> Run:
    """One forward and backward of each batch, as in training: the floor of what scoring costs."""

    def run() -> None:
        for batch in work.batches:
            work.task.losses(work.model, batch).sum().backward()
            work.model.zero_grad(set_to_none=True)

    return run


def one_sample_loop(work: Work) -> Run:
    """The papers' way: a backward pass for each sample, squared and added."""
    candidates = work.candidates()

    def run() -> dict[str, Tensor]:
        scores = {name: torch.zeros_like(p) for name, p in candidates.items()}
        for batch in work.batches:
            for n in range(len(batch["labels"])):
                sample = {key: value[n : n + 1] for key, value in batch.items()}
                loss = work.task.losses(work.model, sample).sum()
                grads = torch.autograd.grad(loss, list(candidates.values()), allow_unused=True)
                for score, g in zip(scores.values(), grads, strict=True):
                    if g is not None:
                        score.addcmul_(g, g)
        return {name: score.div_(work.num_samples) for name, score in scores.items()}

    return run


def true_scores(work: Work) -> dict[str, Tensor]:
    """By the loop in float64, to which the work itself is changed."""
    work.model.double()
    for batch in work.batches:
        batch |= {k: v.double() for k, v in batch.items() if v.is_floating_point()}
    return one_sample_loop(work)()


def vmap_of_grad(work: Work) -> Run:
    """torch.func: per-sample gradients of as many samples at once as memory allows.

    With attention written out: the fused kernel has no rule for vmap, and would be looped over.
    """
    model = _with_plain_attention(work.model)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    chunk = max(1, VMAP_BYTES // sum(p.nbytes for p in params.values()))

    def loss(params: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        inputs = {key: value[None] for key, value in sample.items()}
        return work.task.losses(_Functional(model, params), inputs).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))

    def run() -> dict[str, Tensor]:
        scores = {name: torch.zeros_like(p) for name, p in params.items()}
        for batch in work.batches:
            for start in range(0, len(batch["labels"]), chunk):
                part = {key: value[start : start + chunk] for key, value in batch.items()}
                for name, g in per_sample(params, part).items():
                    scores[name] += g.square_().sum(0)
        return {name: score.div_(work.num_samples) for name, score in scores.items()}

    return run


class _Functional:
    """A model called with other values for its parameters."""

    def __init__(self, model: nn.Module, params: dict[str, Tensor]) -> None:
        self.model, self.params = model, params

    def __call__(self, *args: Tensor, **inputs: Tensor) -> Any:
        return functional_call(self.model, self.params, args, inputs)


def opacus(work: Work) -> Run:
    """Opacus: every parameter's per-sample gradients, [N, ...], squared and added here.

    It records them in training mode alone, so dropout is set to zero instead.
    """
    require("opacus", "opacus")
    from opacus.grad_sample import GradSampleModule

    model = _with_plain_attention(work.model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recorded = GradSampleModule(model, loss_reduction="sum", strict=False)

    def run() -> dict[str, Tensor]:
        scores = {name: torch.zeros_like(p) for name, p in candidates.items()}
        for batch in work.batches:
            work.task.losses(recorded, batch).sum().backward()
            for name, p in candidates.items():
                scores[name] += p.grad_sample.square_().sum(0)  # type: ignore[attr-defined]
                p.grad_sample = p.grad = None  # type: ignore[attr-defined]
        return {name: score.div_(work.num_samples) for name, score in scores.items()}

    return run


def backpack(work: Work) -> Run:
    """BackPACK's SumGradSquared, with opt_einsum, without which it forms [N, T, O, I]."""
    require("backpack", "backpack-for-pytorch")
    require("opt_einsum", "opt_einsum")
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model = extend(copy.deepcopy(work.model))
    loss_fn = extend(work.task.loss(reduction="sum"))
    candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run() -> dict[str, Tensor]:
        scores = {name: torch.zeros_like(p) for name, p in candidates.items()}
        for batch in work.batches:
            loss = loss_fn(work.task.predict(model, batch), batch["labels"])
            with recording(SumGradSquared()):
                loss.backward()
            for name, p in candidates.items():
                scores[name] += p.sum_grad_squared  # type: ignore[attr-defined]
                del p.sum_grad_squared
                p.grad = None
        return {name: score.div_(work.num_samples) for name, score in scores.items()}

    return run


def _with_plain_attention(model: nn.Module) -> Any:
    """A copy with attention written out: the fused kernel gives no per-sample gradients."""
    model = copy.deepcopy(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model
