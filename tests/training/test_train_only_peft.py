"""train_only on models with adapters of PEFT, whose calls switch flags and exchange modules."""

import copy
import io

import peft
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.problems import PROBLEMS, bert, lora
from tests.support.tolerances import MODEL, assert_scores_match
from tests.support.training import (
    dense_gradients,
    distance,
    leaf_gradients,
    random_mask,
    weights,
)

# Of PEFT, where a model made here is saved.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]
PROBLEM = PROBLEMS["bert-lora"]


def trained(model, mask, steps=2, **kwargs):
    """The handle after some steps, so that the leaves are not what they were."""
    handle = train_only(model, mask, **kwargs)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        PROBLEM.loss(model, PROBLEM.batch()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return handle


def trainable(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def adapter_weights(model):
    return {n: v for n, v in weights(model).items() if "lora" in n}


METHODS = {
    "dora": lambda: lora(bert(), ["query", "value"], use_dora=True),
    "rslora-biases": lambda: lora(bert(), ["query"], use_rslora=True, bias="lora_only"),
    "ia3": lambda: peft.get_peft_model(
        bert(), peft.IA3Config(target_modules=["query", "intermediate.dense"],
                               feedforward_modules=["intermediate.dense"]),
    ),
    "vera": lambda: peft.get_peft_model(
        bert(), peft.VeraConfig(r=4, target_modules=["query"], d_initial=0.5)
    ),
    "loha": lambda: peft.get_peft_model(
        bert(), peft.LoHaConfig(r=2, target_modules=["query"], init_weights=False)
    ),
    "adalora": lambda: peft.get_peft_model(
        bert(), peft.AdaLoraConfig(target_modules=["query"], total_step=100, init_r=4)
    ),
    "modules_to_save": lambda: lora(bert(), ["query"], modules_to_save=["classifier"]),
}  # fmt: skip


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_every_method_are_the_dense_ones(name, with_base):
    torch.manual_seed(1)
    model = METHODS[name]().eval()
    if with_base:
        model.requires_grad_()
    batch, mask = PROBLEM.batch(), random_mask(model)
    truth = dense_gradients(model, PROBLEM, batch, torch.float64)
    train_only(model, mask)
    PROBLEM.loss(model, batch).backward()
    found = {n: g for n, g in leaf_gradients(model).items() if g is not None}
    assert set(found) == {n for n in mask if len(mask[n]) and n in truth}
    expected = {n: truth[n].flatten()[mask[n].long()] for n in found}
    assert_scores_match(found, expected)


def test_switched_flags_do_not_thaw_unselected_weights():
    model = PROBLEM.model()
    handle = train_only(model, random_mask(model, density=0.1))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    PROBLEM.loss(model, PROBLEM.batch()).backward()
    leaves = {id(leaf) for leaf in handle.parameters()}
    assert all(leaf.grad is not None for leaf in handle.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in leaves)


def test_a_disabled_adapter_gives_the_base_model():
    model = PROBLEM.model().eval()
    base, batch = copy.deepcopy(model).unload(), PROBLEM.batch()
    trained(model, random_mask(model))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_a_second_adapter_is_trained_beside_the_leaves():
    model = PROBLEM.model()
    handle = train_only(model, random_mask(model))
    own = trainable(model)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["query"]))
    PROBLEM.loss(
        model, PROBLEM.batch()
    )  # PEFT may have switched flags, and a forward puts them back
    assert trainable(model) == own  # the first one is still the active one
    model.set_adapter("second")
    assert all("second" in name for name in trainable(model))  # its leaves are off
    PROBLEM.loss(model, PROBLEM.batch()).backward()
    assert all(leaf.grad is None for leaf in handle.parameters())
    assert any(p.grad is not None for n, p in model.named_parameters() if "second" in n)
    model.zero_grad()
    model.set_adapter("default")
    PROBLEM.loss(model, PROBLEM.batch()).backward()
    assert trainable(model) == own
    assert all(leaf.grad is not None for leaf in handle.parameters())
    model.delete_adapter("second")
    PROBLEM.loss(model, PROBLEM.batch())


