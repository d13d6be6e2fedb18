"""Models and batches for labels that are not the data's."""

import torch
import torch.nn.functional as F
from torch import nn

from fishkern import estimate_fisher


def score(model, batches, labels, **kwargs):
    """``estimate_fisher`` at these labels."""
    return estimate_fisher(model, batches, labels=labels, progress=False, **kwargs)


def seeded(seed):
    """A generator of this seed."""
    return torch.Generator().manual_seed(seed)


def unlabelled(batch):
    """The batch without its labels."""
    return {key: value for key, value in batch.items() if key != "labels"}


class Output:
    """What a model returns."""

    def __init__(self, logits):
        self.logits = logits


class Scores(nn.Module):
    """``logits = x W^T + b``, by a layer with a rule, or by a functional use without one."""

    def __init__(self, features, outputs, functional=False):
        super().__init__()
        self.layer, self.functional = nn.Linear(features, outputs), functional

    def forward(self, x):
        if self.functional:
            return Output(F.linear(x, self.layer.weight, self.layer.bias))
        return Output(self.layer(x))


def softmax_fisher(model, x):
    """The true Fisher information of softmax regression: ``mean_n p_c (1 - p_c) x_i^2``."""
    weight, bias = model.layer.weight.double(), model.layer.bias.double()
    p = (x.double() @ weight.T + bias).softmax(1).detach()
    variance = p * (1 - p)
    return {
        "layer.weight": variance.T @ x.double().square() / len(x),
        "layer.bias": variance.mean(0),
    }
