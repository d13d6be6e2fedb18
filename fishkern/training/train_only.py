"""``train_only``: the selected entries become the model's only trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fishkern.interception import ATTACHMENT, exchange_class, original_class, rule_for
from fishkern.names import named_parameters, some
from fishkern.selection.masks import SparseMask
from fishkern.tensors import gather, is_sharded, wide_dtype
from fishkern.training.checks import check_mask, check_model, check_unshared
from fishkern.training.leaves import CHILD, SHARDED, Leaves
from fishkern.training.owners import owner_members
from fishkern.training.remasking import carry_over
from fishkern.training.report import report
from fishkern.training.steps import follow, followed, forget
from fishkern.training.tracing import has_compiled_parts, is_traced
from fishkern.training.watch import ForwardWatch

__all__ = ["Handle", "attached", "train_only"]


def train_only(model: nn.Module, mask: SparseMask, *, unlisted: str = "error") -> Handle:
    """Make the selected entries the model's only trainable parameters.

    Each tensor with selected entries gets one 1-D float32 leaf parameter with their values, and
    every dense weight is frozen. From then on the model has exactly ``mask.num_selected`` trainable
    numbers: gradients, clipping, accumulation, DDP and any elementwise optimizer see these alone.
    The weights follow the leaves after each optimizer step; ``state_dict()`` keeps its keys.

    Attach before building the optimizer and before wrapping the model.

    Args:
        model: The model; changed in place until ``handle.remove()``.
        mask: What to train, by the names of ``model.named_parameters()``.
        unlisted: What becomes of a trainable parameter that the mask does not know: "error",
            "train" (it stays an ordinary trainable parameter), or "freeze".

    Returns:
        The handle; also ``fishkern.attached(model)``.

    Raises:
        TypeError: ``mask`` is not a SparseMask.
        ValueError: The mask does not fit the model, or the model is a wrapper.
        RuntimeError: The model, a part of it, or a model that shares a weight is attached already.

    Example:
        >>> import torch, fishkern
        >>> model = torch.nn.Linear(3, 2)
        >>> mask = fishkern.SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
        >>> handle = fishkern.train_only(model, mask, unlisted="freeze")
        >>> [(name, p.numel()) for name, p in handle.named_parameters()]
        [('fishkern_leaves.weight', 2)]
        >>> optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> handle.remove()
    """
    check_model(model, attached(model))
    params = named_parameters(model)
    check_mask(model, params, mask)
    check_unshared(params, mask, followed())
    strangers = [n for n, p in params.items() if p.requires_grad and n not in mask]
    if unlisted not in ("error", "train", "freeze"):
        raise ValueError(f'unlisted is {unlisted!r}: choose "error", "train" or "freeze"')
    if strangers and unlisted == "error":
        raise ValueError(
            f"{some(strangers)} {'is' if len(strangers) == 1 else 'are'} "
            f'trainable but not in the mask: choose unlisted="train" or unlisted="freeze", or call '
            f"requires_grad_(False) on them"
        )
    handle = Handle(model, mask, keep_trainable=set(strangers) if unlisted == "train" else set())
    handle._attach()
    return handle


def attached(model: nn.Module) -> Handle | None:
    """The handle of a model that ``train_only`` is attached to, or is part of one; or None.

    Example:
        >>> import torch, fishkern
        >>> model = torch.nn.Linear(3, 2)
        >>> mask = fishkern.SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
        >>> handle = fishkern.train_only(model, mask, unlisted="freeze")
        >>> attached(model) is handle, attached(torch.nn.Linear(3, 2))
        (True, None)
    """
    found = (module.__dict__.get(ATTACHMENT) for module in model.modules())
    handle: Handle | None = next((handle for handle in found if handle is not None), None)
    return handle


class Handle:
    """What ``train_only`` did to a model, and how to undo it. Usable with ``with``.

    It holds modules and names, never tensors, so that a deepcopy or a pickle of the model carries
    a handle of its own.
    """

    def __init__(self, model: nn.Module, mask: SparseMask, keep_trainable: set[str]) -> None:
        self._model = model
        self._mask = mask
        names = {id(param): name for name, param in named_parameters(model).items()}
        self._dense = [
            (module, local, names[id(param)])
            for module in model.modules()
            for local, param in module._parameters.items()
            if param is not None
        ]
        self._flags = self._current_flags()
        self._keep_trainable = keep_trainable
        self._watched = False  # whether a first forward has shown that all leaves get gradients

    @property
    def mask(self) -> SparseMask:
        """What is trained."""
        return self._mask

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The leaves, named as in ``model.named_parameters()``."""
        for name, param in self._model.named_parameters():
            if CHILD in name.split("."):
                yield name, param

    def parameters(self) -> Iterator[nn.Parameter]:
        """The leaves."""
        return (leaf for _, leaf in self.named_parameters())

    def sync(self) -> None:
        """Bring leaves and weights together (done after every optimizer step)."""
        for leaves in self._leaves():
            leaves.sync()

    def report(self) -> str:
        """A table: each trained tensor, how its gradient is formed, and what that costs.

        After a training forward it also says what other modules keep with it, and which weights
        are read otherwise than by their layers' rules, so that the dense gradient is formed.

        Raises:
            RuntimeError: The handle was removed.
        """
        self._check_attached()
        return report(self._dense, self._mask)

    @torch.no_grad()
    def set_mask(self, new_mask: SparseMask, optimizer: Any) -> None:
        """Train other entries from now on: call it between a step and the next forward.

        The leaves are made anew. Entries that stay keep their float32 values, moments and numbers
        of steps; new ones start from the weights' values; those that leave stay in the weights,
        rounded. A tensor that the new mask does not name has no selected entries. Whoever else
        holds the old leaves has to be built anew: DDP, averages (EMA, SWA), schedules of one's own.

        Args:
            new_mask: What to train.
            optimizer: The ``FishSparseAdamW`` that holds the leaves. In any other the moments would
                silently go to other entries.

        Raises:
            TypeError: Another optimizer, or no mask.
            ValueError: The mask does not fit the model, or the optimizer not the leaves. Nothing is
                changed.
            RuntimeError: The handle was removed.

        Example:
            >>> import torch, fishkern
            >>> model = torch.nn.Linear(3, 2, bias=False)
            >>> first = fishkern.SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
            >>> second = fishkern.SparseMask({"weight": torch.tensor([4])}, {"weight": (2, 3)})
            >>> handle = fishkern.train_only(model, first)
            >>> optimizer = fishkern.FishSparseAdamW(model.named_parameters(), mask=first)
            >>> handle.set_mask(second, optimizer)
            >>> [(name, p.numel()) for name, p in handle.named_parameters()]
            [('fishkern_leaves.weight', 1)]
        """
        if not hasattr(optimizer, "_exchange_leaves"):
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}, whose moments would go to other "
                f"entries: train with fishkern.FishSparseAdamW (pass what a wrapper holds), or "
                f"call handle.remove(), train_only with the new mask, and build the optimizer anew"
            )
        self._check_attached()
        params = named_parameters(self._model)
        check_mask(self._model, params, new_mask)
        check_unshared(params, new_mask, followed() - {self})
        if whole := sorted(self._keep_trainable & {n for n in new_mask if len(new_mask[n])}):
            raise ValueError(
                f'{whole[0]!r} is trained whole (unlisted="train"): leave it out of the new mask'
            )
        old = self._all_leaves()
        optimizer._check_leaves(new_mask, self._mask, list(old.values()))
        if new_mask == self._mask:
            return
        self.sync()
        before = self._mask
        for leaves in self._detach().values():
            leaves.unregister()
        self._mask, self._watched = new_mask, False
        self._attach()
        carry_over(self._all_leaves(), old, new_mask, before)
        self.sync()
        optimizer._exchange_leaves(new_mask, named_parameters(self._model))

    def remove(self) -> None:
        """Synchronise, then leave the model as it was, with the trained weights in it."""
        if not any(True for _ in self._leaves()):
            return
        self.sync()
        for leaves in self._detach().values():
            leaves.unregister()
        self._restore_flags(self._flags)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it was before attaching, with its flags; attached again afterwards."""
        self.sync()
        now = self._current_flags()
        stashed = self._detach()
        self._restore_flags(self._flags)
        try:
            yield
        finally:
            self._attach(stashed)
            self._restore_flags(now)

    def watched(self, call: Callable[[], Any]) -> Any:
        """Call the model, and look on in its first forward in grad mode.

        From outside the call: a KeyboardInterrupt in it passes by all forward hooks.
        """
        if self._watched or not torch.is_grad_enabled() or has_compiled_parts(self._model):
            return call()
        watch = ForwardWatch(*self._weights_and_leaves())
        with watch:
            output = call()
        watch.check(output)
        self._watched = True
        return output

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if attached(self._model) is self else "removed"
        return f"<train_only handle, {self._mask.num_selected:,} trained numbers, {state}>"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        follow(self)

    def _check_attached(self) -> None:
        if attached(self._model) is not self:
            raise RuntimeError("train_only was removed from the model: call train_only again")

    def _leaves(self) -> Iterator[Leaves]:
        for module in {module: None for module, _, _ in self._dense}:
            if isinstance(child := module._modules.get(CHILD), Leaves):
                yield child

    def _all_leaves(self) -> dict[str, nn.Parameter]:
        """The leaves by the names of their weights."""
        return {
            name: leaf
            for module, local, name in self._dense
            if isinstance(child := module._modules.get(CHILD), Leaves)
            and (leaf := child._parameters.get(local)) is not None
        }

    def _ids(self) -> dict[int, bool]:
        """The ids of all weights, and whether each is trained whole."""
        return {id(m._parameters.get(k)): n in self._keep_trainable for m, k, n in self._dense}

    def _weights_and_leaves(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The dense weights with leaves, and the leaves that are trained, by the weights' names."""
        weights, trained = {}, {}
        for module, local, name in self._dense:
            child = module._modules.get(CHILD)
            if isinstance(child, Leaves) and (leaf := child._parameters.get(local)) is not None:
                weight = module._parameters[local]
                if not isinstance(weight, nn.Parameter):
                    continue  # lent by torch.func.functional_call
                weights[name] = weight
                if leaf.requires_grad and not is_sharded(leaf):
                    trained[name] = leaf
        return weights, trained

    def _current_flags(self) -> dict[str, bool]:
        return {
            name: weight.requires_grad
            for module, local, name in self._dense
            if (weight := module._parameters.get(local)) is not None
        }

    def _restore_flags(self, flags: dict[str, bool]) -> None:
        for module, local, name in self._dense:
            if (weight := module._parameters.get(local)) is not None and name in flags:
                weight.requires_grad_(flags[name])

    def _freeze(self) -> None:
        """Adapter libraries switch their weights' flags: the dense weights stay frozen."""
        for module, local, name in self._dense:
            weight = module._parameters.get(local)
            if not isinstance(weight, nn.Parameter) or name in self._keep_trainable:
                continue  # none, or lent by torch.func.functional_call
            if weight.requires_grad:
                weight.requires_grad_(False)
                weight.grad = None

    def _attach(self, stashed: dict[nn.Module, Leaves] | None = None) -> None:
        try:
            self._attach_all(stashed)
        except BaseException:
            self._detach()
            self._restore_flags(self._flags)
            raise

    @torch.no_grad()
    def _attach_all(self, stashed: dict[nn.Module, Leaves] | None = None) -> None:
        owners: dict[nn.Module, list[tuple[str, str]]] = {}
        for module, local, name in self._dense:
            if name in self._mask and len(self._mask[name]):
                owners.setdefault(module, []).append((local, name))
        leaves: dict[str, nn.Parameter] = {}
        if stashed is None:
            self._watched = False
        for module, entries in owners.items():
            if stashed is not None:
                child = stashed[module]
            else:
                child = Leaves(module)
                for local, name in entries:
                    weight = module._parameters[local]
                    assert weight is not None
                    indices = self._mask[name].to(weight.device)
                    if name not in leaves:  # a tied weight has one leaf
                        leaves[name] = nn.Parameter(gather(weight, indices, wide_dtype(weight)))
                    child.add(local, leaves[name], indices)
            names = tuple(local for local, _ in entries)
            rule = rule_for(module)
            by_rule = rule is not None and rule.selects and set(names) <= set(rule.params)
            child.__dict__[ATTACHMENT] = self  # so that any part of the model leads here
            module._modules[CHILD] = child
            exchange_class(module, owner_members(names, by_rule, module is self._model))
        if self._model not in owners:
            exchange_class(self._model, owner_members((), False, True))
        self._freeze()
        self._model.register_forward_pre_hook(_before_forward)
        self._model.__dict__[ATTACHMENT] = self
        follow(self)

    def _detach(self) -> dict[nn.Module, Leaves]:
        stashed = {}
        for module in {module for module, _, _ in self._dense}:
            if isinstance(child := module._modules.get(CHILD), Leaves):
                stashed[module] = child
                del module._modules[CHILD]
                module.__class__ = original_class(module)
        self._model.__class__ = original_class(self._model)
        hooks = self._model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _before_forward]:
            del hooks[key]
        self._model.__dict__.pop(ATTACHMENT, None)
        forget(self)
        return stashed


def _before_forward(model: nn.Module, args: Any) -> None:
    """Bring both copies of each value together before they are used."""
    handle: Handle | None = model.__dict__.get(ATTACHMENT)
    if handle is None or is_traced():
        return  # a traced graph holds no such checks; each optimizer step brings them together
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2 has gathered it for this forward
        raise RuntimeError(SHARDED)
    handle._freeze()
    for leaves in handle._leaves():
        # On a GPU the full comparison would cost launches in each step: there, in training, only
        # what a version counter shows is looked at.
        leaves.sync(thorough=not (model.training and leaves.on_gpu), strict=True)
