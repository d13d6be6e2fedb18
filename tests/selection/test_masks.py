import copy
import gc
import hashlib
import pickle
import weakref

import pytest
import torch
from torch import nn

from fishkern.selection.masks import BoundMask, SparseMask
from fishkern.selection.summary import layer_of, type_of


def make(**changes):
    indices = {"1.weight": torch.tensor([0, 4, 5]), "1.bias": torch.tensor([1]), "0.weight": []}
    indices["0.weight"] = torch.empty(0, dtype=torch.int64)
    shapes = {"0.weight": (3, 2), "1.bias": (2,), "1.weight": (2, 3)}
    return SparseMask({**indices, **changes}, shapes)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def test_is_a_mapping_in_the_order_of_the_indices():
    mask = make()
    assert list(mask) == ["1.weight", "1.bias", "0.weight"]
    assert mask["1.weight"].tolist() == [0, 4, 5]
    assert mask["0.weight"].shape == (0,)
    assert mask.shapes == {"1.weight": (2, 3), "1.bias": (2,), "0.weight": (3, 2)}
    assert mask.num_selected == 4
    assert mask.density == 4 / 14
    assert repr(mask) == "SparseMask(4 of 14 entries, 28.571%, in 2 of 3 tensors)"


def test_names_are_canonical():
    mask = SparseMask({"module.w": torch.tensor([0])}, {"_orig_mod.w": (1,)})
    assert list(mask) == ["w"]
    assert mask["module.w"].tolist() == [0]
    assert mask.dense("module.w").tolist() == [True]


def test_shapes_cannot_be_changed():
    with pytest.raises(TypeError):
        make().shapes["0.weight"] = (1,)


def test_indices_are_int32_where_the_size_allows_and_int64_beyond():
    at = torch.tensor([5, 2**31 - 2], dtype=torch.int64)
    mask = SparseMask({"fits": at, "not": at}, {"fits": (2**31 - 1,), "not": (2**31,)})
    assert mask["fits"].dtype == torch.int32
    assert mask["not"].dtype == torch.int64
    assert torch.equal(mask["fits"].long(), at)
    narrow = SparseMask({"a": torch.tensor([3], dtype=torch.uint8)}, {"a": (4,)})
    assert narrow["a"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_are_copied(dtype):
    index = torch.tensor([0], dtype=dtype)
    mask = SparseMask({"w": index}, {"w": (2,)})
    index.fill_(1)
    assert mask["w"].tolist() == [0]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0], TypeError, "are a list"),
        (torch.tensor([0.0]), TypeError, "are torch.float32: pass integers"),
        (torch.tensor([True]), TypeError, r"are torch.bool: .*nonzero"),
        (torch.tensor([[0]]), ValueError, r"shape \[1, 1\]: pass 1-D"),
        (torch.tensor(0), ValueError, r"shape \[\]: pass 1-D"),
        (torch.tensor([1, 0]), ValueError, "do not ascend"),
        (torch.tensor([1, 1]), ValueError, "do not ascend"),
        (torch.tensor([-1, 2]), ValueError, r"from -1 to 2: its shape \[2, 3\] .* 0 to 5"),
        (torch.tensor([0, 6]), ValueError, r"from 0 to 6: its shape \[2, 3\] .* 0 to 5"),
    ],
)
def test_refuses_indices(index, error, message):
    with pytest.raises(error, match=message) as raised:
        make(**{"1.weight": index})
    assert "'1.weight'" in str(raised.value)


def test_refuses_names_that_only_one_side_has():
    with pytest.raises(ValueError, match="only one of indices and shapes names 'a', 'b'"):
        SparseMask({"a": torch.tensor([0])}, {"b": (1,)})


def test_dense():
    assert make().dense("1.weight").tolist() == [[True, False, False], [False, True, True]]
    assert make().dense("0.weight").shape == (3, 2)
    assert not make().dense("0.weight").any()
    assert SparseMask({"s": torch.tensor([0])}, {"s": ()}).dense("s").item() is True


def test_equality_and_fingerprint_follow_what_is_selected():
    mask = make()
    turned = SparseMask(dict(list(mask.items())[::-1]), mask.shapes)
    assert mask == turned
    assert mask.fingerprint == turned.fingerprint
    assert hash(mask) == hash(turned)
    for other in (
        make(**{"1.bias": torch.tensor([0])}),
        make(**{"1.bias": torch.empty(0, dtype=torch.int32)}),
        SparseMask(dict(mask), {**mask.shapes, "0.weight": (2, 3)}),
        SparseMask({"1.bias": mask["1.bias"]}, {"1.bias": (2,)}),
    ):
        assert mask != other
        assert mask.fingerprint != other.fingerprint
    assert mask != dict(mask)


def test_fingerprint_does_not_change_between_versions():
    mask = SparseMask({"w": torch.tensor([1, 5])}, {"w": (2, 3)})
    text = b"'w' [2, 3] 2" + b"\1\0\0\0\5\0\0\0"
    assert mask.fingerprint == hashlib.sha256(text).hexdigest()


def test_copies_pickles_and_moves():
    mask = make()
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert other == mask
        assert type(other) is SparseMask
    assert mask.to("meta")["1.bias"].device.type == "meta"
    assert mask["1.bias"].device.type == "cpu"


