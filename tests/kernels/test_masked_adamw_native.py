"""The C++ masked_adamw_: every instruction set and thread count, and state packed in one tensor."""

import os
import subprocess
import sys

import pytest
import torch

from fishkern import _dispatch
from fishkern.backends import native
from fishkern.functional import masked_adamw_


@pytest.fixture(autouse=True)
def _native():
    if reason := _dispatch.why_not("native"):
        pytest.skip(f"native: {reason}")


# In a process of its own: the number of threads and the instruction set are fixed at the start.
FINGERPRINT = """
import hashlib, torch
from fishkern._dispatch import use_backend
from fishkern.functional import masked_adamw_
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for k in (40000, 2000, 7, 0):
        param, grad = torch.randn(300, 301).to(dtype), torch.randn(300, 301).to(dtype)
        index = torch.randperm(param.numel())[:k].sort().values.int()
        other = param[:50].clone()
        m, v, v_max = (torch.rand(k or param.numel()) for _ in range(3))
        with use_backend("native"):
            masked_adamw_([param, other], [grad, grad[:50]], [index, torch.empty(0).int()],
                          [m, torch.ones(15050)], [v, torch.ones(15050)], steps=[3, 3], lr=0.1,
                          betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                          max_exp_avg_sqs=[v_max, torch.ones(15050)])
        for tensor in (param, other, m, v, v_max):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def fingerprint(**environment):
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], env={**os.environ, **environment}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_masked_adamw_same_bits_for_every_instruction_set_and_thread_count():
    runs = [("baseline", "1"), ("avx2", "1"), ("avx512", "1"), ("avx512", "2"), ("avx2", "3")]
    results = {
        run: fingerprint(FISHKERN_CPU_CAPABILITY=run[0], OMP_NUM_THREADS=run[1]) for run in runs
    }
    assert len(set(results.values())) == 1, results


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"indices": 2}, "indices has 2 entries, params 1: pass one for each parameter"),
        ({"masters": 2}, "masters has 2 entries, params 1: pass one for each parameter, or none"),
    ],
    ids=str,
)
def test_masked_adamw_names_the_list_of_another_length(lists, message):
    """The functional door refuses these before; this is for callers of the op itself."""
    every = {"params": 1, "grads": 1, "indices": 1, "exp_avgs": 1, "exp_avg_sqs": 1}
    every |= {"max_exp_avg_sqs": 0, "masters": 0, **lists}
    args = [[torch.ones(3) for _ in range(count)] for count in every.values()]
    steps, lr = torch.ones(1), torch.tensor(0.1)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fishkern_native.masked_adamw_(*args, steps, lr, 0.9, 0.99, 1e-8, 0.0)


# All memory but the indices ends where a page that must not be touched begins.
GUARDED = """
import ctypes, mmap, torch
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def guarded(tensor):
    memory, size = mmap.mmap(-1, 2 * mmap.PAGESIZE), tensor.numel() * tensor.element_size()
    placed = torch.frombuffer(memory, dtype=torch.uint8)[mmap.PAGESIZE - size : mmap.PAGESIZE]
    assert mprotect(placed.data_ptr() + size, mmap.PAGESIZE, 0) == 0
    placed = placed.view(tensor.dtype)
    placed.copy_(tensor)
    return placed
def step(param, grad, m, v, v_max, index):
    torch.ops.fishkern_native.masked_adamw_(
        [param], [grad], [index], [m], [v], [v_max], [], torch.ones(1), torch.tensor(0.1),
        0.9, 0.99, 1e-8, 0.1)
