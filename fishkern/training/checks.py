"""What train_only asks of a mask and a model before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fishkern.names import suggest
from fishkern.selection.masks import SparseMask
from fishkern.tensors import is_sharded
from fishkern.training.leaves import CHILD


def check_model(model: nn.Module, handle: Any) -> None:
    """Refuse a model that something is wrapped around, or attached to.

    Args:
        model: The model.
        handle: That of what is attached to it already; None: nothing.

    Raises:
        ValueError: DataParallel, DistributedDataParallel or a compiled model is around it.
        RuntimeError: ``train_only`` is attached to it.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"the model is wrapped by {type(model).__name__}: attach train_only to the model "
            f"inside first, then wrap it"
        )
    if handle is not None:
        raise RuntimeError(
            f"train_only is attached already ({handle!r}): call fishkern.attached(model).remove() "
            f"first"
        )


def check_mask(model: nn.Module, params: Mapping[str, nn.Parameter], mask: SparseMask) -> None:
    """Refuse a mask that does not fit the model, or selects what cannot be trained.

    Raises:
        TypeError: It is not a SparseMask.
        ValueError: Names the parameter and the difference.
    """
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask is a {type(mask).__name__}: pass a SparseMask (fishkern.select)")
    if mask.num_selected == 0:
        raise ValueError("the mask selects nothing: there would be nothing to train")
    params = {name: p for name, p in params.items() if CHILD not in name.split(".")}
    for name in mask:
        if name not in params:
            raise ValueError(
                f"the mask names {name!r}, which the model does not have"
                f"{suggest(name, params)}: select again for this model"
            )
        param, shape = params[name], tuple(mask.shapes[name])
        if tuple(param.shape) != shape:
            raise ValueError(
                f"{name!r} has shape {list(param.shape)}, but the mask was made for "
                f"{list(shape)}: select again for this model"
            )
        if not param.is_floating_point():
            raise ValueError(
                f"{name!r} has dtype {param.dtype}: quantised and integer weights cannot be "
                f"trained; leave them out of the mask"
            )
        if is_sharded(param):
            raise ValueError(
                f"{name!r} is sharded (DTensor): train_only takes whole tensors; train with DDP"
            )
    names = {id(param): name for name, param in params.items()}
    for module in model.modules():
        name = names.get(id(module._parameters.get("weight")), "")
        if getattr(module, "max_norm", None) is not None and len(mask.get(name, ())):
            raise ValueError(
                f"{name!r} has max_norm={module.max_norm}, by which its module writes to it in "
                f"each forward, past the leaves: set max_norm to None, leave it out of the mask, "
                f"or train with FishSparseAdamW alone"
            )


def check_unshared(
    params: Mapping[str, nn.Parameter], mask: SparseMask, others: Iterable[Any]
) -> None:
    """Refuse entries of a weight that another attached model has, too: one step would undo another.

    Args:
        params: The model's.
        mask: What is to be trained of them.
        others: The handles of the other attached models.

    Raises:
        RuntimeError: Names the weight.
    """
    for handle in others:
        theirs = handle._ids()
        for name, param in params.items():
            whole = theirs.get(id(param))
            if whole or (whole is not None and len(mask.get(name, ()))):
                raise RuntimeError(
                    f"{name!r} is also in another model that train_only is attached to: attach to "
                    f"one model that has all that is shared, or call remove() on the other's handle"
                )
