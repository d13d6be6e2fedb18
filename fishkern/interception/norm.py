"""Rules for norms: what they scale and shift is their input, normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishkern.functional import norm_fisher_
from fishkern.interception.rules import NO_MASKS, Rule, original_class, register_rule
from fishkern.tensors import wide_dtype


class ScaleRule(Rule):
    """``y = x_hat w + b``, feature by feature; a subclass says what x_hat is."""

    def x_hat(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the weight is multiplied with, of x's shape and dtype."""
        # each subclass has its own
        raise NotImplementedError(f"{type(self).__name__} has no x_hat")

    def input_dims(self, module: nn.Module) -> int:
        """Those of the weight."""
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        param = bias if weight is None else weight
        return 1 if param is None else param.dim()

    def output_dims(self, module: nn.Module) -> int:
        """The same."""
        return self.input_dims(module)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_t grad_out x_hat`` and ``sum_t grad_out``."""
        x_hat = self.x_hat(module, x.to(grad_out.dtype))
        return {"weight": (grad_out * x_hat).sum(1), "bias": grad_out.sum(1)}

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
        """Both parameters in one pass over grad_out; x_hat in float32 at least."""
        x_hat = None
        if "weight" in fishers:
            wide = wide_dtype(x)
            x_hat = self.x_hat(module, x.to(wide)).flatten(2)
        weight, bias = (
            None if (fisher := fishers.get(name)) is None else fisher.view(-1)
            for name in ("weight", "bias")
        )
        weight_mask, bias_mask = (
            None if (mask := masks.get(name)) is None else mask.flatten()
            for name in ("weight", "bias")
        )
        norm_fisher_(
            weight,
            bias,
            x_hat,
            grad_out.flatten(2),
            sample_scores=sample_scores,
            weight_mask=weight_mask,
            bias_mask=bias_mask,
        )


class LayerNormRule(ScaleRule):
    """``x_hat = (x - mean) / sqrt(var + eps)``."""

    def x_hat(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's output for a weight of ones and a bias of zeros."""
        norm = _layer_norm(module)
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)

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


class GroupNormRule(Rule):
    """``y[:, c] = x_hat[:, c] w[c] + b[c]`` of ``[N, C, *S]``, x_hat normalised group by group."""

    def num_groups(self, module: nn.Module) -> int:
        """Into how many groups the channels are split."""
        assert isinstance(module, nn.GroupNorm)
        return module.num_groups

    def input_dims(self, module: nn.Module) -> int | None:
        """All but the samples: the channels, and positions of any number of dimensions."""
        return None

    def output_dims(self, module: nn.Module) -> int | None:
        """The same."""
        return self.input_dims(module)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_tp grad_out x_hat`` and ``sum_tp grad_out`` over calls and positions: small."""
        eps: Any = module.eps
        x = x.to(grad_out.dtype).flatten(0, 1)
        x_hat = F.group_norm(x, self.num_groups(module), eps=eps).view_as(grad_out)
        others = [d for d in range(grad_out.dim()) if d not in (0, 2)]
        return {"weight": (grad_out * x_hat).sum(others), "bias": grad_out.sum(others)}


class InstanceNormRule(GroupNormRule):
    """The same with a group for each channel."""

    dims: ClassVar[dict[type[nn.Module], int]] = {
        nn.InstanceNorm1d: 2,
        nn.InstanceNorm2d: 3,
        nn.InstanceNorm3d: 4,
    }

    def covers(self, module: nn.Module) -> bool:
        """Not with running averages: they take the place of the sample's own in evaluation."""
        return not module.track_running_stats

    def num_groups(self, module: nn.Module) -> int:
        """One for each channel."""
        groups: Any = module.num_features
        return int(groups)

    def input_dims(self, module: nn.Module) -> int:
        """Channels and positions: an input without samples is possible here."""
        return self.dims[original_class(module)]


