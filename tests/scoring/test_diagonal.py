import copy
import pickle

import pytest
import torch

from fishkern import files
from fishkern.scoring.diagonal import FisherDiagonal


def scores():
    return {"b.weight": torch.rand(2, 3), "a.bias": torch.rand(2), "scalar": torch.rand(())}


def test_is_a_mapping_in_the_given_order():
    given = scores()
    fisher = FisherDiagonal(given, num_samples=4)
    assert list(fisher) == list(given)
    assert len(fisher) == 3
    assert all(fisher[name] is not None and "a.bias" in fisher for name in given)
    assert "missing" not in fisher
    with pytest.raises(KeyError):
        fisher["missing"]


def test_holds_the_scores_without_a_copy_or_a_graph():
    given = {"w": torch.rand(3, requires_grad=True)}
    held = FisherDiagonal(given, num_samples=1)["w"]
    assert held.data_ptr() == given["w"].data_ptr()
    assert not held.requires_grad


def test_names_are_canonical():
    fisher = FisherDiagonal(
        {"module._orig_mod.w": torch.ones(2)}, num_samples=1, routes={"module.w": "fused"}
    )
    assert list(fisher) == ["w"]
    assert fisher.routes == {"w": "fused"}
    assert torch.equal(fisher["module.w"], torch.ones(2))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"scores": [torch.ones(1)]}, TypeError, "pass a mapping"),
        ({"scores": {"w": torch.ones(1).double()}}, TypeError, "'w' is torch.float64"),
        ({"scores": {"w": [1.0]}}, TypeError, "'w' is list"),
        ({"scores": {"w": torch.ones(1), "module.w": torch.ones(1)}}, ValueError, "both 'w'"),
        ({"num_samples": 0}, ValueError, "num_samples is 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples is 1.0"),
        ({"num_samples": True}, TypeError, "num_samples is True"),
        ({"labels": 3}, TypeError, "labels is 3"),
        ({"kind": None}, TypeError, "kind is None"),
        ({"kind": "magnitude", "num_samples": -1}, ValueError, "num_samples is -1"),
        ({"routes": {"v": "fused"}}, ValueError, "names 'v', which has no score"),
        ({"routes": {"w": "magic"}}, ValueError, "'w' is 'magic': one of fused, vmap, loop"),
    ],
)
def test_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        FisherDiagonal(**{"scores": {"w": torch.ones(1)}, "num_samples": 1, **kwargs})


def test_file_round_trip(tmp_path):
    routes = {"b.weight": "fused", "a.bias": "loop"}
    fisher = FisherDiagonal(scores(), num_samples=7, labels="sampled", routes=routes)
    fisher.save(tmp_path / "fisher")
    loaded = FisherDiagonal.load(tmp_path / "fisher")
    assert loaded == fisher
    assert list(loaded) == list(fisher)
    assert (loaded.num_samples, loaded.labels, loaded.routes) == (7, "sampled", routes)
    assert all(score.dtype == torch.float32 for score in loaded.values())


def test_reasons_are_kept_and_shown(tmp_path):
    routes = {"b.weight": "fused", "a.bias": "loop"}
    reasons = {"module.a.bias": "it has a use that no rule sees"}
    fisher = FisherDiagonal(scores(), num_samples=7, routes=routes, reasons=reasons)
    assert fisher.reasons == {"a.bias": "it has a use that no rule sees"}
    assert repr(fisher).endswith("1 fused 1 loop (see .reasons))")
    fisher.save(tmp_path / "fisher")
    assert FisherDiagonal.load(tmp_path / "fisher").reasons == fisher.reasons
    assert FisherDiagonal(scores(), num_samples=7).reasons == {}
    with pytest.raises(ValueError, match="reasons names 'missing'"):
        FisherDiagonal(scores(), num_samples=7, reasons={"missing": "?"})
    with pytest.raises(TypeError, match=r"the reason of 'a\.bias' is 3"):
        FisherDiagonal(scores(), num_samples=7, reasons={"a.bias": 3})


def test_a_file_without_reasons_can_be_read(tmp_path, monkeypatch):
    save = files.save

    def without(path, kind, tensors, fields):
        save(path, kind, tensors, {key: v for key, v in fields.items() if key != "reasons"})

    monkeypatch.setattr(files, "save", without)
    FisherDiagonal(scores(), num_samples=7).save(tmp_path / "fisher")
    assert FisherDiagonal.load(tmp_path / "fisher").reasons == {}


def test_equality_is_of_bits_and_origin():
    given = scores()
    fisher = FisherDiagonal(given, num_samples=2)
    assert fisher == FisherDiagonal(copy.deepcopy(given), num_samples=2)
    assert fisher != FisherDiagonal(given, num_samples=3)
    assert fisher != FisherDiagonal({**given, "a.bias": torch.zeros(2)}, num_samples=2)
    assert fisher != FisherDiagonal({"a.bias": given["a.bias"]}, num_samples=2)
    assert fisher != given


def test_copies_and_pickles():
    fisher = FisherDiagonal(scores(), num_samples=2, labels="empirical")
    assert copy.deepcopy(fisher) == fisher
    assert pickle.loads(pickle.dumps(fisher)) == fisher


def test_repr_tells_size_and_origin():
    routes = {"b.weight": "fused", "a.bias": "loop"}
    fisher = FisherDiagonal(scores(), num_samples=2, labels="expected", routes=routes)
    assert repr(fisher) == (
        "FisherDiagonal(3 tensors, 9 scores, 2 samples, labels='expected', 1 fused 1 loop)"
    )
    assert repr(FisherDiagonal(scores(), num_samples=2)) == (
        "FisherDiagonal(3 tensors, 9 scores, 2 samples)"
    )


def test_scores_of_another_kind_say_so_and_may_be_of_no_sample(tmp_path):
    fisher = FisherDiagonal(scores(), num_samples=0, kind="magnitude")
    assert repr(fisher) == "FisherDiagonal(3 tensors, 9 scores, 0 samples, kind='magnitude')"
    fisher.save(tmp_path / "f")
    assert FisherDiagonal.load(tmp_path / "f").kind == "magnitude"
    assert FisherDiagonal(scores(), num_samples=1).kind == "fisher"


def test_sample_scores_are_held_saved_and_compared(tmp_path):
    given, by_sample = scores(), torch.rand(4)
    fisher = FisherDiagonal(given, num_samples=4, sample_scores=by_sample)
    fisher.save(tmp_path / "f")
    loaded = FisherDiagonal.load(tmp_path / "f")
    assert list(loaded) == list(given)
    assert torch.equal(loaded.sample_scores, by_sample)
    assert loaded == fisher
    assert fisher != FisherDiagonal(given, num_samples=4, sample_scores=by_sample + 1)
    assert fisher != FisherDiagonal(given, num_samples=4)
    FisherDiagonal(given, num_samples=4).save(tmp_path / "f")
    assert FisherDiagonal.load(tmp_path / "f").sample_scores is None


def test_sample_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sample_scores has shape \[3\], num_samples is 4"):
        FisherDiagonal(scores(), num_samples=4, sample_scores=torch.rand(3))
    with pytest.raises(TypeError, match=r"sample_scores.*float64"):
        FisherDiagonal(scores(), num_samples=4, sample_scores=torch.rand(4).double())
