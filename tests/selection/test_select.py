"""``select`` against rankings written here in numpy."""

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.selection.ranking import _proportional
from fishkern.selection.select import select


def make(*shapes, ties=False):
    names = "abcdefgh"
    return {
        f"{names[i]}.weight": (torch.randint(1, 5, shape) if ties else torch.rand(shape)).float()
        for i, shape in enumerate(shapes)
    }


def ranked(scores, k, sign=-1, allowed=None):
    """A stable sort of the concatenation, cut after k, as flat indices per tensor."""
    flat = sign * np.concatenate([score.numpy().ravel() for score in scores.values()])
    if allowed is not None:
        flat[~np.concatenate([allowed[name].ravel() for name in scores])] = np.inf
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[np.argsort(flat, kind="stable")[:k]] = True
    ends = np.cumsum([score.numel() for score in scores.values()])[:-1]
    parts = np.split(chosen, ends)
    return {name: np.flatnonzero(p).tolist() for name, p in zip(scores, parts, strict=True)}


def found(mask):
    return {name: index.tolist() for name, index in mask.items()}


SHAPES = [(4, 6), (5,), (), (0, 3), (3, 2, 2), (7, 1)]
TOTAL = 24 + 5 + 1 + 12 + 7


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 10, 48, 49])
@pytest.mark.parametrize(("order", "sign"), [("largest", -1), ("smallest", 1)])
def test_global_ranking(k, ties, order, sign):
    scores = make(*SHAPES, ties=ties)
    mask = select(scores, k=k, order=order)
    assert found(mask) == ranked(scores, k, sign)
    assert mask.num_selected == k
    assert mask.shapes == {name: score.shape for name, score in scores.items()}


def test_smallest_over_all_magnitudes_and_both_zeros():
    scores = {
        "a": torch.tensor([0.0, 1e-45, 3e38, -0.0, 1.0, 1e-30]),
        "b": torch.cat([torch.tensor([0.0, 1.0, 1e-45]), 1 + torch.arange(8) * 2.0**-23]),
    }
    for k in range(18):
        assert found(select(scores, k=k, order="smallest")) == ranked(scores, k, 1)


@pytest.mark.parametrize("k", range(0, 50, 7))
@pytest.mark.parametrize(("order", "sign"), [("largest", -1), ("smallest", 1)])
def test_scope_tensor_takes_the_same_share_of_each(k, order, sign):
    scores = make(*SHAPES, ties=True)
    mask = select(scores, k=k, scope="tensor", order=order)
    assert mask.num_selected == k
    for name, score in scores.items():
        quota = len(mask[name])
        assert abs(quota - k * score.numel() / TOTAL) < 1
        assert mask[name].tolist() == ranked({name: score}, quota, sign)[name]


def test_largest_remainders_make_up_k_and_ties_go_by_order():
    assert _proportional(3, [3, 3, 4]) == [1, 1, 1]
    assert _proportional(2, [1, 1, 1]) == [1, 1, 0]
    assert _proportional(5, [10, 10, 30]) == [1, 1, 3]
    assert _proportional(4, [10, 19, 21]) == [1, 1, 2]
    assert _proportional(0, []) == []
    assert _proportional(7 * 10**9, [7 * 10**9, 0]) == [7 * 10**9, 0]


def test_strided_and_differentiable_scores():
    base = torch.rand(6, 8)
    scores = {"a": base.t(), "b": base[::2, ::3], "c": torch.rand(3, requires_grad=True)}
    plain = {name: score.detach().contiguous() for name, score in scores.items()}
    for order in ("largest", "smallest"):
        assert select(scores, k=20, order=order) == select(plain, k=20, order=order)
    assert select(scores, k=9, max_columns=0.5) == select(plain, k=9, max_columns=0.5)


def test_density_is_of_the_candidates_and_rounds_half_to_even():
    scores = make((10,), (4,))
    assert select(scores, density=0.5).num_selected == 7
    assert select(make((5,)), density=0.5).num_selected == 2
    assert select(make((7,)), density=0.5).num_selected == 4
    assert select(scores, density=0).num_selected == 0
    assert select(scores, density=1).num_selected == 14
    assert select(scores, density=0.5, keep="b.*").num_selected == 5 + 4


def test_keep_is_whole_and_outside_the_ranking():
    scores = make((4, 3), (2,), (5,))
    scores["b.weight"][:] = math.nan  # not ranked, so of no interest
    mask = select(scores, k=6, keep=["module.b.*"])
    assert list(mask) == list(scores)
    assert mask["b.weight"].tolist() == [0, 1]
    rest = {name: scores[name] for name in ("a.weight", "c.weight")}
    assert {name: found(mask)[name] for name in rest} == ranked(rest, 6)
    assert mask.num_selected == 8
    assert select(scores, k=0, keep="*").density == 1
    assert select(scores, density=0.1, keep="*").density == 1


def test_takes_a_fisher_diagonal_and_drops_wrappers_prefixes():
    scores = make((4, 3), (2,))
    wrapped = {f"module.{name}": score for name, score in scores.items()}
    assert select(FisherDiagonal(scores, num_samples=1), k=3) == select(wrapped, k=3)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("k", [0, 1, 20, 24, 25, 48, 49])
