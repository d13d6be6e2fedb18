"""Rules for norms: what they scale is their input, normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishkern.interception.rules import Rule, original_class, register_rule


class LayerNormRule(Rule):
    """``y = x_hat w + b`` with ``x_hat = (x - mean) / sqrt(var + eps)``."""

    def input_dims(self, module: nn.Module) -> int:
        """Those that are normalised over."""
        return len(_layer_norm(module).normalized_shape)

    def output_dims(self, module: nn.Module) -> int:
        """The same."""
        return self.input_dims(module)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_t grad_out x_hat`` and ``sum_t grad_out``."""
        norm = _layer_norm(module)
        x_hat = F.layer_norm(x.to(grad_out.dtype), norm.normalized_shape, eps=norm.eps)
        return {"weight": (grad_out * x_hat).sum(1), "bias": grad_out.sum(1)}

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """The backward of ``layer_norm``, for its input alone."""
        norm = _layer_norm(module)
        weight, bias = (
            None if p is None else p.to(grad_out.dtype)
            for p in (norm._parameters["weight"], norm._parameters["bias"])
        )
        x, shape = x.to(grad_out.dtype), list(norm.normalized_shape)
        _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, norm.eps)
        grad: Tensor = torch.ops.aten.native_layer_norm_backward(
            grad_out, x, shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        return grad


class RMSNormRule(Rule):
    """Any norm that is affine in its one weight: ``y = x_hat w``, or ``x_hat (1 + w)``.

    Models bring their own classes for it, with x_hat computed in one dtype or another. So x_hat is
    asked of the layer itself - its output for a weight of ones, less that for zeros - and whether a
    class is of this kind is tried out, not assumed of its name.
    """

    params = ("weight",)

    def covers(self, module: nn.Module) -> bool:
        """Whether the layer's output for any weight is what those for ones and zeros foretell."""
        (weight,) = module._parameters.values() if len(module._parameters) == 1 else (None,)
        if weight is None or weight.dim() != 1 or weight.device.type == "meta":
            return False
        with torch.no_grad():
            ramp = torch.linspace(-2, 3, len(weight), device=weight.device)
            x = torch.stack([ramp, ramp.cos(), ramp.sin() * 5]).to(weight.dtype)
            other = torch.linspace(0.5, 2, len(weight), device=weight.device).to(weight.dtype)
            at_zero, at_one = (_with_weight(module, x, weight * 0 + c) for c in (0, 1))
            expected = at_zero + (at_one - at_zero) * other
            found = _with_weight(module, x, other)
            alone = _with_weight(module, x[1:2], other)
            tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
            return torch.allclose(found, expected, tolerance, tolerance) and torch.allclose(
                found[1:2], alone, tolerance, tolerance
            )

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_t grad_out x_hat``."""
        weight = module._parameters["weight"]
        assert weight is not None
        at_zero, at_one = (_with_weight(module, x, torch.full_like(weight, c)) for c in (0, 1))
        return {"weight": (grad_out * (at_one - at_zero)).sum(1)}


def _with_weight(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output as if this were its weight."""
    before = module._parameters["weight"]
    try:
        module._parameters["weight"] = weight  # type: ignore[assignment]
        y: Tensor = original_class(module).forward(module, x)
        return y
    finally:
        module._parameters["weight"] = before


def _layer_norm(module: nn.Module) -> nn.LayerNorm:
    assert isinstance(module, nn.LayerNorm)
    return module


register_rule(nn.LayerNorm, LayerNormRule())
for _name in (
    "RMSNorm",  # torch's
    *("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"),
    *("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Phi3RMSNorm", "OlmoeRMSNorm"),
    *("DeepseekV2RMSNorm", "DeepseekV3RMSNorm", "T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm"),
):
    register_rule(_name, RMSNormRule())
