"""What an input's maker keeps anyhow is not kept again: its columns are made of that."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import fishkern
from fishkern import SparseMask, attached, train_only
from fishkern.training import makers
from tests.support.tolerances import assert_matches
from tests.support.training import kept_bytes, leaf_gradients

# So that kernels that take numbers by many have no rest, which they round otherwise.
N, T, I, O = 32, 5, 16, 12  # noqa: E741


class Made(nn.Module):
    """A layer that reads what another made."""

    def __init__(self, make, inner=1):
        super().__init__()
        self.below = nn.Linear(I, inner * I)
        self.norm = nn.LayerNorm(I)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.register_buffer("matrices", torch.randn(2, T, I))
        self.reader = nn.Linear(I, O)
        self.make = make

    def forward(self, x):
        return self.reader(self.make(self, self.below(x)))


def gated(model, h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(model, h):
    """As in transformers; nothing of the vector is trained."""
    wide = h.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return model.matrices[0, 0] * (wide * scale).to(h.dtype)


def gelu_by_hand(model, h):
    return 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * h**3)))


MAKERS = {
    "gelu": (lambda model, h: F.gelu(h), 1),
    "gelu, tanh": (lambda model, h: F.gelu(h, approximate="tanh"), 1),
    "gelu by hand": (gelu_by_hand, 1),
    "silu": (lambda model, h: F.silu(h), 1),
    "relu": (lambda model, h: F.relu(h), 1),
    "tanh": (lambda model, h: torch.tanh(h), 1),
    "sigmoid": (lambda model, h: torch.sigmoid(h), 1),
    "gated": (gated, 2),
    "a number for each token": (lambda model, h: h * h.sum(-1, keepdim=True), 1),
    "rms norm": (rms_norm, 1),
    "silu, and a frozen factor": (lambda model, h: 0.5 * (F.silu(h) * model.matrices[1]), 1),
    "norm": (lambda model, h: model.norm(h), 1),
    "norm of matrices": (lambda model, h: F.layer_norm(h, (T, I), *model.matrices), 1),
}
SHARES = {"few columns": 3, "most columns": I}  # in the latter case the input is kept whole


def mask_of(model, columns, *, with_reader=True):
    """Some of everything; of the reader's weight entries in so many columns."""
    generator = torch.Generator().manual_seed(0)
    indices, shapes = {}, {}
    for name, param in model.named_parameters():
        chosen = torch.rand(param.shape, generator=generator) < 0.5
        if name == "reader.weight":
            chosen[:, torch.randperm(I, generator=generator)[columns:]] = False
            if not with_reader:
                continue
        indices[name], shapes[name] = chosen.flatten().nonzero().view(-1), param.shape
    return SparseMask(indices, shapes)


def reader_line(model):
    """What the report says of the reader's weight."""
    (line,) = (line for line in attached(model).report().splitlines() if "reader.weight" in line)
    return line


def gradients_after(model, run):
    """Those of the leaves that have one, after a second forward."""
    run(model)
    model.zero_grad()  # also of another way's
    run(model).square().sum().backward()
    return {name: grad for name, grad in leaf_gradients(model).items() if grad is not None}


