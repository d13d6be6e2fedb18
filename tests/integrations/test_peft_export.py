"""Adapters that stock PEFT loads, and Fisher masks that stock SHiRA trains."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fishkern
from fishkern.integrations.peft import export_adapter, fisher_mask_fn
from tests.support.tolerances import MODEL

needs_supertuning = pytest.mark.skipif(
    not hasattr(peft, "SupertuningConfig"), reason=f"peft {peft.__version__} has no Super-Tuning"
)
METHODS = ["shira", pytest.param("supertuning", marks=needs_supertuning)]
LAYER = "bert.encoder.layer.0"


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval().to(dtype)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(2, 40, (4, 6), generator=generator)).logits


def trained(model, density=0.05, names=("query", "value", "dense")):
    """A copy in which a random mask on the weights of linear layers was trained."""
    model = copy.deepcopy(model)
    scores = {
        name: torch.rand(p.shape) * (10 if "layer.0" in name else 1)
        for name, p in model.named_parameters()
        if name.endswith(tuple(f"{n}.weight" for n in names))
    }
    mask = fishkern.select(scores, density=density)
    with fishkern.train_only(model, mask, unlisted="freeze") as handle:
        with torch.no_grad():
            for leaf in handle.parameters():
                leaf.add_(torch.randn_like(leaf), alpha=0.5)
        handle.sync()
    return model


def edited(model, *names):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).view(-1)[1::3] += 0.5
    return model


def loads(folder, base, model):
    """The adapted base, which gives the model's logits, and which the base is far from."""
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    assert_same(loaded, model)
    assert (logits(loaded) - before).abs().max() > 0.2
    return loaded


def assert_same(loaded, model):
    """Up to rounding."""
    truth = logits(model)
    # In bfloat16 Super-Tuning rounds the differences, too.
    bound = MODEL if truth.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(loaded), truth, rtol=MODEL, atol=bound)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_peft_loads_it_and_gives_the_same_logits(tmp_path, method, dtype):
    base = bert(dtype)
    model = trained(base)
    export_adapter(model, tmp_path, base=base.state_dict(), method=method)
    loaded = loads(tmp_path, base, model)
    assert_same(loaded.merge_and_unload(), model)


