"""The formulas of docs/train-only.md for work and memory, held against what is measured."""

import contextlib
import gc
import re
import weakref

import pytest
import torch
import transformers
from torch import nn

from fishkern import FishSparseAdamW, SparseMask, train_only

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


def kept_bytes(model):
    """Bytes of the storages that a second forward keeps for backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    batch = {"input_ids": torch.arange(N * T).view(N, T), "labels": torch.tensor([0, 1, 0])}
    for _ in range(2):  # which layers read one tensor is found out in the first
        packed = []

        def pack(tensor, packed=packed):
            # Its very self, by which readers know it - but not an output, lest it hold its graph.
            saved = Saved(tensor if tensor.grad_fn is None else tensor.detach())
            packed.append(weakref.ref(saved))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = model(**batch).loss
        storages = [ref().tensor.untyped_storage() for ref in packed if ref() is not None]
        found = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
        loss.backward()
    return sum(found.values())


class Saved:
    """A tensor that the graph keeps, as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("dtype", BYTES)
def test_kept_bytes_are_those_of_the_columns_that_any_reader_needs(dtype):
    model = bert().to(dtype)
    with train_only(model, mask_of(model, with_weights=False), unlisted="freeze"):
        without = kept_bytes(model)  # biases keep nothing of their layers' inputs
    mask = mask_of(model, with_weights=True)
    with train_only(model, mask, unlisted="freeze") as handle:
        found = kept_bytes(model) - without
        report = handle.report()
    expected = 0
    for layer in range(2):
        for readers in READERS.values():
            weights = [f"bert.encoder.layer.{layer}.{reader}.weight" for reader in readers]
            width = mask.shapes[weights[0]][1]
            columns = torch.cat([mask[name] % width for name in weights]).unique()
            expected += N * T * len(columns) * BYTES[dtype]
            for name in weights:
                (line,) = (line for line in report.splitlines() if line.startswith(name + " "))
                assert f"  {len(columns) / width:.1%}  " in line
    assert found == expected > 0


def held_bytes():
    """Of each storage under a tensor that Python can reach, by its place."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            # Fake tensors of a compiler have no memory.
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