from fishkern import _dispatch
_dispatch.why_not("native")
torch.manual_seed(0)
for k in range(1, 36):
    for dtype in (torch.float32, torch.bfloat16):
        for index in (torch.empty(0).int(), 2 * torch.arange(k).int()):
            numel = 2 * k - 1 if len(index) else k
            plain = [torch.randn(numel).to(dtype) for _ in range(2)]
            plain += [torch.rand(k) for _ in range(3)]
            at_the_end = [guarded(tensor) for tensor in plain]
            step(*plain, index)
            step(*at_the_end, index)
            assert all(map(torch.equal, plain, at_the_end)), (k, dtype)
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_masked_adamw_touches_nothing_behind_a_tensor(capability):
    environment = {**os.environ, "FISHKERN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_masked_adamw_refuses_an_expanded_param():
    """Its entries would be updated several times each."""
    base, m, v = torch.ones(3, 1), torch.zeros(12), torch.zeros(12)
    with pytest.raises(ValueError, match=r"params\[0\] of shape \[3, 4\] has strides \[1, 0\]"):
        masked_adamw_(
            [base.expand(3, 4)], [torch.ones(3, 4)], [torch.empty(0).int()], [m], [v],
            steps=[1], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
        )  # fmt: skip
    assert base.eq(1).all()


def packed_problem(index_dtype, param_dtype=torch.float32):
    torch.manual_seed(0)
    params = [torch.randn(6, 7), torch.randn(5), torch.randn(4, 50), torch.randn(3)]
    params = [param.to(param_dtype) for param in params]
    counts = [13, 0, 177, 3]  # the last is trained whole, and takes no indices
    indices = [
        torch.randperm(param.numel())[:count].sort().values.to(index_dtype)
        for param, count in zip(params, counts, strict=True)
    ]
    indices[-1] = indices[-1][:0]
    grads = [torch.randn_like(param) for param in params]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    m, v, v_max, master = (torch.rand(sum(counts)) for _ in range(4))
    return params, grads, indices, offsets, m, v, v_max, master


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_masked_adamw_packed_equals_lists(index_dtype, param_dtype, extras):
    """Packed and listed state give the same bits; the packed op counts the step itself."""
    steps, scalars = torch.tensor([0.0, 1, 2, 3]), (torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1)
    params, grads, indices, offsets, *packed = packed_problem(index_dtype, param_dtype)
    listed = [list(t.clone().split(offsets.diff().tolist())) for t in packed]
    others = [param.clone() for param in params]
    kernels = torch.ops.fishkern_native
    kernels.masked_adamw_packed_(
        params, grads, offsets, torch.cat(indices), *packed[:2],
        *(packed[2:] if extras else (None, None)), steps, *scalars,
    )  # fmt: skip
    assert steps.tolist() == [1, 2, 3, 4]
    kernels.masked_adamw_(
        others, grads, indices, *listed[:2], *(listed[2:] if extras else ([], [])), steps, *scalars
    )
    assert all(map(torch.equal, params, others))
    for whole, parts in zip(packed, listed, strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (1, [torch.ones(3)], "grads has 1 entries, params 4"),
        (2, torch.arange(3, dtype=torch.int32), "indices has 3 entries"),
        (2, torch.arange(400), "indices has 400 entries, of which 190 are used"),
        (2, torch.cat([torch.arange(189), torch.tensor([200])]), r"indices\[2\] holds 200"),
        (3, torch.tensor([0, 13, 13, 190]), "offsets must be"),
        (3, torch.tensor([0, 13, 13, 190, 192]), "offsets must run from 0 to 193"),
        (3, torch.tensor([0, 13, 10, 190, 193]), "offsets must not descend"),
        (5, torch.rand(7), "must be contiguous"),
    ],
)
def test_masked_adamw_packed_refuses(place, value, match):
    arguments = list(packed_problem(torch.int64))
    arguments[2] = torch.cat(arguments[2])
    before = [param.clone() for param in arguments[0]]
    arguments[place] = value
    params, grads, indices, offsets, m, v, v_max, master = arguments
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fishkern_native.masked_adamw_packed_(
            params, grads, offsets, indices, m, v, v_max, master,
            torch.ones(4), torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1,
        )  # fmt: skip
    assert all(map(torch.equal, params, before))


def step_packed(problem):
    """One step of the op: what it has written."""
    params, grads, indices, offsets, m, v, *_ = problem
    written = [*(param.clone() for param in params), m.clone(), v.clone(), torch.zeros(4)]
    own, state, steps = written[:-3], written[-3:-1], written[-1]
    native.masked_adamw_packed_(
        *(own, grads, offsets, torch.cat(indices), *state, None, None, steps),
        *(torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1),
    )
    return written


@pytest.mark.parametrize("odd", ["param strides", "grad strides", "grad dtype", "selected"])
def test_masked_adamw_packed_takes_any_layout(odd):
    """However one tensor lies, the bits are those of contiguous ones."""
    problem = packed_problem(torch.int32)
    params, grads, indices = problem[:3]
    grads[0] = grads[0].bfloat16().float()
    plain = step_packed(problem)
    if odd == "param strides":
        params[0] = params[0].t().contiguous().t()
    elif odd == "grad strides":
        grads[2] = grads[2].t().contiguous().t()
    elif odd == "grad dtype":
        grads[0] = grads[0].bfloat16()
    elif odd == "selected":
        grads[2] = grads[2].flatten()[indices[2].long()]
    assert all(map(torch.equal, step_packed(problem), plain))
    assert not torch.equal(plain[0], params[0])


def test_masked_adamw_drops_what_it_is_handed():
    """The kernel owns a reference to each tensor of a list, and gives it back, also in an error."""
    problem = packed_problem(torch.int32)
    params, grads, indices, _, m, *_ = problem
    lists = [params, grads, indices, *([[m[:0]] * 4] * 2), [], []]
    before = [t._use_count() for t in [*params, *grads]]
    step_packed(problem)
    with pytest.raises(RuntimeError, match="exp_avgs"):
        torch.ops.fishkern_native.masked_adamw_(
            *lists, torch.ones(4), torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1
        )
    assert [t._use_count() for t in [*params, *grads]] == before
