"""Checkpoints: every dtype survives, resuming is unbroken, and a wrong mask is refused."""

import copy
import io
import pickle

import pytest
import torch

from fishkern.optim import FishSparseAdamW
from fishkern.selection.masks import SparseMask
from tests.support.optim import copies, full_mask, make_mask, make_model, train


def saved_and_loaded(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(a, b):
    for p, q in zip(a.state.values(), b.state.values(), strict=True):
        assert p.keys() == q.keys()
        for key in p:
            assert p[key].dtype == q[key].dtype == torch.float32
            assert torch.equal(p[key], q[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(dtype, amsgrad, masked):
    model = make_model(dtype)
    mask = make_mask(model) if masked else None

    def build(model):
        pairs = list(model.named_parameters())
        optimizer = FishSparseAdamW(
            [{"params": pairs[:2]}, {"params": pairs[2:]}], lr=1e-2, amsgrad=amsgrad, mask=mask
        )
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def run(model, optimizer, scheduler, start):
        for i in range(start, start + 10):
            train(model, optimizer, 1, start=i)
            scheduler.step()

    broken = copy.deepcopy(model)
    optimizer, scheduler = build(model)
    run(model, optimizer, scheduler, 0)
    run(model, optimizer, scheduler, 10)

    first, schedule = build(broken)
    run(broken, first, schedule, 0)
    checkpoint = saved_and_loaded([broken.state_dict(), first.state_dict(), schedule.state_dict()])
    resumed = make_model(dtype)
    second, schedule = build(resumed)
    for target, state in zip((resumed, second, schedule), checkpoint, strict=True):
        target.load_state_dict(state)
    assert_same_state(first, second)
    run(resumed, second, schedule, 10)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same_state(optimizer, second)


def test_layout_is_torchs_with_the_mask_in_the_groups():
    model = make_model()
    mask = make_mask(model)
    pairs = list(model.named_parameters())
    optimizer = FishSparseAdamW([{"params": pairs[:2]}, {"params": pairs[2:]}], mask=mask)
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, 1)
    checkpoint = optimizer.state_dict()
    assert list(checkpoint["state"]) == list(range(6))
    assert [group["params"] for group in checkpoint["param_groups"]] == [[0, 1], [2, 3, 4, 5]]
    for group in checkpoint["param_groups"]:
        assert group["mask"]["fingerprint"] == mask.fingerprint
        assert list(group["mask"]["indices"]) == group["param_names"]
        for name, index in group["mask"]["indices"].items():
            assert torch.equal(index, mask[name])
            assert group["mask"]["shapes"][name] == list(mask.shapes[name])
    assert optimizer.param_groups[0]["mask"] == "see optimizer.mask"
    assert "tensor" not in repr(optimizer)


def test_stock_adamw_refuses_a_masked_checkpoint():
    # Its fused kernels compare no shapes: they would write behind the selected entries' moments.
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model), fused=True)
    train(model, optimizer, 1)
    checkpoint = optimizer.state_dict()
    assert optimizer.param_groups[0]["fused"] is True
    stock = torch.optim.AdamW(model.named_parameters(), fused=True)
    stock.load_state_dict(checkpoint)
    assert not any(group["fused"] for group in stock.param_groups)
    with pytest.raises(RuntimeError, match="size"):
        train(model, stock, 1)


def test_loading_copies():
    model = make_model()
    mask = make_mask(model)
    first = FishSparseAdamW(model.named_parameters(), mask=mask)
    train(model, first, 1)
    checkpoint = first.state_dict()
    second = FishSparseAdamW(model.named_parameters(), mask=mask)
    second.load_state_dict(checkpoint)
    kept = copy.deepcopy(checkpoint["state"])
    train(model, second, 3)
    for i, entry in kept.items():
        for key, value in entry.items():
            assert torch.equal(checkpoint["state"][i][key], value)
    assert "mask" in checkpoint["param_groups"][0]


def test_hooks_of_state_dict_and_load_state_dict_run():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    train(model, optimizer, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(
        lambda _, state: {**state, "extra": list(state["param_groups"][0]["mask"])}
    )

    def unwrap(_, state):
        seen.append(state.pop("extra"))
        return {"state": state["state"], "param_groups": state["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    checkpoint = optimizer.state_dict()
    optimizer.load_state_dict(checkpoint)
    assert seen == ["save", ["fingerprint", "indices", "shapes"], 6]
    assert "extra" in checkpoint  # the caller's dictionary is left as it was


def changed(mask, name="0.weight"):
    index = mask[name].tolist()
    free = next(i for i in range(mask.shapes[name].numel()) if i not in index)
    return SparseMask({**mask, name: torch.tensor(sorted([*index[1:], free]))}, mask.shapes)


def test_another_mask_is_refused_and_the_difference_named():
    model = make_model()
    mask = make_mask(model)
    first = FishSparseAdamW(model.named_parameters(), mask=mask)
    train(model, first, 1)
    second = FishSparseAdamW(model.named_parameters(), mask=changed(mask))
    train(model, second, 1)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=r"another mask.*2 entries differ, in '0\.weight'"):
        second.load_state_dict(first.state_dict())
    assert second.mask == changed(mask)
    for i, entry in second.state_dict()["state"].items():
        assert torch.equal(entry["exp_avg"], before["state"][i]["exp_avg"])


def test_the_checkpoints_mask_wins_over_a_computed_one():
    model = make_model()
    mask = make_mask(model)
    first = FishSparseAdamW(model.named_parameters(), mask=mask)
    train(model, first, 3)
    second = FishSparseAdamW(model.named_parameters(), mask=make_mask(model, 0.5, seed=1))
    second._mask_is_computed = True
    train(copy.deepcopy(model), second, 1)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert second.mask == mask
    assert_same_state(first, second)
    before = copies(model)
    train(model, second, 1)
    for name, param in model.named_parameters():
        assert torch.equal((param != before[name]), mask.dense(name))


def test_a_checkpoints_mask_must_fit_the_parameters():
    model = make_model()
    first = FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    train(model, first, 1)
    checkpoint = copy.deepcopy(first.state_dict())
    group = checkpoint["param_groups"][0]
    for part in (group["mask"]["indices"], group["mask"]["shapes"]):
        part["elsewhere"] = part["0.weight"]
    second = FishSparseAdamW(model.named_parameters(), mask=full_mask(model))
    second._mask_is_computed = True
    with pytest.raises(ValueError, match=r"'elsewhere'.*no such parameter"):
        second.load_state_dict(checkpoint)
    assert second.mask == full_mask(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_go_on(duplicate):
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask.bind(model), lr=1e-2)
    train(model, optimizer, 2)
    twin_model, twin = duplicate([model, optimizer])
    assert twin.mask == mask
    assert "mask" in twin.state_dict()["param_groups"][0]
    assert_same_state(optimizer, twin)
    train(model, optimizer, 3, start=2)
    train(twin_model, twin, 3, start=2)
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)
