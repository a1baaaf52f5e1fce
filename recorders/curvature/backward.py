"""Backward passes through a graph that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_AT_ONCE_ON_CPU = 2**20  # numbers in the activations of vectors taken at once
_AT_ONCE_ON_GPU = 2**27


def vectors_at_once(activations: int, device: torch.device) -> int:
    """Return how many vectors are worth taking in one pass, for as many numbers in the activations.

    On one CPU thread this took 0.2 to 0.7 of the time for a 64-32-10 net on 200 to 1000
    samples. For larger activations (784-256-256-10 on 2048 samples) it would take up to
    twice the time, so vectors go one by one there.

    Examples
    --------
    >>> vectors_at_once(2**18, torch.device("cpu")), vectors_at_once(2**30, torch.device("cpu"))
    (4, 1)
    """
    affordable = _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE_ON_GPU
    return max(1, affordable // activations)


def pulled_back(of: Sequence[Tensor], by: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Return vector-Jacobian products for n cotangents (n, *of) of each tensor, each of shape (n, *by).

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pulled_back([x**2], [x], [torch.eye(2)])
    [tensor([[2., 0.],
            [0., 4.]])]
    """
    n = len(cotangents[0])
    # What depends on no parameter (the gradient of a loss linear in them) has no graph.
    pairs = [(o, c.to(o.dtype)) for o, c in zip(of, cotangents, strict=True) if o.grad_fn is not None]
    products: Sequence[Tensor | None] = [None] * len(by)
    if pairs:
        products = torch.autograd.grad(
            [o for o, _ in pairs],
            by,
            [c if n > 1 else c[0] for _, c in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=n > 1,
        )
    zeros = [tensor.new_zeros(n, *tensor.shape) for tensor in by]
    return [
        zero if product is None else product if n > 1 else product[None]
        for product, zero in zip(products, zeros, strict=True)
    ]
