"""The rule for ``nn.Embedding``: a sample's gradient is in the rows of its own ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishkern.functional import embedding_fisher_
from fishkern.interception.rules import NO_MASKS, Rule, Selection, register_rule
from fishkern.tensors import wide_dtype


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

    def settings(self, module: nn.Module) -> object:
        """The id that gets no gradient."""
        return _embedding(module).padding_idx

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

    def prepare(self, module: nn.Module, name: str, indices: Tensor) -> Selection:
        """Ids are few numbers, kept as they are; the cost depends on the batch alone."""
        return Selection(indices, route="tokens of the batch", work=0.0)

    def selected_grad(
        self, module: nn.Module, name: str, selection: Selection, x: Tensor, grad_out: Tensor
    ) -> Tensor:
        """The gradients of each id's occurrences, added up in float32; then what is selected.

        Nothing of the embedding's size is made: the sums lie at the first places of the ids in
        their order, ``[NT, H]``, and the selected tokens are looked up there.
        """
        embedding, width = _embedding(module), grad_out.shape[-1]
        ids = x.reshape(-1)
        if not len(ids):
            return grad_out.new_zeros(len(selection.indices))
        in_order = ids.sort().values
        place = torch.searchsorted(in_order, ids)
        wide = wide_dtype(grad_out)
        sums = torch.ops.aten.embedding_dense_backward(
            grad_out.reshape(-1, width).to(wide), place, len(ids), -1, False
        )
        token = selection.indices.div(width, rounding_mode="floor")
        place = torch.searchsorted(in_order, token.to(ids.dtype)).clamp_(max=len(ids) - 1)
        counts = in_order[place] == token
        if embedding.padding_idx is not None:
            counts &= token != embedding.padding_idx
        selected = sums.reshape(-1)[place * width + selection.indices % width]
        return torch.where(counts, selected, 0.0)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """A dense ``[N, V, H]``, mostly zeros: made only to be added to uses of other kinds."""
        embedding = _embedding(module)
        rows, size = embedding.num_embeddings, x.shape[0]
        sample = torch.arange(size, device=x.device).unsqueeze(1)
        grads = grad_out.new_zeros(size * rows, grad_out.shape[-1])
        grads.index_add_(0, (sample * rows + x).flatten(), grad_out.flatten(0, -2))
        grads = grads.view(size, rows, -1)
        if embedding.padding_idx is not None:
            grads[:, embedding.padding_idx] = 0.0
        return {"weight": grads}

    def fisher_(
        self,
        module: nn.Module,
        fishers: Mapping[str, Tensor],
        x: Tensor,
        grad_out: Tensor,
        *,
        sample_scores: Tensor | None = None,
        masks: Mapping[str, Tensor | None] = NO_MASKS,
    ) -> None:
        """Sum over each (sample, id) pair's occurrences, square, add to the id's row."""
        embedding_fisher_(
            fishers["weight"],
            x.flatten(1),
            grad_out.flatten(1, -2),
            padding_idx=_embedding(module).padding_idx,
            sample_scores=sample_scores,
            mask=masks.get("weight"),
        )

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """Never asked for: ids have no gradient."""
        raise RuntimeError("ids have no gradient")


def _embedding(module: nn.Module) -> nn.Embedding:
    assert isinstance(module, nn.Embedding)
    return module


register_rule(nn.Embedding, EmbeddingRule())
