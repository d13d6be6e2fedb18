"""The formulas of docs/train-only.md for work and memory, held against what is measured."""

import contextlib
import gc
import re

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensor

from fishkern import FishSparseAdamW, SparseMask, train_only
from tests.support.training import kept_bytes

N, T = 3, 7
BYTES = {torch.float32: 4, torch.bfloat16: 2}
READERS = {  # of one tensor, in a layer of BERT
    "attention": [f"attention.self.{name}" for name in ("query", "key", "value")],
    "attention's output": ["attention.output.dense"],
    "intermediate": ["intermediate.dense"],
    "output": ["output.dense"],
}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def linears(model):
    """The names of the layers' own linear layers."""
    return [
        name
        for name, module in model.named_modules()
        if ".layer." in name and isinstance(module, nn.Linear)
    ]


def mask_of(model, *, with_weights):
    """An entry of each bias; and entries in a few columns of each weight."""
    generator = torch.Generator().manual_seed(1)
    params, indices = dict(model.named_parameters()), {}
    for name in linears(model):
        indices[f"{name}.bias"] = torch.tensor([3])
        if with_weights:
            shape = params[f"{name}.weight"].shape
            chosen = torch.rand(shape, generator=generator) < 0.3
            chosen[:, torch.randperm(shape[1], generator=generator)[4:]] = False
            indices[f"{name}.weight"] = chosen.flatten().nonzero().flatten()
    return SparseMask(indices, {name: params[name].shape for name in indices})


def kept(model):
    """Bytes that a second forward keeps: which layers read one tensor is found out in the first."""
    batch = {"input_ids": torch.arange(N * T).view(N, T), "labels": torch.tensor([0, 1, 0])}
    model(**batch).loss.backward()
    return kept_bytes(model, model(**batch).loss)


def is_remade(layer, readers, dtype):
    """Whether what made the readers' input keeps enough: gelu, or float32's norms of what needs a
    gradient."""
    norms = {"attention": layer > 0, "intermediate": True}
    return readers == "output" or (dtype == torch.float32 and norms.get(readers, False))


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
@pytest.mark.parametrize("dtype", BYTES)
def test_kept_bytes_are_those_of_the_columns_that_any_reader_needs(dtype, hooks):
    model = bert().to(dtype)
    context = contextlib.nullcontext()
    if hooks:  # then every layer keeps its own
        context = torch.autograd.graph.saved_tensors_hooks(*2 * [lambda tensor: tensor])
    with train_only(model, mask_of(model, with_weights=False), unlisted="freeze"):
        without = kept(model)  # biases keep nothing of their layers' inputs
    mask = mask_of(model, with_weights=True)
    with train_only(model, mask, unlisted="freeze") as handle, context:
        found = kept(model) - without
        report = handle.report()
    expected = 0
    for layer in range(2):
        for readers, reads in READERS.items():
            weights = [f"bert.encoder.layer.{layer}.{reader}.weight" for reader in reads]
            width = mask.shapes[weights[0]][1]
            columns = torch.cat([mask[name] % width for name in weights]).unique()
            count = 0 if is_remade(layer, readers, dtype) and not hooks else len(columns)
            expected += N * T * count * BYTES[dtype]
            for name in weights:
                (line,) = (line for line in report.splitlines() if line.startswith(name + " "))
                assert f"  {count / width:.1%}  " in line
    assert found == expected > 0


def held_bytes():
    """Of each storage under a tensor that Python can reach, by its place."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Fake tensors of a compiler have no memory.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def random_mask(shape, density):
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    return SparseMask({"weight": chosen.flatten().nonzero().flatten()}, {"weight": shape})


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        # leaf, gradient, moments, index, and what leaf and weight last agreed on
        (torch.float32, torch.float32, 4 + 4 + 8 + 4 + 4),
        (torch.bfloat16, torch.float32, 4 + 4 + 8 + 4 + 2),
        (torch.float32, torch.bfloat16, 4 + 4 + 4 + 4 + 4),
        (torch.float32, torch.uint8, 4 + 4 + 2 + 2 / 32 + 4 + 4),
    ],
)
def test_held_bytes_of_each_selected_entry(dtype, state_dtype, expected):
    size = 512
    model = nn.Linear(size, size, bias=False).to(dtype)
    x = torch.randn(2, size).to(dtype)
    before = held_bytes()
    mask = random_mask((size, size), 0.3)
    handle = train_only(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, state_dtype=state_dtype)
    model(x).sum().backward()
    optimizer.step()
    grads = [leaf.grad for leaf in handle.parameters()]
    held = sum(nbytes for place, nbytes in held_bytes().items() if place not in before)
    assert len(grads[0]) == mask.num_selected
    # Beside them, 4 bytes a few times for each row and column, to find the entries among these.
    tables = held - expected * mask.num_selected
    assert 0 <= tables <= 16 * (size + size) + 64
    assert tables < 0.3 * mask.num_selected  # so that nothing of the entries hides there


def test_work_is_that_of_the_plan_and_of_gathering():
    rows, columns, count = 40, 60, 12
    model = nn.Linear(columns, rows, bias=False)
    indices = torch.arange(count) * columns + torch.arange(count) % 6  # a row each, in 6 columns
    handle = train_only(model, SparseMask({"weight": indices}, {"weight": (rows, columns)}))
    costs = {
        "tiles": 3 * count + 25 * (count + 6),
        "columns": rows * 6 + 8 * rows,  # nothing is left out of the 6 columns that were kept
        "rows": 6 * count + 8 * count + 100 * count,
    }
    route = min(costs, key=costs.get)
    (line,) = (line for line in handle.report().splitlines() if line.startswith("weight"))
    *_, kept, work, found = re.split(r"\s{2,}", line)
    assert found == route
    assert kept == f"{6 / columns:.1%}"
    assert work == f"{(costs[route] + 100 * 6) / (rows * columns + 8 * columns):.1%}"
