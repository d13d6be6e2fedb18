"""Layers with a rule and without: each leaf's gradient is the dense one at its entries."""

import copy

import pytest
import torch
from torch import nn

from fishkern import attached, train_only
from tests.support.tolerances import assert_matches
from tests.support.training import leaf_gradients, random_mask


class Attention(nn.Module):
    """torch's own reads its parameters functionally."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    """Keeps its Parameter objects in a list of its own."""

    def __init__(self, cls):
        super().__init__()
        self.layer = cls(8, 6, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


class Bag(nn.Module):
    """An embedding with settings, called with ids."""

    def __init__(self, **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, **kwargs)

    def forward(self, x):
        return self.embedding((x[..., 0] * 1e4).long().abs() % 10)


IMAGES, TEXT = (2, 4, 6, 6), (2, 5, 8)
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), TEXT),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.RMSNorm(6)), TEXT),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, padding=1), TEXT),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGES),
    "batch_norm": (lambda: nn.BatchNorm2d(4), IMAGES),
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "embedding": (lambda: Bag(padding_idx=3), TEXT),
    "by_frequency": (lambda: Bag(scale_grad_by_freq=True), TEXT),
    "attention": (Attention, TEXT),
    "lstm": (lambda: Recurrent(nn.LSTM), TEXT),
    "gru": (lambda: Recurrent(nn.GRU), TEXT),
    "prelu": (lambda: nn.PReLU(5), TEXT),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), TEXT),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), TEXT),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_dense_ones(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    truth = copy.deepcopy(model).double()
    for each, values in ((truth, x.double()), (model, x)):
        if each is model:
            train_only(model, random_mask(model, density=0.5))
        each(values).sin().square().sum().backward()
    dense = {name: param.grad for name, param in truth.named_parameters()}
    found, mask = leaf_gradients(model), attached(model).mask
    assert set(found) == {name for name in mask if len(mask[name])}
    for name, value in found.items():
        expected = dense[name].flatten()[mask[name].long()]
        scale = torch.cat([g.flatten() for g in dense.values()]).abs().max()
        both = [torch.cat([t.double(), scale[None]]) for t in (value, expected)]
        assert_matches(both[0], both[1], terms=64)
