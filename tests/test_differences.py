"""What is no model, and no base, is refused before anything is compared."""

import pytest
import torch
from torch import nn

import fishkern


def test_wrong_types_are_refused(tmp_path):
    path = tmp_path / "delta.safetensors"
    model, base = nn.Linear(3, 2), nn.Linear(3, 2)
    for odd in (None, "bert-base", [("weight", torch.zeros(2, 3))]):
        with pytest.raises(TypeError, match=rf"base is a {type(odd).__name__}: pass the model"):
            fishkern.save_delta(model, path, base=odd)
    with pytest.raises(TypeError, match="OrderedDict in the place of a model"):
        fishkern.save_delta(model.state_dict(), path, base=base)
    assert not path.exists()
    fishkern.save_delta(model, path, base=base)
    for change in (fishkern.apply_delta, fishkern.revert_delta):
        with pytest.raises(TypeError, match="OrderedDict in the place of a model"):
            change(base.state_dict(), path)
