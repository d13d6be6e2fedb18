"""Every method of PEFT: exact, by the route that the catalogue says, or refused with a reason."""

import importlib
from collections import Counter

import pytest
import torch

from benchmarks.harness import Missing
from benchmarks.studies.peft.methods import ABSENT, METHODS
from benchmarks.studies.peft.models import kind, matches, widened
from fishkern import FisherVerificationError, estimate_fisher
from tests.support.oracle import fisher_oracle
from tests.support.tolerances import assert_scores_match

# What the libraries that adapt say of each other and of themselves.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request):
    return request.param


@pytest.fixture
def model(method):
    try:
        return method.build()
    except Missing as reason:
        pytest.skip(str(reason))


def condition(model):
    """All that scoring must leave as it was."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "modules": {
            name: (type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
            for name, m in model.named_modules()
        },
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def test_scores_are_exact_and_go_the_expected_way(method, model):
    batches = [method.batch(model), method.batch(model, 3, 7)]
    kwargs = {"loss_fn": method.loss_fn(), "progress": False, "verify": 2}
    with torch.no_grad():
        method.losses(model, batches[0])  # transformers hooks some models in their first forward
    before = condition(model)
    if method.refused:
        with pytest.raises(FisherVerificationError, match=method.refused):
            estimate_fisher(model, batches, **kwargs)
    else:
        scores = estimate_fisher(model, batches, **kwargs)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert list(scores) == names
        truth = fisher_oracle(
            widened(model), batches, lambda model, batch: method.losses(model, batch).sum(), names
        )
        assert_scores_match(scores, truth)
        assert_routes(method, scores.routes)
        live = {kind(name) for name in names if truth[name].count_nonzero()}
        assert live == {kind(name) for name in names}  # comparing zeros would show nothing
    after = condition(model)
    for name, value in before.pop("values").items():
        assert torch.equal(value, after["values"][name]), name
    assert before == {key: after[key] for key in before}


def assert_routes(method, routes):
    """Each parameter goes as the one pattern for its kind says; no pattern is idle."""
    idle = dict(method.patterns())
    found = {}
    for name, route in routes.items():
        fitting = [pattern for pattern, _ in method.patterns() if matches(name, pattern)]
        assert len(fitting) == 1, (kind(name), fitting)
        idle.pop(fitting[0], None)
        found.setdefault(route, set()).add(kind(name))
        expected = dict(method.patterns())[fitting[0]]
        assert route == expected, f"{name} goes by {route}, the catalogue says {expected}"
    assert not idle


def test_names_are_unique():
    assert Counter(method.name for method in METHODS).most_common(1)[0][1] == 1


def test_no_method_of_peft_is_missing():
    """Each of PEFT's types and configurations is in the catalogue, or says why not."""
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    peft = importlib.import_module("peft")
    rows = {method.config for method in METHODS if method.package == "peft"}
    configs = {name for name in dir(peft) if name.endswith("Config")}
    assert configs == rows | set(ABSENT)
    assert not rows & set(ABSENT)
    assert set(peft.PeftType) == set(mapping)
    assert {config.__name__ for config in mapping.values()} <= rows
