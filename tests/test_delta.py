"""Deltas lead from the base to the trained model and back, bit for bit, and to nothing else."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard

import fishkern
from fishkern import files


def bert(seed=0, **config):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3, **config,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(2, 50, (4, 6), generator=generator)}


def random_mask(model, density=0.05, skip=("classifier",)):
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters() if not n.startswith(skip)}
    return fishkern.select(scores, density=density)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model(**batch()).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def raw(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bits(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    return all(torch.equal(raw(now[name]), raw(state[name])) for name in state)


def snapshot(model):
    return copy.deepcopy(model.state_dict())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "delta.safetensors"


def attached_run(model, mask):
    handle = fishkern.train_only(model, mask, unlisted="train")
    head = [p for n, p in model.named_parameters() if n.startswith("classifier")]
    train(model, torch.optim.SGD([*handle.parameters(), *head], lr=0.1))


def plain_run(model, mask):
    params = model.named_parameters()
    train(model, fishkern.FishSparseAdamW(params, mask=mask, lr=1e-2, unlisted="train"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("run", [plain_run, attached_run])
def test_apply_gives_the_trained_bits_and_revert_the_bases(path, run, dtype):
    model = bert().to(dtype)
    base, mask = snapshot(model), random_mask(model)
    run(model, mask)
    fishkern.save_delta(model, path, base=base, mask=mask, whole="classifier.*")
    trained = snapshot(model)
    assert not same_bits(model, base)

    other = bert().to(dtype)
    fishkern.apply_delta(other, path)
    assert same_bits(other, trained)
    fishkern.revert_delta(other, path)
    assert same_bits(other, base)
    fishkern.revert_delta(model, path)  # also the model that was trained
    assert same_bits(model, base)


def test_no_bits_are_lost_where_values_are_odd(path):
    base = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.0, float("nan"), 1e8, 1.0], [2.0, 1e-40, 3.0, -0.0]]))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[0, :3] = torch.tensor([-0.0, 1.0, 1e-8])
        model.weight[1, 1] = float("inf")
    before, after = snapshot(base), snapshot(model)
    fishkern.save_delta(model, path, base=base)
    stored, _ = files.load(path, "delta")
    assert set(stored) == {"gaps.weight", "xor.weight"}
    assert len(stored["xor.weight"]) == 4
    fishkern.apply_delta(base, path)
    assert same_bits(base, after)
    fishkern.revert_delta(base, path)
    assert same_bits(base, before)


def test_a_head_made_anew_is_replaced(path):
    model = bert()
    base = snapshot(model)
    attached_run(model, random_mask(model))
    fishkern.save_delta(model, path, base=base)
    other = bert()
    nn.init.normal_(other.classifier.weight)
    fishkern.apply_delta(other, path)
    assert same_bits(other, model.state_dict())
    fishkern.revert_delta(other, path)
    assert same_bits(other, base)


def test_a_tensor_may_travel_whole_though_little_changed(path):
    model = bert()
    base = snapshot(model)
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    fishkern.save_delta(model, path, base=base, whole="classifier.weight")
    other = bert()
    nn.init.normal_(other.classifier.weight)
    fishkern.apply_delta(other, path)
    assert same_bits(other, model.state_dict())


def test_statistics_travel_and_other_buffers_need_not_match(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other, base = copy.deepcopy(model), snapshot(model)
    model(torch.randn(8, 3))
    assert not same_bits(model, base)
    fishkern.save_delta(model, path, base=base)
    fishkern.apply_delta(other, path)
    assert same_bits(other, model.state_dict())
    fishkern.revert_delta(other, path)
    assert same_bits(other, base)


def test_tied_weights_are_stored_once_and_stay_tied(path):
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1
        model.transformer.h[0].attn.c_attn.weight[1, 5] += 1
    only_second_name = {n: t for n, t in base.state_dict().items() if n != "transformer.wte.weight"}
    fishkern.save_delta(model, path, base=only_second_name)
    stored, _ = files.load(path, "delta")
    assert {n for n in stored if "lm_head" in n} == set()
    fishkern.apply_delta(base, path)
    assert base.lm_head.weight is base.transformer.wte.weight
    assert same_bits(base, model.state_dict())


def test_weights_that_are_not_contiguous(path):
    base = nn.Linear(5, 3)
    base.weight = nn.Parameter(torch.randn(5, 3).t())
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[2, 1] += 1
    assert not model.weight.is_contiguous()
    before = snapshot(base)
    fishkern.save_delta(model, path, base=base)
    fishkern.apply_delta(base, path)
    assert torch.equal(base.weight, model.weight)
    fishkern.revert_delta(base, path)
    assert same_bits(base, before)


def test_peft_models_and_wrapped_ones(path):
    def make():
        torch.manual_seed(0)
        return peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"]))

    model = make()
    base = snapshot(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.view(-1)[::3] += 1
    fishkern.save_delta(torch.compile(model), path, base=base)
    other = nn.DataParallel(make())
    fishkern.apply_delta(other, path)
    assert same_bits(other.module, model.state_dict())


def test_leaves_follow_what_is_applied(path):
    model = bert()
    mask = random_mask(model)
    base = snapshot(model)
    handle = fishkern.train_only(model, mask, unlisted="freeze")
    leaves = [leaf.detach().clone() for leaf in handle.parameters()]
    train(model, torch.optim.SGD(handle.parameters(), lr=0.1))
    with torch.no_grad():
        for leaf in handle.parameters():
            leaf.add_(1)  # by hand: the weights have not followed yet
    trained = [leaf.detach().clone() for leaf in handle.parameters()]
    fishkern.save_delta(model, path, base=base, mask=mask)
    fishkern.revert_delta(model, path)
    assert all(map(torch.equal, handle.parameters(), leaves))
    fishkern.apply_delta(model, path)
    assert all(map(torch.equal, handle.parameters(), trained))


def test_a_changed_entry_takes_its_value_and_two_bytes(path):
    base = nn.Linear(1000, 1000, bias=False)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight.view(-1)[torch.randperm(10**6)[:50_000]] += 1
    fishkern.save_delta(model, path, base=base)
    assert 50_000 * 6 <= path.stat().st_size < 50_000 * 6 + 2000


def test_places_far_apart(path):
    base = nn.Embedding(100_000, 10)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[99_999, 9] += 1
        model.weight[1, 1] += 1
    fishkern.save_delta(model, path, base=base)
    assert files.load(path, "delta")[0]["gaps.weight"].dtype == torch.int32
    fishkern.apply_delta(base, path)
    assert same_bits(base, model.state_dict())


def changed(change):
    model = bert()
    with torch.no_grad():
        model.get_submodule(QUERY).weight[0] = ROW
        change(model)
    return model


QUERY = "bert.encoder.layer.0.attention.self.query"
ROW = torch.arange(16.0)  # the base's first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert(seed=1), "'bert.embeddings.word_embeddings.weight'.* and .* more of the"),
        (lambda: bert().bfloat16(), r"in torch.bfloat16 in the model and .* in torch.float32 in"),
        (lambda: bert(type_vocab_size=3), r"'bert.embeddings.token_type.*' is \[3, 16\] in"),
        (lambda: nn.Linear(3, 2), "the model has 'bias', 'weight', which the base of"),
        (lambda: bert().bert, "does not have: load"),
        # as many of the same bits, elsewhere
        (
            lambda: changed(lambda m: m.get_submodule(QUERY).weight[0].copy_(ROW.flip(0))),
            f"'{QUERY}.weight' of the model has other values",
        ),
        # a change that no selected entry shows
        (
            lambda: changed(lambda m: m.get_submodule(QUERY).weight[1, 1].add_(1e-3)),
            f"'{QUERY}.weight' of the model has other values",
        ),
        (
            lambda: changed(lambda m: m.bert.pooler.dense.bias.add_(1)),
            "'bert.pooler.dense.bias' of the model has other values",
        ),
    ],
)
def test_another_base_is_refused_by_name_and_left_alone(path, make, message):
    model = changed(lambda m: None)
    base = snapshot(model)
    with torch.no_grad():
        model.get_submodule(QUERY).weight[0, ::5] += 0.1
    fishkern.save_delta(model, path, base=base)
    other = make()
    before = snapshot(other)
    with pytest.raises(ValueError, match=message) as error:
        fishkern.apply_delta(other, path)
    assert str(path) in str(error.value)
    assert same_bits(other, before)


def test_twice_and_too_early(path):
    model = bert()
    base = snapshot(model)
    attached_run(model, random_mask(model))
    fishkern.save_delta(model, path, base=base)
    trained = snapshot(model)
    with pytest.raises(ValueError, match="is applied already: revert_delta"):
        fishkern.apply_delta(model, path)
    assert same_bits(model, trained)
    other = bert()
    with pytest.raises(ValueError, match="is not applied: the model is its base already"):
        fishkern.revert_delta(other, path)
    assert same_bits(other, base)


def test_what_was_trained_on_is_not_reverted(path):
    model = bert()
    base = snapshot(model)
    attached_run(model, random_mask(model))
    fishkern.save_delta(model, path, base=base)
    with torch.no_grad():
        model.classifier.bias[0] += 1  # stored whole
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'classifier.bias' of the model has .*load the base"):
        fishkern.revert_delta(model, path)
    assert same_bits(model, before)


def test_cut_and_edited_files_are_refused(path):
    base = nn.Linear(8, 4)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[1, 1] += 1
    fishkern.save_delta(model, path, base=base)
    whole, before = path.read_bytes(), snapshot(base)
    for position in range(0, len(whole), 7):
        edited = bytearray(whole)
        edited[position] ^= 1
        for content in (whole[:position], edited):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"delta\.safetensors"):
                fishkern.apply_delta(base, path)
    assert same_bits(base, before)
    random_mask(bert()).save(path)
    with pytest.raises(ValueError, match="holds a mask, not a delta"):
        fishkern.apply_delta(base, path)


def one_changed():
    model = bert()
    with torch.no_grad():
        model.bert.pooler.dense.weight[3, 3] += 1
    return model


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (bert, {"base": bert}, "equals the base bit for bit"),
        (one_changed, {"base": lambda: {}}, "the base has no 'bert.embeddings"),
        (one_changed, {"base": lambda: bert().half()}, "is .*float16 in the base and .*float32 in"),
        (one_changed, {"base": bert, "whole": "clasifier.*"}, "whole: the pattern 'clasifier"),
        (
            one_changed,
            {"base": bert, "mask": lambda: random_mask(bert(), skip=("bert.pooler",))},
            "outside the mask the model differs from the base in 'bert.pooler.dense.weight'",
        ),
        (
            one_changed,
            {
                "base": bert,
                "mask": lambda: fishkern.SparseMask(
                    {"bert.pooler.dense.weight": torch.arange(5)},
                    {"bert.pooler.dense.weight": (16, 16)},
                ),
            },
            "outside the mask .* 'bert.pooler.dense.weight': pass the base that",
        ),
        (
            one_changed,
            {"base": bert, "mask": lambda: random_mask(nn.Linear(2, 2), 0.5)},
            "the mask names 'weight'",
        ),
        (lambda: one_changed().to("meta"), {"base": bert}, 'is on "meta" and has no values'),
    ],
)
def test_save_refuses(path, model, kwargs, message):
    kwargs = {name: value() if callable(value) else value for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        fishkern.save_delta(model(), path, **kwargs)
    assert not path.exists()


def test_sharded_weights_are_refused(path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        base = snapshot(model)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"'weight' is sharded \(DTensor\)"):
            fishkern.save_delta(model, path, base=base)
    finally:
        dist.destroy_process_group()


def test_a_base_that_is_the_model_itself_is_refused(path):
    model = bert()
    base = model.state_dict()  # not a copy
    attached_run(model, random_mask(model))
    for own in (base, model):
        with pytest.raises(ValueError, match=r"model's own tensor, .* copy\.deepcopy"):
            fishkern.save_delta(model, path, base=own)
