"""train_only on models with adapters of PEFT, whose calls switch flags and exchange modules."""

import copy

import torch

import fishkern
from fishkern import SparseMask, train_only
from tests.support.problems import PROBLEMS
from tests.support.training import (
    distance,
    random_mask,
    weights,
)


def test_switched_flags_do_not_thaw_unselected_weights():
    problem = PROBLEMS["bert-lora"]
    model = problem.model()
    mask = random_mask(model, density=0.1)
    handle = train_only(model, mask)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    problem.loss(model, problem.batch()).backward()
    leaves = {id(leaf) for leaf in handle.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in leaves)


def test_merged_adapters_keep_their_delta():
    problem = PROBLEMS["bert-lora"]
    model = problem.model().eval()
    base = model.base_model.model
    names = [n for n, _ in base.named_parameters() if n.endswith("query.base_layer.weight")]
    shapes = dict.fromkeys(names, (16, 16))
    mask = SparseMask({n: torch.arange(0, 256, 3) for n in names}, shapes)
    train_only(base, mask, unlisted="freeze")
    expected = copy.deepcopy(model)
    fishkern.attached(expected).remove()
    merged, plain = model.merge_and_unload(), expected.merge_and_unload()
    assert distance(weights(plain), weights(merged)) < 1e-6
