"""What launchers share: launching, the size of the device, and the arithmetic of grids.

Ahead-of-time compilation (``aot.py``) calls the ops on meta tensors inside ``collect()`` and
compiles what they would have launched: the same kernels with the same constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    #: Where given, ptxas may use so many before it spills; else it spills to run more programs.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel is compiled. Fused multiply-add is said aloud: its default will move."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


_collected: list[Launch] | None = None


def run(launch: Launch, device: torch.device) -> None:
    """Launch on the device's current stream, or only note the launch, inside ``collect()``."""
    if _collected is not None:
        _collected.append(launch)
        return
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[launch.grid](**launch.args, **launch.options)


@contextmanager
def collect() -> Iterator[list[Launch]]:
    """Gather launches instead of running them; not for more than one thread."""
    global _collected
    _collected = []
    try:
        yield _collected
    finally:
        _collected = None


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors there are to fill; as many as an H100 has without a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up. Triton's own is for kernels: on the host it takes microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
