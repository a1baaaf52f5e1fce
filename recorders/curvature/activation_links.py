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
    from collections.abc import Collection, Iterator

    from torch.autograd.graph import Node

_PERIODS = 8191, 8179  # of random numbers: primes, which no layer is wide
_LARGEST = 20  # exponent of the powers of two among them


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


class Flow:
    """Where numbers go in the graph of a loss: the users of every node, found once.

    Parameters
    ----------
    loss
        The loss, with its graph.
    """

    def __init__(self, loss: Tensor) -> None:
        self._last = loss.grad_fn
        self._users: dict[Node, list[Node]] = defaultdict(list)
        for node, user in _edges(loss.grad_fn):
            self._users[node].append(user)

    def meets(self, z: Tensor, ends: Collection[Node]) -> Node | None:
        """Return the one end that all ways from z to the loss lead through, if it is used once."""
        if z.grad_fn is None:
            return None
        found = {z.grad_fn} & set(ends)
        reached, stack = {z.grad_fn}, [z.grad_fn]
        while stack:
            node = stack.pop()
            if node is self._last:
                return None
            for user in self._users[node] if node not in ends else ():
                if user not in reached:
                    reached.add(user)
                    stack.append(user)
                    found |= {user} & set(ends)
            if len(found) > 1:
                return None
        # Every way on from z that is not stopped at an end would have come to the loss.
        end = found.pop() if found else None
        return end if end is not None and len(self._users[end]) == 1 else None


def find_link(flow: Flow, z: Tensor, h: Tensor) -> ActivationLink | None:
    """Return the link from the output z of a layer to the input h of another one, if it is one.

    Two things must hold. In the graph of the loss, every way from z leads through h and
    from there into one operation, the other layer. And h depends on z number by number, by its
    first and by its second derivatives there, which products with random numbers tell. The first
    ones would not do: those of ``z * sigmoid(mean(z))`` are diagonal at z = 0, where layers may begin.

    Parameters
    ----------
    flow
        Of the loss.
    z, h
        Shape (M, d).

    Examples
    --------
    >>> z = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> start = z * 1
    >>> h = start**2
    >>> link = find_link(Flow((h @ torch.ones(2)).sum()), start, h)
    >>> link.slope.tolist(), link.bend.tolist()
    ([[0.0, 2.0]], [[2.0, 2.0]])
    >>> find_link(Flow((h @ torch.ones(2)).sum() + start.sum()), start, h) is None
    True
    """
    if h.shape != z.shape or h.grad_fn is None or flow.meets(z, {h.grad_fn}) is not h.grad_fn:
        return None
    ones = torch.ones_like(h)
    left, right = _factors(h)
    (slope,) = torch.autograd.grad(h, z, ones, create_graph=True)
    # with a graph too, for some activations are then differentiated by another formula
    (mixed,) = torch.autograd.grad(h, z, left, create_graph=True)
    (other,) = torch.autograd.grad(h, z, right, create_graph=True)
    # two draws, for two numbers of one draw may be equal by chance
    if not (torch.equal(mixed, slope * left) and torch.equal(other, slope * right)):
        return None
    bend = _second(slope, z, ones)
    if not torch.equal(_second(mixed, z, right), bend * left * right):
        return None
    return ActivationLink(slope.detach(), bend)


def _factors(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of random signs times powers of two, by which products are not rounded.

    Some thousand random numbers, repeated: to draw all of them would take longer than the rest.
    """
    exponents = torch.arange(-_LARGEST, _LARGEST + 1).to(like.dtype)
    values = torch.cat([2**exponents, -(2**exponents)])
    generator = torch.Generator().manual_seed(0)
    left, right = (
        values[torch.randint(0, len(values), (period,), generator=generator)]
        .repeat(like.numel() // period + 1)[: like.numel()]
        .reshape(like.shape)
        .to(like.device)
        for period in _PERIODS
    )
    return left, right


def _second(first: Tensor, z: Tensor, factors: Tensor) -> Tensor:
    """Return the derivative by z of a first derivative times factors; zero where it is constant."""
    if not first.requires_grad:
        return torch.zeros_like(z, requires_grad=False)
    (found,) = torch.autograd.grad(
        first, z, factors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found.detach()


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
