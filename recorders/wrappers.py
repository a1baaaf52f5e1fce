"""What other libraries wrap around optimizers, and how they split models over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a library's wrapper.

    Accelerate, Lightning and Fabric hand out wrappers that look like an optimizer
    but have no hooks of their own; they keep the real one in ``.optimizer``. Its
    hooks fire for every update, whoever asked for it.

    Examples
    --------
    >>> sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    >>> unwrapped_optimizer(sgd) is sgd
    True
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds a part of the tensor only.

    Examples
    --------
    >>> is_sharded(torch.zeros(2))
    False
    """
    # by its method: importing the class takes 0.4 s, and only sharded runs need it
    return hasattr(tensor, "full_tensor")


def check_whole(model: nn.Module) -> None:
    """Check that this process holds the whole model.

    Raises
    ------
    TypeError
        If a parameter is sharded over processes: by FSDP, or as a DTensor of tensor
        parallelism. The recorder for it is named.

    Examples
    --------
    >>> check_whole(nn.Linear(2, 1))
    """
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise TypeError(
            f"{len(sharded)} parameters of the model are sharded over processes ({sharded[0]}, ...), so no "
            "process can record it alone: use hild_xr.recorders.adapters.distributed.FullyShardedRecorder"
            "(..., replica=<the same architecture, not sharded>) on every rank"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters: shard "
            "it with torch.distributed.fsdp.fully_shard (FSDP2) and record it with "
            "hild_xr.recorders.adapters.distributed.FullyShardedRecorder"
        )
