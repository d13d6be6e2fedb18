import pytest
import torch
from torch import nn

from fishkern.names import by_canonical_name, canonical_name, match, named_parameters, some

NAMES = [
    "encoder.layer.0.query.weight",
    "encoder.layer.0.query.bias",
    "encoder.layer.10.query.weight",
    "classifier.weight",
    "classifier.bias",
]


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("weight", "weight"),
        ("module.weight", "weight"),
        ("module.module.a.weight", "a.weight"),
        ("a.module.weight", "a.module.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("submodule.weight", "submodule.weight"),
        ("module", "module"),
        ("", ""),
    ],
)
def test_canonical_name(wrapped, bare):
    assert canonical_name(wrapped) == bare
    assert canonical_name(bare) == bare


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_named_parameters_of_a_wrapped_model_are_those_of_the_bare_one():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    wrapped = Wrapper(torch.compile(Wrapper(model), backend="eager"))
    bare = dict(model.named_parameters())
    assert list(named_parameters(wrapped)) == list(bare)
    assert all(param is bare[name] for name, param in named_parameters(wrapped).items())


def test_named_parameters_names_a_tied_weight_once_by_its_first_name():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert list(named_parameters(model)) == ["embed.weight"]


def test_named_parameters_refuses_two_that_become_one():
    model = Wrapper(nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"Wrapper: 'weight' and 'module\.weight' are both"):
        named_parameters(model)


def test_names_that_are_not_strings_are_refused():
    with pytest.raises(TypeError, match="the name 3 is a int"):
        by_canonical_name([(3, None)], "scores")


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), []),
        ("classifier.*", [3, 4]),
        ("module.classifier.*", [3, 4]),
        (["*.bias", "*.0.*"], [0, 1, 4]),
        (["classifier.*", "classifier.weight"], [3, 4]),
        ("*.layer.?.*", [0, 1]),
        (iter(["*"]), [0, 1, 2, 3, 4]),
    ],
)
def test_match_keeps_the_order_of_the_names(patterns, chosen):
    assert match(NAMES, patterns, "keep") == [NAMES[i] for i in chosen]


def test_match_takes_names_with_glob_characters_literally():
    assert match(["a[0].weight", "a0.weight"], "a[0].weight", "keep") == [
        "a[0].weight",
        "a0.weight",
    ]
    assert match(["a[0].weight"], "a[0].weight", "keep") == ["a[0].weight"]


def test_match_by_predicate_sees_name_and_value():
    params = {"a": torch.zeros(2), "b": torch.zeros(2, 2)}
    assert match(params, lambda name, param: param.dim() == 2, "params") == ["b"]
    with pytest.raises(ValueError, match="params: the predicate chose none of 2"):
        match(params, lambda name, param: False, "params")
    with pytest.raises(TypeError, match="needs the values"):
        match(list(params), lambda name, param: True, "params")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("classifer.*", "close to it: 'classifier"),
        ("*.classifier.*", "close to it: 'classifier.weight'"),
        ("Classifier.weight", "close to it: 'classifier.weight'"),
        ("zzz", "none of 5 names$"),
    ],
)
def test_match_names_the_pattern_that_matches_nothing(pattern, hint):
    with pytest.raises(ValueError, match=hint) as error:
        match(NAMES, ["*.bias", pattern], "keep")
    assert f"keep: the pattern {pattern!r}" in str(error.value)


def test_match_refuses_patterns_that_are_not_strings():
    with pytest.raises(TypeError, match="the pattern 3 is not a string"):
        match(NAMES, [3], "keep")


def test_some_names_three_at_most():
    assert some(["a", "b"]) == "'a', 'b'"
    assert some("abcde") == "'a', 'b', 'c' and 2 more"
