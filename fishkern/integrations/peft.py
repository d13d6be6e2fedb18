"""PEFT: trained base weights as an adapter that stock PEFT loads, and Fisher masks for its SHiRA.

SHiRA and Super-Tuning add sparse values to the weights of linear layers, as many in each layer as
their configuration says: SHiRA ``r * (in + out)``, Super-Tuning a share of its weights. Where fewer
changed, zeros fill it up. Fisher masks are far denser in some layers than in others, which would
make that wasteful: the densest travel whole where the file is smaller for it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fishkern.differences import Base, differing, matched
from fishkern.functional import topk_indices
from fishkern.interception import original_class
from fishkern.names import by_canonical_name, canonical_name, match, named_parameters, some

__all__ = ["export_adapter", "fisher_mask_fn"]

_PREFIX = "base_model.model."  # of every name in an adapter's file


class Change(NamedTuple):
    """What changed in the weight [out, in] of a linear layer."""

    weight: Tensor  # as it is now
    places: Tensor  # [n] flat positions, ascending
    values: Tensor  # [n] float32, after minus before


@torch.no_grad()
def export_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: Base,
    method: str = "shira",
    modules_to_save: str | Iterable[str] = (),
) -> None:
    """Write what training changed as an adapter for stock PEFT's ``from_pretrained(base, folder)``.

    PEFT adds the stored differences to the base's weights, so that the outputs are the trained
    model's up to the rounding of that addition; ``fishkern.save_delta`` is exact and smaller. Only
    the weights of ``nn.Linear`` layers fit into such an adapter. Modules named in
    ``modules_to_save`` travel whole; a change anywhere else is refused, never dropped.

    An entry takes 12 bytes with SHiRA and 8 with Super-Tuning. All layers have as many entries, in
    proportion, so layers that are far denser than the others travel whole too, where that makes the
    file smaller. On bfloat16 weights Super-Tuning rounds the differences to bfloat16 before it adds
    them, SHiRA only the sums.

    Args:
        model: The trained model, not a PEFT model; plain or with ``train_only`` attached.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        base: What training started from, as for ``fishkern.save_delta``.
        method: "shira", or "supertuning" where the installed PEFT has it.
        modules_to_save: Names, or globs, of modules that travel whole: a head, norms, embeddings,
            linear layers of which the bias changed.

    Raises:
        ValueError: Something changed that the adapter cannot hold, or PEFT would not find (the
            message names it); nothing changed in a linear layer; the method is not known; the
            base does not fit.
        TypeError: The model is a PEFT model, whose adapter ``save_pretrained`` writes.

    Example:
        >>> import copy, tempfile, peft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> base = copy.deepcopy(model)
        >>> _ = model[0].weight.data[2, 5].add_(0.5)  # the training
        >>> folder = tempfile.mkdtemp()
        >>> export_adapter(model, folder, base=base)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(peft.PeftModel.from_pretrained(base, folder)(x), model(x))
        True
    """
    _check_model(model)
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(map(repr, _METHODS))}")
    kind = _METHODS[method]()
    owners = _owners(model)
    saved = _modules_named(model, modules_to_save)
    pairs = matched(model, base)
    changes: dict[str, Change] = {}
    misfits = []
    for name, (before, after) in pairs.items():
        index = differing(before, after)
        kinds = owners.get(name, [])
        inside = name.startswith(_insides(saved))
        if not len(index) or (inside and len(kinds) < 2):
            continue
        if kinds == [nn.Linear] and after.dim() == 2 and not inside:
            new, old = after.flatten()[index], before.to(after.device).flatten()[index]
            values = (new.double() - old.double()).float()
            changes[name.removesuffix(".weight")] = Change(after, index, values)
        else:
            misfits.append(name)
    if misfits:
        raise ValueError(
            f"{some(misfits)} changed, for which {method} has no place (only for weights of "
            f"nn.Linear that are not tied): name their modules in modules_to_save, or, for tied "
            f"weights, use fishkern.save_delta and apply_delta"
        )
    if not changes:
        raise ValueError(
            "no weight of a linear layer differs from the base: pass the base as it was before "
            "training, or use fishkern.save_delta and apply_delta"
        )
    level, dense = _level(kind, changes)
    saved += dense
    tensors = {n: after for n, (_, after) in pairs.items() if n.startswith(_insides(saved))}
    targets = [name for name in changes if name not in dense]
    _check_apart(model, targets, saved)
    for name in targets:
        shape = changes[name].weight.shape
        filled = _filled(changes[name], kind.room(shape, level))
        tensors |= {f"{name}.{part}": tensor for part, tensor in kind.parts(shape, *filled).items()}
    config = kind.config(level)
    config.target_modules = "|".join(map(re.escape, targets))  # whole names, not ends of names
    config.modules_to_save = saved or None
    config.base_model_name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
    folder = Path(folder)
    config.save_pretrained(folder)
    owned = {_PREFIX + name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(owned, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def fisher_mask_fn(model: nn.Module, scores: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A ``mask_fn`` with which stock SHiRA trains the entries of largest Fisher information.

    Args:
        model: The model that ``peft.get_peft_model`` is called with next.
        scores: For each weight that SHiRA is to train its scores, as ``estimate_fisher`` makes
            them: float32, of the weight's shape.

    Returns:
        ``mask_fn(base_layer, r, **kwargs)``: a mask [out, in] with ``r * (in + out)`` ones, of the
        weight's dtype and device. It raises a ValueError for a layer that is not the model's, has
        no scores, or has fewer weights than that.

    Example:
        >>> import peft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> scores = {"0.weight": torch.rand(8, 8)}
        >>> config = peft.ShiraConfig(r=2, target_modules=["0"])
        >>> config.mask_fn = fisher_mask_fn(model, scores)
        >>> adapted = peft.get_peft_model(model, config)
        >>> adapted.base_model.model[0].shira_indices["default"].shape
        torch.Size([2, 32])
    """
    names = {param: name for name, param in named_parameters(model).items()}
    return _FisherMask(names, by_canonical_name(scores.items(), "scores"))


