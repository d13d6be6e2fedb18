"""What is special to the Triton kernel of masked_adamw_; the rest is tested on every backend."""

import math

import pytest
import torch

from fishkern import _dispatch
from fishkern.backends import reference
from tests.support.tolerances import assert_matches

adamw = pytest.importorskip("fishkern.backends.triton.adamw")
adamw_tables = pytest.importorskip("fishkern.backends.triton.adamw_tables")
launch = pytest.importorskip("fishkern.backends.triton.launch")

reason = _dispatch.why_not("triton")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def adamw_lists(sizes, param_dtype, grad_dtype, index_dtype, *, selected, masters, amsgrad):
    """Lists for the op; an index dtype of None selects everything."""
    params = [torch.randn(s, device=DEVICE).to(param_dtype) for s in sizes]
    whole = index_dtype is None
    indices = []
    for p in params:
        chosen = (torch.rand(p.numel(), device=DEVICE) < 0.3).nonzero().view(-1)
        indices.append(chosen[:0] if whole else chosen.to(index_dtype))
    counts = [p.numel() if whole else len(i) for p, i in zip(params, indices, strict=True)]
    lists = {
        "params": params,
        "grads": [
            torch.randn(k if selected else p.shape, device=DEVICE).to(grad_dtype)
            for p, k in zip(params, counts, strict=True)
        ],
        "indices": indices,
    }
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters"):
        lists[name] = [torch.rand(k, device=DEVICE) for k in counts]
    lists["masters"] = [
        (p.view(-1) if whole else p.view(-1)[i.long()]).float() + 1e-5
        for p, i in zip(params, indices, strict=True)
    ]
    lists["masters"] = lists["masters"] if masters else []
    lists["max_exp_avg_sqs"] = lists["max_exp_avg_sqs"] if amsgrad else []
    return lists


def in_double(lists):
    return {
        name: [t.double() if t.is_floating_point() else t for t in tensors]
        for name, tensors in lists.items()
    }


def scalars(steps, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1):
    return {
        "steps": torch.tensor(steps, dtype=torch.float32),
        "lr": torch.tensor(lr, dtype=torch.float64),
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
    }


KINDS = {
    "plain": (torch.float32, torch.float32, torch.int32, False, False, False),
    "int64": (torch.float32, torch.float32, torch.int64, False, False, True),
    "selected": (torch.float32, torch.bfloat16, torch.int32, True, False, False),
    "whole": (torch.float32, torch.float32, None, False, False, True),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.int32, False, False, False),
    "bf16-masters": (torch.bfloat16, torch.float32, torch.int32, True, True, False),
    "fp16-masters": (torch.float16, torch.float16, torch.int64, False, True, True),
    "fp16-whole": (torch.float16, torch.float32, None, False, True, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_masked_adamw_every_kind(kind, scaled):
    *dtypes, selected, masters, amsgrad = KINDS[kind]
    lists = adamw_lists(
        [(3, 5), (41, 53), (1,)], *dtypes, selected=selected, masters=masters, amsgrad=amsgrad
    )
    truth = in_double(lists)
    before = [p.clone() for p in lists["params"]]
    options = {"maximize": scaled, **scalars([1, 2, 1000])}
    if scaled:
        options["grad_scale"] = torch.tensor(8.0, device=DEVICE)
        options["found_inf"] = torch.tensor(0.0, device=DEVICE)
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "params"):
        dtype = dtypes[0] if name == "params" else torch.float32
        for actual, expected in zip(lists[name], truth[name], strict=True):
            assert_matches(actual, expected, dtype, terms=4)
    for old, new, index in zip(before, lists["params"], lists["indices"], strict=True):
        if dtypes[2] is not None:
            keep = torch.ones(old.numel(), dtype=torch.bool, device=DEVICE)
            keep[index.long()] = False
            assert torch.equal(old.view(-1)[keep], new.view(-1)[keep])


def test_masked_adamw_mixed_kinds_take_one_launch_each():
    kinds = [KINDS[k] for k in ("plain", "selected", "whole", "bf16", "plain")]
    parts = []
    for *dtypes, selected, _, _ in kinds:
        parts.append(
            adamw_lists([(7, 9)], *dtypes, selected=selected, masters=False, amsgrad=False)
        )
    lists = {name: [t for part in parts for t in part[name]] for name in parts[0]}
    truth, options = in_double(lists), scalars([1, 2, 3, 4, 5])
    with launch.collect() as launches:
        adamw.masked_adamw_(**lists, **options)
    assert len(launches) == 4
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for actual, expected in zip(lists["params"], truth["params"], strict=True):
        assert_matches(actual, expected, actual.dtype)


