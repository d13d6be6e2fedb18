"""The definition of the Fisher diagonal, slowly: float64, one sample at a time, plain autograd."""

import copy

import torch

from fishkern import estimate_fisher
from tests.support.tolerances import assert_scores_match


def fisher_oracle(model, batches, loss, names, dtype=torch.float64):
    """``1/N sum_n (grad loss_n)^2`` by name; ``loss(model, batch)`` sums over its samples.

    A copy of the model is scored in eval mode; ``dtype``: the type that it computes in.
    """
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    params = dict(model.named_parameters())
    chosen = [params[name].requires_grad_(True) for name in names]
    total = [torch.zeros_like(param, dtype=torch.float64) for param in chosen]
    num_samples = 0
    for batch in batches:
        for n in range(batch_size(batch)):
            value = loss(model, _cast(one_sample(batch, n), dtype))
            grads = torch.autograd.grad(value, chosen, allow_unused=True)
            num_samples += 1
            for t, grad in zip(total, grads, strict=True):
                if grad is not None:
                    t += grad.to_dense().double().square()
    return {name: t / num_samples for name, t in zip(names, total, strict=True)}


def sample_oracle(model, batches, loss, names):
    """Each sample's squared gradients by name: ``[N, *shape]``, in the order of the batches."""
    each = [
        fisher_oracle(model, [one_sample(batch, n)], loss, names)
        for batch in batches
        for n in range(batch_size(batch))
    ]
    return {name: torch.stack([squares[name] for squares in each]) for name in names}


def batch_size(batch):
    """Of a mapping that of its labels; of a sequence that of its last tensor."""
    return len(batch["labels"] if isinstance(batch, dict) else batch[-1])


def one_sample(batch, n):
    """Sample n alone. A tensor with another length than the batch belongs to all samples."""
    size = batch_size(batch)

    def cut(value):
        own = torch.is_tensor(value) and value.dim() and len(value) == size
        return value[n : n + 1] if own else value

    if isinstance(batch, dict):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(value) for value in batch)


def _cast(batch, dtype):
    def cast(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    if isinstance(batch, dict):
        return {key: cast(value) for key, value in batch.items()}
    return tuple(cast(value) for value in batch)


def squared_error(model, batch):
    """Losses [N] of a batch (x, y): ``0.5 (model(x) - y)^2``, summed over all but the samples."""
    x, y = batch
    return 0.5 * (model(x) - y).square().flatten(1).sum(1)


def assert_exact(model, batches, loss=None, *, dtype=None, **kwargs):
    """Score, compare with the oracle, return the scores.

    ``loss(model, batch)`` sums over the samples; None: that of ``squared_error``, which is then
    the ``loss_fn``, too. ``dtype``: the narrower type that model or autocast compute in.
    """
    if loss is None:
        kwargs.setdefault("loss_fn", squared_error)

        def loss(model, batch):
            return kwargs["loss_fn"](model, batch).sum()

    scores = estimate_fisher(model, batches, progress=False, **kwargs)
    truth = fisher_oracle(model, batches, loss, list(scores))
    rounded = None
    if dtype is not None:
        rounded = fisher_oracle(model, batches, loss, list(scores), dtype)
    assert_scores_match(scores, truth, rounded)
    return scores
