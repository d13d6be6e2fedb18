"""``set_mask`` against AdamW written out in float64, each entry with a step count of its own."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, SparseMask, create_fish_optimizer
from tests.support.optim import bits, copies, kernel, make_model  # noqa: F401
from tests.support.remasking import EntryOracle, backward, some_mask
from tests.support.tolerances import assert_matches

STEPS = 40  # the most that are compared


def assert_follows(optimizer, model, oracle):
    for name, param in model.named_parameters():
        assert_matches(param.detach(), oracle.p[name], terms=STEPS)
        state, on = optimizer.state[param], oracle.on[name]
        for kind, truth in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
            assert_matches(state[kind].flatten(), truth[name][on], terms=STEPS)
        counts = state["step"]
        if "cohorts" in state:
            assert len(counts.unique()) == len(counts) > 1
            counts = counts[state["cohorts"].long()]
        assert torch.equal(counts.double().expand(int(on.sum())), oracle.t[name][on]), name


@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}, {"lr": torch.tensor(0.01)}],
    ids=str,
)
def test_each_entry_has_its_own_step_count(kernel, options):  # noqa: F811
    torch.manual_seed(0)
    model = make_model()
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    mask = some_mask(model, 0)
    before = copies(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, **options)
    oracle = EntryOracle(model, mask, **{**options, "lr": 1e-2})
    ever = {n: mask.dense(n) for n in mask}
    for i in range(STEPS):
        if i and i % 8 == 0:
            mask = some_mask(model, i // 8)
            optimizer.set_mask(mask)
            oracle.set_mask(mask)
            ever = {n: ever[n] | mask.dense(n) for n in mask}
        grads = backward(model, i)
        if i % 5 == 3:  # an unused layer
            model[0].weight.grad = grads["0.weight"] = None
        oracle.step(grads)
        optimizer.step()
        assert_follows(optimizer, model, oracle)
    assert any("cohorts" in state for state in optimizer.state.values())
    assert optimizer.mask == mask
    for name, param in model.named_parameters():
        assert torch.equal(bits(param[~ever[name]]), bits(before[name][~ever[name]]))


def test_groups_and_unlisted_parameters_keep_their_options():
    torch.manual_seed(0)
    model = make_model()
    names = dict(model.named_parameters())
    whole = names.pop("2.weight")
    first, second = (
        SparseMask({n: m[n] for n in names}, {n: m.shapes[n] for n in names})
        for m in (some_mask(model, 0), some_mask(model, 2))
    )
    groups = [
        {"params": [(n, p) for n, p in names.items() if n.startswith("0")]},
        {"params": [("2.weight", whole), *((n, p) for n, p in names.items() if n[0] in "23")]},
    ]
    optimizer = FishSparseAdamW(groups, lr=1e-2, weight_decay=0.1, mask=first, unlisted="train")
    oracle = EntryOracle(model, first)
    for i in range(12):
        if i == 5:
            optimizer.set_mask(second)
            oracle.set_mask(second)
        oracle.step(backward(model, i))
        optimizer.step()
    assert_follows(optimizer, model, oracle)
    assert optimizer.state[whole]["step"] == 12


def test_an_equal_mask_changes_no_bit_and_a_mask_before_the_first_step_is_the_mask():
    torch.manual_seed(0)
    model = make_model()
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    masks = [some_mask(model, 0), some_mask(model, 1)]
    optimizers = [
        FishSparseAdamW(model.named_parameters(), mask=masks[1]),
        FishSparseAdamW(other.named_parameters(), mask=masks[0]),
        FishSparseAdamW(third.named_parameters(), mask=masks[1]),
    ]
    optimizers[1].set_mask(masks[1])
    for i in range(6):
        for m, optimizer in zip((model, other, third), optimizers, strict=True):
            backward(m, i)
            optimizer.step()
        optimizers[2].set_mask(SparseMask(masks[1], masks[1].shapes))
    for a, b, c in zip(*(m.parameters() for m in (model, other, third)), strict=True):
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(bits(a), bits(c))


def test_there_and_back_loses_only_what_left():
    model = make_model()
    first, second = some_mask(model, 0), some_mask(model, 2)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=first)
    backward(model, 0)
    optimizer.step()
    saved = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    optimizer.set_mask(second)
    optimizer.set_mask(first)
    for name, param in model.named_parameters():
        stayed = torch.isin(first[name], second[name])
        now = optimizer.state[param]["exp_avg"].flatten()
        assert torch.equal(now, saved[param].flatten() * stayed)


def test_what_leaves_is_freed():
    model = nn.Linear(100, 100, bias=False)
    shapes = {"weight": (100, 100)}
    large = SparseMask({"weight": torch.arange(0, 10_000, 2)}, shapes)
    small = SparseMask({"weight": torch.arange(0, 10_000, 100)}, shapes)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=large)
    for mask in (large, small):
        optimizer.set_mask(mask)
        model(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        gc.collect()
        state = optimizer.state[model.weight]
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()
        }
        k = mask.num_selected
        assert sum(held.values()) <= 8 * k + 8
        assert optimizer.mask["weight"].untyped_storage().nbytes() == 4 * k


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "checkpoint", "file"])
def test_a_remasked_run_goes_on_bit_for_bit(way):
    torch.manual_seed(0)
    model = make_model()
    masks = [some_mask(model, i) for i in range(3)]
    optimizer = FishSparseAdamW(model.named_parameters(), mask=masks[0], amsgrad=True)
    for i in range(9):
        if i and i % 3 == 0:
            optimizer.set_mask(masks[i // 3])
        backward(model, i)
        optimizer.step()
    if way in ("deepcopy", "pickle"):
        pair = (model, optimizer)
        twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        twin = copy.deepcopy(model)
        other = FishSparseAdamW(twin.named_parameters(), mask=masks[2], amsgrad=True)
        saved = optimizer.state_dict()
        if way == "file":
            torch.save(saved, file := io.BytesIO())
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert sorted(saved["state"]) == list(range(6))
        for entry, (name, param) in zip(
            saved["state"].values(), model.named_parameters(), strict=True
        ):
            assert entry["exp_avg"].numel() == len(masks[2][name])
            assert entry["step"].dim() == ("cohorts" in entry)
            assert entry["exp_avg"].dtype == torch.float32, param
        other.load_state_dict(saved)
    for i in range(9, 15):
        for m, o in ((model, optimizer), (twin, other)):
            if i == 12:
                o.set_mask(masks[0])
            backward(m, i)
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other.state[b][key])


def test_one_call_updates_all_remasked_tensors(monkeypatch):
    from fishkern import _ops

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    masks = [
        SparseMask({n: torch.arange(i, s.numel(), 3) for n, s in shapes.items()}, shapes)
        for i in range(2)
    ]
    both = SparseMask({n: torch.arange(s.numel()) for n, s in shapes.items()}, shapes)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=masks[0])
    calls = []
    for name in ("masked_adamw_", "masked_adamw_packed_"):
        run = getattr(_ops, name)
        monkeypatch.setattr(
            _ops, name, lambda *a, run=run, name=name: (calls.append(name), run(*a))
        )
    for mask in (masks[0], both, masks[1]):
        optimizer.set_mask(mask)
        model(torch.ones(2, 8)).sum().backward()
        calls.clear()
        optimizer.step()
        assert calls == ["masked_adamw_packed_"]
        assert any("cohorts" in state for state in optimizer.state.values()) == (mask is both)


def test_refusals_change_nothing():
    model = make_model()
    mask = some_mask(model, 0)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    shapes = dict(mask.shapes)
    wrong = [
        (SparseMask({**mask, "9.weight": torch.tensor([0])}, {**shapes, "9.weight": (2,)}),
         ValueError, r"'9\.weight'.*no such parameter"),
        (SparseMask({**mask, "0.weight": torch.tensor([0])}, {**shapes, "0.weight": (6, 8)}),
         ValueError, r"0\.weight has shape \[8, 6\].*made for \[6, 8\]"),
        (SparseMask({n: mask[n] for n in mask if n != "2.bias"},
                    {n: shapes[n] for n in mask if n != "2.bias"}),
         ValueError, r"'2\.bias' is trainable but not in the mask"),
        ({"0.weight": torch.tensor([0])}, TypeError, "new mask is a dict"),
    ]  # fmt: skip
    for new, error, text in wrong:
        with pytest.raises(error, match=text):
            optimizer.set_mask(new)
        assert optimizer.mask == mask
        for key, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(entry[k], v) for k, v in before["state"][key].items())
    plain = FishSparseAdamW(model.parameters())
    with pytest.raises(ValueError, match="built without a mask"):
        plain.set_mask(mask)


def test_a_checkpoint_of_the_mask_before_is_refused_once_the_mask_was_set():
    model = nn.Linear(3, 2)
    batches = [(torch.randn(8, 3), torch.randn(8, 2))]
    optimizer = create_fish_optimizer(
        model, batches, density=0.5, lr=1e-3, num_samples=8, progress=False,
        loss_fn=lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1),
    )  # fmt: skip
    model(batches[0][0]).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    shapes = optimizer.mask.shapes
    optimizer.set_mask(SparseMask({n: torch.tensor([0]) for n in shapes}, shapes))
    with pytest.raises(ValueError, match="another mask"):
        optimizer.load_state_dict(saved)


def test_a_step_that_the_scaler_skips_leaves_every_count():
    torch.manual_seed(0)
    model = make_model()
    masks = [some_mask(model, i) for i in range(2)]
    optimizer = FishSparseAdamW(model.named_parameters(), mask=masks[0], capturable=True)
    backward(model, 0)
    optimizer.step()
    optimizer.set_mask(masks[1])
    optimizer.grad_scale = None
    for found in (0.0, 1.0, 0.0):
        before = copy.deepcopy((copies(model), optimizer.state_dict()["state"]))
        optimizer.found_inf = torch.tensor(found)
        backward(model, 1)
        model[3].weight.grad = None
        optimizer.step()
        states = optimizer.state_dict()["state"]
        assert any("cohorts" in state for state in states.values())
        for i, (name, param) in enumerate(model.named_parameters()):
            moves = not found and name != "3.weight" and len(masks[1][name]) > 0
            assert torch.equal(bits(param), bits(before[0][name])) != moves
            raised = states[i]["step"] - before[1][i]["step"]
            assert bool((raised == (not found and name != "3.weight")).all()), name
