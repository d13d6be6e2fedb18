"""What the tests of train_only share: models, masks for them, and gradients by their names."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory import kept_tensors, storages
from fishkern import SparseMask, attached
from tests.support.problems import PROBLEMS, Problem


class Functional(nn.Module):
    """A weight that is read outside its module, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        h = self.norm(self.linear(torch.tanh(self.linear(self.embedding(ids)))))
        return F.linear(h.mean(1), self.embedding.weight)


def functional_loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="sum")


def functional_batch(n=4, t=5):
    return {"input_ids": torch.randint(20, (n, t)), "labels": torch.randint(20, (n,))}


CASES = {
    **{name: PROBLEMS[name] for name in ("bert", "bert-lora", "gpt2", "llama-tied", "t5")},
    "functional": Problem(Functional, functional_batch, functional_loss),
}


def random_mask(model, density=0.2, seed=0):
    """Some entries of every trainable tensor, none of each seventh."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for i, (name, param) in enumerate(model.named_parameters()):
        if param.requires_grad:
            share = 0.0 if i % 7 == 3 else density
            chosen = torch.rand(param.numel(), generator=generator) < share
            indices[name], shapes[name] = chosen.nonzero().view(-1), param.shape
    return SparseMask(indices, shapes)


def dense_gradients(model, problem, batch, dtype):
    model = copy.deepcopy(model).to(dtype)
    problem.loss(model, batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def leaf_gradients(model):
    """By the name of the dense parameter."""
    return {
        name.replace("fishkern_leaves.", ""): leaf.grad
        for name, leaf in attached(model).named_parameters()
    }


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def kept_bytes(model, output):
    """Bytes of the storages that are kept for backward, without the model's own."""
    own = storages([*model.parameters(), *model.buffers()])
    found = storages(kept_tensors(output))
    return sum(size for place, size in found.items() if place not in own)
