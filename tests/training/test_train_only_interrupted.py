"""Exceptions in the middle of a pass, and several threads: nothing stays of them."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from fishkern import FishSparseAdamW, attached, train_only
from fishkern.training import inputs
from tests.support.tolerances import assert_matches
from tests.support.training import distance, leaf_gradients, weights
from tests.training.test_train_only_inputs import I, N, O, Readers, T, column_mask


def model_and_optimizer(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(Readers(), nn.LayerNorm(O), nn.Linear(O, 4))
    mask = column_mask(model, seed=seed)
    train_only(model, mask)
    return model, FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.01)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


PLACES = {
    "forward": lambda model, fail: model[1].register_forward_pre_hook(fail),
    "after a layer": lambda model, fail: model[0].k.register_forward_hook(fail),
    "after all": lambda model, fail: model.register_forward_hook(fail),
    "backward": lambda model, fail: model[1].register_full_backward_pre_hook(fail),
    "a leaf": lambda model, fail: next(attached(model).parameters()).register_hook(fail),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_trains_after_an_exception_as_if_there_had_been_none(place, error, first):
    (model, optimizer), (twin, twins) = model_and_optimizer(), model_and_optimizer()
    batches, kept = [torch.randn(N, T, I) for _ in range(3)], []
    if not first:
        step(model, optimizer, batches[0]), step(twin, twins, batches[0])

    def fail(*_):
        raise error

    hook, found = PLACES[place](model, fail), set(inputs._found)
    seen = model[0].q.register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    with pytest.raises(error):
        step(model, optimizer, batches[1])
    hook.remove(), seen.remove()
    gc.collect()
    assert _get_current_function_mode_stack() == []
    assert torch.is_grad_enabled()
    assert len(kept) == 1
    assert kept[0]() is None
    assert set(inputs._found) <= found
    for x in batches:
        step(model, optimizer, x), step(twin, twins, x)
    assert distance(weights(model), weights(twin)) == 0


def test_threads_train_their_own_models_alike_and_together():
    """Even of one input."""
    x = torch.randn(N, T, I)

    def run(made):
        for _ in range(5):
            step(*made, x)
        return weights(made[0])

    alone = [run(model_and_optimizer(seed)) for seed in range(4)]
    made = [model_and_optimizer(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, made))
    assert all(distance(a, b) == 0 for a, b in zip(alone, together, strict=True))


def test_forward_in_one_thread_and_backward_in_another():
    torch.manual_seed(0)
    model = Readers()
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for _ in range(2):
            x = torch.randn(N, T, I)
            model.zero_grad(), truth.zero_grad()
            loss = one.submit(lambda x: model(x).square().sum(), x).result()
            other.submit(loss.backward).result()
            truth(x.double()).square().sum().backward()
            for name, grad in leaf_gradients(model).items():
                dense = truth.get_parameter(name).grad.flatten()[mask[name].long()]
                assert_matches(grad, dense, terms=N * T)
