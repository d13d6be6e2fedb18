"""Which backend runs an op: the preference, the explicit choice, the refusal, the warning."""

import contextlib
import warnings

import pytest
import torch

import fishkern
from fishkern import _dispatch, _ops, functional

SCORES = [torch.tensor([1.0, 3.0, 2.0])]


@pytest.fixture(autouse=True)
def _fresh_choices(monkeypatch):
    monkeypatch.delenv("FISHKERN_BACKEND", raising=False)
    _dispatch._choose.cache_clear()
    _dispatch._warn_missing.cache_clear()
    yield
    _dispatch._choose.cache_clear()
    _dispatch._warn_missing.cache_clear()


@pytest.fixture
def missing(monkeypatch):
    """Make backends unavailable; the fixture's value lists which were asked for."""
    real, asked = _dispatch.backend, []

    def hide(*names):
        def backend(name):
            asked.append(name)
            return (None, f"no {name} today; buy some") if name in names else real(name)

        monkeypatch.setattr(_dispatch, "backend", backend)
        return asked

    return hide


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_cpu_prefers_native_and_the_reference_has_every_op(op):
    native, _ = _dispatch.backend("native")
    assert _dispatch.chosen(op, "cpu") == ("native" if native else "reference")
    with fishkern.use_backend("reference"):
        assert _dispatch.chosen(op, "cpu") == "reference"


def test_use_backend_nests_and_ends_with_an_exception():
    before = _dispatch.chosen("topk_indices", "cpu")
    with fishkern.use_backend("triton"):
        with contextlib.suppress(KeyError), fishkern.use_backend("reference"):
            assert _dispatch.chosen("topk_indices", "cpu") == "reference"
            raise KeyError
        with pytest.raises(RuntimeError, match="'triton' was asked for"):
            _dispatch.chosen("topk_indices", "cpu")
    assert _dispatch.chosen("topk_indices", "cpu") == before


def test_environment_chooses_and_use_backend_overrides_it(monkeypatch):
    monkeypatch.setenv("FISHKERN_BACKEND", "reference")
    assert _dispatch.chosen("topk_indices", "cpu") == "reference"
    monkeypatch.setenv("FISHKERN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="'triton' was asked for"):
        functional.topk_indices(SCORES, 1)
    with fishkern.use_backend("reference"):
        assert functional.topk_indices(SCORES, 1)[0].tolist() == [1]


def test_unknown_backend_is_refused(monkeypatch):
    message = "no backend is named 'cuda': choose one of native, triton, reference"
    with pytest.raises(ValueError, match=message), fishkern.use_backend("cuda"):
        pass
    monkeypatch.setenv("FISHKERN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"FISHKERN_BACKEND is set, but {message}"):
        functional.topk_indices(SCORES, 1)


def test_explicit_choice_of_a_missing_backend_is_refused(missing):
    missing("native")
    with (
        fishkern.use_backend("native"),
        pytest.raises(RuntimeError, match=r"'native' was asked for .*buy some"),
    ):
        functional.topk_indices(SCORES, 1)


def test_missing_native_warns_once_and_the_reference_runs(missing):
    missing("native")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert functional.topk_indices(SCORES, 1)[0].tolist() == [1]
            fisher = torch.zeros(1, 1)
            functional.linear_fisher_(fisher, torch.full((1, 1), 2.0), torch.full((1, 1), 3.0))
            assert fisher.item() == 36.0
    assert len(caught) == 1
    assert caught[0].category is RuntimeWarning
    assert "native kernels are not available: no native today; buy some" in str(caught[0].message)


def test_cuda_tensors_do_not_build_cpu_kernels(missing):
    asked = missing("native", "triton")
    with pytest.warns(RuntimeWarning, match="no triton today"):
        assert _dispatch.chosen("topk_indices", "cuda") == "reference"
    assert asked == ["triton", "reference"]


def test_unknown_device_is_refused():
    with pytest.raises(RuntimeError, match="no backend runs 'topk_indices' on 'fpga'"):
        _dispatch.chosen("topk_indices", "fpga")
