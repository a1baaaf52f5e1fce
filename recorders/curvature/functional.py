"""A model as a function of its parameters, on copies that never touch training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature.isolation import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: one tensor, positional tensors, or keyword tensors."""


class FunctionalModel:
    """The map from parameters and inputs to outputs.

    The trainable parameters become detached leaves that share the memory of the
    model's own (or a copy in another precision), so gradients, ``.grad``,
    parameter hooks and the user's graph are never touched. Every call gets fresh
    clones of the buffers, so it is the same function each time. A module may be
    reached under several names, and modules may share parameters: what is one tensor
    in the model is one here, and its derivative that of all its uses.

    Parameters
    ----------
    model
        The model; wrappers of ``torch.compile`` and data parallelism are looked through.
    dtype
        Precision to compute in; ``None`` keeps the model's.

    Attributes
    ----------
    trainable
        Leaves of the parameters that require gradients, by qualified name, in the
        model's order; tied parameters once.

    Raises
    ------
    ValueError
        If no parameter requires gradients, or one of those that do has no elements.
    TypeError
        If a trainable parameter is complex.

    Examples
    --------
    >>> function = FunctionalModel(nn.Linear(2, 1), dtype=torch.float64)
    >>> list(function.trainable), function(torch.ones(3, 2, dtype=torch.float64)).shape
    (['weight', 'bias'], torch.Size([3, 1]))
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model = unwrapped(model)
        self.trainable: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.is_complex():
                raise TypeError(
                    f"parameter {name!r} is complex: curvature is defined here for real parameters; "
                    "hold its real and imaginary parts as two parameters"
                )
            if parameter.requires_grad and parameter.numel() == 0:
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} has no elements, so it has no "
                    "curvature: freeze it with requires_grad_(False), which changes nothing in training, or "
                    "take its layer out"
                )
            value = cast(parameter.detach(), dtype)
            if parameter.requires_grad:
                self.trainable[name] = value.requires_grad_(True)
            else:
                self._fixed[name] = value
        if not self.trainable:
            raise ValueError(
                "the model has no trainable parameter (requires_grad=True), so there is no curvature; "
                "unfreeze the parameters of interest"
            )
        self._buffers = {name: cast(buffer.detach(), dtype) for name, buffer in self.model.named_buffers()}
        self._names_at = _names_at_places(self.model)

    def __call__(self, inputs: Inputs, trainable: Mapping[str, Tensor] | None = None) -> Any:
        """Return the model's outputs, with ``trainable`` in place of some of the parameters."""
        values = {name: buffer.clone() for name, buffer in self._buffers.items()}
        values |= {**self._fixed, **self.trainable, **(trainable or {})}
        state = {place: values[name] for place, name in self._names_at.items()}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
        # tie_weights=True would put values in by every name of a module; where it has two, the
        # second put meets the first one's value, takes it for the original and leaves it behind.
        return torch.func.functional_call(self.model, state, args, kwargs, tie_weights=False)

    def flat(self, names: tuple[str, ...]) -> Tensor:
        """Return the named parameters flattened into one detached vector."""
        return torch.cat([self.trainable[name].detach().reshape(-1) for name in names])


def _names_at_places(model: nn.Module) -> dict[str, str]:
    """Return which tensor each attribute of each module holds, each module under one name only.

    Keys are paths to the attributes; values the names that ``named_parameters()`` and
    ``named_buffers()`` give the tensors, of which tied attributes have one.
    """
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{path}.{attribute}" if path else attribute: names[id(tensor)]
        for path, module in model.named_modules()
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to each tensor of the inputs.

    Examples
    --------
    >>> map_inputs(lambda tensor: tensor[:1], (torch.ones(2), torch.zeros(2)))
    (tensor([1.]), tensor([0.]))
    """
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(tensor) for tensor in inputs)
    return function(inputs)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Bring a tensor of half precision to float32: products may be rounded, bases may not.

    Examples
    --------
    >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Bring a floating tensor to ``dtype``; ``None``, integers and bools leave it as it is.

    Examples
    --------
    >>> cast(torch.zeros(2), torch.float64).dtype, cast(torch.tensor([1]), torch.float64).dtype
    (torch.float64, torch.int64)
    """
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