@pytest.mark.parametrize("method", METHODS)
def test_an_attached_model_and_a_module_as_base(tmp_path, method):
    base = bert()
    model = trained(base)
    mask = fishkern.SparseMask({f"{LAYER}.output.dense.weight": torch.arange(9)},
                               {f"{LAYER}.output.dense.weight": (16, 32)})  # fmt: skip
    handle = fishkern.train_only(model, mask, unlisted="freeze")
    with torch.no_grad():
        next(handle.parameters()).add_(1)
    export_adapter(model, tmp_path, base=base, method=method)
    loads(tmp_path, base, model)


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_hold_what_the_method_cannot(tmp_path, method):
    base = bert()
    model = edited(
        trained(base),
        "classifier.weight",
        "classifier.bias",
        f"{LAYER}.output.LayerNorm.weight",
        f"{LAYER}.attention.self.query.bias",
        "bert.embeddings.word_embeddings.weight",
    )
    saved = ["classifier", "*.layer.0.output.LayerNorm", f"{LAYER}.attention.self.query"]
    saved.append("bert.embeddings.word_embeddings")
    export_adapter(model, tmp_path, base=base, method=method, modules_to_save=saved)
    loads(tmp_path, base, model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("model", "changed", "saved"),
    [
        (bert, "bert.embeddings.word_embeddings.weight", ()),
        (bert, f"{LAYER}.output.LayerNorm.weight", ()),
        (bert, f"{LAYER}.attention.self.query.bias", "classifier"),
        (gpt2, "transformer.h.0.attn.c_attn.weight", ()),  # Conv1D
        (gpt2, "transformer.wte.weight", ()),  # tied: one of its modules alone would not do
        (gpt2, "transformer.wte.weight", "transformer.wte"),
        (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", ()),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj.weight", ()),  # used as a function
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path, method, model, changed, saved):
    base = model()
    with pytest.raises(ValueError, match=f"{changed}'.* name their modules in modules_to_save"):
        export_adapter(
            edited(base, changed), tmp_path, base=base, method=method, modules_to_save=saved
        )
    assert list(tmp_path.iterdir()) == []


def test_shira_has_one_r_for_all_layers(tmp_path):
    base = bert()
    model = trained(base, names=("query", "key"))
    export_adapter(model, tmp_path, base=base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    changes = {
        n: int((p != base.get_parameter(n)).sum())
        for n, p in model.named_parameters()
        if not torch.equal(p, base.get_parameter(n))
    }
    assert len(set(changes.values())) > 1
    assert config["modules_to_save"] is None
    assert config["r"] == max(-(-k // 32) for k in changes.values())
    assert len(tensors) == 2 * len(changes)
    for name, k in changes.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        weight, index = tensors[f"{layer}.shira_weight"], tensors[f"{layer}.shira_indices"].long()
        assert len(weight) == index.shape[1] == config["r"] * 32
        flat = index[0] * 16 + index[1]
        assert torch.equal(flat, flat.unique())  # a mask: ascending, none twice
        assert int(weight.count_nonzero()) == k


@pytest.mark.parametrize("method", METHODS)
def test_layers_far_denser_than_the_others_travel_whole(tmp_path, method):
    base = bert()
    dense = f"{LAYER}.output.dense"
    model = edited(base, f"{dense}.weight")  # a third of it
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.view(-1)[::50] += 1
            layer.attention.self.value.weight.view(-1)[::60] += 1
    export_adapter(model, tmp_path, base=base, method=method)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["modules_to_save"] == [dense]
    assert tensors[f"base_model.model.{dense}.weight"].shape == (16, 32)
    assert tensors[f"base_model.model.{dense}.bias"].shape == (16,)
    loads(tmp_path, base, model)


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_of_a_layer(tmp_path, method):
    model = copy.deepcopy(base := bert())
    with torch.no_grad():
        model.bert.pooler.dense.weight.neg_()
    export_adapter(model, tmp_path, base=base, method=method)
    loads(tmp_path, base, model)


def test_a_layer_too_small_for_shira(tmp_path):
    base = nn.Sequential(nn.Linear(6, 1))
    model = edited(base, "0.weight")
    with pytest.raises(ValueError, match=r"'0' changed, too small .* or method=\"supertuning\""):
        export_adapter(model, tmp_path, base=base)


@pytest.mark.parametrize("other", ["10", "1.0"])
def test_a_layer_that_peft_would_take_for_another(tmp_path, other):
    base = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    base.add_module("10", nn.Linear(8, 8))
    model = edited(base, "0.weight", f"{other}.weight")
    with pytest.raises(ValueError, match=f"PEFT would take '{other}' for '0', which travels whole"):
        export_adapter(model, tmp_path, base=base, modules_to_save="0")
    assert list(tmp_path.iterdir()) == []


@needs_supertuning
def test_a_share_that_does_not_come_back_from_its_complement(tmp_path):
    count, size = 3, 7
    assert int(size**2 * (1 - (1 - count / size**2))) == count - 1
    base = nn.Sequential(nn.Linear(size, size))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[0].weight.view(-1)[:count] += 1
    export_adapter(model, tmp_path, base=base, method="supertuning")
    x = torch.randn(4, size)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_names_that_end_alike_are_told_apart(tmp_path):
    def make():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        return nn.Sequential(nn.Linear(6, 6), inner)

    base, x = make(), torch.randn(3, 6)
    model = edited(base, "0.weight")
    export_adapter(model, tmp_path, base=base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    assert isinstance(loaded.base_model.model[1][0], nn.Linear)  # no adapter there


def test_refuses(tmp_path):
    base = bert()
    with pytest.raises(ValueError, match="no weight of a linear layer differs"):
        export_adapter(bert(), tmp_path, base=base)
    with pytest.raises(ValueError, match="method is 'lora': choose one of 'shira', 'supertuning'"):
        export_adapter(trained(base), tmp_path, base=base, method="lora")
    with pytest.raises(ValueError, match="modules_to_save: the pattern 'clasifier' matches none"):
        export_adapter(trained(base), tmp_path, base=base, modules_to_save="clasifier")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="is a PEFT model: its save_pretrained"):
        export_adapter(model, tmp_path, base=model)


def test_without_supertuning(tmp_path, monkeypatch):
    monkeypatch.delattr(peft, "SupertuningConfig", raising=False)
    base = bert()
    with pytest.raises(ValueError, match='has no Super-Tuning: choose method="shira"'):
        export_adapter(trained(base), tmp_path, base=base, method="supertuning")


def test_stock_shira_trains_the_fisher_mask():
    model = bert()
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters() if "query" in n}
    with pytest.warns(UserWarning, match="mask_fn"):  # PEFT says what to do next
        config = peft.ShiraConfig(r=2, mask_type="fisher", target_modules=["query"])
    config.mask_fn = fisher_mask_fn(model, scores)
    adapted = peft.get_peft_model(model, config)
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "shira_indices")}
    assert len(layers) == 2
    for name, layer in layers.items():
        index = layer.shira_indices["default"].long()
        score = scores[name.removeprefix("base_model.model.") + ".weight"]
        best = score.flatten().topk(2 * (16 + 16)).indices.sort().values
        assert torch.equal(index[0] * 16 + index[1], best)
    adapted(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2
    assert all(adapted.get_parameter(n).grad is not None for n in trainable)
    pickle.loads(pickle.dumps(adapted))


@pytest.mark.parametrize(
    ("r", "names", "message"),
    [
        (9, ["query"], "r is 9, for which '.*query.weight' would train 288 of 256"),
        (1, ["key"], r"'.*key.weight' has shape \[16, 16\], its scores none"),
    ],
)
def test_mask_fn_refuses(r, names, message):
    model = bert()
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters() if "query" in n}
    config = peft.ShiraConfig(r=r, target_modules=names)
    config.mask_fn = fisher_mask_fn(model, scores)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config)


def test_mask_fn_of_another_model_is_refused():
    model = bert()
    config = peft.ShiraConfig(r=1, target_modules=["query"])
    config.mask_fn = fisher_mask_fn(bert(), {})
    with pytest.raises(ValueError, match="not of the model given to fisher_mask_fn"):
        peft.get_peft_model(model, config)
