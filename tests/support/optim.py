"""What the optimizer's tests share: a small model, masks for it, and training on made-up data."""

import pytest
import torch
from torch import nn

from fishkern import _dispatch
from fishkern.selection.masks import SparseMask


@pytest.fixture(params=["reference", "native"])
def kernel(request):
    """Plain torch and the compiled kernel; the interpreter is too slow for hundreds of steps."""
    reason = _dispatch.why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with _dispatch.use_backend(request.param):
        yield request.param


def make_model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def make_mask(model, density=0.3, seed=0):
    """Some entries of each tensor, none of the first bias and all of the last."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    share = {name: density for name in shapes} | {"0.bias": -1.0, "3.bias": 2.0}
    return SparseMask(
        {
            n: (torch.rand(s.numel(), generator=generator) < share[n]).nonzero()[:, 0]
            for n, s in shapes.items()
        },
        shapes,
    )


def full_mask(model):
    shapes = {name: param.shape for name, param in model.named_parameters()}
    return SparseMask({n: torch.arange(s.numel()) for n, s in shapes.items()}, shapes)


def loss_of(model, i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(16, 6, generator=generator)
    y = torch.randn(16, 3, generator=generator)
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()


class Oracle:
    """torch's AdamW in float64 on masked gradients, its decay restricted to the mask."""

    def __init__(self, model, mask, lr=1e-3, weight_decay=1e-2, **options):
        self.params = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        self.masks = {name: mask.dense(name) for name in mask}
        self.decay = weight_decay
        self.adamw = torch.optim.AdamW(self.params.values(), lr=lr, weight_decay=0.0, **options)

    def step(self, model):
        for name, param in model.named_parameters():
            chosen, own = self.masks[name], self.params[name]
            own.grad = torch.where(chosen, param.grad.double(), 0.0)
            own[chosen] *= 1 - float(self.adamw.param_groups[0]["lr"]) * self.decay
        self.adamw.step()


def copies(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def bits(tensor):
    """The tensor's bytes, so that equality tells -0.0 from 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
