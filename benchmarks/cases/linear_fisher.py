"""``linear_fisher_`` on its own, against torch's way to the same, and against its floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Config, Run, Target, Times, check_error
from fishkern.functional import linear_fisher_

FISHKERN, FORMED = "fishkern", "per-sample gradients formed"
GRADIENT = "batch gradient"  # one product of the same operands, without a square: less work
PRODUCT, PASS = "large product", "in-place pass"  # what the machine multiplies and moves at best
PASS_BYTES = 2**27  # half of it read, half written


class Layer(NamedTuple):
    """What backward hands over, where the squares go, and a square matrix for ``PRODUCT``."""

    x: Tensor  # [N, T, I]
    grad_out: Tensor  # [N, T, O]
    fisher: Tensor  # [O, I]
    square: Tensor


def fused(layer: Layer) -> Run:
    def run() -> Tensor:
        linear_fisher_(layer.fisher.zero_(), layer.x, layer.grad_out)
        return layer.fisher

    return run


def formed(layer: Layer) -> Run:
    """Every sample's gradient [N, O, I], its square, the sum."""

    def run() -> Tensor:
        grads = torch.bmm(layer.grad_out.transpose(1, 2), layer.x)
        return layer.fisher.zero_().add_(grads.float().square_().sum(0))

    return run


def gradient(layer: Layer) -> Run:
    x, grad_out = layer.x.flatten(0, 1), layer.grad_out.flatten(0, 1)
    return lambda: grad_out.T @ x


def product(layer: Layer) -> Run:
    return lambda: layer.square @ layer.square


def passing(layer: Layer) -> Run:
    buffer = torch.ones(PASS_BYTES // 8, device=layer.x.device)
    return lambda: buffer.mul_(1.0)


class LinearFisher(Case):
    """One layer's accumulation, the operands lying there."""

    name = "linear_fisher"
    baselines = (FORMED, GRADIENT)
    contenders: ClassVar[dict[str, Callable[[Layer], Run]]] = {
        FISHKERN: fused,
        FORMED: formed,
        GRADIENT: gradient,
        PRODUCT: product,
        PASS: passing,
    }
    targets = (
        Target("linear_fisher_: share of the floor, on a GPU", {"dtype": "bfloat16"}, FISHKERN,
               "floor_share", 0.7, at_least=True),
    )  # fmt: skip

    def sweep(self, suite: str, device: str) -> list[Config]:
        if suite == "tiny":
            shapes = [(2, 8, 12, 16)]
        else:  # samples, tokens, inputs, outputs: LoRA's A and B, layers of BERT-base
            shapes = [(32, 128, 768, 8), (32, 128, 8, 768), (32, 128, 768, 768)]
            shapes += [(32, 128, 768, 3072), (256, 1, 768, 768)]
        dtypes = ["float32", "bfloat16"] if device == "cuda" else ["float32"]
        keys = ("samples", "tokens", "inputs", "outputs")
        return [
            {**dict(zip(keys, shape, strict=True)), "dtype": dtype}
            for dtype in dtypes
            for shape in shapes
        ]

    def setup(self, config: Config, device: str) -> Layer:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, config["dtype"])
        side = 8192 if device == "cuda" else 256 if config["tokens"] == 8 else 1024
        x, grad_out, square = (
            torch.randn(*shape, generator=generator).to(device, dtype)
            for shape in (
                (config["samples"], config["tokens"], config["inputs"]),
                (config["samples"], config["tokens"], config["outputs"]),
                (side, side),
            )
        )
        fisher = torch.zeros(config["outputs"], config["inputs"], device=device)
        return Layer(x, grad_out, fisher, square)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """Against the definition in float64."""
        if contender not in (FISHKERN, FORMED):
            return
        layer = self.setup({**config, "samples": min(config["samples"], 4)}, device)
        grads = torch.bmm(layer.grad_out.double().transpose(1, 2), layer.x.double())
        bound = 1e-5 if config["dtype"] == "float32" else 2e-2  # bmm rounds what it forms
        check_error(self.contenders[contender](layer)(), grads.square().sum(0), bound, contender)

    def metrics(
        self, config: Config, workload: Layer, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        """The floor: the longer of the time to multiply and of the time to move the operands."""
        seconds = {name: statistics.median(found) for name, found in times.items()}
        x, grad_out, fisher, square = workload
        flop = 2 * x.shape[:2].numel() * fisher.numel()
        flop_per_second = 2 * len(square) ** 3 / seconds[PRODUCT]
        moved = x.nbytes + grad_out.nbytes + 2 * fisher.nbytes
        bytes_per_second = PASS_BYTES / seconds[PASS]
        floor = max(flop / flop_per_second, moved / bytes_per_second)
        yield PRODUCT, "tflop_per_s", flop_per_second / 1e12
        yield PASS, "gb_per_s", bytes_per_second / 1e9
        for name in (FISHKERN, FORMED, GRADIENT):
            yield name, "floor_share", floor / seconds[name]

    def measures_memory(self, config: Config) -> bool:
        return False  # the accumulator is there before; test_linear_fisher holds the rest
