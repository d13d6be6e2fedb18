"""The selected values of a module's weights as its trainable leaves: two copies of each value.

A weight with selected entries is frozen; its selected values live in one 1-D float32 leaf.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fishkern.tensors import gather, is_sharded, scatter

CHILD = "fishkern_leaves"  # the name of the child module that holds an owner's leaves
INDICES = "_indices"
SETTLED = "_settled"

#: leaf -> (a weak reference to the Leaves that hold it, its local name); (None, "") once removed.
_homes: WeakIdKeyDictionary = WeakIdKeyDictionary()

SHARDED = (
    "fully_shard was called on a model that train_only is attached to, but weights do not follow "
    "sharded leaves: train with DistributedDataParallel"
)

#: Leaves that were detached, as long as somebody keeps them.
_removed: WeakIdKeyDictionary = WeakIdKeyDictionary()


_generation = 0


def generation() -> int:
    """A number that changes whenever a leaf may have got another home."""
    return _generation


class Home(NamedTuple):
    """The dense weight that a leaf's values belong to, and where in it.

    ``settled`` is what both copies were when they last agreed, in the weight's dtype: whoever
    writes both at once has to write it, too.
    """

    weight: Tensor
    indices: Tensor
    settled: Tensor


def home_of(leaf: Tensor) -> Home | None:
    """The weight behind a leaf, as it is now; None for any other tensor.

    Raises:
        RuntimeError: The leaf was detached from its weight by ``handle.remove()``.
    """
    if leaf not in _homes:
        return None
    leaves, name = _homes[leaf]
    if leaves is None:
        raise RuntimeError(
            f"a leaf of {leaf.numel()} numbers belongs to no weight any more, since train_only was "
            f"removed: build a new optimizer for the model's own parameters"
        )
    owner = leaves()
    return None if owner is None else owner.home(name)


def pack_settled(leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Lay ``Home.settled`` of some leaves into one tensor; returns it and the parts.

    The leaves are those of weights of one dtype. Where their parts lie in another optimizer's
    tensor, that optimizer learns by the generation that they have left it.
    """
    global _generation
    places = [(_homes[leaf][0](), _homes[leaf][1]) for leaf in leaves]
    settled = [owner._buffers[name + SETTLED] for owner, name in places]
    base = settled[0]._base
    if base is not None and _follow_each_other(settled, base):
        return base, settled
    _generation += any(part._base is not None for part in settled)
    packed = torch.cat(settled)
    parts = list(packed.split([len(part) for part in settled]))
    for (owner, name), part in zip(places, parts, strict=True):
        owner._buffers[name + SETTLED] = part
    return packed, parts


def mark_settled(leaves: Sequence[Tensor]) -> None:
    """Leaves that were just written together with their weights and ``Home.settled``.

    Until a version counter moves nothing is compared then, where that takes launches.
    """
    for leaf in leaves:
        owner, name = _homes[leaf][0](), _homes[leaf][1]
        owner._seen[name] = _stamp(leaf, owner.home(name).weight)


def _follow_each_other(parts: Sequence[Tensor], base: Tensor) -> bool:
    """Whether these are the parts of base, in their order and without a gap."""
    starts = accumulate((len(part) for part in parts), initial=0)
    return base.numel() == sum(len(part) for part in parts) and all(
        part._base is base and part.storage_offset() == start
        for part, start in zip(parts, starts, strict=False)
    )


def any_removed() -> bool:
    """Whether somebody keeps leaves that belong to no weight any more."""
    return len(_removed) > 0


def is_master(tensor: Tensor) -> bool:
    """Whether it is the leaf of a weight that holds only the rounding of its values."""
    leaves, name = _homes.get(tensor, (None, ""))
    owner = None if leaves is None else leaves()
    return owner is not None and bool(owner.home(name).weight.dtype != tensor.dtype)


def sync(leaf: Tensor) -> None:
    """Bring a leaf and its weight together; nothing is done for other tensors."""
    leaves, _ = _homes.get(leaf, (None, ""))
    if leaves is not None and (owner := leaves()) is not None:
        owner.sync()