def test_random_selects_k_and_repeats_by_seed(k, scope):
    scores = make(*SHAPES)
    mask = select(scores, k=k, order="random", seed=3, scope=scope)
    assert mask.num_selected == k
    hopeless = {name: torch.full_like(score, math.nan) for name, score in scores.items()}
    assert select(hopeless, k=k, order="random", seed=3, scope=scope) == mask
    if 0 < k < 49:
        others = [select(scores, k=k, order="random", seed=s, scope=scope) for s in range(4, 9)]
        assert any(other != mask for other in others)


@pytest.mark.parametrize("k", [2, 3])
def test_random_draws_every_subset_equally_often(k):
    scores = make((2,), (3,))
    draws = 2000
    counts = Counter()
    for seed in range(draws):
        mask = select(scores, k=k, order="random", seed=seed)
        counts[tuple(torch.cat([mask["a.weight"], mask["b.weight"] + 2]).tolist())] += 1
    assert sorted(counts) == list(itertools.combinations(range(5), k))
    expected = draws / 10
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 27.9  # one run in a thousand is above; the seeds are fixed


def test_random_does_not_touch_the_global_generator():
    scores, before = make((9,)), torch.get_rng_state()
    select(scores, k=3, order="random", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def best_columns(scores, share, sign=-1):
    """For each tensor, where a selected entry may lie."""
    allowed = {}
    for name, score in scores.items():
        place = np.ones(tuple(score.shape), dtype=bool)
        if score.dim() >= 2 and score.numel():
            matrix = score.numpy().astype(np.float64).reshape(len(score), -1)
            count = math.ceil(share * matrix.shape[1])
            best = np.argsort(sign * matrix.sum(0), kind="stable")[:count]
            place = np.isin(np.arange(matrix.shape[1]), best)[None].repeat(len(score), 0)
        allowed[name] = place
    return allowed


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1])
@pytest.mark.parametrize(("order", "sign"), [("largest", -1), ("smallest", 1)])
def test_max_columns_ranks_within_the_best_columns(order, sign, share, ties):
    scores = make(*SHAPES, ties=ties)
    allowed = best_columns(scores, share, sign)
    room = sum(int(place.sum()) for place in allowed.values())
    for k in (1, 10, room):
        mask = select(scores, k=k, order=order, max_columns=share)
        assert found(mask) == ranked(scores, k, sign, allowed)
    if share < 1:
        with pytest.raises(ValueError, match=f"k = {room + 1}: .*possible is {room};"):
            select(scores, k=room + 1, order=order, max_columns=share)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("order", ["largest", "smallest", "random"])
def test_max_columns_bounds_the_columns_used(order, scope):
    scores = make((6, 10), (4, 20), (3, 5, 2))
    mask = select(scores, k=40, order=order, scope=scope, max_columns=0.3, seed=0)
    assert mask.num_selected == 40
    for name, score in scores.items():
        columns = mask.dense(name).reshape(len(score), -1).any(0)
        assert 0 < columns.sum() <= math.ceil(0.3 * len(columns))


def test_max_columns_is_not_rounded_up_by_a_rounding_error():
    mask = select(make((1, 100)), k=7, max_columns=0.07)  # 0.07 * 100 > 7
    assert mask.num_selected == 7
    with pytest.raises(ValueError, match="possible is 7;"):
        select(make((1, 100)), k=8, max_columns=0.07)


def test_max_columns_with_scope_tensor_names_a_k_that_fits():
    scores = make((5, 10), (4, 4))
    with pytest.raises(ValueError, match=r"max_columns=0.5 .*k = 34: .*possible is 33;"):
        select(scores, k=34, scope="tensor", max_columns=0.5)
    assert select(scores, k=33, scope="tensor", max_columns=0.5).num_selected == 33


def test_a_density_that_selects_nothing_warns():
    with pytest.warns(UserWarning, match=r"density=0.03 of 14 candidates is less than one entry"):
        assert select(make((5,), (9,)), density=0.03).num_selected == 0


def test_lora_at_initialisation_warns_and_still_selects_k():
    # A has no gradient while B is zero; some of B's scores are zero too.
    scores = {f"layer.{i}.lora_A": torch.zeros(2, 6) for i in range(5)}
    scores |= {f"layer.{i}.lora_B": torch.rand(6, 2).round(decimals=1) for i in range(5)}
    nonzero = sum(int(score.count_nonzero()) for score in scores.values())
    with pytest.warns(UserWarning, match="zero") as caught:
        mask = select(scores, k=nonzero)
    assert len(caught) == 1
    assert "all scores are zero in 5 of 10 tensors" in str(caught[0].message)
    assert "'layer.0.lora_A', 'layer.1.lora_A', 'layer.2.lora_A' and 2 more" in str(
        caught[0].message
    )
    assert "after some warm-up steps" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert mask.num_selected == nonzero

    with pytest.warns(UserWarning, match="zero") as caught:
        mask = select(scores, k=nonzero + 13)
    assert len(caught) == 2
    text = str(caught[1].message)
    assert f"13 of the {nonzero + 13} selected entries have a score of zero" in text
    assert "'layer.0.lora_A', 'layer.1.lora_A'" in text
    assert caught[1].filename == __file__
    assert found(mask) == ranked(scores, nonzero + 13)


