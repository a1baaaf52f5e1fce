r"""Hessian products of linear layers in a row, without a pass through the network.

In a chain of layers :math:`z_l = W_l h_{l-1} + b_l` with activations
:math:`h_l = \varphi_l(z_l)` number by number between them, the derivative R of everything along a direction
:math:`(V_l, c_l)` of the weights and biases goes forwards,

.. math::

    R z_l = W_l\, R h_{l-1} + V_l h_{l-1} + c_l, \qquad
    R h_l = \varphi_l'(z_l) \circ R z_l,

through whatever lies behind the last layer, :math:`R\delta_L = \frac{\partial^2 L}{\partial z_L^2} R z_L`
with :math:`\delta_l = \partial L/\partial z_l`, and backwards,

.. math::

    R \delta_l = \varphi_l'(z_l) \circ (W_{l+1}^T R\delta_{l+1} + V_{l+1}^T \delta_{l+1})
    + \varphi_l''(z_l) \circ (W_{l+1}^T \delta_{l+1}) \circ R z_l.

The Hessian times the direction is :math:`\sum_m R\delta_l h_{l-1}^T + \delta_l\, R h_{l-1}^T` and
:math:`\sum_m R\delta_l` (Pearlmutter 1994, "Fast exact multiplication by the Hessian"). All but R is known
once for all products, so that a product is its matrix products and three passes over each layer's
numbers, in memory that is there already: the least work there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class ChainLayer:
    r"""A linear layer on M samples.

    Parameters
    ----------
    weight, bias
        Qualified names; ``bias`` is ``None`` where none is asked for.
    matrix
        W, shape (out, in).
    h
        Inputs, shape (M, in).
    delta
        Derivatives :math:`\delta` of the mean loss by the outputs, shape (M, out).
    """

    weight: str
    bias: str | None
    matrix: Tensor
    h: Tensor
    delta: Tensor


@dataclass(frozen=True)
class ChainActivation:
    r"""The activation between two layers.

    Parameters
    ----------
    slope
        :math:`\varphi'(z)`, shape (M, d).
    bend
        :math:`\varphi''(z) \circ \partial L/\partial h` with its output h, shape (M, d).
    """

    slope: Tensor
    bend: Tensor


class LinearChain:
    """Linear layers in a row with activations between them.

    Parameters
    ----------
    layers
        One at least, from the first whose parameters matter.
    activations
        Those between them, one less.
    behind
        Multiplies n directions (M, n, out) at the last layer's outputs with the mean loss's second
        derivative by them.

    Examples
    --------
    The mean of (w x)^2 / 2 over two samples has the second derivative mean(x^2):

    >>> layer = ChainLayer("w", None, torch.ones(1, 1), torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> chain = LinearChain([layer], [], lambda directions: directions / 2)
    >>> product = torch.empty(1, 1, 1)
    >>> chain.multiply({"w": torch.ones(1, 1, 1)}, {"w": product})
    >>> product
    tensor([[[5.]]])
    """

    def __init__(
        self,
        layers: Sequence[ChainLayer],
        activations: Sequence[ChainActivation],
        behind: Callable[[Tensor], Tensor],
    ) -> None:
        self._layers, self._activations, self._behind = layers, activations, behind
        self._space: _Space | None = None

    def multiply(self, vectors: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> None:
        """Multiply n vectors with the Hessian block of the named parameters.

        Parameters
        ----------
        vectors
            One tensor of shape (n, *parameter) for each parameter of the block.
        products
            Tensors of the same names and shapes, which are overwritten.
        """
        n = len(next(iter(vectors.values())))
        if self._space is None or self._space.n != n:
            self._space = None  # what is there goes first
            self._space = _Space(self._layers, n)
        self._forwards(vectors, self._space)
        self._backwards(vectors, products, self._space)

    def _forwards(self, vectors: Mapping[str, Tensor], space: _Space) -> None:
        """Leave R z and R h of all layers."""
        for i, layer in enumerate(self._layers):
            z, vector = space.z[i], vectors.get(layer.weight)
            if vector is None:
                z.zero_()
            else:
                torch.mm(layer.h, vector.flatten(0, 1).T, out=z.flatten(1))
            if i:
                torch.mul(space.z[i - 1], self._activations[i - 1].slope[:, None], out=space.h[i - 1])
                z.flatten(0, 1).addmm_(space.h[i - 1].flatten(0, 1), layer.matrix.T)
            if layer.bias is not None and layer.bias in vectors:
                z += vectors[layer.bias]

    def _backwards(
        self, vectors: Mapping[str, Tensor], products: Mapping[str, Tensor], space: _Space
    ) -> None:
        """Take R delta from the last layer to the first, and the products on the way."""
        along = self._behind(space.z[-1])
        for i, layer in reversed(list(enumerate(self._layers))):
            vector = vectors.get(layer.weight)
            if layer.bias is not None and layer.bias in products:
                torch.sum(along, 0, out=products[layer.bias])
            if vector is not None:
                _set_outer(products[layer.weight], along, layer.h)
                if i:
                    _add_outer(products[layer.weight], layer.delta, space.h[i - 1])
            if i:
                pulled = space.pulled(i - 1)
                torch.mm(along.flatten(0, 1), layer.matrix, out=pulled.flatten(0, 1))
                if vector is not None:
                    pulled.flatten(1).addmm_(layer.delta, vector.transpose(0, 1).flatten(1))
                activation = self._activations[i - 1]
                along = space.z[i - 1].mul_(activation.bend[:, None])
                along.addcmul_(activation.slope[:, None], pulled)


class _Space:
    """The numbers that change from product to product, in one place for all of them.

    Memory that is handed back and asked for anew comes in pages of zeros, which took a fifth of the time.
    All have the shape (M, n, d), so that n vectors share one matrix product.
    """

    def __init__(self, layers: Sequence[ChainLayer], n: int) -> None:
        self.n, like = n, layers[0].h
        self.z = [like.new_empty(len(like), n, len(layer.matrix)) for layer in layers]
        self.h = [torch.empty_like(z) for z in self.z[:-1]]
        self._pulled = like.new_empty(max((z.numel() for z in self.h), default=0))

    def pulled(self, i: int) -> Tensor:
        """Return room for derivatives by the outputs of an activation."""
        return self._pulled[: self.h[i].numel()].view(self.h[i].shape)


def _set_outer(product: Tensor, along: Tensor, h: Tensor) -> None:
    """Set products (n, out, in) to the sums over samples of along (M, n, out) times h (M, in)."""
    if len(product) == 1:
        torch.mm(along[:, 0].T, h, out=product[0])
    else:
        product.copy_((along.flatten(1).T @ h).view(product.shape))


def _add_outer(product: Tensor, delta: Tensor, h: Tensor) -> None:
    """Add the sums over samples of delta (M, out) times h (M, n, in) to products (n, out, in)."""
    if len(product) == 1:
        product[0].addmm_(delta.T, h[:, 0])
    else:
        product += (delta.T @ h.flatten(1)).unflatten(1, h.shape[1:]).transpose(0, 1)