class Leaves(nn.Module):
    """The leaves of one owner, by the local names of its weights, and their indices.

    Nothing of it is in ``state_dict()``: the owner's weights hold the same values. The leaves stay
    float32 whatever the model is cast to.

    Each value exists twice, in its leaf and in its weight, and either may be written by others:
    optimizers and averages write leaves; loading, merging and users write weights, also through
    ``.data``, which no version counter sees. ``sync`` therefore compares both with what both
    were when it last ran, entry by entry.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is not taken for a child
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self.reader: Any = None  # how the owner reads its input, found out in its first forward
        self.read_whole: set[str] = set()  # weights that something else than a rule has read

    def add(self, name: str, leaf: nn.Parameter, indices: Tensor) -> None:
        """Take over the owner's weight ``name``."""
        weight = self._owner[0]._parameters[name]
        assert weight is not None
        self._shapes[name] = weight.shape
        self.register_parameter(name, leaf)
        self.register_buffer(name + INDICES, indices, persistent=False)
        settled = leaf.detach().to(weight.dtype, copy=True)
        self.register_buffer(name + SETTLED, settled, persistent=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also where somebody assigns another parameter to a leaf's name."""
        super().register_parameter(name, param)
        self._register()

    def home(self, name: str) -> Home:
        """The weight behind a leaf."""
        weight, indices = self._owner[0]._parameters[name], self._buffers[name + INDICES]
        settled = self._buffers[name + SETTLED]
        assert weight is not None
        assert indices is not None
        assert settled is not None
        return Home(weight, indices, settled)

    def items(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor, Tensor]]:
        """Local name, leaf, weight, indices, settled."""
        for name, leaf in self._parameters.items():
            assert leaf is not None
            yield (name, leaf, *self.home(name))

    @property
    def on_gpu(self) -> bool:
        """Whether comparing costs launches."""
        return any(leaf is not None and leaf.is_cuda for leaf in self._parameters.values())

    @torch.no_grad()
    def sync(self, *, thorough: bool = True, strict: bool = False) -> None:
        """Bring leaf and weight together.

        A weight's entry that was written goes to the leaf - unless it is the leaf's own rounding,
        whose more precise value then stays; any other entry of the weight gets the leaf's value.

        Args:
            thorough: Also look where no version counter moved since the last time.
            strict: Refuse weights that were resized, which otherwise are left alone.

        Raises:
            RuntimeError: A weight has another shape, or was sharded.
        """
        for name, leaf, weight, indices, settled in self.items():
            if not isinstance(weight, nn.Parameter) or not isinstance(leaf, nn.Parameter):
                continue  # lent to the module for one call, by torch.func.functional_call
            if is_sharded(leaf) or is_sharded(weight):
                raise RuntimeError(SHARDED)
            if weight.shape != self._shapes[name]:
                if strict:
                    raise RuntimeError(
                        f"the {name} of a {type(self._owner[0]).__name__} has shape "
                        f"{list(weight.shape)} now, but had {list(self._shapes[name])} when "
                        f"train_only was attached, whose entries may lie elsewhere: call "
                        f"fishkern.attached(model).remove(), and resize before attaching"
                    )
                continue
            home = home_of(leaf)
            if home is not None and home.weight is weight and home.settled is not settled:
                continue  # tied: another module's leaves see to it
            if not thorough and self._seen.get(name) == _stamp(leaf, weight):
                continue
            if settled.dtype != weight.dtype:  # the model was cast
                settled = self._buffers[name + SETTLED] = settled.to(weight.dtype)
                self._register()
            values = gather(weight, indices, weight.dtype)
            if not leaf.is_cuda and _all_equal(values, settled, leaf):
                continue  # most often so; on a GPU, finding out would take longer
            written = (values != settled) & (values != leaf.to(weight.dtype))
            leaf.copy_(torch.where(written, values.to(leaf.dtype), leaf))
            scatter(weight, indices, leaf)
            settled.copy_(leaf)
            self._seen[name] = _stamp(leaf, weight)

    def _register(self) -> None:
        global _generation
        _generation += 1
        for name, leaf in self._parameters.items():
            if leaf is not None:
                _homes[leaf] = (weakref.ref(self), name)
                _removed.pop(leaf, None)

    def unregister(self) -> None:
        """The leaves are detached: nothing follows them any more."""
        global _generation
        _generation += 1
        for leaf in self._parameters.values():
            _homes[leaf] = (None, "")
            _removed[leaf] = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.sync()  # the owner's tensors are in the dict already; they share their memory

    def _load_from_state_dict(self, *args: Any) -> None:
        # The owner's tensors were loaded just before, possibly replaced (assign=True).
        self._register()
        self.sync()
        for _, _, weight, _, _ in self.items():
            weight.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaves:
        """Follow the model to another device, but not to another dtype."""
        self.sync()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._register()
        self._seen.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as a view, each would carry the whole packed tensor.
        apart = {
            name: buffer.clone() if buffer is not None and name.endswith(SETTLED) else buffer
            for name, buffer in self._buffers.items()
        }
        return {**self.__dict__, "_buffers": apart, "reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()
        self._seen = {}  # of other tensors


def _all_equal(values: Tensor, settled: Tensor, leaf: Tensor) -> bool:
    return torch.equal(values, settled) and torch.equal(leaf.to(settled.dtype), settled)


def _stamp(leaf: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return id(weight), weight._version, leaf._version
