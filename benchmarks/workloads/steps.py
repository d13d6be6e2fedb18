"""What an optimizer steps on: a model's tensors with gradients and a mask; and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fishkern
from benchmarks.harness import Config
from benchmarks.memory import storages, tensors_in
from benchmarks.workloads.encoder import encoder, fisher_scores

LINE = 16  # float32 values in a cache line
LISTS = {"500-small": (500, (16, 16)), "4-large": (4, (1024, 4096))}  # tensors alike


@dataclass
class Problem:
    """Parameters with gradients, by name, and which of their entries are selected."""

    params: dict[str, nn.Parameter]
    mask: fishkern.SparseMask

    def copy(self) -> Problem:
        """The same for each contender, in memory of its own."""
        copies = {}
        for name, param in self.params.items():
            copies[name] = nn.Parameter(param.detach().clone())
            copies[name].grad = param.grad.clone() if param.grad is not None else None
        return Problem(copies, self.mask)

    def one_each(self) -> Problem:
        """The same tensors with one selected entry in each: a step has all to find, none to do."""
        first = {name: index[:1] for name, index in self.mask.items()}
        return Problem(self.params, fishkern.SparseMask(first, self.mask.shapes))

    def attached(self) -> nn.Module:
        """A model of the tensors in which the selected entries are leaves, with their gradients."""
        model, mask = nn.Module(), self.mask
        names = {name: f"{i}.weight" for i, name in enumerate(self.params)}
        grads = []
        for i, (name, param) in enumerate(self.params.items()):
            model.add_module(str(i), nn.Module())
            model.get_submodule(str(i)).register_parameter("weight", param)
            if mask[name].numel():
                grads.append(param.grad.flatten()[mask[name].long()])
        indices = {names[name]: index for name, index in mask.items()}
        shapes = {names[name]: shape for name, shape in mask.shapes.items()}
        handle = fishkern.train_only(model, fishkern.SparseMask(indices, shapes))
        for leaf, grad in zip(handle.parameters(), grads, strict=True):
            leaf.grad = grad
        return model


Optimizer = Callable[[Problem], torch.optim.Optimizer]


def step_problem(config: Config, device: str) -> Problem:
    """``config``: model, density, mask ("uniform" or "fisher")."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = {}
    for name, shape in shapes_of(config["model"]).items():
        params[name] = nn.Parameter(draw(*shape).to(device))
        params[name].grad = (0.01 * draw(*shape)).to(device)
    if config["mask"] == "fisher":
        scores = fisher_scores()
        mask = fishkern.select(scores, density=config["density"])
    else:
        scores = {name: param.detach().cpu() for name, param in params.items()}
        mask = fishkern.select(scores, density=config["density"], order="random", seed=0)
    return Problem(params, mask.to(device))


def shapes_of(model: str) -> dict[str, torch.Size]:
    """Every tensor that is trained."""
    if model == "bert-base-lora":
        sides = {"A": torch.Size((8, 768)), "B": torch.Size((768, 8))}
        places = [(layer, target, side) for layer in range(12) for target in "qv" for side in "AB"]
        return {f"{layer}.{target}.{side}": sides[side] for layer, target, side in places}
    if model == "tiny":
        return {f"{i}.weight": torch.Size((16 + i, 24)) for i in range(4)}
    if model in LISTS:
        count, shape = LISTS[model]
        return {f"{i}.weight": torch.Size(shape) for i in range(count)}
    params = encoder({"model": model}).named_parameters()
    return {name: param.shape for name, param in params}


def lines_touched(index: Tensor) -> int:
    """How many cache lines of float32 values hold one of these ascending positions."""
    return len(torch.unique_consecutive(index // LINE))


def held_bytes(build: Optimizer, problem: Problem) -> tuple[int, int]:
    """All that the optimizer keeps between steps, and how many entries it trains."""
    problem = problem.copy()
    optimizer = build(problem)
    optimizer.step()
    given = {id(t) for p in problem.params.values() for t in (p, p.grad)}
    held = storages(tensors_in(vars(optimizer), given))
    trained = sum(entry["exp_avg"].numel() for entry in optimizer.state.values())
    return sum(held.values()), trained
