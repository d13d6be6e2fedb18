"""Rules for convolutions: linear layers over patches, summed over the positions of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishkern.functional import conv_fisher_
from fishkern.interception.linear import bias_fisher_
from fishkern.interception.rules import NO_MASKS, Rule, register_rule

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvRule(Rule):
    """``y[:, p] = sum W patch(x, p) + b`` with W ``[O, C / groups, *K]`` and x ``[N, C, *S]``.

    All of ``[C, *S]`` are features: a sample's positions are summed by the layer itself. Where the
    layer pads with anything but the same number of zeros on both sides, its input is padded first.
    """

    autocasts = True

    def reads_input(self, names: Iterable[str]) -> bool:
        """For the weight alone."""
        return "weight" in names

    def input_dims(self, module: nn.Module) -> int:
        """The channels and the spatial dimensions."""
        return 1 + len(_layer(module).kernel_size)

    def output_dims(self, module: nn.Module) -> int:
        """The same."""
        return self.input_dims(module)

    def settings(self, module: nn.Module) -> object:
        """All that says which inputs an output is made of."""
        layer = _layer(module)
        places = (layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups)
        return type(layer), *places

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """The transposed convolution of grad_out, and the padding's backward where x is padded."""
        layer = _layer(module)
        pads, _ = _padding(layer)
        if pads is None:
            return _backward(layer, x, grad_out, weight=False)
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            padded = _pad(layer, inner, pads)
        return torch.autograd.grad(
            padded, inner, _backward(layer, padded.detach(), grad_out, weight=False)
        )[0]

    def param_grad(self, module: nn.Module, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """``sum_np grad_out patch^T``; for the bias ``sum_np grad_out``."""
        layer, dims = _layer(module), self.input_dims(module)
        x, grad_out = (t.reshape(-1, *t.shape[t.dim() - dims :]) for t in (x, grad_out))
        if name == "bias":
            return grad_out.flatten(2).sum((0, 2))
        pads, _ = _padding(layer)
        padded = x if pads is None else _pad(layer, x, pads)
        return _backward(layer, padded, grad_out, weight=True)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """The gradients of a sample at a time, stacked."""
        present = [n for n in self.params if module._parameters.get(n) is not None]
        return {
            name: torch.stack(
                [
                    self.param_grad(module, name, sample, grad)
                    for sample, grad in zip(x, grad_out, strict=True)
                ]
            )
            for name in present
        }

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
        """``sum_n (sum_p grad_out patch^T)^2``, with the bias in the same pass."""
        layer = _layer(module)
        weight, bias = fishers.get("weight"), fishers.get("bias")
        if weight is not None:
            # The kernel's sample_scores are the weight's alone.
            together = bias if sample_scores is None else None
            pads, padding = _padding(layer)
            conv_fisher_(
                weight,
                x if pads is None else _pad(layer, x.flatten(0, 1), pads).unflatten(0, x.shape[:2]),
                grad_out,
                bias_fisher=together,
                stride=layer.stride,
                padding=padding,
                dilation=layer.dilation,
                groups=layer.groups,
                sample_scores=sample_scores,
                mask=masks.get("weight"),
            )
            bias = bias if together is None else None
        if bias is not None:
            by_call = grad_out.flatten(3).sum(3, dtype=bias.dtype)
            bias_fisher_(bias, by_call, sample_scores, masks.get("bias"))


def _padding(layer: Layer) -> tuple[list[int] | None, tuple[int, ...]]:
    """How the input is to be padded before (as ``F.pad`` takes it), and the zeros that are left."""
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return layer._reversed_padding_repeated_twice, none
    if layer.padding == "valid":
        return None, none
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return layer._reversed_padding_repeated_twice, none
        return None, tuple(t // 2 for t in total)
    assert not isinstance(layer.padding, str)
    return None, layer.padding


def _pad(layer: Layer, x: Tensor, pads: list[int]) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, pads, mode)


def _backward(layer: Layer, x: Tensor, grad_out: Tensor, *, weight: bool) -> Tensor:
    """The gradient of the weight or of x; x is padded already where the layer does not."""
    dims = len(layer.kernel_size)
    batched = x.dim() == dims + 2
    if not batched:
        x, grad_out = x.unsqueeze(0), grad_out.unsqueeze(0)
    own: Any = layer._parameters["weight"]
    grads = torch.ops.aten.convolution_backward(
        grad_out,
        x.to(grad_out.dtype),
        own.to(grad_out.dtype),
        None,
        layer.stride,
        _padding(layer)[1],
        layer.dilation,
        False,
        [0] * dims,
        layer.groups,
        [not weight, weight, False],
    )
    grad: Tensor = grads[1] if weight else grads[0]
    return grad if batched or weight else grad.squeeze(0)


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return module


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_rule(_type, ConvRule())
# Subclasses may compute something else, and parametrised ones (weight_norm) have no weight of
# their own: neither has this rule.
