"""Rules for ``nn.Linear`` and for transformers' ``Conv1D`` (a linear layer, transposed)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from fishkern.functional import linear_fisher_, norm_fisher_
from fishkern.interception.rules import NO_MASKS, Rule, Selection, register_rule
from fishkern.interception.selected import matrix_grad, select_matrix
from fishkern.tensors import wide_dtype


class LinearRule(Rule):
    """``y = x W^T + b`` with W ``[O, I]``."""

    autocasts = True
    #: Which dimension of the weight is the layer's input.
    input_dim: ClassVar[int] = 1

    def settings(self, module: nn.Module) -> object:
        """There are none."""
        return None

    def reads_input(self, names: Iterable[str]) -> bool:
        """For the weight alone."""
        return "weight" in names

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """``grad_out W``."""
        return grad_out @ _weight(module).to(grad_out.dtype)

    def param_grad(self, module: nn.Module, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """``sum_nt grad_out x^T``; for the bias ``sum_nt grad_out``."""
        g = grad_out.reshape(-1, grad_out.shape[-1])
        return g.sum(0) if name == "bias" else g.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)

    def prepare(self, module: nn.Module, name: str, indices: Tensor) -> Selection:
        """What of the input the weight's selected entries need, and the route to them."""
        if name == "bias":  # nothing of it
            return Selection(indices, columns=indices[:0], route="sums", kept=0.0, work=0.0)
        return select_matrix(indices, _weight(module), input_dim=self.input_dim)

    def selected_grad(
        self, module: nn.Module, name: str, selection: Selection, x: Tensor, grad_out: Tensor
    ) -> Tensor:
        """The weight's gradient at its selected entries, and no more of it than has to be."""
        if name == "bias":
            return _selected_sums(selection, grad_out)
        if self.input_dim == 0:
            x, grad_out = grad_out, x  # a linear layer with the two sides exchanged
        return matrix_grad(selection, x, grad_out)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_t grad_out x^T``; for the bias ``sum_t grad_out``."""
        return {"weight": grad_out.mT @ x.to(grad_out.dtype), "bias": grad_out.sum(1)}

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
        """``sum_n (sum_t grad_out x^T)^2``, with the bias in the same pass."""
        weight, bias = fishers.get("weight"), fishers.get("bias")
        if weight is not None:
            # The kernel's sample_scores are the weight's alone.
            together = bias if sample_scores is None else None
            mask = masks.get("weight")
            linear_fisher_(
                weight, x, grad_out, bias_fisher=together, sample_scores=sample_scores, mask=mask
            )
            bias = bias if together is None else None
        if bias is not None:
            bias_fisher_(bias, grad_out, sample_scores, masks.get("bias"))


class Conv1DRule(LinearRule):
    """``y = x W + b`` with W ``[I, O]``, as in GPT-2."""

    input_dim = 0

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """``grad_out W^T``."""
        return grad_out @ _weight(module).to(grad_out.dtype).T

    def param_grad(self, module: nn.Module, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """``sum_nt x grad_out^T``; for the bias ``sum_nt grad_out``."""
        g = grad_out.reshape(-1, grad_out.shape[-1])
        return g.sum(0) if name == "bias" else x.reshape(-1, x.shape[-1]).to(g.dtype).T @ g

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_t x grad_out^T``; for the bias ``sum_t grad_out``."""
        return {"weight": x.to(grad_out.dtype).mT @ grad_out, "bias": grad_out.sum(1)}

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
        """The linear layer's kernel with the two sides exchanged: W is ``[I, O]``."""
        if "weight" in fishers:
            mask = masks.get("weight")
            linear_fisher_(fishers["weight"], grad_out, x, sample_scores=sample_scores, mask=mask)
        if "bias" in fishers:
            bias_fisher_(fishers["bias"], grad_out, sample_scores, masks.get("bias"))


def bias_fisher_(
    fisher: Tensor,
    grad_out: Tensor,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``fisher += sum_n (sum_t grad_out[n, t])^2`` with fisher ``[O]``, grad_out ``[N, *, O]``.

    ``sample_scores[n]`` gets the same squares, summed over the mask ``[O]``.
    """
    norm_fisher_(None, fisher, None, grad_out, sample_scores=sample_scores, bias_mask=mask)


def _selected_sums(selection: Selection, grad_out: Tensor) -> Tensor:
    """``sum_nt grad_out`` of the selected features, in float32 at least."""
    g, indices = grad_out.reshape(-1, grad_out.shape[-1]), selection.indices
    wide = wide_dtype(g)
    if len(indices) > g.shape[1] // 8:
        return g.sum(0, dtype=wide)[indices]
    return g.index_select(1, indices).sum(0, dtype=wide)  # less to read


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


register_rule(nn.Linear, LinearRule())
# PEFT's LoRA layers hold plain nn.Linear modules. MultiheadAttention's output projection is a
# subclass that its module reads functionally; the stray-use detection would catch it, too.
register_rule("transformers.pytorch_utils.Conv1D", Conv1DRule())
