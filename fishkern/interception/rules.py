"""The registry of layer types: what each computes, and what its gradients are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

_RULES: dict[str, Rule] = {}


class Rule(ABC):
    """One layer type. ``params`` holds the module's own tensors by their local names.

    A rule is stateless: it serves every module of its type. x is the module's one input,
    grad_out the gradient at its output, in the dtype of the output.
    """

    #: Local names of the parameters that the rule covers.
    params: ClassVar[tuple[str, ...]] = ("weight", "bias")
    #: How many trailing dimensions of x and of the output are features, not samples or tokens.
    feature_dims: ClassVar[int] = 1

    @abstractmethod
    def forward(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The module's output, exactly as the module computes it."""

    @abstractmethod
    def input_grad(self, params: Mapping[str, Tensor], x: Tensor, grad_out: Tensor) -> Tensor:
        """The gradient with respect to x."""

    @abstractmethod
    def param_grad(self, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """The dense gradient of one parameter, summed over all samples and tokens."""

    @abstractmethod
    def fisher_(self, fishers: Mapping[str, Tensor], x: Tensor, grad_out: Tensor) -> None:
        """Add the squares of the samples' own gradients to each accumulator, in place.

        Args:
            fishers: Float32 accumulators of the parameters' shapes by local name; any subset.
            x: ``[N, *, features]``, samples first.
            grad_out: ``[N, *, features]``, samples first.
        """


def register_rule(module_type: type[nn.Module] | str, rule: Rule) -> None:
    """Cover a layer type, for scoring and for training alike.

    Args:
        module_type: The exact type (a subclass may compute something else, so it needs a rule of
            its own), or its qualified name where its package should not be imported.
        rule: What the layer computes.
    """
    name = module_type if isinstance(module_type, str) else _qualified_name(module_type)
    _RULES[name] = rule


def rule_for(module_type: type[nn.Module]) -> Rule | None:
    """The rule of exactly this type, or None."""
    return _RULES.get(_qualified_name(module_type))


def _qualified_name(module_type: type) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"
