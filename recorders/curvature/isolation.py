"""Run a model for measurement without leaving a trace in the training run."""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hild_xr.recorders.curvature.precision import MatrixProducts, matrix_products

if TYPE_CHECKING:
    from collections.abc import Iterator


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile`` and data-parallel wrappers.

    Compiled code has no double backward and DDP's forward synchronises ranks,
    so curvature is taken of the module inside. It shares its parameters with
    the wrapper.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Measure inside, and find everything as it was outside.

    Inside the context

    * every module is in eval mode (dropout off, BatchNorm on its running statistics);
    * gradients can be taken, also when the caller is under ``torch.no_grad`` or
      ``torch.inference_mode``;
    * backward hooks of modules, also global ones, do not run: they could change the gradients that the
      measurement takes, and their side effects are meant for training;
    * autocast is off, attention uses the math kernel and recurrent layers avoid
      cuDNN, since fused kernels have no double backward.

    On leaving, also through an exception, each module's own train/eval flag, the
    RNG states of torch (CPU, and the CUDA devices that hold the model), the
    buffers, the backward hooks and the global switches are as before. Parameters
    and ``.grad`` are never touched.

    Parameters
    ----------
    model
        The model. Its forward hooks run as usual, since its outputs may depend on them,
        and with them what they hang on tensors (``Tensor.register_hook``).

    Warnings
    --------
    Attributes that are neither parameters nor buffers (a Python counter, a
    cache) and the generators of ``random`` and NumPy are not restored.

    Examples
    --------
    >>> model = nn.Dropout(0.5)
    >>> with torch.no_grad(), isolated(model):
    ...     print(model.training, torch.is_grad_enabled())
    False True
    >>> model.training
    True
    """
    devices = _devices(model)
    cuda = [device for device in devices if device.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.random.fork_rng(devices=cuda, device_type="cuda"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_no_backward_hooks(model))
        stack.enter_context(_uncompiled())
        for device_type in sorted({"cpu"} | {device.type for device in devices}):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fused_encoder())
        if cuda and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class Measurement:
    """A model's :func:`isolated` as a context that can be entered again inside itself.

    Nested entries cost nothing, so that every pass through the network can make sure of
    it, and a solve of many passes pays once.

    Parameters
    ----------
    model
        The model.
    products
        How float32 matrices are multiplied meanwhile; see
        :func:`~hild_xr.recorders.curvature.precision.matrix_products`.

    Examples
    --------
    >>> model = nn.Dropout(0.5)
    >>> measuring = Measurement(model)
    >>> with measuring(), measuring():
    ...     print(model.training)
    False
    >>> model.training
    True
    """

    def __init__(self, model: nn.Module, products: MatrixProducts = "fastest") -> None:
        self._model, self._products = model, products
        self._active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter :func:`isolated`, unless it is entered already."""
        if self._active:
            yield
            return
        with isolated(self._model), matrix_products(self._products):
            self._active = True
            try:
                yield
            finally:
                self._active = False


def _devices(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in [*model.parameters(), *model.buffers()]}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # The flag is set module by module: model.eval() may be overridden to do more
    # (merge adapters, say), and it would forget which modules were frozen in eval mode.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    # The whole dict: a buffer may be None until, or registered at, the first forward pass.
    dicts = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()
    ]
    saved = [
        (buffer, buffer.detach().clone())
        for _, buffers, _ in dicts
        for buffer in buffers.values()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, buffers, non_persistent in dicts:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = non_persistent
        with torch.no_grad():
            for buffer, copy in saved:
                # A needless copy would move the version counter and break a graph that saved the
                # buffer; the counter itself does not tell, since BatchNorm does not move it.
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


@contextmanager
def _no_backward_hooks(model: nn.Module) -> Iterator[None]:
    # Dicts are exchanged rather than emptied, so that the users' own come back as they are, and a
    # handle removed inside takes its hook out of the right one.
    places: list[tuple[dict[str, Any], str]] = [
        (vars(module), name)
        for module in model.modules()
        for name in ("_backward_hooks", "_backward_pre_hooks")
    ]
    of_all = vars(nn.modules.module)
    places += [(of_all, "_global_backward_hooks"), (of_all, "_global_backward_pre_hooks")]
    saved = [owner[name] for owner, name in places]
    try:
        for owner, name in places:
            owner[name] = OrderedDict()
        yield
    finally:
        for (owner, name), hooks in zip(places, saved, strict=True):
            owner[name] = hooks


@contextmanager
def _uncompiled() -> Iterator[None]:
    # Code compiled inside the model (model.compile(), a compiled layer or forward) has no double
    # backward. Without dynamo loaded nothing is compiled, and loading it takes a second.
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield


@contextmanager
def _no_fused_encoder() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
