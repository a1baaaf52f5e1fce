"""Backward passes through a graph that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


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