class BatchNormRule(Rule):
    """``y[:, c] = x_hat[:, c] w[c] + b[c]``, x_hat normalised with running averages.

    With the batch's own, as in training, a sample's output depends on the others, and there is no
    gradient of a sample's own.
    """

    def covers(self, module: nn.Module) -> bool:
        """Where it normalises with running averages."""
        return not module.training and module._buffers["running_mean"] is not None

    def reads_input(self, names: Iterable[str]) -> bool:
        """For the weight alone."""
        return "weight" in names

    def input_dims(self, module: nn.Module) -> int | None:
        """All but the samples: the channels, and positions of any number of dimensions."""
        return None

    def output_dims(self, module: nn.Module) -> int | None:
        """The same."""
        return self.input_dims(module)

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """``sum_tp grad_out x_hat`` and ``sum_tp grad_out`` over calls and positions: small."""
        mean, rstd = self._averages(module, grad_out)
        centred = x - mean.view(-1, *[1] * (x.dim() - 3))
        others = [d for d in range(grad_out.dim()) if d not in (0, 2)]
        weight = (centred * grad_out).sum(others) * rstd
        return {"weight": weight, "bias": grad_out.sum(others)}

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """``grad_out w / sqrt(var + eps)``."""
        _, scale = self._averages(module, grad_out)
        weight = module._parameters["weight"]
        if weight is not None:
            scale = scale * weight.detach()
        return grad_out * scale.to(grad_out.dtype).view(-1, *[1] * (grad_out.dim() - 2))

    def _averages(self, module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, and one over the standard deviation, in float32 at least."""
        wide, eps = wide_dtype(like), module.eps
        mean, var = (module._buffers[f"running_{name}"] for name in ("mean", "var"))
        assert mean is not None
        assert var is not None
        assert isinstance(eps, float)
        return mean.to(wide), (var.to(wide) + eps).rsqrt()


class TriedNormRule(ScaleRule):
    """Any norm that computes ``y = x_hat w + b``, or ``x_hat (1 + w) + b``, with or without b.

    Models bring their own classes for it, with x_hat computed in one way or another. So x_hat is
    asked of the layer itself - it is its output for a certain weight - and whether a class is of
    this kind is tried out, not assumed of its name.
    """

    optional = ("bias",)

    def covers(self, module: nn.Module) -> bool:
        """Whether its outputs for several weights and inputs are what one of them foretells."""
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        return (
            weight is not None
            and set(module._parameters) <= {"weight", "bias"}
            and (bias is None or bias.shape == weight.shape)
            and weight.is_floating_point()
            and weight.device.type != "meta"
            and weight.numel() > 0
            # Running averages would be changed by a trial, and may be those of the batch.
            and not any(True for _ in module.buffers())
            and _unit(module) is not None
        )

    def x_hat(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's output for the weight that changes nothing."""
        unit = _unit(module)
        assert unit is not None
        return _output(module, x, unit, 0.0)


# What is found out about a module, so that it is tried once.
_units: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def _unit(module: nn.Module) -> float | None:
    """The weight for which the layer's output is x_hat, 1 or 0; None: it is no such norm."""
    if module not in _units:
        _units[module] = next((unit for unit in (1.0, 0.0) if _is_norm(module, unit)), None)
    return _units[module]


def _is_norm(module: nn.Module, unit: float) -> bool:
    """Whether y is ``x_hat (w + 1 - unit) + b``, each token's from its own x alone."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    ramp = torch.linspace(-2, 3, weight.numel(), device=weight.device)
    x = torch.stack([ramp, ramp.cos(), ramp.sin() * 5, ramp.square() - 1]).view(2, 2, *weight.shape)
    scale, shift = (ramp * 0.4 + 1.3).view_as(weight), ramp.sin().view_as(weight)
    x, scale, shift = (t.to(weight.dtype) for t in (x, scale, shift))
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    try:
        with torch.no_grad():
            x_hat = _output(module, x, unit, 0.0)
            found = _output(module, x, scale, shift)
            alone = _output(module, x[1:, 1:], scale, shift)
    except Exception:  # whatever it expects, it is not one tensor [N, T, *features]
        return False
    expected = x_hat * (scale + (1 - unit)) + (0 if bias is None else shift)
    return (
        found.shape == x.shape
        and torch.allclose(found, expected, tolerance, tolerance)
        and torch.allclose(alone, expected[1:, 1:], tolerance, tolerance)
    )


def _output(module: nn.Module, x: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
    """The layer's output as if these were its parameters."""
    before = dict(module._parameters)
    values = {"weight": weight, "bias": bias}
    try:
        for name, param in before.items():
            if param is not None:
                value: Tensor = torch.as_tensor(values[name], dtype=x.dtype, device=x.device)
                module._parameters[name] = value.expand(param.shape).contiguous()  # type: ignore[assignment]
        y: Tensor = original_class(module).forward(module, x)
        return y
    finally:
        module._parameters.update(before)


def _layer_norm(module: nn.Module) -> nn.LayerNorm:
    assert isinstance(module, nn.LayerNorm)
    return module


register_rule(nn.LayerNorm, LayerNormRule())
register_rule(nn.GroupNorm, GroupNormRule())
for _type in InstanceNormRule.dims:
    register_rule(_type, InstanceNormRule())
for _type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register_rule(_type, BatchNormRule())
for _pattern in ("*RMSNorm*", "*LayerNorm*"):
    register_rule(_pattern, TriedNormRule())
