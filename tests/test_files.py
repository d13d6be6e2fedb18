import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fishkern import files

TENSORS = {
    "z": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1, 2**40]),
    "m": torch.tensor([7, 8, 9], dtype=torch.int32),
    "b.c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 4),
}
FIELDS = {"k": 3, "text": 'naïve "quotes"', "nothing": None, "deep": {"x": [1, 2.5]}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scores.safetensors"
    files.save(path, "fisher", TENSORS, FIELDS)
    return path


def rewrite(path, change):
    """Save the file anew, by safetensors itself, with another header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in TENSORS}
        header = json.loads(file.metadata()["fishkern"])
    change(header)
    save_file(tensors, path, metadata={"fishkern": json.dumps(header)})


def test_round_trip_keeps_order_dtypes_and_fields(path):
    tensors, fields = files.load(path, "fisher")
    assert list(tensors) == list(TENSORS)
    assert fields == FIELDS
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_others_can_read_the_tensors(path):
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("z"), TENSORS["z"])
        assert json.loads(file.metadata()["fishkern"])["version"] == 1


def test_views_and_shared_memory_are_saved_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"whole": base, "same": base, "turned": base.t(), "row": base[1]}
    tensors["wide"] = torch.ones(1).expand(5)
    files.save(tmp_path / "f", "fisher", tensors, {})
    loaded, _ = files.load(tmp_path / "f", "fisher")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_no_tensors(tmp_path):
    files.save(tmp_path / "f", "mask", {}, {})
    assert files.load(tmp_path / "f", "mask") == ({}, {})


def test_a_cut_file_is_refused(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"scores\.safetensors .*cut short"):
            files.load(path, "fisher")
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"scores\.safetensors"):
        files.load(path, "fisher")


def test_every_changed_byte_is_found(path):
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"scores\.safetensors"):
            files.load(path, "fisher")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["fields"].update(k=4), "digest does not match"),
        (lambda h: h["names"].reverse(), "digest does not match"),
        (lambda h: h["names"].pop(), "does not hold the tensors"),
        (lambda h: h.update(names=[1]), "no proper names"),
        (lambda h: h.update(version=2), "has format version 2, this fishkern reads 1: use"),
        (lambda h: h.pop("version"), "no version"),
        (lambda h: h.pop("digest"), "no proper 'digest'"),
        (lambda h: h.update(kind="mask"), "holds a mask, not a fisher: pass a fisher file"),
    ],
)
def test_an_edited_header_is_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as error:
        files.load(path, "fisher")
    assert str(path) in str(error.value)


def test_another_kind_is_refused(path):
    with pytest.raises(ValueError, match="holds a fisher, not a mask: pass a mask file"):
        files.load(path, "mask")


def test_a_plain_safetensors_file_is_refused(path):
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no fishkern header: pass a file that fishkern saved"):
        files.load(path, "fisher")
    save_file({"a": torch.zeros(1)}, path, metadata={"fishkern": "{"})
    with pytest.raises(ValueError, match="damaged header"):
        files.load(path, "fisher")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_never_loaded(path):
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickles are never read"):
        files.load(path, "fisher")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="pickles are never read"):
        files.load(path, "fisher")


def test_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.load(tmp_path / "nowhere", "fisher")
    with pytest.raises(OSError, match="nowhere"):
        files.save(tmp_path / "nowhere" / "f", "fisher", TENSORS, {})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        files.save(path, "fisher", {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_over_a_file_that_is_loaded_does_not_change_what_was_loaded(path):
    tensors, _ = files.load(path, "fisher")
    files.save(path, "fisher", {"z": torch.zeros(2, 3)}, {})
    assert torch.equal(tensors["z"], TENSORS["z"])
    assert torch.equal(files.load(path, "fisher")[0]["z"], torch.zeros(2, 3))