@pytest.mark.parametrize("columns", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_kept_of_an_input_that_can_be_made_again(maker, columns):
    torch.manual_seed(0)
    model, x = Made(*MAKERS[maker]), torch.randn(N, T, I)
    with train_only(model, mask_of(model, columns, with_reader=False), unlisted="freeze"):
        without = kept_bytes(model, model(x))
    with train_only(model, mask_of(model, columns)):
        for _ in range(2):
            assert kept_bytes(model, model(x)) == without
        assert "  0.0%  " in reader_line(model)


@pytest.mark.parametrize("columns", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_are_those_of_kept_columns_bit_for_bit(maker, columns):
    torch.manual_seed(0)
    model, x = Made(*MAKERS[maker]), torch.randn(N, T, I)
    twin, truth, mask = copy.deepcopy(model), copy.deepcopy(model).double(), mask_of(model, columns)
    train_only(model, mask)
    train_only(twin, mask)
    found = gradients_after(model, lambda model: model(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = gradients_after(twin, lambda model: model(x))
    assert attached(model).report() != attached(twin).report()  # which keeps columns
    truth(x.double()).square().sum().backward()
    assert "reader.weight" in found
    for name, grad in found.items():
        assert torch.equal(grad, expected[name])
        exact = truth.get_parameter(name).grad.flatten()[mask[name].long()]
        assert_matches(grad, exact, terms=N * T * O)


@pytest.mark.parametrize("maker", MAKERS)
def test_narrow_gradients_are_those_of_kept_columns_bit_for_bit(maker):
    torch.manual_seed(0)
    model, x = Made(*MAKERS[maker]).bfloat16(), torch.randn(N, T, I).bfloat16()
    twin, mask = copy.deepcopy(model), mask_of(model, 3)
    train_only(model, mask)
    train_only(twin, mask)
    found = gradients_after(model, lambda model: model(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = gradients_after(twin, lambda model: model(x))
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_a_checkpoint_gradients_are_the_same(maker, use_reentrant):
    torch.manual_seed(0)
    model, x = Made(*MAKERS[maker]), torch.randn(N, T, I, requires_grad=True)
    train_only(model, mask_of(model, 3))
    plain = gradients_after(model, lambda model: model(x))

    def checkpointed(model):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    for name, grad in gradients_after(model, checkpointed).items():
        assert torch.equal(grad, plain[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("maker", MAKERS)
def test_odd_sizes_and_narrow_dtypes_have_their_gradients(maker, dtype):
    torch.manual_seed(0)
    model, x = Made(*MAKERS[maker]).to(dtype), torch.randn(3, T, I).to(dtype)
    mask, seen = mask_of(model, 3), []
    model.reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    train_only(model, mask)
    output = model(x)
    norm = maker.startswith("norm")
    assert ("  0.0%  " in reader_line(model)) is (dtype == torch.float32 or not norm)
    grad_out = torch.randn(3, T, O).to(dtype)
    output.backward(grad_out)
    dense = grad_out.double().flatten(0, 1).T @ seen[0].double().flatten(0, 1)
    found = leaf_gradients(model)["reader.weight"]
    assert_matches(found, dense.flatten()[mask["reader.weight"].long()], dtype, terms=3 * T)


def test_autocast_makes_columns_of_its_own_dtype():
    torch.manual_seed(0)
    model, x = Made(*MAKERS["gelu"]), torch.randn(N, T, I)
    twin, mask = copy.deepcopy(model), mask_of(model, 3)
    train_only(model, mask)
    train_only(twin, mask)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    found = gradients_after(model, run)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = gradients_after(twin, run)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_weight_that_is_trained_whole_beside_leaves_gets_its_gradient():
    torch.manual_seed(0)
    model, x = Made(*MAKERS["gelu"]), torch.randn(N, T, I)
    truth = copy.deepcopy(model).double()
    mask = SparseMask({"reader.bias": torch.tensor([2])}, {"reader.bias": (O,)})
    train_only(model, mask, unlisted="train")
    for each, value in ((model, x), (truth, x.double())):
        each(value).square().sum().backward()
    found = model.reader._parameters["weight"].grad
    assert_matches(found, truth.reader.weight.grad, terms=N * T * O)


def written(model, h):
    x = F.gelu(h)
    with torch.no_grad():
        x[..., ::2] = 3.0
    return x


def other_data(model, h):
    x = F.gelu(h)
    x.data[..., ::2] = 3.0  # no version counts this
    return x


NOT_AS_MADE = {
    "written": (written, 1),
    "other data": (other_data, 1),
    "one factor": (lambda model, h: h * torch.arange(1.0, I + 1), 1),
    "a number": (lambda model, h: h * 2.0, 1),
    "as many for each token": (lambda model, h: F.gelu(h[..., :1]) * torch.ones(I), 1),
    "a view": (lambda model, h: F.gelu(h).mT.reshape(N, T, I), 1),
    "norm without a scale": (lambda model, h: F.layer_norm(h, (I,)), 1),
}


@pytest.mark.parametrize("columns", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("maker", NOT_AS_MADE)
def test_other_inputs_are_kept(maker, columns):
    torch.manual_seed(0)
    model, x = Made(*NOT_AS_MADE[maker]), torch.randn(N, T, I)
    mask = mask_of(model, columns)
    seen = []
    model.reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    train_only(model, mask)
    output = model(x)
    assert "  0.0%  " not in reader_line(model)
    grad_out = torch.randn(N, T, O)
    output.backward(grad_out)
    dense = grad_out.double().flatten(0, 1).T @ seen[-1].double().flatten(0, 1)
    found = leaf_gradients(model)["reader.weight"]
    assert_matches(found, dense.flatten()[mask["reader.weight"].long()], terms=N * T)


def test_an_input_that_is_written_to_later_is_kept_from_then_on():
    """Its maker kept nothing else in the forward passes before."""
    torch.manual_seed(0)
    model, x = Made(*MAKERS["gelu"]), torch.randn(N, T, I)
    mask = mask_of(model, 3)
    train_only(model, mask)
    model(x).sum().backward()
    assert "  0.0%  " in reader_line(model)
    model.make = written
    seen = written(model, model.below(x)).detach().double()
    grad_out = torch.randn(N, T, O)
    model.zero_grad()
    model(x).backward(grad_out)
    assert "  0.0%  " not in reader_line(model)
    dense = grad_out.double().flatten(0, 1).T @ seen.flatten(0, 1)
    found = leaf_gradients(model)["reader.weight"]
    assert_matches(found, dense.flatten()[mask["reader.weight"].long()], terms=N * T)


def test_columns_that_do_not_come_out_as_they_are_are_kept(monkeypatch):

    def almost(node, x):
        return [node._saved_self], lambda columns, h: makers.gathered(h, columns).sin()

    monkeypatch.setitem(makers._READINGS, "GeluBackward0", almost)
    monkeypatch.setitem(NOT_AS_MADE, "otherwise", MAKERS["gelu"])
    test_other_inputs_are_kept("otherwise", 3)


def test_a_frozen_norm_may_be_let_go_between_forward_and_backward():
    """As sharding libraries free the memory of modules that have done their forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, I), nn.LayerNorm(I), nn.Linear(I, O))
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith("weight") and not name.startswith("1"))
    x = torch.randn(N, T, I)
    mask = SparseMask({n: torch.arange(0, I * O, 7) for n in ("0.weight", "2.weight")},
                      {"0.weight": (I, I), "2.weight": (O, I)})  # fmt: skip
    expected = torch.autograd.grad(model(x).square().sum(), model[2].weight)[0]
    leaf = dict(train_only(model, mask).named_parameters())["2.fishkern_leaves.weight"]
    for values in (torch.zeros(I), torch.empty(0)):
        for _ in range(2):  # in the first forward it is found out how
            loss = model(x).square().sum()
        held, model[1].weight.data = model[1].weight.data, values
        (found,) = torch.autograd.grad(loss, leaf)
        model[1].weight.data = held
        assert_matches(found, expected.flatten()[mask["2.weight"].long()].double(), terms=N * T)


def test_an_empty_batch_decides_nothing():
    model, x = Made(*MAKERS["gelu"]), torch.randn(N, T, I)
    train_only(model, mask_of(model, 3))
    model(x[:0]).sum().backward()
    model(x).sum().backward()
    assert "  0.0%  " in reader_line(model)


def test_what_hooks_pack_is_not_unpacked_by_the_forward_pass():
    model, x = Made(*MAKERS["gelu"]), torch.randn(N, T, I)
    train_only(model, mask_of(model, 3))

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        output = model(x)
    assert unpacked == []
    output.sum().backward()
    assert unpacked


def test_a_rule_that_reads_all_of_its_input_is_given_it():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(I))

        def forward(self, x):
            return (x * self.weight).sin()

    class ScaleRule(fishkern.Rule):
        params = ("weight",)

        def sample_grads(self, module, x, grad_out):
            weight = module._parameters["weight"]
            return {"weight": (grad_out * x * (x * weight).cos()).sum(1)}

        def selected_grad(self, module, name, selection, x, grad_out):
            return self.param_grad(module, name, x, grad_out)[selection.indices]

    fishkern.register_rule(Scale, ScaleRule())
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(I, I), nn.GELU(), Scale()), torch.randn(N, T, I)
    truth = copy.deepcopy(model).double()
    indices = {"0.weight": torch.arange(0, I * I, 7), "2.weight": torch.tensor([1, 5])}
    mask = SparseMask(indices, {"0.weight": (I, I), "2.weight": (I,)})
    train_only(model, mask, unlisted="freeze")
    for each, value in ((model, x), (truth, x.double())):
        each(value).square().sum().backward()
    for name, grad in leaf_gradients(model).items():
        exact = truth.get_parameter(name).grad.flatten()[mask[name].long()]
        assert_matches(grad, exact, terms=N * T * I)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trained_by_either_way_is_the_same_bit_for_bit(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    start = transformers.LlamaForSequenceClassification(config).to(dtype)
    params = {n: p for n, p in start.named_parameters() if "layers" in n}
    indices = {n: torch.arange(0, p.numel(), 5) for n, p in params.items()}
    mask = SparseMask(indices, {n: p.shape for n, p in params.items()})
    batch = {"input_ids": torch.arange(1, 22).view(3, 7), "labels": torch.tensor([0, 1, 0])}
    ends = []
    for hooks in (False, True):
        model = copy.deepcopy(start)
        handle = train_only(model, mask, unlisted="freeze")
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
        for _ in range(3):
            with (
                torch.autograd.graph.saved_tensors_hooks(*2 * [lambda t: t])
                if hooks
                else (torch.enable_grad())
            ):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([leaf.detach() for leaf in handle.parameters()])
        down = [line for line in handle.report().splitlines() if "down_proj" in line]
        assert all(("  0.0%  " in line) is not hooks for line in down)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