@dataclass(frozen=True, eq=False)
class _FisherMask:
    """``fisher_mask_fn``'s result: no closure, so that an adapted model can be pickled."""

    names: dict[nn.Parameter, str]  # which are told apart by identity
    scores: dict[str, Tensor]

    def __call__(self, base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        weight: Any = base_layer.weight
        name = self.names.get(weight)
        if name is None:
            raise ValueError(
                "SHiRA asks for the mask of a layer that is not of the model given to "
                "fisher_mask_fn: make the mask_fn with the model that get_peft_model adapts"
            )
        scores = self.scores.get(name)
        if scores is None or scores.shape != weight.shape:
            found = "none" if scores is None else list(scores.shape)
            raise ValueError(
                f"{name!r} has shape {list(weight.shape)}, its scores {found}: score it, or leave "
                f"its layer out of target_modules"
            )
        count = r * sum(weight.shape)
        if count > weight.numel():
            raise ValueError(
                f"r is {r}, for which {name!r} would train {count} of {weight.numel()} weights: "
                f"choose a smaller r"
            )
        (index,) = topk_indices([scores], count)
        mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        mask[index.to(weight.device)] = 1
        return mask.view(weight.shape)


class _Shira:
    """``level``: the rank that a LoRA with as many entries would have."""

    entry_bytes = 12

    def needed(self, change: Change) -> float:
        """The least level with room for a change."""
        return math.ceil(len(change.places) / sum(change.weight.shape))

    def room(self, shape: torch.Size, level: float) -> int:
        """How many entries a layer has."""
        return int(level) * sum(shape)

    def config(self, level: float) -> Any:
        """PEFT's. Its mask is not "random", so that loading draws none, only to replace it."""
        return peft.ShiraConfig(r=int(level), mask_type="fishkern", inference_mode=True)

    def parts(self, shape: torch.Size, places: Tensor, values: Tensor) -> dict[str, Tensor]:
        """A layer's tensors in the file."""
        rows_columns = torch.stack([places // shape[1], places % shape[1]])
        return {"shira_weight": values, "shira_indices": rows_columns.int()}


class _Supertuning:
    """``level``: the share of a layer's weights."""

    entry_bytes = 8

    def __init__(self) -> None:
        if not hasattr(peft, "SupertuningConfig"):
            raise ValueError(
                f'peft {peft.__version__} has no Super-Tuning: choose method="shira", or a newer '
                f"peft"
            )

    def needed(self, change: Change) -> float:
        """The least level with room for a change; half an entry more, as PEFT rounds down."""
        return min((len(change.places) + 0.5) / change.weight.numel(), 1.0)

    def room(self, shape: torch.Size, level: float) -> int:
        """How many entries a layer has: PEFT's own arithmetic."""
        return int(shape.numel() * (1 - (1 - level)))

    def config(self, level: float) -> Any:
        """PEFT's."""
        return peft.SupertuningConfig(sparsity=1 - level, inference_mode=True)

    def parts(self, shape: torch.Size, places: Tensor, values: Tensor) -> dict[str, Tensor]:
        """A layer's tensors in the file."""
        return {"supertuning_values": values, "supertuning_indices": places.int()}


_METHODS: dict[str, Callable[[], _Shira | _Supertuning]] = {
    "shira": _Shira,
    "supertuning": _Supertuning,
}


def _level(kind: _Shira | _Supertuning, changes: Mapping[str, Change]) -> tuple[float, list[str]]:
    """The level that makes the smallest file, and the layers too dense for it, which go whole."""
    choices = []
    for level in sorted({kind.needed(change) for change in changes.values()}):
        size, dense = 0, []
        for name, change in changes.items():
            weight, room = change.weight, kind.room(change.weight.shape, level)
            if kind.needed(change) <= level and room <= weight.numel():
                size += room * kind.entry_bytes
            else:
                size += weight.numel() * weight.element_size()
                dense.append(name)
        if len(dense) < len(changes):  # PEFT wants a layer to adapt
            choices.append((size, level, dense))
    if not choices:
        raise ValueError(
            f"{some(changes)} changed, too small a layer for SHiRA: use fishkern.save_delta and "
            f'apply_delta, or method="supertuning"'
        )
    _, level, dense = min(choices)
    return level, dense


def _check_apart(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    """PEFT finds the modules to save by the ends of names; no layer to adapt may be among them."""
    names = [canonical_name(name) for name, _ in model.named_modules()]
    for module in saved:
        taken = [name for name in names if name.endswith(module)]
        if clash := [t for t in targets if t in taken or t.startswith(_insides(taken))]:
            raise ValueError(
                f"PEFT would take {some(clash)} for {module!r}, which travels whole, since it "
                f"compares the ends of names: use fishkern.save_delta and apply_delta"
            )


def _filled(change: Change, count: int) -> tuple[Tensor, Tensor]:
    """Exactly ``count`` positions, ascending, and values: zeros at the first ones that are free."""
    weight, places, values = change
    free = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    free[places] = False
    more = free.nonzero().flatten()[: count - len(places)]
    places, order = torch.cat([places, more]).sort()
    return places, torch.cat([values, values.new_zeros(len(more))])[order]


def _insides(modules: list[str]) -> tuple[str, ...]:
    """What the names of the modules' parameters start with."""
    return tuple(name + "." for name in modules)


def _check_model(model: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError(
            "the model is a PEFT model: its save_pretrained writes its adapter, and "
            "fishkern.save_delta what changed in all of it"
        )


def _owners(model: nn.Module) -> dict[str, list[type[nn.Module]]]:
    """By the name of each parameter the classes of the modules that hold it: tied, several."""
    names = {param: name for name, param in named_parameters(model).items()}
    owners: dict[str, list[type[nn.Module]]] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(names[param], []).append(original_class(module))
    return owners


def _modules_named(model: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    """The modules that patterns match, without those inside of others of them."""
    names = [canonical_name(name) for name, _ in model.named_modules() if name]
    found = match(names, patterns, "modules_to_save")
    return [name for name in found if not name.startswith(_insides(found))]
