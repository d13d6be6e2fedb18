"""The first forward finds selected weights that would train nothing, and names them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from fishkern import SparseMask, attached, train_only
from tests.support.training import random_mask


class Saved(nn.Module):
    """A head that uses the embedding's Parameter object, kept in a list since the beginning."""

    def __init__(self, use=lambda h, weight: F.linear(h, weight)):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.saved, self.use = [self.embedding.weight], use

    def forward(self, ids):
        return self.use(self.linear(self.embedding(ids)), self.saved[0])


USES = {
    "functional": lambda h, weight: F.linear(h, weight),
    "transposed": lambda h, weight: h @ weight.T,
    "in a list": lambda h, weight: torch.cat([h.flatten(0, 1), weight]),
    "as a keyword": lambda h, weight: F.linear(h, weight=weight),
    "penalty": lambda h, weight: h.sum() + weight.square().sum(),
}
HARMLESS = {
    "detached": lambda h, weight: F.linear(h, weight.detach()),
    "data": lambda h, weight: F.linear(h, weight.data),
    "dtype and shape": lambda h, weight: h.to(weight.dtype) * weight.shape[0],
    "new": lambda h, weight: h + weight.new_zeros(8) + torch.zeros_like(weight).sum(),
    "compared": lambda h, weight: h * (weight > 0).any(),
}
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("use", USES)
def test_a_parameter_saved_before_attaching_is_refused_by_name(use):
    model = Saved(USES[use])
    train_only(model, random_mask(model))
    for _ in range(2):  # as long as it is so
        with pytest.raises(RuntimeError, match=r"'embedding\.weight'.*saved.*module\.weight"):
            model(IDS)
        assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("use", HARMLESS)
def test_uses_without_a_gradient_are_not_refused(use):
    model = Saved(HARMLESS[use])
    train_only(model, random_mask(model))
    model(IDS).sum().backward()


def test_a_saved_parameter_outside_the_mask_is_nobodys_concern():
    model = Saved()
    shapes = {"linear.weight": (8, 8)}
    train_only(model, SparseMask({"linear.weight": torch.tensor([3])}, shapes), unlisted="freeze")
    model(IDS).sum().backward()


def test_only_the_first_forward_in_grad_mode_is_watched():
    model = Saved(HARMLESS["data"])
    handle = train_only(model, random_mask(model))
    seen = []
    model.linear.register_forward_pre_hook(
        lambda *_: seen.append(len(_get_current_function_mode_stack()))
    )
    with torch.no_grad():
        model(IDS)
    model(IDS), model(IDS)
    assert seen == [0, 1, 0]
    assert not model._forward_hooks
    handle.remove()
    assert not model._forward_hooks_always_called


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_first_forward_ends_the_watch(error):
    """torch's own hooks do not hear of the second one."""

    def fail(h, weight):
        raise error

    model = Saved(fail)
    train_only(model, random_mask(model))
    with pytest.raises(error):
        model(IDS)
    assert _get_current_function_mode_stack() == []
    assert not model._forward_hooks
    model.use = USES["functional"]
    with pytest.raises(RuntimeError, match="saved"):  # the next one is watched
        model(IDS)


class Layers(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.call = call

    def forward(self, x):
        return {"logits": self.head(self.call(self.second, self.first(x))), "other": None}


def no_grad(layer, x):
    with torch.no_grad():
        return layer(x)


def reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def not_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def mask_of(*names):
    shapes = {"first.weight": (4, 4), "second.weight": (4, 4), "head.weight": (2, 4)}
    return SparseMask(dict.fromkeys(names, torch.tensor([1, 6])), {n: shapes[n] for n in names})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("call", [no_grad, reentrant])
def test_leaves_that_no_gradient_reaches_are_named(call):
    model = Layers(call)
    train_only(model, mask_of("second.weight", "head.weight"), unlisted="freeze")
    with pytest.raises(RuntimeError, match=r"'second\.weight'.*use_reentrant=False.*no_grad"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("call", [reentrant, not_reentrant])
def test_checkpointing_gives_the_same_gradients(call, frozen_input):
    model, x = Layers(lambda layer, x: layer(x)), torch.randn(3, 4)
    names = ("second.weight", "head.weight") + (() if frozen_input else ("first.weight",))
    twin = copy.deepcopy(model)
    twin.call = call
    for each in (model, twin):
        train_only(each, mask_of(*names), unlisted="freeze")
    if frozen_input:  # as model.enable_input_require_grads() does
        twin.first.register_forward_hook(lambda module, args, y: y.requires_grad_())
    for each in (model, twin):
        each(x)["logits"].square().sum().backward()
    for a, b in zip(attached(model).parameters(), attached(twin).parameters(), strict=True):
        assert a.grad.count_nonzero()
        assert torch.equal(a.grad, b.grad)


def test_leaves_that_are_off_or_unused_are_nobodys_concern():
    model = Layers(lambda layer, x: x)
    handle = train_only(model, mask_of("first.weight", "second.weight", "head.weight"),
                        unlisted="freeze")  # fmt: skip
    dict(handle.named_parameters())["first.fishkern_leaves.weight"].requires_grad_(False)
    model(torch.randn(3, 4))["logits"].sum().backward()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # torch's own
def test_a_compiled_part_is_not_watched():
    model = Layers(lambda layer, x: layer(x))
    model.second.compile(fullgraph=True, backend="aot_eager")
    handle = train_only(model, mask_of("second.weight"), unlisted="freeze")
    model(torch.randn(3, 4))["logits"].sum().backward()
    assert all(leaf.grad is not None for leaf in handle.parameters())
