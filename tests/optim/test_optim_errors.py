"""Wrong input is refused with the value and the remedy, before anything is modified."""

import re

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from fishkern.optim import FishSparseAdamW
from fishkern.selection.masks import SparseMask
from tests.support.optim import copies, loss_of, make_mask, make_model, train


def part(mask, *names):
    return SparseMask({n: mask[n] for n in names}, {n: mask.shapes[n] for n in names})


def reshaped(mask):
    return SparseMask(dict(mask), {**mask.shapes, "0.weight": (6, 8)})


def leaf(*size, dtype=torch.float32):
    return [("0.fishkern_leaves.weight", torch.nn.Parameter(torch.zeros(size, dtype=dtype)))]


def pairs(model):
    return list(model.named_parameters())


def weights(model):
    return list(model.parameters())


# name: (params, options, what the message has to hold); m is the model, k its mask
AT_CONSTRUCTION = {
    "lr": (pairs, lambda m, k: {"mask": k, "lr": -1.0}, ["-1.0"]),
    "eps": (pairs, lambda m, k: {"mask": k, "eps": -1e-8}, ["-1e-08"]),
    "betas": (pairs, lambda m, k: {"mask": k, "betas": (0.9, 1.0)}, ["1.0"]),
    "weight_decay": (pairs, lambda m, k: {"mask": k, "weight_decay": -0.1}, ["-0.1"]),
    "lr_tensor": (pairs, lambda m, k: {"mask": k, "lr": torch.ones(2)}, ["1-element"]),
    "lr_tensor_foreach": (
        pairs,
        lambda m, k: {"mask": k, "lr": torch.tensor(1e-3), "foreach": True},
        ["foreach=True"],
    ),
    "differentiable": (
        pairs,
        lambda m, k: {"mask": k, "differentiable": True},
        ["differentiable=True", "torch.optim.AdamW"],
    ),
    "state_dtype": (
        pairs,
        lambda m, k: {"mask": k, "state_dtype": torch.float16},
        ["torch.float16", "torch.float32, torch.bfloat16, or torch.uint8"],
    ),
    "check_numerics": (
        pairs,
        lambda m, k: {"mask": k, "check_numerics": True, "capturable": True},
        ["check_numerics=True", "leave out capturable=True"],
    ),
    "unlisted_value": (
        pairs,
        lambda m, k: {"mask": k, "unlisted": "ignore"},
        ["'ignore'", "error, train, freeze"],
    ),
    "unlisted": (
        pairs,
        lambda m, k: {"mask": part(k, "0.weight", "0.bias")},
        ["'2.weight', '2.bias', '3.weight' and 1 more", 'unlisted="train"', 'unlisted="freeze"'],
    ),
    "unlisted_and_misspelt": (
        pairs,
        lambda m, k: {"mask": SparseMask({"0.weights": torch.tensor([1])}, {"0.weights": (48,)})},
        ["'0.weight'", "close to it: '0.weights'"],
    ),
    "shape": (
        pairs,
        lambda m, k: {"mask": reshaped(k)},
        ["0.weight", "[8, 6]", "[6, 8]", "select again"],
    ),
    "bare": (
        weights,
        lambda m, k: {"mask": k},
        ["model.named_parameters()", "mask.bind(model)"],
    ),
    "bound_elsewhere": (
        weights,
        lambda m, k: {"mask": k.bind(make_model())},
        ["parameter 0", "[8, 6]", "bind the mask to the model that is trained"],
    ),
    "half_named": (
        lambda m: [*pairs(m)[:2], *weights(m)[2:]],
        lambda m, k: {"mask": k},
        ["2 of 6", "name all or none"],
    ),
    "same_name": (
        lambda m: [*pairs(m), ("module.0.weight", torch.nn.Parameter(torch.zeros(8, 6)))],
        lambda m, k: {"mask": k},
        ["'0.weight'", "under a name of its own"],
    ),
    "same_name_in_groups": (
        lambda m: [{"params": pairs(m)}, {"params": [("0.bias", torch.zeros(8))]}],
        lambda m, k: {"mask": k},
        ["'0.bias'", "under a name of its own"],
    ),
    "same_parameter": (
        lambda m: weights(m) * 2,
        lambda m, k: {},
        ["12 parameters", "pass it once"],
    ),
    "complex": (
        lambda m: [("c", torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))],
        lambda m, k: {},
        ["c has dtype torch.complex64", "view_as_real"],
    ),
    "expanded": (
        lambda m: [("e", torch.nn.Parameter(torch.zeros(3, 1).expand(3, 4)))],
        lambda m, k: {},
        ["e of shape [3, 4] has strides [1, 0]", "contiguous()"],
    ),
    "several_tensors": (
        lambda m: [("t", torch.nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3))))],
        lambda m, k: {},
        ["t is a TwoTensor", "(a, b)", "leave it out"],
    ),
    "integer_in_mask": (
        lambda m: [("q", torch.zeros(3, dtype=torch.int8))],
        lambda m, k: {"mask": SparseMask({"q": torch.tensor([1])}, {"q": (3,)})},
        ["q has dtype torch.int8", "leave it out"],
    ),
    "empty": (lambda m: [], lambda m, k: {"mask": k}, ["empty parameter list"]),
    "leaf_size": (
        lambda m: pairs(m) + leaf(3),
        lambda m, k: {"mask": k},
        ["[3]", "the mask that train_only was given"],
    ),
    "leaf_dtype": (
        lambda m: pairs(m) + leaf(18, dtype=torch.float16),
        lambda m, k: {"mask": k},
        ["torch.float16", "float32"],
    ),
    "leaf_unknown": (
        lambda m: pairs(m) + leaf(3),
        lambda m, k: {"mask": part(k, "0.bias"), "unlisted": "freeze"},
        ["'0.weight'", "not in the mask"],
    ),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION.values(), ids=AT_CONSTRUCTION)
