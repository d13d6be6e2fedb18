"""FishSparseAdamW: AdamW on the selected entries, with optimizer state for these alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fishkern.optim.arguments import as_groups, check_options
from fishkern.optim.calls import run_call
from fishkern.optim.checkpoint import (
    MASK_ELSEWHERE,
    add_masks,
    agree,
    apart,
    check_groups,
    check_mask,
    unpack_groups,
    unpack_masks,
    unpack_state,
)
from fishkern.optim.masters import restore_masters, saved_masters
from fishkern.optim.numerics import Numerics
from fishkern.optim.plans import Plan, check_leaves_on, make_call, make_plan, refuse_capture
from fishkern.optim.quantized import check_quantizable
from fishkern.optim.remasking import check_leaves, check_new_mask, exchange_leaves, remasked
from fishkern.optim.roles import (
    admit,
    check_distinct,
    check_group,
    check_trainable,
    group_owners,
    index_of,
    name_all,
)
from fishkern.optim.scaler import scaling
from fishkern.optim.states import States
from fishkern.optim.wrapping import without_idle_hooks
from fishkern.selection.masks import SparseMask

__all__ = ["FishSparseAdamW"]

# What is pickled beside torch's own.
OWN = ("_unlisted", "_owners", "_mask_is_computed", "_state_dtype", "_numerics")


class FishSparseAdamW(torch.optim.Optimizer):
    r"""AdamW that trains the entries in a mask and keeps state for nothing else.

    In place of ``torch.optim.AdamW`` in any loop. With p the selected values and g the selected
    gradient of a parameter, in float32, at step t::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Outside the mask not one bit changes: no decay, no rounding. The state is ``step`` (0-d
    float32), ``exp_avg`` and ``exp_avg_sq`` (with ``amsgrad`` also ``max_exp_avg_sq``): ``[k]``
    float32 for k selected entries, of the parameter's shape where all of it is trained, and also
    float32 where the parameter is bfloat16 or float16 (float64 where it is float64). It is built in
    the first step, which is not counted where lr = 0 and all gradients are zero: it moves nothing,
    and is how checkpoint libraries make a state to load into. The mask travels in
    ``state_dict()["param_groups"]``. There, leaves of narrower weights (``train_only``) have also a
    ``master``, their float32 values, which loading puts back.

    Args:
        params: As AdamW: parameters, (name, parameter) pairs, or groups of either. With a mask they
            need names: pass ``model.named_parameters()``. Frozen parameters outside the mask are
            left out.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, of the selected entries only.
        amsgrad: Divide by the running maximum of the second moment.
        mask: What to train; ``mask.bind(model)`` where a loop passes parameters without names.
            None trains everything given, as ``torch.optim.AdamW``.
        unlisted: What becomes of a trainable parameter that the mask does not know: "error",
            "train" (the whole of it) or "freeze" (it stays in its group, but never changes).
        maximize: Ascend instead of descend.
        foreach: Accepted as by AdamW, without effect: a step is a few calls anyway.
        capturable: Keep the step counts on the parameters' device, for CUDA graphs; call ``step()``
            once before capturing.
        differentiable: Not available.
        fused: Accepted as by AdamW, without effect.
        state_dtype: What the moments are kept in: float32; bfloat16; or uint8, a byte with, for
            each 32 entries, one byte that scales them (``exp_avg_scale``, ``exp_avg_sq_scale``).
            The update is made in float32, and what is kept is rounded up or down at random, by
            a hash of the step: see ``functional.masked_adamw_quantized_``. Not with ``amsgrad``,
            float64 or sharded parameters (refused in the first step), nor with another mask later.
        check_numerics: Look at what each step wrote, at the cost of some passes over the selected
            entries, a copy of them and their state, and one wait for the device. A step that wrote
            NaN or infinity is taken back, and refused with the tensors' names; updates that are
            lost in rounding in bfloat16 or float16 are warned of, once (``LostUpdateWarning``).
            Not with ``capturable`` or sharded parameters.

    Raises:
        ValueError: An argument out of range; a parameter that does not fit its mask, that the mask
            does not know, or that appears twice. At the first step: a mask entry that no parameter
            answers to.
        TypeError: ``mask`` is not a SparseMask.

    Example:
        >>> import torch, fishkern
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> mask = fishkern.SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
        >>> optimizer = FishSparseAdamW(model.named_parameters(), lr=0.1, mask=mask)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).flatten().nonzero().flatten().tolist()
        [1, 5]
    """

    writes_weights_of_leaves = True  # in the kernel, so that train_only need not after each step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        mask: SparseMask | None = None,
        unlisted: str = "error",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype = torch.float32,
        check_numerics: bool = False,
    ) -> None:
        check_options(mask, unlisted, differentiable, capturable, state_dtype, check_numerics)
        # AdamW itself checks its arguments, so that they are refused as in the installed torch.
        flags: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "fused": fused}
        defaults = torch.optim.AdamW(
            [torch.zeros(1)], lr, betas, eps, weight_decay, amsgrad, capturable=capturable, **flags
        ).defaults
        self._mask = mask
        self._unlisted = unlisted
        self._mask_is_computed = False  # then a checkpoint's mask takes its place
        self._plans: dict[int, Plan] = {}
        self._state_dtype = state_dtype
        self._numerics = Numerics() if check_numerics else None
        groups = as_groups(params)
        # A leaf and its dense parameter may stand in different groups: look at all of them first.
        named = mask is not None and not isinstance(groups, Tensor)
        self._owners: set[str] = group_owners(groups) if named else set()
        super().__init__(groups, defaults)
        self.state = States.of(self.state)
        self.register_state_dict_post_hook(add_masks, prepend=True)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler always calls ``step()``, and leaves unscaling and skipping to it.

        Only where it cannot do so itself: without a wait for the device, or with float16 gradients.
        Lightning refuses to clip gradients that ``step()`` unscales. Accelerate looks whether its
        own function in step's place is called, and lets the schedule advance then.
        """
        if str(getattr(self.__dict__.get("step"), "__module__", "")).startswith("accelerate."):
            return False
        return any(
            group["capturable"] or param.dtype is torch.float16
            for group in self.param_groups
            for param in group["params"]
        )

    @property
    def mask(self) -> SparseMask | None:
        """What is trained; from the first step on its indices are beside the parameters."""
        return self._mask

    @torch.no_grad()
    def set_mask(self, new_mask: SparseMask) -> None:
        """Train other entries from now on: call it between two steps.

        Entries that stay keep their moments and their number of steps; new ones start from zero
        with a count of their own; the state of those that leave is freed, and they keep their
        value. Where a parameter's entries have several counts, its ``step`` is ``[c]``, and
        ``cohorts`` ``[k]`` says which count is an entry's. An equal mask changes nothing. Capture
        a CUDA graph of the step anew.

        Args:
            new_mask: What to train, of the same parameters.

        Raises:
            TypeError: It is not a SparseMask.
            ValueError: It does not fit the parameters; the optimizer has no mask, moments in fewer
                bits, or leaves of ``train_only`` (``handle.set_mask`` then). Nothing is changed.

        Example:
            >>> import torch, fishkern
            >>> model = torch.nn.Linear(3, 2, bias=False)
            >>> first = fishkern.SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
            >>> second = fishkern.SparseMask({"weight": torch.tensor([1, 4])}, {"weight": (2, 3)})
            >>> optimizer = FishSparseAdamW(model.named_parameters(), mask=first)
            >>> model(torch.ones(1, 3)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.set_mask(second)
            >>> optimizer.step()
            >>> optimizer.state[model.weight]["step"].tolist()  # of entry 4, of entry 1
            [1.0, 2.0]
        """
        own = check_new_mask(new_mask, self._mask, self.param_groups, self.state)
        if new_mask == own:
            return
        states = remasked(self.param_groups, self.state, own, new_mask, self._unlisted)
        self.state.update(states)
        self._follow(new_mask)

    def _check_leaves(self, new_mask: SparseMask, mask: SparseMask, held: list[Tensor]) -> None:
        """Refuse what ``_exchange_leaves`` could not do; for ``handle.set_mask``.

        Raises:
            TypeError: The new mask is none.
            ValueError: This optimizer does not train the leaves ``held``, which have ``mask``.
        """
        own = check_new_mask(new_mask, self._mask, self.param_groups, self.state)
        check_leaves(self.param_groups, own, new_mask, mask, held)

    @torch.no_grad()
    def _exchange_leaves(self, new_mask: SparseMask, named: dict[str, Tensor]) -> None:
        """Train a model's new leaves in the place of its old ones; for ``handle.set_mask``."""
        assert self._mask is not None
        exchange_leaves(self.param_groups, self.state, self._mask, new_mask, named)
        self._owners = group_owners(self.param_groups)
        self._follow(new_mask)

    def _follow(self, mask: SparseMask) -> None:
        self._mask, self._mask_is_computed = mask, False
        self._plans.clear()  # and with them the packed state of what has left

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; names and mask are checked before anything changes.

        Raises:
            ValueError: As the constructor.
        """
        group = param_group
        if isinstance(group, dict) and not isinstance(group["params"], set):
            (group,) = as_groups([group])
            self._admit(group)
            group.pop("mask", None)  # of a group that was another optimizer's
            if self._mask is not None:
                group["mask"] = MASK_ELSEWHERE
        super().add_param_group(group)
        self._plans.clear()

    def _admit(self, group: dict[str, Any]) -> None:
        """Name the group's parameters, and drop those that the mask leaves out."""
        names, params = group.pop("param_names", None), group["params"]
        pairs = name_all(params, names, self._mask)
        if pairs is not None:
            if self._mask is not None:
                owners = group_owners([*self.param_groups, {"params": pairs}])
                pairs = admit(pairs, self._mask, self._unlisted, owners | self._owners)
            names, params = [name for name, _ in pairs], [param for _, param in pairs]
            group["param_names"], group["params"] = names, params
        before = set(chain.from_iterable(g.get("param_names", ()) for g in self.param_groups))
        check_distinct(names or (), params, before)
        for i, param in enumerate(params):
            if isinstance(param, Tensor) and param.requires_grad:
                check_trainable(names[i] if names else f"parameter {i}", param)

    @without_idle_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the selected entries of every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: The mask has an entry that no parameter answers to.
            RuntimeError: A gradient is sparse, a state lacks something, a GradScaler has checked no
                gradient, every leaf of ``train_only`` is frozen, or ``check_numerics`` found NaN or
                infinity in what was written, which has then been taken back.
        """
        self._accelerator_graph_capture_health_check()
        plans = [self._plan(i, group) for i, group in enumerate(self.param_groups)]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            amp = scaling(self)
            if amp is None:
                return loss
            # Everything is gathered before the first call: a refusal leaves all as it was.
            calls = [
                (call, group)
                for plan, group in zip(plans, self.param_groups, strict=True)
                for batch in plan.batches
                if (call := make_call(batch, self.state, group)) is not None
            ]
            if len(calls) < sum(len(plan.batches) for plan in plans):
                check_leaves_on(plans)
            if self._numerics is not None:
                self._numerics.run(calls, self.state, amp)
                return loss
            for call, group in calls:
                run_call(call, group, *amp)
        return loss

    def _plan(self, i: int, group: dict[str, Any]) -> Plan:
        """The plan of group i, made anew if somebody has exchanged or moved its parameters."""
        plan = self._plans.get(i)
        if plan is not None and plan.holds(group["params"]):
            return plan
        refuse_capture(group["params"])
        check_quantizable(group, self._state_dtype)
        indices = self._indices(group)
        if plan is not None and len(plan.params) == len(group.get("param_names", ())):
            # Same name and shape, another tensor: its moments go with the name.
            for old, new in zip(plan.params, group["params"], strict=True):
                if old.shape == new.shape and old in self.state and not self.state.get(new):
                    self.state[new] = self.state.pop(old)
        plan = self._plans[i] = make_plan(group["params"], indices, self.state, self._state_dtype)
        if self._mask is not None:
            # The plan's indices lie packed: held by the mask too, they are held once.
            held = plan.packed_indices()
            self._mask = self._mask._with_indices(
                {
                    name: held[id(param)]
                    for name, param, index in zip(
                        group["param_names"], group["params"], indices, strict=True
                    )
                    if index is not None and name in self._mask and id(param) in held
                }
            )
        return plan

    def _indices(self, group: dict[str, Any]) -> list[Tensor | None]:
        """For each of the group's parameters the positions to train, None for all."""
        params = group["params"]
        if self._mask is None:
            return [None] * len(params)
        check_group(group, self.param_groups, self._mask)
        devices = {param.device for g in self.param_groups for param in g["params"]}
        if len(devices) == 1:
            self._mask = self._mask.to(devices.pop())  # held once, where it is used
        return [index_of(name, self._mask, self._unlisted) for name in group["param_names"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; moments keep their type and are moved beside their parameters.

        The tensors are copied. A checkpoint's mask must be the optimizer's, but takes its place
        where the optimizer's was computed by ``create_fish_optimizer``. Without masks, checkpoints
        of ``torch.optim.AdamW`` fit, also bfloat16 moments, which become float32.

        Raises:
            ValueError: The groups, the mask or a moment do not fit, or the checkpoint has another
                ``state_dtype``; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved, own = state_dict["param_groups"], self.param_groups
        check_groups(saved, own)
        mask = agree(unpack_masks(saved), self._mask, self._mask_is_computed)
        if mask is not None and mask is not self._mask:
            check_mask(mask, own, self._unlisted)
        state = unpack_state(
            state_dict["state"], saved, own, mask, self._unlisted, self._state_dtype
        )
        masters = saved_masters(state_dict, own)
        self._mask = mask
        self.__setstate__({"state": state, "param_groups": unpack_groups(saved, own)})
        restore_masters(masters)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in OWN}
        state = super().__getstate__()
        state["state"], mask = apart(state["state"], self._mask)
        return {**state, **own, "_mask": mask}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled = "_optimizer_state_dict_post_hooks" not in self.__dict__
        super().__setstate__(state)
        self.state = States.of(self.state)
        self._plans = {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group["decoupled_weight_decay"] = True  # also if Adam has written the checkpoint
        if unpickled:
            self.register_state_dict_post_hook(add_masks, prepend=True)