def test_masked_adamw_long_tensors_take_several_blocks(monkeypatch):
    monkeypatch.setattr(adamw_tables, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(adamw_tables, "num_multiprocessors", lambda device: 2)
    lists = adamw_lists(
        [(15000,), (10,)], *KINDS["plain"][:3], selected=False, masters=False, amsgrad=False
    )
    truth, options = in_double(lists), scalars([1, 1])
    with launch.collect() as launches:
        adamw.masked_adamw_(**lists, **options)
    assert launches[0].grid == (len(launches[0].args["programs_ptr"][0]),)
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for actual, expected in zip(lists["params"], truth["params"], strict=True):
        assert_matches(actual, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_masked_adamw_bias_correction_over_a_hundred_thousand_steps(beta):
    steps = [float(s) for s in (1, 2, 3, 10, 77, 500, 1000, 9999, 10**5)]
    n = len(steps)
    ones = [torch.ones(1, device=DEVICE) for _ in range(4 * n)]
    lists = {
        "params": [torch.zeros(1, device=DEVICE) for _ in range(n)],
        "grads": ones[:n],
        "indices": [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(n)],
        "exp_avgs": ones[n : 2 * n],
        "exp_avg_sqs": ones[2 * n : 3 * n],
        "max_exp_avg_sqs": [],
        "masters": [],
    }
    # With every moment at 1 the update is lr sqrt(1 - beta2^s) / (1 - beta1^s).
    adamw.masked_adamw_(
        **lists, **scalars(steps, lr=1.0, beta1=beta, beta2=0.999, eps=0.0, weight_decay=0.0)
    )
    for step, param in zip(steps, lists["params"], strict=True):
        update = math.sqrt(1 - 0.999**step) / -math.expm1(step * math.log(beta) if beta else -1e9)
        assert_matches(param, torch.full((1,), -update, dtype=torch.float64, device=DEVICE))


def test_masked_adamw_rounds_to_nearest_even():
    # masters stay as they are (no gradient, no decay); params get their rounding
    masters = torch.randn(4096, device=DEVICE) * torch.logspace(-38, 38, 4096, device=DEVICE)
    ties = torch.arange(-2048, 2048, device=DEVICE, dtype=torch.int32)
    ties = (0x3F800000 + ties * 0x8000).view(torch.float32)  # halfway between two bfloat16
    masters = torch.cat([masters, ties, masters.new_tensor([math.nan, math.inf, 3.4e38, 1e-40])])
    param = torch.zeros(len(masters), dtype=torch.bfloat16, device=DEVICE)
    zeros = torch.zeros_like(masters)
    adamw.masked_adamw_(
        params=[param],
        grads=[zeros],
        indices=[torch.arange(len(masters), device=DEVICE)],
        exp_avgs=[zeros.clone()],
        exp_avg_sqs=[zeros.clone()],
        max_exp_avg_sqs=[],
        masters=[masters.clone()],
        **scalars([1], weight_decay=0.0),
    )
    expected = masters.to(torch.bfloat16)
    assert torch.equal(param.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_masked_adamw_found_inf_changes_nothing():
    lists = adamw_lists(
        [(41, 53)], *KINDS["fp16-masters"][:3], selected=False, masters=True, amsgrad=True
    )
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    found_inf = torch.tensor([1.0], device=DEVICE)
    adamw.masked_adamw_(**lists, **scalars([3]), found_inf=found_inf)
    for name, tensors in lists.items():
        assert all(map(torch.equal, tensors, before[name]))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_masked_adamw_params_and_grads_of_any_strides(layout):
    lists = adamw_lists(
        [(37, 41)], *KINDS["plain"][:3], selected=False, masters=False, amsgrad=False
    )
    truth = in_double(lists)
    room = torch.full((41, 37) if layout == "transposed" else (37, 90), 5.0, device=DEVICE)
    view = room.T if layout == "transposed" else room[:, 3:85:2]
    view.copy_(lists["params"][0])
    lists["params"] = [view]
    lists["grads"] = [lists["grads"][0].T.contiguous().T]
    adamw.masked_adamw_(**lists, **scalars([1]))
    reference.masked_adamw_(**truth, **scalars([1]))
    assert_matches(view, truth["params"][0])
    if layout == "sliced":
        assert int((room == 5.0).sum()) == room.numel() - view.numel()


def test_masked_adamw_refuses_what_the_kernel_does_not_have():
    lists = adamw_lists([(8,)], *KINDS["whole"][:3], selected=False, masters=False, amsgrad=False)
    with pytest.raises(TypeError, match=r"params has a tensor of dtype torch\.float64"):
        adamw.masked_adamw_(**{**lists, "params": [lists["params"][0].double()]}, **scalars([1]))
    with pytest.raises(TypeError, match=r"exp_avgs has a tensor of dtype torch\.bfloat16"):
        adamw.masked_adamw_(
            **{**lists, "exp_avgs": [lists["exp_avgs"][0].bfloat16()]}, **scalars([1])
        )
    with pytest.raises(ValueError, match="exp_avg_sqs has a tensor that is not contiguous"):
        adamw.masked_adamw_(
            **{**lists, "exp_avg_sqs": [torch.zeros(16, device=DEVICE)[::2]]}, **scalars([1])
        )
