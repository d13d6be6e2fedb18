"""AdamW with a step count for each entry, and masks that differ, for the tests of re-masking."""

import torch

from fishkern import SparseMask
from tests.support.optim import loss_of, make_mask


class EntryOracle:
    """Dense float64 AdamW in which everything, also the step count, is an entry's own."""

    def __init__(self, model, mask, lr=1e-2, weight_decay=0.1, amsgrad=False, maximize=False):
        self.p = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        self.m, self.v, self.top, self.t = (
            {n: torch.zeros_like(p) for n, p in self.p.items()} for _ in range(4)
        )
        self.lr, self.decay, self.amsgrad = lr, weight_decay, amsgrad
        self.sign = -1 if maximize else 1
        self.set_mask(mask)

    def set_mask(self, mask):
        self.on = {n: mask.dense(n) if n in mask else torch.ones_like(p, dtype=torch.bool)
                   for n, p in self.p.items()}  # fmt: skip
        for name, on in self.on.items():
            for kind in (self.m, self.v, self.top, self.t):
                kind[name][~on] = 0

    def step(self, grads):
        for name, grad in grads.items():
            if grad is None:
                continue
            on, g = self.on[name], self.sign * grad.double()
            p, m, v, top, t = (k[name] for k in (self.p, self.m, self.v, self.top, self.t))
            t += 1.0 * on
            m[on] = (0.9 * m + 0.1 * g)[on]
            v[on] = (0.999 * v + 0.001 * g * g)[on]
            top.copy_(torch.maximum(top, v))
            used = top if self.amsgrad else v
            new = p * (1 - self.lr * self.decay)
            new -= self.lr * (m / (1 - 0.9**t)) / ((used / (1 - 0.999**t)).sqrt() + 1e-8)
            p[on] = new[on]


def backward(model, i):
    model.zero_grad()
    loss_of(model, i).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def some_mask(model, seed):
    """Other entries for each seed; single tensors gain or lose all."""
    mask = make_mask(model, density=0.4, seed=seed)
    indices = dict(mask)
    if seed % 2:
        shapes = mask.shapes
        indices["0.bias"] = torch.arange(shapes["0.bias"].numel())
        indices["3.bias"] = indices["3.bias"][:0]
        indices["2.weight"] = torch.arange(shapes["2.weight"].numel())
    return SparseMask(indices, mask.shapes)
