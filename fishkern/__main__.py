"""``python -m fishkern``: what is installed, which backends work here, and why others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator

import torch

from fishkern import __version__, _dispatch
from fishkern._ops import SCHEMAS
from fishkern.backends import native

# Each with what installs it.
PACKAGES = {
    "triton": "triton",
    "transformers": "'fishkern[peft]'",
    "peft": "'fishkern[peft]'",
    "accelerate": "'fishkern[peft]'",
    "numpy": "numpy",
    "safetensors": "safetensors",
}


def report() -> str:
    """The whole report: titles, and under each its lines."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "ops": _ops(),
        "settings": _settings(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing stands in the report itself
        return "\n\n".join(_layout(title, list(lines)) for title, lines in sections.items())


def _layout(title: str, lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)])


def _versions() -> Iterator[tuple[str, str]]:
    yield "fishkern", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {cuda}"
    for name, source in PACKAGES.items():
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, f"not installed: pip install {source}"


def _devices() -> Iterator[tuple[str, str]]:
    vectors = _attempt(native.cpu_capability)
    yield "cpu", f"{torch.get_num_threads()} threads, vector instructions: {vectors}"
    if not torch.cuda.is_available():
        yield "cuda", "none"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{i}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"


def _backends() -> Iterator[tuple[str, str]]:
    for name in _dispatch.BACKENDS:
        reason = _attempt(_dispatch.why_not, name)
        yield name, f"not available: {reason}" if reason else "available"


def _ops() -> Iterator[tuple[str, str]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in SCHEMAS:
        choices = [f"{device}: {_attempt(_dispatch.chosen, op, device)}" for device in devices]
        yield op, ", ".join(choices)


def _settings() -> Iterator[tuple[str, str]]:
    yield "cache", _attempt(native.cache_dir)
    for name in sorted(os.environ):
        if name.startswith("FISHKERN_") or name == "TRITON_INTERPRET":
            yield name, os.environ[name]


def _attempt(function: Callable[..., object], *args: str) -> str:
    """The function's result (none: empty), or the error: a report has to reach its end."""
    try:
        return str(function(*args) or "")
    except (RuntimeError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    print(report())
