"""The first training forward, watched: a selected weight that is used past its leaf trains nothing.

Whoever reads ``module.weight`` gets an alias, but a Parameter object that was saved in a variable
before attaching escapes it, and so does a layer that runs without gradients though its model is
trained. Both are found in one forward, whose operations pass by here; later ones cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fishkern.names import some

# What they return has no gradient for the weight in any training.
_WITHOUT_GRADIENT = ("detach", "detach_", "data", "grad")


class ForwardWatch(TorchFunctionMode):
    """Notes which of the weights are used, and refuses a use in grad mode.

    Args:
        weights: The weights with selected entries, by their names.
        leaves: Their leaves, by the same names, as far as they are trained.
    """

    def __init__(self, weights: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._leaves = leaves
        self._used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and look at its arguments."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            name = self._names.get(id(tensor))
            if name is None or not _has_gradient(func, result, tensor):
                continue
            if not torch.is_grad_enabled():  # so a rule reads it, too
                self._used.add(name)
            else:
                raise RuntimeError(
                    f"{name!r} is used by {_name(func)} through a Parameter object that was saved "
                    f"before train_only was attached: its selected entries would not be trained. "
                    f"Read it from its module where it is used (module.weight), or leave it out of "
                    f"the mask"
                )
        return result

    def check(self, output: Any) -> None:
        """Refuse weights that were used, but from which no gradient comes to their leaves.

        Raises:
            RuntimeError: Names them.
        """
        if not isinstance(output, (Tensor, tuple, list, Mapping)):
            output = vars(output) if hasattr(output, "__dict__") else ()
        roots = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
        if not roots:
            return  # nothing to train by this output, which backward says
        reached = _reached(roots)
        if reached is None:
            return
        trained = self._used & self._leaves.keys()
        lost = [name for name in sorted(trained) if id(self._leaves[name]) not in reached]
        if lost:
            raise RuntimeError(
                f"{some(lost)}: used in this forward, but no gradient comes to the selected "
                f"entries. A checkpoint with use_reentrant=True gives none if its inputs require "
                f"none: choose use_reentrant=False, or call model.enable_input_require_grads(). "
                f"What runs under torch.no_grad() is not trained: leave it out of the mask"
            )


def _has_gradient(func: Any, result: Any, weight: Tensor) -> bool:
    """Whether a gradient at the result would be one for the weight."""
    name = _name(func)
    if name in _WITHOUT_GRADIENT or name.startswith("new_") or name.endswith("_like"):
        return False
    return any(t is not weight and t.is_floating_point() for t in _tensors(result))


def _name(func: Any) -> str:
    """A function's name; that of the property for a getter."""
    name: str = getattr(func, "__name__", repr(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)


def _reached(roots: list[Any]) -> set[int] | None:
    """The leaf tensors of a graph, by their ids; None where a reentrant checkpoint hides some."""
    seen, reached, left = set(roots), set(), list(roots)
    while left:
        node = left.pop()
        if "heckpoint" in node.name():
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            reached.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)
    return reached
