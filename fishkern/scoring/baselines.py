"""Other scores than Fisher information, in the same shape, for baselines that are honest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishkern.batches import samples
from fishkern.batches.losses import LossFn, default_loss, require_losses
from fishkern.names import Patterns
from fishkern.scoring.candidates import scored, unwrap
from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.scoring.one_sample import CUT_OFF
from fishkern.scoring.preserve import backward
from fishkern.scoring.verification import require_finite

__all__ = ["KINDS", "baseline_scores"]

#: Beside |weight| in a denominator: a weight of zero ranks by its gradient, above all others.
EPS = 1e-8

# From the weight and the gradient of the mean loss, both float32.
_OF_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda weight, grad: grad.abs(),
    "weight_gradient": lambda weight, grad: (weight * grad).abs(),
    "gradient_over_weight": lambda weight, grad: grad.abs() / (weight.abs() + EPS),
}
_SQUARED = "squared_batch_gradient"

KINDS = (*_OF_GRADIENT, _SQUARED, "magnitude", "random", "second_moment")


def baseline_scores(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    kind: str,
    loss_fn: LossFn | None = None,
    params: Patterns | Callable[[str, nn.Parameter], bool] | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = True,
) -> FisherDiagonal:
    """Score parameters by something else than Fisher information, to be selected by alike.

    With w the weight and g the gradient of the mean, over the samples, of the losses that
    ``estimate_fisher`` squares one by one:

    - "gradient": ``|g|``. SPEFT (ACL 2025) finds it as good a static mask as any.
    - "weight_gradient": ``|w g|``, the first-order change of the loss if w were zero.
    - "gradient_over_weight": ``|g| / (|w| + 1e-8)``: large gradients of small weights, as GaLLoP
      (2025) describes its choice. The formula and the 1e-8 are our reading of its abstract. A
      weight of zero ranks by its gradient, above all others: all of a fresh LoRA's B, say.
    - "squared_batch_gradient": the mean over the batches of the square of a batch's mean gradient.
      It is often taken for Fisher information, but squares after the sum over the samples: it
      depends on the size of the batches, and is right for batches of one sample only.
    - "magnitude": ``|w|``.
    - "random": uniform in (0, 1], the same for the same ``seed`` on every device.
    - "second_moment": ``v / (1 - beta2^t)``, the second moment of a running Adam, AdamW or
      FishSparseAdamW that trains the whole tensor, with the bias correction of its step t. An
      average of squared batch gradients, taken at all the weights passed by, in training mode and
      after whatever changed the gradients.

    The model is run and left as by ``estimate_fisher``: no dropout, norms in eval mode. Beside the
    scores there is one gradient in memory.

    Args:
        model: As for ``estimate_fisher``.
        batches: As for ``estimate_fisher``; iterated once by the kinds with a gradient, and not at
            all by the others.
        kind: What to score by.
        loss_fn: As for ``estimate_fisher``.
        params: As for ``estimate_fisher``.
        num_samples: As for ``estimate_fisher``.
        seed: For "random".
        optimizer: For "second_moment": it has taken a step.
        progress: Show a progress bar.

    Returns:
        A mapping from names to float32 scores of the parameters' shapes, with ``.kind``;
        ``.num_samples`` is 0 for kinds that look at no data.

    Raises:
        TypeError: An argument of another type than above.
        ValueError: An unknown kind, or what it needs is missing or does not fit.
        RuntimeError: Scores overflowed.

    Example:
        >>> import torch
        >>> from fishkern import baseline_scores, select
        >>> model = torch.nn.Linear(3, 2)
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        >>> batches = [(torch.randn(8, 3), torch.randn(8, 2))]
        >>> scores = baseline_scores(model, batches, kind="gradient", loss_fn=loss_fn,
        ...                          progress=False)
        >>> scores.kind, scores.num_samples, select(scores, k=2).num_selected
        ('gradient', 8, 2)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module")
    samples.check_num_samples(num_samples)
    model = unwrap(model)
    found = 0
    with scored(model, params) as candidates:
        if kind == "magnitude":
            scores = {name: param.detach().float().abs() for name, param in candidates.items()}
        elif kind == "random":
            scores = _random(candidates, seed)
        elif kind == "second_moment":
            scores = _second_moments(candidates, optimizer)
        else:
            with tqdm(total=num_samples, desc=kind, unit="sample", disable=not progress) as bar:
                scores, found = _gradients(
                    model, candidates, batches, kind, loss_fn, num_samples, bar
                )
            samples.check_found(found, num_samples, found)
    require_finite(scores)
    labels = "empirical" if found else None
    return FisherDiagonal(scores, num_samples=found, labels=labels, kind=kind)


