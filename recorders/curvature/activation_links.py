r"""Two linear layers with nothing but an activation between them.

There, :math:`z' = W' \varphi(z) + b'` with :math:`\varphi` applied number by number, and all
that z does to the loss it does through z'. So each sample's second derivative by one output is

.. math::

    \frac{\partial^2 \ell}{\partial z_c^2}
    = \varphi'(z_c)^2\, w_c^T \frac{\partial^2 \ell}{\partial z'^2} w_c
    + \varphi''(z_c)\, w_c^T \frac{\partial \ell}{\partial z'}

with the column :math:`w_c` of W': passes that begin at z' take the place of those that begin at z,
and of the largest matrix products.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.autograd.graph import Node


@dataclass(frozen=True)
class ActivationLink:
    r"""The derivatives of an activation.

    Parameters
    ----------
    slope, bend
        :math:`\varphi'(z)` and :math:`\varphi''(z)`, of the shape of z.
    """

    slope: Tensor
    bend: Tensor


def find_link(loss: Tensor, z: Tensor, h: Tensor) -> ActivationLink | None:
    """Return the link from the output z of a layer to the input h of another one, if it is one.

    Two things must hold. In the graph of the loss, every way from z leads through h and
    from there into one operation, the other layer. And h depends on z number by number, by its
    first and by its second derivatives there, which products with random numbers tell. The first
    ones would not do: those of ``z * sigmoid(mean(z))`` are diagonal at z = 0, where layers may begin.

    Parameters
    ----------
    loss
        The loss, with its graph.
    z, h
        Shape (M, d).

    Examples
    --------
    >>> z = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> start = z * 1
    >>> h = start**2
    >>> link = find_link((h @ torch.ones(2)).sum(), start, h)
    >>> link.slope.tolist(), link.bend.tolist()
    ([[0.0, 2.0]], [[2.0, 2.0]])
    >>> find_link((h @ torch.ones(2)).sum() + start.sum(), start, h) is None
    True
    """
    if h.shape != z.shape or h.grad_fn is None or z.grad_fn is None or not _is_only_way(loss, z, h):
        return None
    ones = torch.ones_like(h)
    left, right = _factors(h)
    (slope,) = torch.autograd.grad(h, z, ones, create_graph=True)
    # with a graph too, for some activations are then differentiated by another formula
    (mixed,) = torch.autograd.grad(h, z, left, create_graph=True)
    if not torch.equal(mixed, slope * left):
        return None
    bend = _second(slope, z, ones)
    if not torch.equal(_second(mixed, z, right), bend * left * right):
        return None
    return ActivationLink(slope.detach(), bend)


def _factors(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of random signs times powers of two, by which products are not rounded."""
    values = torch.tensor([1, 2, 4, 8, -1, -2, -4, -8], dtype=like.dtype)
    chosen = torch.randint(0, 8, (2, *like.shape), generator=torch.Generator().manual_seed(0))
    left, right = values[chosen].to(like.device)
    return left, right


def _second(first: Tensor, z: Tensor, factors: Tensor) -> Tensor:
    """Return the derivative by z of a first derivative times factors; zero where it is constant."""
    if not first.requires_grad:
        return torch.zeros_like(z, requires_grad=False)
    (found,) = torch.autograd.grad(
        first, z, factors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found.detach()


def _is_only_way(loss: Tensor, z: Tensor, h: Tensor) -> bool:
    """Whether all that z does to the loss goes through h, and h is used once."""
    start, end = z.grad_fn, h.grad_fn
    users: dict[Node, list[Node]] = defaultdict(list)
    for node, user in _edges(loss.grad_fn):
        users[node].append(user)
    if start is None or end is None or len(users[end]) != 1:
        return False
    reached, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user in users[node] if node is not end else ():
            if user not in reached:
                reached.add(user)
                stack.append(user)
    # Every way on from z that is not stopped at h would have come to the loss.
    return end in reached and loss.grad_fn not in reached


def _edges(last: Node | None) -> Iterator[tuple[Node, Node]]:
    """Iterate over (input, user) for every use of an input upstream of a node."""
    seen, stack = {last}, [last]
    while stack:
        user = stack.pop()
        for node, _ in user.next_functions if user is not None else ():
            if node is not None and user is not None:
                yield node, user
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
