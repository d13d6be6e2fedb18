"""Which module is run again for a parameter: the nearest around it that runs at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from fishkern.interception.capture import Site
from fishkern.interception.rerun import CallConsumer, Place, Rerun
from fishkern.interception.rules import original_class


def find_reruns(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    consume: CallConsumer,
    called: Callable[[Site, Tensor], Tensor],
) -> list[Rerun]:
    """A ``Rerun`` of the nearest module around each parameter that has a forward of its own.

    Left out are parameters that several such modules share, and those of the model itself.
    """
    names = {id(param): name for name, param in params.items()}
    parents: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(child, []).append(module)
    places: dict[str, list[Place]] = {}
    runners: dict[str, set[nn.Module]] = {}
    for owner in model.modules():
        for local, param in owner._parameters.items():
            if (name := names.get(id(param))) is not None:
                places.setdefault(name, []).append(Place(owner, local))
                runners.setdefault(name, set()).update(_runners(owner, parents))
    groups: dict[nn.Module, dict[str, list[Place]]] = {}
    for name, modules in runners.items():
        if len(modules) == 1 and (module := modules.pop()) is not model:
            groups.setdefault(module, {})[name] = places[name]
    return [Rerun(module, group, consume, called) for module, group in groups.items()]


def _runners(
    module: nn.Module, parents: Mapping[nn.Module, list[nn.Module]]
) -> Iterator[nn.Module]:
    """The module itself, or the nearest around it, that can be called: no lists, dictionaries."""
    if original_class(module).forward is not nn.Module.forward:
        yield module
        return
    for parent in parents.get(module, []):
        yield from _runners(parent, parents)