def test_construction_refuses(case):
    params, options, fragments = case
    model = make_model()
    mask = make_mask(model)
    before = copies(model)
    given = params(model)
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        FishSparseAdamW(given, **options(model, mask))
    for fragment in fragments:
        assert fragment in str(error.value)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
    assert all(set(group) == {"params"} for group in given if isinstance(group, dict))


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (pairs, {"mask": {"0.weight": torch.tensor([0])}}, "mask is a dict: pass a SparseMask"),
        (pairs, {"fused": True, "foreach": True}, None),
        (lambda m: m[0].weight, {}, "iterable of Tensors"),
        (lambda m: [("w", [1.0, 2.0])], {}, "w is a list"),
        (lambda m: [{"params": set(weights(m))}], {}, "ordered collections"),
    ],
    ids=["mask", "fused_foreach", "tensor", "list", "set"],
)
def test_wrong_types_are_refused(params, options, message):
    with pytest.raises((TypeError, RuntimeError), match=message):
        FishSparseAdamW(params(make_model()), **options)


def snapshot(optimizer):
    return [dict(group, params=[*group["params"]]) for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda m: {"params": pairs(m)[3:4]}, "two parameters are named '2.bias'"),
        (lambda m: {"params": weights(m)[4:]}, r"mask\.bind\(model\)"),
        (lambda m: {"params": [("x", torch.zeros(2, requires_grad=True))]}, "'x' is trainable but"),
        (lambda m: {"params": [("3.bias", torch.zeros(4))]}, r"3\.bias has shape \[4\]"),
        (lambda m: {"params": weights(m)[4:], "param_names": ["3.weight"]}, "1 param_names for 2"),
    ],
    ids=["twice", "bare", "unlisted", "shape", "names"],
)
def test_add_param_group_refuses(group, message):
    model = make_model()
    optimizer = FishSparseAdamW(pairs(model)[:4], mask=make_mask(model))
    before = snapshot(optimizer)
    wrong = group(model)
    given = dict(wrong)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(wrong)
    assert snapshot(optimizer) == before
    assert wrong.keys() == given.keys()


