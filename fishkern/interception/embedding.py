"""The rule for ``nn.Embedding``: a sample's gradient is in the rows of its own ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishkern.interception.rules import Rule, register_rule


class EmbeddingRule(Rule):
    """``y[n, t] = W[ids[n, t]]`` with W ``[V, H]``; the input is ``ids``."""

    params = ("weight",)
    broadcasts = True

    def covers(self, module: nn.Module) -> bool:
        """Not if looking rows up changes them, or scales their gradients by how often."""
        embedding = _embedding(module)
        return embedding.max_norm is None and not embedding.scale_grad_by_freq

    def input_dims(self, module: nn.Module) -> int:
        """Ids have no features."""
        return 0

    def param_grad(self, module: nn.Module, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """The gradients of each id's occurrences, added up in its row."""
        embedding = _embedding(module)
        weight = embedding._parameters["weight"]
        assert weight is not None
        padding = -1 if embedding.padding_idx is None else embedding.padding_idx
        grad: Tensor = torch.ops.aten.embedding_dense_backward(
            grad_out, x, len(weight), padding, False
        )
        return grad

    def fisher_(
        self, module: nn.Module, fishers: Mapping[str, Tensor], x: Tensor, grad_out: Tensor
    ) -> None:
        """Sum over each (sample, id) pair's occurrences, square, add to the id's row."""
        fisher, padding_idx = fishers["weight"], _embedding(module).padding_idx
        ids, grad = x.flatten(1), grad_out.flatten(0, -2)
        sample = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        pairs, place = torch.unique(sample * len(fisher) + ids, return_inverse=True)
        sums = fisher.new_zeros(len(pairs), fisher.shape[1])
        sums.index_add_(0, place.flatten(), grad.to(fisher.dtype))
        rows = pairs % len(fisher)
        if padding_idx is not None:
            sums[rows == padding_idx] = 0.0
        fisher.index_add_(0, rows, sums.square_())

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """Never asked for: ids have no gradient."""
        raise RuntimeError("ids have no gradient")


def _embedding(module: nn.Module) -> nn.Embedding:
    assert isinstance(module, nn.Embedding)
    return module


register_rule(nn.Embedding, EmbeddingRule())