def test_zeros_that_fill_a_tensors_share_are_counted():
    scores = {"a": torch.tensor([0.0, 0.0, 0.0, 1.0]), "b": torch.ones(4)}
    with pytest.warns(UserWarning, match="1 of the 4 selected entries .* in 'a'"):
        select(scores, k=4, scope="tensor")


def test_zeros_do_not_warn_where_they_were_asked_for_or_not_selected():
    scores = {"a": torch.tensor([0.0, 0.0, 1.0]), "zero": torch.zeros(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select({"a": scores["a"]}, k=1)
        select({"a": scores["a"]}, k=2, order="smallest")
        select(scores, k=5, order="random", seed=0)
        select(scores, k=1, keep="zero")


SCORES = {"a.weight": torch.ones(2, 3), "b.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "neither of density and k is given"),
        ({"k": 1, "density": 0.5}, ValueError, r"both \(density=0.5, k=1\) of density and k"),
        ({"k": 9}, ValueError, "k is 9, the candidates are 8: choose k from 0 up to that"),
        ({"k": 3, "keep": "a.*"}, ValueError, "k is 3, the candidates are 2"),
        ({"k": -1}, ValueError, "k is -1"),
        ({"k": 1.5}, TypeError, "k is 1.5: pass an int"),
        ({"density": 5}, ValueError, "density is 5: it is a share from 0 to 1"),
        ({"density": -0.1}, ValueError, "density is -0.1"),
        ({"density": math.nan}, ValueError, "density is nan"),
        ({"density": "0.1"}, TypeError, "density is '0.1': pass a number"),
        ({"k": 1, "scope": "layer"}, ValueError, "scope is 'layer': choose one of global, tensor"),
        ({"k": 1, "order": "best"}, ValueError, "order is 'best': choose one of largest, smal"),
        ({"k": 1, "order": "random"}, ValueError, 'order="random" needs a seed'),
        ({"k": 1, "max_columns": 0}, ValueError, "max_columns is 0: it is a share above 0"),
        ({"k": 1, "max_columns": 1.1}, ValueError, "max_columns is 1.1"),
        ({"k": 1, "max_columns": "all"}, TypeError, "max_columns is 'all': pass a number"),
        ({"k": 1, "keep": ["b.*", "c.*"]}, ValueError, r"keep: the pattern 'c\.\*' matches none"),
    ],
)
def test_refuses_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        select(SCORES, **kwargs)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (torch.ones(2, dtype=torch.float64), TypeError, "'b.bias' is torch.float64"),
        (torch.ones(2, dtype=torch.bfloat16), TypeError, "'b.bias' is torch.bfloat16"),
        ([1.0, 2.0], TypeError, "'b.bias' is list"),
        (torch.tensor([1.0, math.nan]), ValueError, "'b.bias' is NaN"),
        (torch.tensor([1.0, math.inf]), ValueError, "'b.bias' is infinite"),
        (torch.tensor([-math.inf, 1.0]), ValueError, "'b.bias' is negative"),
        (torch.tensor([1.0, -1e-30]), ValueError, "'b.bias' is negative"),
    ],
)
def test_refuses_scores(score, error, message):
    with pytest.raises(error, match=message):
        select({**SCORES, "b.bias": score}, k=1)


def test_refuses_nothing_to_rank_by():
    with pytest.raises(TypeError, match="fisher is a list: pass a mapping"):
        select([torch.ones(1)], k=1)
    with pytest.raises(ValueError, match="fisher is empty"):
        select({}, k=0)
    zeros = {name: torch.zeros_like(score) for name, score in SCORES.items()}
    with pytest.raises(ValueError, match="zero everywhere"):
        select(zeros, k=1)
    assert select(zeros, k=1, order="random", seed=0).num_selected == 1
    with pytest.raises(ValueError, match="both 'w'"):
        select({"w": torch.ones(1), "module.w": torch.ones(1)}, k=1)


def test_scores_are_left_as_they_were():
    scores = make(*SHAPES)
    before = {name: score.clone() for name, score in scores.items()}
    for order in ("largest", "smallest", "random"):
        select(scores, k=5, order=order, seed=0, max_columns=0.5)
    assert all(torch.equal(before[name], score) for name, score in scores.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ["largest", "smallest", "random"])
def test_masks_do_not_depend_on_the_device(order):
    scores = make((64, 32), (100,), ties=True)
    there = {name: score.cuda() for name, score in scores.items()}
    spread = {**scores, "b.weight": there["b.weight"]}
    mask = select(scores, k=700, order=order, seed=0)
    assert select(there, k=700, order=order, seed=0) == mask
    assert select(spread, k=700, order=order, seed=0)["b.weight"].is_cuda
    assert select(spread, k=700, order=order, seed=0) == mask