def test_a_mask_entry_without_parameter_is_refused_at_the_first_step():
    model = make_model()
    optimizer = FishSparseAdamW(pairs(model)[:5], mask=make_mask(model))
    loss_of(model, 0).backward()
    before = copies(model)
    asked = []
    with pytest.raises(ValueError, match=r"selects entries of '3\.bias', but the optimizer has no"):
        optimizer.step(lambda: asked.append(1))
    assert not asked
    assert not optimizer.state
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])


def test_an_empty_mask_entry_needs_no_parameter():
    model = make_model()
    mask = make_mask(model)
    assert mask["0.bias"].numel() == 0
    train(model, FishSparseAdamW([pairs(model)[0], *pairs(model)[2:]], mask=mask), 1)


@pytest.mark.parametrize("masked", [False, True])
def test_sparse_gradients_are_refused_before_any_update(masked):
    model = torch.nn.ModuleDict(
        {"linear": torch.nn.Linear(3, 3), "table": torch.nn.Embedding(5, 3, sparse=True)}
    )
    mask = make_mask_of(model) if masked else None
    optimizer = FishSparseAdamW([{"params": [pair]} for pair in pairs(model)], mask=mask)
    before = copies(model)
    model["linear"](model["table"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"\[5, 3\] is torch\.sparse_coo.*sparse=False"):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
    assert all(entry["step"] == 0 for entry in optimizer.state.values())


def make_mask_of(model):
    shapes = {name: param.shape for name, param in model.named_parameters()}
    return SparseMask({name: torch.tensor([0, 2]) for name in shapes}, shapes)


def without_mask(checkpoint):
    for group in checkpoint["param_groups"]:
        del group["mask"]


def fewer_groups(checkpoint):
    del checkpoint["param_groups"][0]


def fewer_parameters(checkpoint):
    del checkpoint["param_groups"][0]["params"][0]


def other_order(checkpoint):
    checkpoint["param_groups"][0]["param_names"].reverse()


def dense_moment(checkpoint):
    checkpoint["state"][0]["exp_avg"] = torch.zeros(8, 6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_mask, "the optimizer has a mask and the checkpoint has none: give"),
        (fewer_groups, "has 1 parameter groups, the optimizer 2: build"),
        (fewer_parameters, "group 0 has 1 parameters in the checkpoint, 2 in the optimizer"),
        (other_order, r"first '0\.bias' where the optimizer has '0\.weight': pass"),
        (dense_moment, r"exp_avg of 0\.weight has shape \[8, 6\] in the checkpoint, but \[18\]"),
    ],
)
def test_load_state_dict_refuses(spoil, message):
    model = make_model()
    mask = make_mask(model)
    groups = [{"params": pairs(model)[:2]}, {"params": pairs(model)[2:]}]
    first = FishSparseAdamW(groups, mask=mask)
    train(model, first, 1)
    checkpoint = first.state_dict()
    checkpoint["param_groups"] = [
        {**group, "param_names": [*group["param_names"]]} for group in checkpoint["param_groups"]
    ]
    checkpoint["state"] = {i: dict(entry) for i, entry in checkpoint["state"].items()}
    spoil(checkpoint)
    second = FishSparseAdamW(groups, mask=mask, lr=0.5)
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(checkpoint)
    assert not second.state
    assert second.mask is mask
    assert second.param_groups[0]["lr"] == 0.5


def test_a_masked_checkpoint_needs_a_mask():
    model = make_model()
    first = FishSparseAdamW(pairs(model), mask=make_mask(model))
    train(model, first, 1)
    with pytest.raises(ValueError, match="the checkpoint has a mask and the optimizer has none"):
        FishSparseAdamW(pairs(model)).load_state_dict(first.state_dict())


def test_a_group_that_lost_its_names_is_refused():
    model = make_model()
    optimizer = FishSparseAdamW(pairs(model), mask=make_mask(model))
    train(model, optimizer, 1)
    group = dict(optimizer.param_groups[0], params=[*weights(model)][::-1])
    del group["param_names"]
    optimizer.param_groups[0] = group
    with pytest.raises(ValueError, match="6 parameters but 0 param_names"):
        optimizer.step()
