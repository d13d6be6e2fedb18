"""``handle.set_mask``: new leaves for old ones, with what stays of values and moments."""

import copy

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.optim import bits, kernel, loss_of, make_model  # noqa: F401
from tests.support.remasking import EntryOracle, backward, some_mask
from tests.support.tolerances import assert_matches


def dense_grads(model, twin, i):
    """The gradients of a copy without leaves, at the weights of the attached model."""
    with torch.no_grad():
        for name, param in twin.named_parameters():
            param.copy_(model.state_dict()[name])
    return backward(twin, i)


def leaf_values(handle):
    return {n.replace("fishkern_leaves.", ""): leaf for n, leaf in handle.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
def test_each_entry_has_its_own_step_count(kernel, options):  # noqa: F811
    torch.manual_seed(0)
    model = make_model()
    twin = copy.deepcopy(model)
    mask = some_mask(model, 0)
    oracle = EntryOracle(model, mask, **options)
    handle = train_only(model, mask)
    optimizer = FishSparseAdamW(
        model.named_parameters(), mask=mask, lr=1e-2, weight_decay=0.1, **options
    )
    for i in range(30):
        if i and i % 6 == 0:
            mask = some_mask(twin, i // 6)
            handle.set_mask(mask, optimizer)
            oracle.set_mask(mask)
        grads = dense_grads(model, twin, i)
        model.zero_grad()
        loss_of(model, i).backward()
        if i % 5 == 3:
            leaf_values(handle)["0.weight"].grad = grads["0.weight"] = None
        oracle.step(grads)
        optimizer.step()
        for name, value in model.state_dict().items():
            assert_matches(value, oracle.p[name], terms=i + 1)
        for name, leaf in leaf_values(handle).items():
            assert torch.equal(leaf, model.state_dict()[name].flatten()[mask[name].long()])
            state = optimizer.state[leaf]
            counts = state["step"]
            if "cohorts" in state:
                counts = counts[state["cohorts"].long()]
            assert torch.equal(counts.double().expand(len(leaf)), oracle.t[name][oracle.on[name]])
    assert any("cohorts" in state for state in optimizer.state.values())
    assert handle.mask == optimizer.mask == mask
    assert sum(leaf.numel() for leaf in handle.parameters()) == mask.num_selected
    groups = optimizer.param_groups[0]
    fresh = FishSparseAdamW(model.named_parameters(), mask=mask, **options)
    assert groups["param_names"] == fresh.param_groups[0]["param_names"]
    assert set(optimizer.state) <= set(groups["params"])


def test_masters_of_bfloat16_weights_stay_bit_for_bit():
    torch.manual_seed(0)
    model = make_model(torch.bfloat16)
    first, second = some_mask(model, 0), some_mask(model, 2)
    handle = train_only(model, first)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=first, lr=1e-4)
    for i in range(3):
        model.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
    old = {n: leaf.detach().clone() for n, leaf in leaf_values(handle).items()}
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    handle.set_mask(second, optimizer)
    finer = 0
    for name, leaf in leaf_values(handle).items():
        stays = torch.isin(second[name], first[name])
        kept = old[name][torch.isin(first[name], second[name])] if name in old else leaf[:0]
        assert torch.equal(bits(leaf[stays]), bits(kept))
        finer += int((kept != kept.bfloat16()).sum())
        start = weights[name].flatten()[second[name].long()][~stays]
        assert torch.equal(leaf[~stays], start.float())
    assert finer
    for name, weight in model.state_dict().items():
        assert torch.equal(bits(weight), bits(weights[name]))
    model.zero_grad()
    loss_of(model, 4).backward()
    optimizer.step()
    for name, leaf in leaf_values(handle).items():
        weight = model.state_dict()[name].flatten()[second[name].long()]
        assert torch.equal(weight, leaf.bfloat16())
    handle.remove()


def test_a_remasked_run_is_resumed_bit_for_bit():
    torch.manual_seed(0)
    model = make_model(torch.bfloat16)
    plain = copy.deepcopy(model)
    masks = [some_mask(model, i) for i in range(3)]
    handle = train_only(model, masks[0])
    optimizer = FishSparseAdamW(model.named_parameters(), mask=masks[0])
    for i in range(9):
        if i and i % 3 == 0:
            handle.set_mask(masks[i // 3], optimizer)
        model.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
    plain.load_state_dict(model.state_dict())
    train_only(plain, masks[2])
    other = FishSparseAdamW(plain.named_parameters(), mask=masks[2])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(9, 15):
        for m, o in ((model, optimizer), (plain, other)):
            if i == 12:
                attached(m).set_mask(masks[0], o)
            m.zero_grad()
            loss_of(m, i).backward()
            o.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_head_that_is_trained_whole_stays_as_it_is():
    model = make_model()
    full = some_mask(model, 0)
    names = [n for n in full if n != "3.weight"]
    first, second = (
        SparseMask({n: m[n] for n in names}, {n: m.shapes[n] for n in names})
        for m in (full, some_mask(model, 1))
    )
    handle = train_only(model, first, unlisted="train")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=first, unlisted="train")
    for i in range(4):
        if i == 2:
            handle.set_mask(second, optimizer)
            with pytest.raises(ValueError, match=r"'3\.weight' is trained whole"):
                handle.set_mask(full, optimizer)
        model.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
    assert optimizer.state[model[3].weight]["step"] == 4
    assert model[3].weight.requires_grad


def test_refusals_change_nothing():
    model = make_model()
    first, second = some_mask(model, 0), some_mask(model, 1)
    handle = train_only(model, first)
    optimizer = FishSparseAdamW(handle.named_parameters(), mask=first)
    leaves = list(handle.parameters())
    with pytest.raises(TypeError, match="is a AdamW, whose moments would go to other entries"):
        handle.set_mask(second, torch.optim.AdamW(leaves))
    with pytest.raises(ValueError, match=r"call handle\.set_mask"):
        optimizer.set_mask(second)
    stranger = nn.Linear(3, 2)
    wrong = SparseMask({"weight": torch.tensor([0])}, {"weight": stranger.weight.shape})
    with pytest.raises(ValueError, match="which the model does not have"):
        handle.set_mask(wrong, optimizer)
    with pytest.raises(ValueError, match="which the model does not have"):
        handle.set_mask(some_mask(model, 1), optimizer)  # it names leaves
    with pytest.raises(ValueError, match="another mask than the handle"):
        handle.set_mask(second, FishSparseAdamW(stranger.named_parameters(), mask=wrong,
                                                unlisted="freeze"))  # fmt: skip
    with pytest.raises(ValueError, match="built without a mask"):
        handle.set_mask(second, FishSparseAdamW(handle.parameters()))
    shares = [dict(handle.named_parameters()), {}]
    shares[1]["0.fishkern_leaves.weight"] = shares[0].pop("0.fishkern_leaves.weight")
    groups = [{"params": list(share.items())} for share in shares]
    with pytest.raises(ValueError, match=r"selects in '0\.bias', which none of the .* 2 groups"):
        handle.set_mask(second, FishSparseAdamW(groups, mask=first))
    assert all(a is b for a, b in zip(handle.parameters(), leaves, strict=True))
    assert handle.mask == first
    handle.set_mask(first, optimizer)  # the same: the leaves stay
    assert all(a is b for a, b in zip(handle.parameters(), leaves, strict=True))
    handle.set_mask(second, optimizer)
    with pytest.raises(RuntimeError, match="belongs to no weight any more"):
        torch.optim.SGD(leaves).step()
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.set_mask(first, optimizer)


@pytest.mark.parametrize("unlisted", ["freeze", "train"])
def test_a_step_in_which_every_leaf_is_frozen_raises_and_says_who_freezes(unlisted):
    model = make_model()
    mask = SparseMask({"0.weight": torch.tensor([1, 5])}, {"0.weight": (8, 6)})
    handle = train_only(model, mask, unlisted=unlisted)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, unlisted=unlisted)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model[0].requires_grad_(False)
    if unlisted == "train":
        loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match=r"all 1 leaves .* are frozen.*set_adapter"):
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(bits(weight), bits(before[name]))
    for leaf in handle.parameters():
        leaf.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.step()  # no gradients, but nothing is frozen


def test_newly_selected_weights_are_watched_in_their_first_forward():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.saved = [self.b.weight]

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.saved[0])

    model, shapes = Saved(), {"a.weight": (4, 4), "b.weight": (4, 4)}
    some, none = torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)
    first = SparseMask({"a.weight": some, "b.weight": none}, shapes)
    handle = train_only(model, first)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=first)
    model(torch.ones(2, 4))
    handle.set_mask(SparseMask({"a.weight": some, "b.weight": some}, shapes), optimizer)
    with pytest.raises(RuntimeError, match=r"'b\.weight' is used by linear"):
        model(torch.ones(2, 4))