def _gradients(
    model: nn.Module,
    candidates: Mapping[str, nn.Parameter],
    batches: Iterable[Any] | None,
    kind: str,
    loss_fn: LossFn | None,
    num_samples: int | None,
    bar: Any,
) -> tuple[dict[str, Tensor], int]:
    """The scores that need gradients, and of how many samples they are."""
    if batches is None:
        raise ValueError(f"kind is {kind!r}, which needs gradients: pass batches")
    scores = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in candidates.items()}
    wanted = {id(param) for param in candidates.values()}
    for param in model.parameters():
        param.requires_grad_(id(param) in wanted)
    losses_of, found, num_batches = loss_fn or default_loss(model), 0, 0
    for batch, size in samples.cut_batches(batches, num_samples, model, loss_fn is None):
        try:
            losses = require_losses(losses_of(model, batch), batch, size)
        except UserWarning as warning:
            if not str(warning).startswith(CUT_OFF):
                raise
            raise RuntimeError(
                "reentrant checkpointing cuts off the gradient of a segment whose inputs require "
                "none: checkpoint with use_reentrant=False"
            ) from warning
        if len(losses) == 0:
            continue
        if not losses.requires_grad:
            raise ValueError(
                "the losses require no gradient: compute them from the model's outputs in "
                "loss_fn without detach(), item() or no_grad(), and name with params= parameters "
                "that take part"
            )
        backward(losses.mean(), candidates.values())
        with torch.no_grad():
            for name, param in candidates.items():
                if param.grad is None:
                    continue
                grad, param.grad = param.grad.to_dense().float(), None
                if kind == _SQUARED:
                    scores[name].addcmul_(grad, grad)
                else:
                    scores[name].add_(grad, alpha=len(losses))
        found, num_batches = found + len(losses), num_batches + 1
        bar.update(len(losses))
        if num_samples is not None and found >= num_samples:
            break
    for name, total in scores.items():
        total /= max(num_batches if kind == _SQUARED else found, 1)
        if kind in _OF_GRADIENT:
            scores[name] = _OF_GRADIENT[kind](candidates[name].detach().float(), total)
    return scores, found


def _random(candidates: Mapping[str, nn.Parameter], seed: int | None) -> dict[str, Tensor]:
    if seed is None:
        raise ValueError('kind="random" needs a seed: pass seed=0, say')
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1 - torch.rand(param.shape, generator=generator).to(param.device)
        for name, param in candidates.items()
    }


def _second_moments(
    candidates: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    if optimizer is None:
        raise ValueError('kind="second_moment" needs the optimizer that trains the model: pass it')
    kind = type(optimizer).__name__
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scores = {}
    for name, param in candidates.items():
        if id(param) not in groups:
            raise ValueError(
                f"{name!r} is not in the {kind}: leave it out with params=, or pass the optimizer "
                f"that trains it"
            )
        state = optimizer.state.get(param, {})
        steps = float(state.get("step", 0))
        moment = state.get("exp_avg_sq")
        if moment is None or steps == 0:
            has = f"has {', '.join(state)}" if state else "is empty"
            raise ValueError(
                f"the {kind}'s state of {name!r} {has}, no second moment of a step: pass an Adam, "
                f"AdamW or FishSparseAdamW that has taken a step with this parameter's gradient"
            )
        if moment.shape != param.shape or not moment.is_floating_point():
            raise ValueError(
                f"the {kind} holds {moment.numel()} moments of {moment.dtype} for the "
                f"{param.numel()} entries of {name!r}: pass one that trains the whole tensor, with "
                f"moments in a floating-point type"
            )
        beta2 = float(groups[id(param)]["betas"][1])
        scores[name] = moment.detach().float() / (1 - beta2**steps)
    return scores