def test_saved_adapters_hold_what_was_trained(tmp_path):
    model = PROBLEM.model().eval()
    base = copy.deepcopy(model).unload()
    start = adapter_weights(model)
    trained(model, random_mask(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert distance(adapter_weights(loaded), adapter_weights(model)) == 0
    assert distance(start, adapter_weights(model)) > 0


def test_an_adapter_loaded_over_the_trained_one_reaches_the_leaves(tmp_path):
    model = PROBLEM.model().eval()
    model.save_pretrained(tmp_path)
    start = adapter_weights(model)
    handle = trained(model, random_mask(model))
    assert distance(adapter_weights(model), start) > 0
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert distance(adapter_weights(model), start) == 0
    PROBLEM.loss(model, PROBLEM.batch()).backward()
    assert all(leaf.grad is not None for leaf in handle.parameters())
    for name, leaf in handle.named_parameters():
        owner = name.replace("fishkern_leaves.", "")
        entries = model.state_dict()[owner].flatten()[handle.mask[owner].long()]
        assert torch.equal(leaf, entries)


def test_merged_adapters_keep_their_delta():
    model = PROBLEM.model().eval()
    base = model.base_model.model
    names = [n for n, _ in base.named_parameters() if n.endswith("query.base_layer.weight")]
    shapes = dict.fromkeys(names, (16, 16))
    mask = SparseMask({n: torch.arange(0, 256, 3) for n in names}, shapes)
    train_only(base, mask, unlisted="freeze")
    expected = copy.deepcopy(model)
    fishkern.attached(expected).remove()
    merged, plain = model.merge_and_unload(), expected.merge_and_unload()
    assert distance(weights(plain), weights(merged)) < MODEL / 10


def test_a_trained_adapter_is_merged_and_unmerged():
    model, batch = PROBLEM.model().eval(), PROBLEM.batch()
    trained(model, random_mask(model))
    expected = model(**batch).logits.detach()
    model.merge_adapter()
    assert (model(**batch).logits - expected).abs().max() < MODEL
    model.unmerge_adapter()
    assert (model(**batch).logits - expected).abs().max() < MODEL
    merged = model.merge_and_unload()
    assert attached(merged) is None
    assert (merged(**batch).logits - expected).abs().max() < MODEL


def test_an_adapter_on_an_attached_model_freezes_its_leaves():
    problem = PROBLEMS["bert"]
    model = problem.model().eval()
    handle = train_only(model, random_mask(model))
    batch = problem.batch()
    before = model(**batch).logits.detach()
    model = lora(model, ["query"])
    assert attached(model) is handle
    assert trainable(model)
    assert all("lora" in name for name in trainable(model))
    problem.loss(model, batch).backward()
    assert all(leaf.grad is None for leaf in handle.parameters())
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("through", ["file", "deepcopy", "state_dict"])
def test_copies_of_an_adapted_model_go_on_alike(through):
    model = PROBLEM.model().eval()
    mask = random_mask(model)
    trained(model, mask)
    if through == "file":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    elif through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        twin = PROBLEM.model().eval()
        train_only(twin, mask)
        twin.load_state_dict(model.state_dict())
    batch = PROBLEM.batch()
    for each in (model, twin):
        optimizer = FishSparseAdamW(each.named_parameters(), mask=mask, lr=0.1)
        PROBLEM.loss(each, batch).backward()
        optimizer.step()
    assert attached(twin) is not attached(model)
    assert distance(weights(model), weights(twin)) == 0


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_are_those_of_the_weights(average):
    model = PROBLEM.model().eval()
    mask = random_mask(model)
    plain = copy.deepcopy(model)
    train_only(model, mask)
    function = get_ema_multi_avg_fn(0.5) if average == "ema" else None
    averages = [AveragedModel(each, multi_avg_fn=function) for each in (model, plain)]
    optimizers = [FishSparseAdamW(m.named_parameters(), mask=mask, lr=0.01) for m in (model, plain)]
    for _ in range(3):
        batch = PROBLEM.batch()
        for each, optimizer, averaged in zip((model, plain), optimizers, averages, strict=True):
            optimizer.zero_grad()
            PROBLEM.loss(each, batch).backward()
            optimizer.step()
            averaged.update_parameters(each)
    a, b = (averaged.module.eval() for averaged in averages)
    with torch.no_grad():
        assert torch.equal(a(**batch).logits, a(**batch).logits)
        assert (a(**batch).logits - b(**batch).logits).abs().max() < MODEL
    assert distance(weights(a), weights(b)) < MODEL
    assert distance(weights(a), weights(model)) > 1e-4


def test_generation_sees_what_was_trained():
    problem = PROBLEMS["gpt2"]
    model = problem.model().eval()
    handle, ids = train_only(model, random_mask(model)), torch.tensor([[2, 3]])
    with torch.no_grad():
        for leaf in handle.parameters():
            leaf.add_(torch.randn_like(leaf))
    removed = copy.deepcopy(model)
    attached(removed).remove()
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), removed.generate(ids, **options))
