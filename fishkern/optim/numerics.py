"""What a step wrote, looked at: numbers that are not finite, and updates lost in rounding.

A step is made, and the host reads two counts for each call, at once; which tensors they are of is
asked where there is something to say. Nothing here runs unless ``check_numerics=True``. It takes a
few passes over the selected entries, and a copy of them and of their state while the step lasts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishkern.names import some
from fishkern.optim.arguments import CAPTURABLE
from fishkern.optim.calls import run_call
from fishkern.optim.plans import Call
from fishkern.optim.quantized import moment_of
from fishkern.optim.states import MOMENTS, State
from fishkern.tensors import gather, scatter

OURS = {"fishkern", "torch"}  # whose frames lie between a training loop and a step
SHARDED = (
    "check_numerics=True is not there for sharded parameters (DTensors), of which each rank would "
    "take back only its own part: look without fully_shard, or leave it out"
)


class LostUpdateWarning(UserWarning):
    """Weights in bfloat16 or float16 stood still, since their updates are lost in rounding.

    ``FishSparseAdamW(..., check_numerics=True)`` warns so once. ``train_only`` keeps float32 values
    of the selected entries, in which such updates add up.
    """


@dataclass(slots=True, eq=False)
class Touched:
    """A tensor that a step is going to change, and what it held before.

    ``values`` are the selected entries ``[k]`` of what is written: of the parameter, or of a leaf
    of ``train_only``, in which nothing is lost.
    """

    name: str
    param: Tensor
    weight: Tensor
    index: Tensor | None  # None: every entry
    state: dict[str, Any]
    lr: float | Tensor
    values: Tensor
    saved: dict[str, Tensor]

    @property
    def has_master(self) -> bool:
        """Whether it is a leaf, which keeps the values of a weight."""
        return self.weight is not self.param

    def now(self) -> Tensor:
        """The entries as they are."""
        return self.entries_of(self.param)

    def entries_of(self, tensor: Tensor) -> Tensor:
        """A copy ``[k]`` of the entries of the parameter or its gradient; a leaf has no others."""
        return _entries(tensor, None if self.has_master else self.index)

    def undo(self) -> None:
        """Put the values and the state back."""
        if self.has_master:
            self.param.copy_(self.values)
        if self.index is not None:
            scatter(self.weight, self.index, self.values)
        else:
            self.weight.copy_(self.values.view_as(self.weight))
        for key, value in self.saved.items():
            self.state[key].copy_(value)


def stood_still(touched: Sequence[Touched]) -> Tensor:
    """How many entries have the bits they had, though their first moment is not zero."""
    narrow = [e for e in touched if not e.has_master and e.weight.dtype.itemsize == 2]
    if not narrow:
        return torch.zeros((), dtype=torch.int64, device=touched[0].weight.device)
    now, before = (
        torch.cat([values.view(torch.int16) for values in kind])
        for kind in ([e.now() for e in narrow], [e.values for e in narrow])
    )
    moving = torch.cat([moment_of(e.state, "exp_avg").reshape(-1) for e in narrow]) != 0
    return ((now == before) & moving).sum() * torch.as_tensor(narrow[0].lr != 0).reshape(())


def not_finite(touched: Sequence[Touched]) -> Tensor:
    """How many entries have a value or a moment that is NaN or infinite."""
    found = ~torch.cat([entry.now() for entry in touched]).isfinite()
    if touched[0].has_master:  # then all of a call have; their roundings may overflow
        found |= ~torch.cat([_entries(e.weight, e.index) for e in touched]).isfinite()
    for key in MOMENTS:
        if all(key in entry.state for entry in touched):
            moments = [moment_of(entry.state, key).reshape(-1) for entry in touched]
            found |= ~torch.cat(moments).isfinite()
    return found.sum()


class Numerics:
    """Makes steps, and warns of what is lost in them or takes them back.

    Attributes:
        warned: Whether it has been said that updates are lost; it is said once.
    """

    def __init__(self) -> None:
        self.warned = False

    def run(
        self,
        calls: Sequence[tuple[Call, dict[str, Any]]],
        state: State,
        amp: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Run the calls of one step, each with its group.

        Raises:
            RuntimeError: The step wrote NaN or infinity; it is taken back whole.
            ValueError: A group is capturable, or a parameter sharded.

        Warns:
            LostUpdateWarning: Entries of bfloat16 or float16 weights stood still.
        """
        if any(group["capturable"] for _, group in calls):
            raise ValueError(CAPTURABLE)
        if any(call.batch.sharded for call, _ in calls):
            raise ValueError(SHARDED)
        touched = [_touched(call, group, state) for call, group in calls]
        for call, group in calls:
            run_call(call, group, *amp)
        if not touched:
            return
        odd = [not_finite(entries) for entries in touched]
        still = [] if self.warned else [stood_still(entries) for entries in touched]
        device = odd[0].device
        counts = torch.stack([count.to(device) for count in odd + still]).tolist()  # the one read
        every = [entry for entries in touched for entry in entries]
        if any(counts[: len(odd)]):
            _refuse(every)
        if any(counts[len(odd) :]):
            self.warned = True
            warnings.warn(_message(every), LostUpdateWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stack level of the line, outside this package and torch, that called ``step()``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    return level


def _touched(call: Call, group: dict[str, Any], state: State) -> list[Touched]:
    batch = call.batch
    numbers = range(len(batch.params)) if call.some is None else call.some
    names = dict(zip(map(id, group["params"]), group.get("param_names") or (), strict=False))
    found = []
    for i in numbers:
        param, weight = batch.params[i], batch.targets[i]
        whole = batch.shapes[i] is None and not batch.masters
        index = None if whole else batch.indices[i]
        name = names.get(id(param)) or f"a parameter of shape {list(param.shape)}"
        saved = {
            key: value.clone() for key, value in state[param].items() if isinstance(value, Tensor)
        }
        values = _entries(param, None if batch.masters else index)
        found.append(Touched(name, param, weight, index, state[param], group["lr"], values, saved))
    return found


def _entries(tensor: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return tensor.detach().flatten().clone()
    return gather(tensor, index, tensor.dtype)


def _refuse(touched: Sequence[Touched]) -> None:
    odd = [(n, entry) for entry in touched if (n := int(not_finite([entry])))]
    for entry in touched:
        entry.undo()
    grads = [
        entry.name
        for _, entry in odd
        if (g := entry.param.grad) is not None and not entry.entries_of(g).isfinite().all()
    ]
    why = (
        f"with NaN or infinity in the gradients of {some(grads)}"
        if grads
        else "though the gradients are finite: their squares or the values overflow"
    )
    raise RuntimeError(
        f"this step would write NaN or infinity to {_shares(odd)}, {why}. It has been taken back: "
        f"lower lr, clip the gradients, or train float16 with torch.amp.GradScaler"
    )


def _message(touched: Sequence[Touched]) -> str:
    lost = [(n, entry) for entry in touched if (n := int(stood_still([entry])))]
    dtypes = ", ".join(sorted({str(entry.weight.dtype) for _, entry in lost}))
    return (
        f"updates were lost in rounding in {_shares(lost)}: they are too small to change weights "
        f"in {dtypes}. fishkern.train_only(model, mask) keeps float32 values of the selected "
        f"entries, in which they add up; or raise lr. This is said once"
    )


def _shares(pairs: Sequence[tuple[int, Touched]]) -> str:
    """The tensors with the largest shares, and how many of how many entries."""
    ranked = sorted(pairs, key=lambda pair: -pair[0] / pair[1].values.numel())
    shown = ", ".join(f"{n} of {e.values.numel()} entries of {e.name!r}" for n, e in ranked[:5])
    return shown + (f" and in {len(ranked) - 5} more tensors" if len(ranked) > 5 else "")
