"""Which parameters of a model are scored, and the model as it is meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fishkern.interception import original_parameters
from fishkern.names import match, named_parameters
from fishkern.scoring.one_sample import CUT_OFF
from fishkern.scoring.preserve import scoring_mode
from fishkern.tensors import is_sharded


@contextmanager
def scored(model: nn.Module, params: Any) -> Iterator[dict[str, nn.Parameter]]:
    """The model as it is while it is scored, and as before afterwards; yields the candidates."""
    with ExitStack() as stack:
        stack.enter_context(original_parameters(model))
        candidates = find_candidates(model, params)
        stack.enter_context(scoring_mode(model, candidates.values()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", CUT_OFF)
        yield candidates


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's, DataParallel's and ``torch.compile``'s wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_candidates(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """The parameters to score, by canonical name: see ``estimate_fisher``."""
    known = named_parameters(model)
    if params is None:
        chosen = [name for name, param in known.items() if param.requires_grad]
        if not chosen:
            raise ValueError(
                "no parameter requires a gradient: call requires_grad_(True) on those to score, "
                "or name them with params="
            )
    else:
        chosen = match(known, params, "params")
        if not chosen:
            raise ValueError("params holds no pattern: pass None for all that require a gradient")
    for name in chosen:
        param = known[name]
        if param.is_complex():
            raise ValueError(
                f"{name!r} has dtype {param.dtype}: the scores of complex parameters are not "
                f"defined here; leave it out of params="
            )
        if not param.is_floating_point():
            raise ValueError(
                f"{name!r} has dtype {param.dtype}: quantised and integer weights have no "
                f"gradient; leave it out of params="
            )
        if is_sharded(param):
            raise ValueError(f"{name!r} is sharded (DTensor): score the model before sharding it")
    return {name: known[name] for name in chosen}
