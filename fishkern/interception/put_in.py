"""What is put in among activations in a parameter's place, and what its gradient says.

Whatever was made of parameters alone, ``value = f(p)``, is put in expanded to the shape of the
activations that it meets, through an autograd function of its own: so the gradient arrives with
their shape, samples and all. Summed over the tokens, sample by sample, and pulled back through f it
is each sample's gradient of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fishkern.interception.capture import Site, autocast, differentiable_once
from fishkern.tensors import wide_dtype

#: Called in the backward pass with (use, grad_out).
UseConsumer = Callable[["Use", Tensor], None]


class Use:
    """One place where ``value = f(parameters)`` is put in among activations.

    Args:
        value: Its graph ends in the ``sources``.
        sources: What f read, an alias of a parameter each time, and the parameter's site.
        slope: Each entry's derivative by the same entry of the only parameter that it is made of,
            in value's shape; None where value depends on its sources in another way.
        shape: That in which it is put in, to which ``value`` broadcasts.
        seen: That which ``called`` was given.
    """

    def __init__(
        self,
        value: Tensor,
        sources: Mapping[Tensor, Site],
        slope: Tensor | None,
        shape: torch.Size,
        seen: torch.Size,
    ) -> None:
        self.value, self.slope, self.shape, self.seen = value, slope, shape, seen
        self.aliases, self.sites = tuple(sources), tuple(sources.values())

    def repeats(self, *axes: int) -> bool:
        """Whether ``value`` has no entries of its own along these axes of ``shape``."""
        return set(axes) <= set(self._repeated())

    def _repeated(self) -> list[int]:
        more = len(self.shape) - self.value.dim()
        return [i for i in range(len(self.shape)) if i < more or self.value.shape[i - more] == 1]

    def sample_grads(self, grad_out: Tensor) -> list[Tensor]:
        """Each sample's gradients of the parameters, in the order of ``sites``.

        Args:
            grad_out: ``[N, *shape]``: each sample's gradient at what was put in. Where ``shape``
                had the samples, it has what is one sample's alone (its tokens, or a single entry).

        Returns:
            ``[N, *param.shape]`` each, in float32 at least.
        """
        size, wide = len(grad_out), wide_dtype(grad_out)
        if repeated := self._repeated():
            grad_out = grad_out.sum([1 + axis for axis in repeated], dtype=wide)
        grad, value = grad_out.to(wide).reshape(size, *self.value.shape), self.value
        if self.slope is None:
            grads = torch.autograd.grad(
                value, self.aliases, grad.to(value.dtype), retain_graph=True, is_grads_batched=True
            )
            return [g.to(wide) for g in grads]
        (alias,) = self.aliases
        grad = grad.reshape(size, *alias.shape)
        if value.data_ptr() != alias.data_ptr():  # not the parameter's own memory
            # Not in place: it may be what others get, too.
            grad = grad * self.slope.reshape(alias.shape)
        return [grad]


class _PutIn(torch.autograd.Function):
    """``value`` in the use's shape; inputs: the use, and the parameters, which get None."""

    @staticmethod
    def forward(ctx: Any, use: Use, consume: UseConsumer, *params: Tensor) -> Tensor:
        ctx.use, ctx.consume, ctx.num_params = use, consume, len(params)
        ctx.set_materialize_grads(False)
        return use.value.detach().expand(use.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[None, ...]:
        if grad_out is not None:
            with autocast(grad_out.device.type, None, enabled=False):
                ctx.consume(ctx.use, grad_out)
        return (None, None, *(None,) * ctx.num_params)


def put_in(use: Use, consume: UseConsumer, params: Sequence[Tensor]) -> Tensor:
    """The use's value in its shape; in the backward pass ``consume`` gets the gradient there.

    Args:
        use: What is put in.
        consume: See ``UseConsumer``.
        params: The parameters, which get no gradient, so that their tensor hooks fire.
    """
    y: Tensor = _PutIn.apply(use, consume, *params)  # type: ignore[no-untyped-call]
    return y
