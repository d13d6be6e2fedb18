"""train_only trains the same weights as dense gradients do, and only they are trainable."""

import copy

import pytest
import torch
from torch import nn

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.problems import PROBLEMS
from tests.support.tolerances import assert_matches, assert_scores_match
from tests.support.training import (
    dense_gradients,
    distance,
    leaf_gradients,
    random_mask,
    weights,
)


def test_gradients_equal_the_selected_entries_of_dense_ones(case):
    problem, model = case
    batch, mask = problem.batch(), random_mask(model)
    truth = dense_gradients(model, problem, batch, torch.float64)
    handle = train_only(model, mask)
    problem.loss(model, batch).backward()
    found = leaf_gradients(model)
    assert set(found) == {name for name in mask if len(mask[name])}
    assert sum(g.numel() for g in found.values()) == mask.num_selected
    expected = {name: truth[name].flatten()[mask[name].long()] for name in found}
    assert_scores_match(found, expected)
    dense = set(model.parameters()) - set(handle.parameters())
    assert all(param.grad is None for param in dense)


def test_accumulated_gradients_are_the_sum(case):
    problem, model = case
    first, second, mask = problem.batch(), problem.batch(), random_mask(model)
    train_only(model, mask)
    problem.loss(model, first).backward()
    one = {name: grad.clone() for name, grad in leaf_gradients(model).items()}
    problem.loss(model, second).backward()
    both = leaf_gradients(model)
    model.zero_grad()
    problem.loss(model, second).backward()
    other = leaf_gradients(model)
    for name in one:
        assert_matches(both[name], one[name].double() + other[name].double())


def run(model, problem, batches, make_optimizer):
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        problem.loss(model, batch).backward()
        optimizer.step()
    return weights(model)


def on_dense_gradients(mask):
    return lambda model: FishSparseAdamW(model.named_parameters(), lr=1e-3, mask=mask)


def on_leaves(mask):
    def make(model):
        train_only(model, mask)
        return FishSparseAdamW(model.named_parameters(), lr=1e-3, mask=mask)

    return make


def on_leaves_with_adamw(mask):
    def make(model):
        train_only(model, mask)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    return make


@pytest.mark.parametrize("way", [on_leaves, on_leaves_with_adamw])
def test_trajectory_is_that_of_dense_gradients(case, way):
    """Rounding moves a trajectory; so does the order of a batch's samples: at most twice that."""
    problem, model = case
    mask = random_mask(model)
    batches = [problem.batch() for _ in range(5)]
    n = len(batches[0]["labels"])
    reordered = [{k: v.flip(0) if len(v) == n else v for k, v in b.items()} for b in batches]
    dense = run(model, problem, batches, on_dense_gradients(mask))
    noise = distance(dense, run(model, problem, reordered, on_dense_gradients(mask)))
    assert distance(dense, weights(model)) > 1e-3  # something was trained
    assert noise < 1e-5  # so that the bound can be missed
    rounding = 2.0**-24  # of weights below one, where reordering happens to change nothing
    assert distance(dense, run(model, problem, batches, way(mask))) <= 2 * max(noise, rounding)


