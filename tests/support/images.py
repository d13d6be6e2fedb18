"""A small convolutional model, and images for it."""

import torch
from torch import nn

N, C, O = 4, 4, 3  # samples, channels, outputs of the model  # noqa: E741


class Net(nn.Module):
    """A few convolutional layers, positions averaged, a linear layer."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.last = nn.LazyLinear(O)

    def forward(self, x):
        return self.last(self.body(x).flatten(2).mean(2))


def net(*layers, size=(7, 6), channels=C):
    """The model with its lazy layer made, and no bias or scale as it was initialised."""
    model = Net(*layers)
    model(torch.zeros(1, channels, *size))
    for param in model.parameters():
        if param.dim() == 1:
            nn.init.uniform_(param, 0.5, 1.5)
    return model


def images(n=N, size=(7, 6), channels=C):
    return torch.randn(n, channels, *size), torch.randn(n, O)


def assert_fused(scores):
    """No parameter went another way."""
    assert set(scores.routes.values()) == {"fused"}, scores.routes


def conv2d(**settings):
    return nn.Conv2d(**{"in_channels": C, "out_channels": 6, "kernel_size": 3, **settings})


class Twice(nn.Module):
    """A convolution called twice, its weight tied to another's; ``tied``: that one's settings."""

    def __init__(self, shrink, **tied):
        super().__init__()
        self.shrink = shrink
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.other = nn.Conv2d(C, C, 3, **{"padding": 1, **tied})
        self.other.weight = self.conv.weight
        self.norm, self.last = nn.GroupNorm(2, C), nn.Linear(C, O)

    def forward(self, x):
        y = self.norm(self.conv(x)).tanh()
        y = nn.functional.avg_pool2d(y, 2) if self.shrink else y
        y = self.norm(self.conv(y)).tanh()
        return self.last(self.other(y).flatten(2).mean(2))
