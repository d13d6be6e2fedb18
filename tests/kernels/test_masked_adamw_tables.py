"""By which table a Triton launch of masked_adamw_ finds its tensors, and when one is made anew."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fishkern import _dispatch
from fishkern.backends.packed import by_lists

adamw = pytest.importorskip("fishkern.backends.triton.adamw")
tables = pytest.importorskip("fishkern.backends.triton.adamw_tables")

reason = _dispatch.why_not("triton")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 5), (7,), (4, 4), (2, 6)]
CHOSEN = [[0, 2, 14], [], list(range(16)), [5]]  # some, none, all, one


def tensors(*addresses, numel=8, dtype=torch.float32):
    return tables.Tensors(addresses, (numel,) * len(addresses), (dtype,) * len(addresses))


def packed_problem(param_dtype, selected_grads, more):
    """Arguments of the packed op: parameters, gradients, and one tensor for each kind of state."""
    params = [torch.randn(shape, device=DEVICE).to(param_dtype) for shape in SHAPES]
    counts = [len(chosen) for chosen in CHOSEN]
    sizes = [(n,) for n in counts] if selected_grads else SHAPES
    grads = [torch.randn(size, device=DEVICE).to(param_dtype) for size in sizes]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    stored = [c for c, s in zip(CHOSEN, SHAPES, strict=True) if len(c) != s[0] * s[-1]]
    indices = torch.tensor([i for c in stored for i in c], dtype=torch.int32, device=DEVICE)
    state = [torch.rand(sum(counts), device=DEVICE) for _ in range(4 if more else 2)]
    state += [] if more else [None, None]
    return [params, grads, offsets, indices, *state, torch.arange(4.0)]


def copied(arguments):
    return [
        [t.clone() for t in a] if isinstance(a, list) else None if a is None else a.clone()
        for a in arguments
    ]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("more", [False, True], ids=["moments", "maxima_and_masters"])
@pytest.mark.parametrize("selected_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_state_equals_lists(dtype, selected_grads, more, strided):
    arguments = packed_problem(dtype, selected_grads, more)
    if strided:
        arguments[0][0] = arguments[0][0].T.contiguous().T
    listed = copied(arguments)
    options = torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01, True, torch.tensor(2.0, device=DEVICE)
    for _ in range(2):  # the second time by the tables of the first, where they are kept
        adamw.masked_adamw_packed_(*arguments, *options)
        by_lists(adamw.masked_adamw_)(*listed, *options)
    for ours, theirs in zip(arguments, listed, strict=True):
        if isinstance(ours, list):
            assert all(map(torch.equal, ours, theirs))
        else:
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert arguments[-1].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_entries_are_shared_out_among_programs(monkeypatch):
    monkeypatch.setattr(tables, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(tables, "num_multiprocessors", lambda device: 2)
    rows = [(*range(1, 8), 5000, 0), (*range(11, 18), 10, 1)]
    found = tables._lay_out(torch.device("cpu"), None, rows)
    assert found.entries_per_program == 2048
    assert found.programs.tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]
    assert found.table.T.tolist() == [list(row) for row in rows]


def test_a_table_is_made_anew_when_anything_has_changed():
    """Memory is used again: at the same address there may be another dtype or size."""

    def found(params, grads, moments=(48, torch.float32), counts=(2, 3)):
        packed = [tables.Packed(*moments)] * 3
        return tables._of_stream(
            0, torch.device("cpu"), tables._build_packed, params, grads, counts, *packed, None, None
        )

    params, grads = tensors(16, 32), tensors(64, 96)
    first = found(params, grads)
    assert found(tensors(16, 32), tensors(64, 96)) is first
    (table,) = first
    assert table.kind.grad_dtype == torch.float32
    assert not table.kind.grad_selected
    for other in (
        found(params, tensors(64, 96, dtype=torch.bfloat16)),
        found(params, tensors(64, 128)),
        found(params, grads, moments=(56, torch.float32)),
        found(params, grads, counts=(3, 2)),
        found(tensors(16, 32, numel=2), grads),
    ):
        assert other is not first
        assert other[0].kind != table.kind or not torch.equal(other[0].table, table.table)


def test_parameters_of_two_devices_are_refused():
    with FakeTensorMode():
        params = [torch.empty(1, device=f"cuda:{i}") for i in (0, 1)]
    with pytest.raises(ValueError, match="cuda:0 and cuda:1: call the op for each"):
        adamw._device_of(params)
