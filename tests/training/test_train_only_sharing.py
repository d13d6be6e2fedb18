"""Who shares what is kept of an input, and where nobody can."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from fishkern import SparseMask, attached, train_only
from fishkern.training import inputs
from tests.support.tolerances import assert_matches
from tests.support.training import leaf_gradients
from tests.training.test_train_only_inputs import (
    I,
    N,
    O,
    Readers,
    T,
    check_gradients,
    column_mask,
    row_mask,
)


def mask_of_columns(model, columns):
    """The first row of some columns of each layer."""
    names = [f"{layer}.weight" for layer in columns]
    return SparseMask(
        {name: torch.tensor(columns[name[0]]) for name in names},
        {name: model.get_parameter(name).shape for name in names},
    )


def saved(run):
    """What is saved for the backward pass by ``run()``, and its result."""
    found = []

    def pack(tensor):
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return found, out


@pytest.mark.parametrize("last", [12, 13])  # of 16 columns are kept at most, else the input itself
def test_the_columns_of_all_readers_together_are_kept_if_they_are_few(last):
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask = mask_of_columns(
        model, {"q": list(range(8)), "k": list(range(4, 12)), "v": list(range(5, last))}
    )
    truth = copy.deepcopy(model).double()
    train_only(model, mask, unlisted="freeze")
    for _ in range(3):
        check_gradients(model, truth, mask, x, lambda each, x: each(x))
    tensors, _ = saved(lambda: model(x))
    widths = {t.shape[-1] for t in tensors if t.shape[:-1] == (N, T)} - {O}
    whole = any(t.data_ptr() == x.data_ptr() for t in tensors)
    assert whole == (last == 13)
    assert (I in widths) == whole
    assert ("100.0%" if whole else "75.0%") in attached(model).report()


def test_a_whole_input_is_cast_once_under_autocast():
    model, x = Readers(), torch.randn(N, T, I)
    train_only(model, row_mask(model))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    run()  # in which they find each other
    tensors, _ = saved(run)
    assert len({t.data_ptr() for t in tensors if t.shape == x.shape}) == 1


def test_each_keeps_its_own_where_tensors_are_saved_on_the_cpu():
    """What is saved is a copy: nobody can share it."""
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for _ in range(2):
        check_gradients(model, truth, mask, x, lambda each, x: each(x))
    widths, hooks = [], save_on_cpu()

    @functools.wraps(hooks.pack_hook)
    def pack(tensor, pack=hooks.pack_hook):
        if tensor.shape[:-1] == (N, T) and tensor.shape[-1] != O:
            widths.append(tensor.shape[-1])
        return pack(tensor)

    hooks.pack_hook = pack

    def forward(each, x):
        with hooks:
            return each(x)

    check_gradients(model, truth, mask, x, forward)
    # The dense layers of the truth save x itself.
    assert [width for width in widths if width != I] == 3 * [2]


def test_readers_on_other_streams_share_nothing(monkeypatch):
    """Where nothing orders them, values of one might not be there yet for another."""
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    check_gradients(model, truth, mask, x, lambda each, x: each(x))
    union = len(model.q.fishkern_leaves.reader.columns)
    for stream, copies in ((lambda x: None, 1), (lambda x: object(), 3)):
        monkeypatch.setattr(inputs, "_stream", stream)
        tensors, _ = saved(lambda: model(x))
        assert len({t.data_ptr() for t in tensors if t.shape == (N, T, union)}) == copies
        check_gradients(model, truth, mask, x, lambda each, x: each(x))


class Made(nn.Module):
    """A layer whose input's maker keeps what that can be made of again."""

    def __init__(self, activation=F.gelu):
        super().__init__()
        self.below, self.head, self.activation = nn.Linear(I, I), nn.Linear(I, O), activation

    def features(self, x):
        return self.activation(self.below(x))

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("gone", ["freed", "written to"])
def test_an_input_whose_maker_has_nothing_any_more_is_kept(gone):
    """The gradient of the head alone does not need its maker."""
    torch.manual_seed(0)
    model = Made()
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for _ in range(2):
        x, found = torch.randn(N, T, I), []
        for each, values in ((model, x), (truth, x.double())):
            h = each.below(values)
            features = F.gelu(h)
            if gone == "freed":
                features.sum().backward()
            else:
                h.add_(1.0)
            loss = each.head(features).square().sum()
            wanted = each.head.fishkern_leaves if each is model else each.head
            found.append(torch.autograd.grad(loss, list(wanted.parameters())))
        for name, grad, dense in zip(("weight", "bias"), *found, strict=True):
            assert_matches(grad, dense.flatten()[mask[f"head.{name}"].long()], terms=N * T)


def test_an_input_made_in_a_checkpoint_is_not_computed_once_more():
    torch.manual_seed(0)
    calls = []

    def activation(h):
        calls.append(h.dtype)
        return F.gelu(h)

    model = Made(lambda h: checkpoint(activation, h, use_reentrant=False))
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for _ in range(2):
        calls.clear()
        check_gradients(model, truth, mask, torch.randn(N, T, I), lambda each, x: each(x))
        assert calls == 2 * [torch.float64] + 2 * [torch.float32]  # forward, and backward
    assert leaf_gradients(model)["head.weight"].count_nonzero()
