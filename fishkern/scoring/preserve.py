"""Everything that scoring touches in a model is put back, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fishkern.scoring.torch_functions import handling


def _identity(function: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["input"]


def _undropped_attention(function: Any, args: Any, kwargs: Any) -> Any:
    args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
    kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
    return function(*args, **kwargs)


#: Makes functional dropout the identity, which no module's mode switches off.
NO_DROPOUT = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _identity),
    **dict.fromkeys(("alpha_dropout", "feature_dropout", "feature_alpha_dropout"), _identity),
    "scaled_dot_product_attention": _undropped_attention,
}


def backward(loss: Tensor, params: Iterable[nn.Parameter], retain_graph: bool = False) -> None:
    """``loss.backward()`` without its dispatch, and for these parameters alone.

    Their ``.grad`` is this loss's alone afterwards, whatever loss_fn may have left there. The
    dispatch would suspend our handlers just where checkpointed layers run again. What else the
    graph leads to (an input that requires a gradient, a parameter of loss_fn's own) keeps the
    ``.grad`` it has. (Autograd's ``inputs=`` would see to that, but not with reentrant
    checkpointing.)
    """
    own = {id(param): param for param in params}
    with torch._C.DisableTorchFunction():
        for param in own.values():
            param.grad = None
    others = [leaf for leaf in _leaves(loss) if id(leaf) not in own]
    with _restored([_grad(leaf) for leaf in others]):
        for leaf in others:
            leaf.grad = None
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), retain_graph, False, (),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors in the output's graph that a backward pass would leave a gradient at."""
    leaves, seen, nodes = [], set(), [output.grad_fn]
    if output.grad_fn is None:
        return [output]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if following := node.next_functions:
            nodes += [edge[0] for edge in following]
        elif node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
    return leaves


@contextmanager
def scoring_mode(model: nn.Module, candidates: Iterable[nn.Parameter]) -> Iterator[None]:
    """Dropout off, norms in eval, ``.grad`` free for the candidates; all as before afterwards.

    transformers skips checkpointing in eval mode. Layers that checkpoint therefore stay in
    training mode themselves (their submodules do not), with dropout made the identity. So do
    bitsandbytes' 4-bit layers: in eval mode they pack their weights for good on some CPUs.

    Raises:
        RuntimeError: They did so before.
    """
    candidates = list(candidates)
    for name, module in model.named_modules():
        if _is_packed(module):
            raise RuntimeError(
                f"{name!r} was packed by bitsandbytes in a forward in eval mode, and no gradient "
                f"passes through it any more: call model.state_dict(), which unpacks all layers"
            )
    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(restored_attributes(model))
        stack.enter_context(_restored([_grad_flag(p) for p in model.parameters()]))
        stack.enter_context(_restored([_grad(p) for p in candidates]))
        stack.enter_context(restored_buffers(model))
        stack.enter_context(hooks_aside(candidates))
        for param in candidates:
            param.grad = None
        for module in model.modules():
            checkpoints = getattr(module, "gradient_checkpointing", False)
            module.training = bool(checkpoints) or _packs_in_eval(module)
        stack.enter_context(handling(NO_DROPOUT))  # functional dropout is on by default
        yield


def _packs_in_eval(module: nn.Module) -> bool:
    return hasattr(module, "support_avx512bf16_for_cpu")  # bitsandbytes' 4-bit layers


def _is_packed(module: nn.Module) -> bool:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


Restore = Callable[[], Any]


@contextmanager
def _restored(undo: Iterable[Restore]) -> Iterator[None]:
    undo = list(undo)
    try:
        yield
    finally:
        for restore in undo:
            restore()


@contextmanager
def restored_attributes(model: nn.Module) -> Iterator[None]:
    """Modes, and whatever else the forward notes on its modules (the longest sequence so far)."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)
            module.__dict__.clear()
            module.__dict__.update(attributes)


@contextmanager
def hooks_aside(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """The caller's tensor hooks change no gradient, and no optimizer steps in one."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    aside = [(hooks, dict(hooks)) for p in params for kind in kinds if (hooks := getattr(p, kind))]
    for hooks, _ in aside:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in aside:
            hooks.update(before)


def _grad_flag(param: nn.Parameter) -> Restore:
    required = param.requires_grad
    return lambda: param.requires_grad_(required)


def _grad(param: Tensor) -> Restore:
    grad = param.grad
    return lambda: setattr(param, "grad", grad)


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Values that the forward changes in place (running statistics, caches) are put back."""
    before: list[tuple[Tensor, int, Tensor]] = [
        (buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, copy in before:
                # The version misses changes through .data, and equality those of a zero's sign.
                if buffer._version != version or not torch.equal(buffer, copy):
                    buffer.copy_(copy)


@contextmanager
def random_state() -> Iterator[None]:
    """The random states of torch, of Python and of numpy are put back."""
    state, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)