def test_file_round_trip(tmp_path):
    mask = make()
    mask.save(tmp_path / "mask")
    loaded = SparseMask.load(tmp_path / "mask")
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert [index.dtype for index in loaded.values()] == [torch.int32] * 3


def test_an_empty_mask():
    mask = SparseMask({}, {})
    assert (len(mask), mask.num_selected, mask.density) == (0, 0, 0.0)
    assert "total" in mask.summary()


def test_bind_knows_parameters_by_identity(model):
    bound = make().bind(model)
    assert bound == make()
    for name, param in model.named_parameters():
        assert bound.name_of(param) == name
    assert bound.name_of(nn.Parameter(model[0].weight.detach().clone())) is None
    assert repr(bound).startswith("BoundMask(")


def test_bind_through_wrappers_and_ties(model):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert make().bind(Wrapper(model)).name_of(model[1].bias) == "1.bias"
    model.append(nn.Linear(3, 2))
    model[2].weight = model[1].weight
    assert make().bind(model).name_of(model[2].weight) == "1.weight"
    assert make().bind(model).name_of(model[2].bias) == "2.bias"  # not in the mask, but known


def test_bound_mask_keeps_no_model_alive():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    bound, survivor = make().bind(model), model[0].weight
    gone = weakref.ref(model[1].weight)
    del model
    gc.collect()
    assert gone() is None
    assert bound.name_of(survivor) == "0.weight"


def test_a_new_parameter_at_the_address_of_an_old_one_is_a_stranger(model):
    bound, new = make().bind(model), nn.Parameter(torch.zeros(1))
    bound._names[id(new)] = bound._names[id(model[0].weight)]
    assert bound.name_of(new) is None


def test_bound_mask_is_unbound_when_copied_but_not_when_moved(model):
    bound = make().bind(model)
    for copied in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert type(copied) is SparseMask
        assert copied == bound
    moved = bound.to("cpu")
    assert type(moved) is BoundMask
    assert moved.name_of(model[0].weight) == "0.weight"


def test_bind_refuses_a_name_the_model_does_not_have(model):
    mask = SparseMask({"1.weigth": torch.tensor([0])}, {"1.weigth": (2, 3)})
    with pytest.raises(ValueError, match=r"'1\.weigth', which Sequential .*'1\.weight'"):
        mask.bind(model)


def test_bind_points_from_a_tied_name_to_the_first(model):
    model.append(nn.Linear(3, 2))
    model[2].weight = model[1].weight
    mask = SparseMask({"2.weight": torch.tensor([0])}, {"2.weight": (2, 3)})
    with pytest.raises(ValueError, match=r"'2\.weight'.* it is tied to '1\.weight'"):
        mask.bind(model)


def test_bind_refuses_another_shape(model):
    mask = SparseMask({"1.weight": torch.tensor([0])}, {"1.weight": (3, 2)})
    with pytest.raises(ValueError, match=r"'1\.weight' in shape \[3, 2\], .* \[2, 3\]"):
        mask.bind(model)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3", "dense"),
        ("bert.embeddings.LayerNorm.bias", "bert.embeddings", "LayerNorm"),
        ("m.layers.0.q_proj.lora_A.default.weight", "m.layers.0", "q_proj.lora_A"),
        ("m.layers.0.q_proj.hada_w1_a.default", "m.layers.0", "q_proj.hada_w1_a"),
        ("m.layers.0.q_proj.base_layer.weight", "m.layers.0", "q_proj"),
        ("m.h.2.experts.7.up.weight", "m.h.2", "up"),
        ("classifier.weight", "classifier", "classifier"),
        ("0.weight", "0", "weight"),
        ("weight", "weight", "weight"),
    ],
)
def test_summary_groups(name, layer, kind):
    assert layer_of(name) == layer
    assert type_of(name) == kind


def test_summary_counts_entries_columns_and_rows():
    shapes = {"b.0.q.weight": (2, 4), "b.0.q.bias": (2,), "b.1.c.weight": (2, 3, 2)}
    indices = {"b.0.q.weight": [0, 4], "b.0.q.bias": [], "b.1.c.weight": [1, 2, 4, 5, 6, 7]}
    mask = SparseMask({n: torch.tensor(i).long() for n, i in indices.items()}, shapes)
    lines = mask.summary().splitlines()
    cells = {line.split()[0]: line.split()[1:-1] for line in lines if "%" in line}
    bars = {5: "#####", 15: "###############", 20: "####################"}
    assert cells == {
        "total": ["36.364%", "8", "100.0%", bars[20], "60.0%", "100.0%"],
        "0": ["20.000%", "2", "25.0%", bars[5], "25.0%", "100.0%"],
        "1": ["50.000%", "6", "75.0%", bars[15], "83.3%", "100.0%"],
        "q": ["20.000%", "2", "25.0%", bars[5], "25.0%", "100.0%"],
        "c": ["50.000%", "6", "75.0%", bars[15], "83.3%", "100.0%"],
    }
    assert [line for line in lines if line.startswith("by")] == ["by layer", "by type of module"]


def test_summary_foretells_the_work():
    """One column of a large matrix takes its gathering, and a column's product."""
    mask = SparseMask({"q.weight": torch.arange(0, 512 * 256, 256)}, {"q.weight": (512, 256)})
    total = next(line for line in mask.summary().splitlines() if line.startswith("total"))
    assert total.split()[-1] == f"{(512 * (1 + 8) + 100) / (512 * (256 + 8)):.1%}"