def test_outside_the_mask_no_bit_changes(case):
    problem, model = case
    mask, before = random_mask(model), weights(model)
    train_only(model, mask)
    optimizer = torch.optim.AdamW(attached(model).parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        problem.loss(model, problem.batch()).backward()
        optimizer.step()
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    for name, value in model.state_dict().items():
        chosen = first.get(id(named.get(name)))
        outside = torch.ones(value.numel(), dtype=torch.bool)
        if chosen in mask:
            outside[mask[chosen].long()] = False
        assert torch.equal(value.flatten()[outside], before[name].flatten()[outside]), name


def test_exactly_k_numbers_are_trainable_and_keys_stay(case):
    _, model = case
    mask, keys = random_mask(model), list(model.state_dict())
    handle = train_only(model, mask)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == mask.num_selected
    assert {id(p) for p in trainable} == {id(p) for p in handle.parameters()}
    assert all(p.dim() == 1 and p.dtype == torch.float32 for p in trainable)
    assert list(model.state_dict()) == keys


def test_scoring_an_attached_model_scores_its_weights(case):
    problem, model = case
    batch = problem.batch()

    def per_sample(model, batch):
        n = len(batch["labels"])
        return torch.stack([problem.loss(model, _sample(batch, i, n)) for i in range(n)])

    loss = {"loss_fn": per_sample}
    plain = fishkern.estimate_fisher(model, [batch], progress=False, **loss)
    handle = train_only(model, random_mask(model))
    scored = fishkern.estimate_fisher(model, [batch], progress=False, **loss)
    assert list(scored) == list(plain)
    for name in plain:
        assert torch.equal(scored[name], plain[name]), name
    assert attached(model) is handle
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == handle.mask.num_selected


def _sample(batch, i, n):
    return {k: v[i : i + 1] if len(v) == n else v for k, v in batch.items()}


def test_unlisted_head_is_trained_whole_or_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mask = SparseMask({"0.weight": torch.tensor([3]), "1.bias": torch.tensor([0])},
                      {"0.weight": (4, 4), "1.bias": (2,)})  # fmt: skip
    handle = train_only(model, mask, unlisted="train")
    model(torch.randn(3, 4)).sum().backward()
    # 1.weight shares its module with a leaf, 0.bias too: both have their ordinary gradients
    assert model[1]._parameters["weight"].grad.shape == (2, 4)
    assert model[0]._parameters["bias"].grad.shape == (4,)
    assert model[0]._parameters["weight"].grad is None
    handle.remove()
    train_only(model, mask, unlisted="freeze")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2


def test_report_names_every_trained_tensor():
    model = PROBLEMS["bert"].model()
    mask = random_mask(model)
    report = train_only(model, mask).report()
    for name in mask:
        assert (name in report) == bool(len(mask[name]))
    assert f"{mask.num_selected:,}" in report


ERRORS = {
    "unknown name": (lambda m: SparseMask({"2.weight": torch.tensor([0])}, {"2.weight": (4, 4)}),
                     {}, ValueError, ["'2.weight'", "select again"]),
    "other shape": (lambda m: SparseMask({"0.weight": torch.tensor([0])}, {"0.weight": (2, 2)}),
                    {}, ValueError, ["[4, 4]", "[2, 2]", "select again"]),
    "unlisted": (lambda m: SparseMask({"0.weight": torch.tensor([0])}, {"0.weight": (4, 4)}),
                 {}, ValueError, ["'0.bias'", 'unlisted="train"', "requires_grad_(False)"]),
    "bad unlisted": (random_mask, {"unlisted": "maybe"}, ValueError, ["'maybe'", '"freeze"']),
    "empty mask": (lambda m: SparseMask({"0.weight": torch.tensor([], dtype=torch.int64)},
                                        {"0.weight": (4, 4)}),
                   {}, ValueError, ["selects nothing"]),
    "not a mask": (lambda m: {}, {}, TypeError, ["dict", "SparseMask"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused_and_nothing_changed(name):
    make, kwargs, error, parts = ERRORS[name]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    mask = make(model)
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    with pytest.raises(error) as caught:
        train_only(model, mask, **kwargs)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_weight_that_its_module_writes_to_is_refused(kind):
    model = nn.ModuleDict({"table": kind(6, 4, max_norm=1.0), "head": nn.Linear(4, 4)})
    mask = random_mask(model)
    with pytest.raises(ValueError, match=r"'table.weight' has max_norm=1\.0.*leave it out"):
        train_only(model, mask)
    rest = SparseMask(
        *({n: d[n] for n in mask if n != "table.weight"} for d in (mask, mask.shapes))
    )
    handle = train_only(model, rest, unlisted="freeze")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=rest)
    with pytest.raises(ValueError, match=r"'table.weight' has max_norm"):
        handle.set_mask(mask, optimizer)
    assert handle.mask == rest


def test_attaching_twice_and_to_wrappers_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    mask = random_mask(model)
    train_only(model, mask)
    with pytest.raises(RuntimeError, match="attached already"):
        train_only(model, mask)
    with pytest.raises(RuntimeError, match="attached already"):
        train_only(nn.Sequential(model), mask)
    with pytest.raises(ValueError, match="model inside first"):
        train_only(nn.DataParallel(nn.Sequential(nn.Linear(4, 4))), mask)


def test_a_weight_is_trained_by_one_attached_model():
    shared = nn.Linear(4, 4)
    first, second = nn.Sequential(shared, nn.Linear(4, 2)), nn.Sequential(shared, nn.Linear(4, 2))
    heads = SparseMask({"1.weight": torch.tensor([1])}, {"1.weight": (2, 4)})
    handle = train_only(first, heads, unlisted="freeze")
    before = [(type(m), sorted(m.__dict__)) for m in second.modules()]
    for model, name in ((second, "0.weight"), (shared, "weight")):
        mask = SparseMask({name: torch.tensor([1])}, {name: (4, 4)})
        with pytest.raises(RuntimeError, match=f"'{name}' is also in another model.*remove"):
            train_only(model, mask, unlisted="freeze")
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    with pytest.raises(RuntimeError, match="'weight' is also in another model"):
        train_only(tied, mask, unlisted="freeze")
    assert [(type(m), sorted(m.__dict__)) for m in second.modules()] == before
    train_only(second, heads, unlisted="freeze")  # what is shared is trained by neither
    for model in (first, second):
        model(torch.randn(3, 4)).sum().backward()
        (leaf,) = attached(model).parameters()
        assert leaf.grad.abs().sum() > 0
    attached(second).remove()
    handle.remove()
    shared.requires_grad_()
    train_only(first, heads, unlisted="train")
    with pytest.raises(RuntimeError, match=r"'0\.weight' is also in another model"):
        train_only(second, heads, unlisted="freeze")  # it would freeze what the first one trains


def test_quantised_weights_are_refused_in_the_mask_and_left_alone_beside_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    quantised = torch.ones(4, 4, dtype=torch.int8)
    model[0].weight = nn.Parameter(quantised, requires_grad=False)
    model[0].forward = lambda x: x @ model[0].weight.to(x.dtype)
    mask = SparseMask({"0.weight": torch.tensor([3])}, {"0.weight": (4, 4)})
    with pytest.raises(ValueError, match=r"'0\.weight' has dtype torch\.int8.*leave them out"):
        train_only(model, mask, unlisted="freeze")
    mask = SparseMask({"1.weight": torch.tensor([3, 6])}, {"1.weight": (2, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = torch.optim.AdamW(handle.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0]._parameters["weight"], quantised)
    assert [leaf.grad.shape for leaf in handle.parameters()] == [(2,)]
