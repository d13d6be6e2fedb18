"""The registry of layer types: what the gradients of each are made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from fishkern.tensors import wide_dtype

_RULES: dict[str, Rule] = {}

NO_MASKS: Mapping[str, Tensor | None] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Selection:
    """Selected entries of one parameter, as its rule prepared them, once for a mask.

    Attributes:
        indices: Flat positions in the parameter, ascending ``[k]``.
        columns: Those features of the layer's input, ascending ``[C]``, that their gradient needs;
            None: all. A rule that names columns reads no x in ``input_grad``.
        plan: What else the rule worked out.
        route: How the gradient is formed, in a word or two, for people.
        kept: The share of the input's features that ``columns`` are.
        work: The expected share of the dense gradient's cost.
    """

    indices: Tensor
    columns: Tensor | None = None
    plan: object = None
    route: str = "by the rule"
    kept: float = 1.0
    work: float = 1.0


class Rule:
    """How a layer's gradients follow from its input x and the gradient grad_out at its output.

    One method is needed, ``sample_grads``; the others have defaults made of it and of the layer's
    own forward, to be replaced where there is a cheaper way. With a ``selected_grad`` the rule
    serves ``train_only``, too, which otherwise leaves the layer's gradients to autograd. A rule is
    stateless: it serves every module of its type. ``params`` names the module's parameters that it
    covers. A ``fisher_`` of the rule's own has to take ``sample_scores`` and ``masks``, which the
    self-check and sums by sample give it; where it is left out, the default does so.

    Example:
        A layer that scales its features:

        >>> import torch, fishkern
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(features))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> class ScaleRule(fishkern.Rule):
        ...     params = ("weight",)
        ...     def sample_grads(self, module, x, grad_out):
        ...         return {"weight": (grad_out * x).sum(1)}  # over the tokens
        >>> fishkern.register_rule(Scale, ScaleRule())
    """

    #: Local names of the parameters that the rule covers.
    params: ClassVar[tuple[str, ...]] = ("weight", "bias")
    #: Those of them that a module of the type may lack.
    optional: ClassVar[tuple[str, ...]] = ()
    #: Whether autocast lets the layer compute in the narrow dtype, so that the input is kept in it.
    autocasts: ClassVar[bool] = False
    #: Whether an input of length 1 in dimension 0 (position ids) may stand for every sample.
    broadcasts: ClassVar[bool] = False

    def covers(self, module: nn.Module) -> bool:
        """Whether this module, of the rule's type, is one that the rule describes.

        Scoring asks at each call, too.
        """
        return True

    def reads_input(self, names: Iterable[str]) -> bool:
        """Whether x, not only its shape, is needed for these parameters or for the input."""
        return True

    def input_dims(self, module: nn.Module) -> int | None:
        """How many trailing dimensions of x are features: not samples, not tokens.

        None: all but the first, however many there are.
        """
        return 1

    def output_dims(self, module: nn.Module) -> int | None:
        """The same of the output."""
        return 1

    def settings(self, module: nn.Module) -> object:
        """What the gradients depend on besides x and grad_out.

        Uses of a tied parameter by several modules are joined if it is equal; by default it is the
        module itself.
        """
        return module

    def sample_grads(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        """Each sample's own gradients.

        Args:
            module: The layer; its parameters are not needed most often.
            x: ``[N, T, *features]``: N samples of T tokens.
            grad_out: ``[N, T, *features]``.

        Returns:
            For each parameter by its local name ``[N, *shape]``.
        """
        # each rule has its own: the one method that it must give
        raise NotImplementedError(f"{type(self).__name__} has no sample_grads")

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
        """Add the squares of the samples' gradients to float32 accumulators, in place.

        Args:
            module: The layer.
            fishers: Accumulators of the parameters' shapes by local name; any subset.
            x: As for ``sample_grads``.
            grad_out: As for ``sample_grads``.
            sample_scores: Accumulator ``[N]``: sample n's squares, summed over the entries.
            masks: Which entries count in ``sample_scores``, bool by local name; None, or no mask:
                all.
        """
        for name, squares in self.sample_squares(module, fishers, x, grad_out).items():
            fishers[name].add_(squares.sum(0))
            if sample_scores is not None:
                sample_scores += sum_by_sample(squares, masks.get(name))

    def sample_squares(
        self, module: nn.Module, fishers: Mapping[str, Tensor], x: Tensor, grad_out: Tensor
    ) -> dict[str, Tensor]:
        """The squares of ``sample_grads`` of the parameters in ``fishers``, in its dtypes."""
        wide = wide_dtype(grad_out)
        x = x.to(wide) if x.is_floating_point() else x
        grads = self.sample_grads(module, x, grad_out.to(wide))
        return {name: grads[name].to(fisher.dtype).square() for name, fisher in fishers.items()}

    def param_grad(self, module: nn.Module, name: str, x: Tensor, grad_out: Tensor) -> Tensor:
        """The dense gradient of one parameter, over everything there is, in any layout."""
        x = _one_sample(x, self.input_dims(module))
        grad_out = _one_sample(grad_out, self.output_dims(module))
        return self.sample_grads(module, x, grad_out)[name][0]

    @property
    def selects(self) -> bool:
        """Whether ``train_only`` runs such layers by this rule: if it has a ``selected_grad``.

        Other layers' dense gradients are formed by autograd, which is good at it, and freed.
        """
        return type(self).selected_grad is not Rule.selected_grad

    def prepare(self, module: nn.Module, name: str, indices: Tensor) -> Selection:
        """Work out, once for a mask, how one parameter's selected entries get their gradient."""
        return Selection(indices)

    def selected_grad(
        self, module: nn.Module, name: str, selection: Selection, x: Tensor, grad_out: Tensor
    ) -> Tensor:
        """The selected entries of one parameter's gradient, ``[k]``.

        Args:
            module: The layer.
            name: The parameter's local name.
            selection: What ``prepare`` returned for it.
            x: The input in any layout: only ``selection.columns`` of its features, if they are
                named.
            grad_out: The gradient at the output.
        """
        # of rules with ``selects`` alone: no other is asked
        raise NotImplementedError(f"{type(self).__name__} has no selected_grad")

    def input_grad(self, module: nn.Module, x: Tensor, grad_out: Tensor) -> Tensor:
        """The gradient at x; by default the layer's forward is computed again for it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = original_class(module).forward(module, x)
        return torch.autograd.grad(y, x, grad_out)[0]


def register_rule(module_type: type[nn.Module] | str, rule: Rule) -> None:
    """Cover a layer type, for scoring and for training alike.

    Args:
        module_type: The exact type (a subclass may compute something else, so it needs a rule of
            its own), or its qualified or bare name where its package should not be imported. A
            name with an asterisk stands for every class whose bare name fits and that has no rule
            of its own; ``rule.covers`` then has to find out what each computes.
        rule: How its gradients are made.

    Raises:
        TypeError: No rule, or one whose own ``fisher_`` takes other arguments than ``Rule``'s.

    Example:
        A subclass that computes what its base computes:

        >>> import torch, fishkern
        >>> from fishkern.interception.linear import LinearRule
        >>> class MyLinear(torch.nn.Linear):
        ...     pass
        >>> fishkern.register_rule(MyLinear, LinearRule())
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is {rule!r}: pass an instance of a subclass of fishkern.Rule")
    taken = inspect.signature(rule.fisher_).parameters
    missing = [name for name in ("sample_scores", "masks") if name not in taken]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(
            f"{type(rule).__name__}.fisher_ takes no {' and no '.join(missing)}: give it all "
            f"arguments of Rule.fisher_, or leave it out (its default needs sample_grads alone)"
        )
    name = module_type if isinstance(module_type, str) else _qualified_name(module_type)
    _RULES[name] = rule


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before fishkern exchanged it."""
    cls: type[nn.Module] = getattr(type(module), "_fishkern_original", type(module))
    return cls


def registered(cls: type[nn.Module]) -> Rule | None:
    """The rule of exactly this type, else of its bare name, else of a pattern that it fits."""
    exact = _RULES.get(_qualified_name(cls)) or _RULES.get(cls.__name__)
    if exact is not None:
        return exact
    patterns = ((name, rule) for name, rule in _RULES.items() if "*" in name)
    return next((rule for name, rule in patterns if fnmatchcase(cls.__name__, name)), None)


def rule_for(module: nn.Module) -> Rule | None:
    """The module's rule, if its forward and its parameters are what the rule describes."""
    if "forward" in module.__dict__:  # somebody replaced this one module's forward
        return None
    rule = registered(original_class(module))
    # Parameters may be made anew for each call, from others (weight_norm and pruning by hooks).
    if rule is None or not module._parameters.keys() >= set(rule.params) - set(rule.optional):
        return None
    return rule if rule.covers(module) else None


def sum_by_sample(squares: Tensor, mask: Tensor | None) -> Tensor:
    """``[N]``: the sum of each sample's ``[N, *shape]`` over the entries in a mask ``[*shape]``."""
    if mask is not None:
        squares = squares.masked_fill(~mask, 0.0)
    return squares.unsqueeze(-1).flatten(1).sum(1)  # also of a single entry, [N]


def _one_sample(tensor: Tensor, feature_dims: int | None) -> Tensor:
    """All samples and tokens as the tokens of one sample."""
    lead = 1 if feature_dims is None else tensor.dim() - feature_dims
    return tensor.reshape(1, -1, *tensor.shape[lead:])


def _qualified_name(module_type: type) -> str:
    return f"{module_type.__module__}.{module_type.__qualname__}"
