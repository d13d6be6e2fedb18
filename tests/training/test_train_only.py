"""train_only trains the same weights as dense gradients do, and only they are trainable."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.problems import PROBLEMS, Problem
from tests.support.tolerances import assert_matches, assert_scores_match


class Functional(nn.Module):
    """A weight that is read outside its module, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        h = self.norm(self.linear(torch.tanh(self.linear(self.embedding(ids)))))
        return F.linear(h.mean(1), self.embedding.weight)


def functional_loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="sum")


def functional_batch(n=4, t=5):
    return {"input_ids": torch.randint(20, (n, t)), "labels": torch.randint(20, (n,))}


CASES = {
    **{name: PROBLEMS[name] for name in ("bert", "bert-lora", "gpt2", "llama-tied", "t5")},
    "functional": Problem(Functional, functional_batch, functional_loss),
}


@pytest.fixture(params=CASES)
def case(request):
    problem = CASES[request.param]
    torch.manual_seed(1)
    return problem, problem.model().eval()


def random_mask(model, density=0.2, seed=0):
    """Some entries of every trainable tensor, none of each seventh."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for i, (name, param) in enumerate(model.named_parameters()):
        if param.requires_grad:
            share = 0.0 if i % 7 == 3 else density
            chosen = torch.rand(param.numel(), generator=generator) < share
            indices[name], shapes[name] = chosen.nonzero().view(-1), param.shape
    return SparseMask(indices, shapes)


def dense_gradients(model, problem, batch, dtype):
    model = copy.deepcopy(model).to(dtype)
    problem.loss(model, batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def leaf_gradients(model):
    """By the name of the dense parameter."""
    return {
        name.replace("fishkern_leaves.", ""): leaf.grad
        for name, leaf in attached(model).named_parameters()
    }


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


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


def test_strict_loading_reaches_the_leaves(case):
    problem, model = case
    mask, start = random_mask(model), weights(model)
    handle = train_only(model, mask)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    problem.loss(model, problem.batch()).backward()
    optimizer.step()
    trained = weights(model)
    assert distance(trained, start) > 0
    model.load_state_dict(start, strict=True)
    for name, leaf in handle.named_parameters():
        owner = name.replace("fishkern_leaves.", "")
        assert torch.equal(leaf, start[owner].flatten()[mask[owner].long()])
    assert distance(weights(model), start) == 0
    model.load_state_dict(trained, strict=True, assign=True)
    assert distance(weights(model), trained) == 0
    problem.loss(model, problem.batch()).backward()  # the assigned weights are frozen, too
    dense = set(model.parameters()) - set(handle.parameters())
    assert not any(p.requires_grad for p in dense)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_attached_and_independent(case, duplicate):
    problem, model = case
    mask = random_mask(model)
    train_only(model, mask)
    twin = duplicate(model)
    assert attached(twin) is not None
    assert attached(twin) is not attached(model)
    before = weights(model)
    optimizer = torch.optim.SGD(attached(twin).parameters(), lr=0.1)
    problem.loss(twin, problem.batch()).backward()
    assert all(leaf.grad is None for leaf in attached(model).parameters())
    optimizer.step()
    assert distance(weights(model), before) == 0
    assert distance(weights(twin), before) > 0


def test_remove_leaves_no_trace(case):
    problem, model = case

    def state(module):
        return [
            (type(m), sorted(m._modules), len(m._forward_pre_hooks), sorted(m.__dict__))
            for m in module.modules()
        ], [(n, p.requires_grad) for n, p in module.named_parameters()]

    before, values = state(model), weights(model)
    handle = train_only(model, random_mask(model))
    assert state(model) != before
    handle.remove()
    handle.remove()  # once more does nothing
    assert state(model) == before
    assert attached(model) is None
    assert distance(weights(model), values) == 0
    problem.loss(model, problem.batch()).backward()
    assert any(p.grad is not None for p in model.parameters())


def test_with_statement_keeps_what_was_trained(case):
    problem, model = case
    before = weights(model)
    with train_only(model, random_mask(model)) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        problem.loss(model, problem.batch()).backward()
        optimizer.step()
    assert attached(model) is None
    assert distance(weights(model), before) > 0


def test_cast_to_bfloat16_keeps_float32_leaves(case):
    problem, model = case
    mask = random_mask(model)
    handle = train_only(model, mask)
    values = [leaf.detach().clone() for leaf in handle.parameters()]
    model.to(torch.bfloat16)
    assert all(leaf.dtype == torch.float32 for leaf in handle.parameters())
    for leaf, value in zip(handle.parameters(), values, strict=True):
        assert torch.equal(leaf, value)
    leaves = {id(leaf) for leaf in handle.parameters()}
    assert {p.dtype for p in model.parameters() if id(p) not in leaves} == {torch.bfloat16}
    optimizer = FishSparseAdamW(model.named_parameters(), lr=1e-5, mask=mask)
    problem.loss(model, problem.batch()).backward()
    optimizer.step()
    state = model.state_dict()
    for name, leaf in handle.named_parameters():  # the weight is the leaf's rounding
        owner = name.replace("fishkern_leaves.", "")
        chosen = state[owner].flatten()[mask[owner].long()]
        assert torch.equal(chosen, leaf.detach().to(torch.bfloat16))
    problem.loss(model, problem.batch())  # a forward does not round the leaves
    moved = [leaf.detach().to(torch.bfloat16).float() for leaf in handle.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, handle.parameters(), strict=True))


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


@pytest.mark.parametrize("write", ["in_place", "data", "parameter"])
@pytest.mark.parametrize("then", ["forward", "state_dict", "remove", "score", "to"])
def test_a_weight_that_others_write_keeps_what_they_wrote(write, then):
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    weight = model._parameters["weight"]
    if write == "in_place":
        with torch.no_grad():
            weight.fill_(7.0)
    elif write == "data":  # as PEFT merges adapters: no version counter moves
        weight.data.fill_(7.0)
    else:
        model.weight = nn.Parameter(torch.full((4, 4), 7.0))
    if then == "forward":
        model(torch.randn(1, 4))
    elif then == "state_dict":
        model.state_dict()
    elif then == "remove":
        handle.remove()
    elif then == "to":
        model.to(torch.float64)
    else:
        batch = (torch.randn(3, 4), torch.randn(3, 4))
        fishkern.estimate_fisher(
            model, [batch], loss_fn=lambda m, b: (m(b[0]) - b[1]).square().sum(1), progress=False
        )
    assert model._parameters["weight"].tolist() == [[7.0] * 4] * 4


def test_leaves_written_by_hand_count_in_training_mode():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    with torch.no_grad():
        leaf.fill_(3.0)
    model(torch.randn(1, 4))
    assert model._parameters["weight"].flatten()[[2, 9]].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("make", [torch.optim.SGD, FishSparseAdamW])
def test_a_step_keeps_what_was_written_to_other_leaves(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shapes = {"0.weight": (4, 4), "1.weight": (4, 4)}
    mask = SparseMask(dict.fromkeys(shapes, torch.tensor([2, 9])), shapes)
    first, second = train_only(model, mask, unlisted="freeze").parameters()
    optimizer = make([first], lr=0.1)  # it knows nothing of the second leaf
    model(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():
        second.fill_(3.0)
    optimizer.step()
    model(torch.randn(1, 4))
    assert second.tolist() == [3.0, 3.0]
    assert model[1]._parameters["weight"].flatten()[[2, 9]].tolist() == [3.0, 3.0]
    assert torch.equal(model[0]._parameters["weight"].flatten()[[2, 9]], first.detach())


def test_functional_call_leaves_the_leaves_alone():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    before = leaf.detach().clone()
    torch.func.functional_call(model, {"weight": torch.zeros(4, 4)}, (torch.ones(1, 4),))
    assert torch.equal(leaf, before)


def test_float64_weights_have_float64_leaves():
    model = nn.Linear(4, 4).double()
    before = model.weight.detach().clone()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    assert [leaf.dtype for leaf in handle.parameters()] == [torch.float64]
    handle.remove()
    assert torch.equal(model.weight, before)
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.1, weight_decay=0.0)
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    change = (model._parameters["weight"] - before).flatten()
    assert_matches(change[[2, 9]], torch.tensor([-0.1, -0.1]).double())
    assert change.count_nonzero() == 2


def test_flags_set_after_attaching_survive_scoring():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mask = SparseMask({"0.weight": torch.tensor([3])}, {"0.weight": (4, 4)})
    train_only(model, mask, unlisted="train")
    model[1].bias.requires_grad_(False)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    batch = (torch.randn(3, 4), torch.randn(3, 2))
    fishkern.estimate_fisher(
        model, [batch], loss_fn=lambda m, b: (m(b[0]) - b[1]).square().sum(1), progress=False
    )
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


def test_a_failing_attachment_leaves_no_trace(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = [(type(m), sorted(m._modules)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "register_forward_pre_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        train_only(model, random_mask(model))
    assert [(type(m), sorted(m._modules)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert attached(model) is None


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


def test_an_optimizer_of_removed_leaves_is_refused():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    model(torch.randn(1, 4)).sum().backward()
    optimizer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="train_only was removed"):
        optimizer.step()


def test_exchanged_leaves_count_in_eval_mode():
    model = nn.Linear(4, 4).eval()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    (leaf,) = handle.parameters()
    leaf.data.fill_(3.0)  # as a moving average would
    model(torch.randn(1, 4))
    assert model.weight.flatten()[[2, 9]].tolist() == [3.0, 3.0]


def test_report_names_every_trained_tensor():
    model = PROBLEMS["bert"].model()
    mask = random_mask(model)
    report = train_only(model, mask).report()
    for name in mask:
        assert (name in report) == bool(len(mask[name]))
    assert f"{mask.num_selected:,}" in report
    assert "rule" in report


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
