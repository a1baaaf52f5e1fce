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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.backward import vectors_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

_TILE = 2**19
"""Numbers of a layer at some samples that are taken at once: more gain nothing, and take more memory."""


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
    by_columns
        h and delta once more, column after column in memory, where sums over samples are faster so.
    """

    weight: str
    bias: str | None
    matrix: Tensor
    h: Tensor
    delta: Tensor
    by_columns: tuple[Tensor, Tensor] | None = None


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
        One at least, in their order.
    activations
        Those between them, one less.
    behind
        The mean loss's second derivative by the last layer's outputs: as numbers of shape (out, out, M),
        sample by sample, or as a function that multiplies n directions (M, n, out) with it.

    Examples
    --------
    The mean of (w x)^2 / 2 over two samples has the second derivative mean(x^2):

    >>> layer = ChainLayer("w", None, torch.ones(1, 1), torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> chain = LinearChain([layer], [], torch.full((1, 1, 2), 0.5))
    >>> product = torch.empty(1, 1, 1)
    >>> chain.multiply({"w": torch.ones(1, 1, 1)}, {"w": product})
    >>> product
    tensor([[[5.]]])
    """

    def __init__(
        self,
        layers: Sequence[ChainLayer],
        activations: Sequence[ChainActivation],
        behind: Tensor | Callable[[Tensor], Tensor],
    ) -> None:
        self._layers, self._activations, self._behind = tuple(layers), tuple(activations), behind
        self._space: _Space | None = None
        self._whole: LinearChain | None = None  # of which this is a part; no cycle, which would keep memory
        self._rounded: LinearChain | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The weights and biases."""
        return tuple(name for layer in self._layers for name in (layer.weight, layer.bias) if name)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of vectors and products."""
        return self._layers[0].h.dtype

    @property
    def vectors_at_once(self) -> int:
        """Vectors worth multiplying at once: one if it is rounded, or by a function behind the last layer."""
        layer = self._layers[0]
        activations = len(layer.h) * sum(len(layer.matrix) for layer in self._layers)
        one = callable(self._behind) or self.dtype == torch.bfloat16
        return 1 if one else vectors_at_once(activations, layer.h.device)

    def holding(self, names: Collection[str]) -> LinearChain | None:
        """Return the chain from the first layer that has one of some parameters; ``None`` if it lacks one."""
        asked = set(names)
        if not asked <= set(self.names):
            return None
        first = next(i for i, layer in enumerate(self._layers) if {layer.weight, layer.bias} & asked)
        part = LinearChain(self._layers[first:], self._activations[first:], self._behind)
        part._whole = self._whole or self
        return part

    def work(self, names: Collection[str]) -> int:
        """Return the multiplications of a product with the block of some parameters, in those of matrices."""
        through = [layer.matrix.numel() for layer in self._layers[1:]]
        own = [0 if layer.weight not in names else layer.matrix.numel() for layer in self._layers]
        return 2 * len(self._layers[0].h) * (sum(through) + sum(own) + sum(own[1:]))

    @property
    def nbytes(self) -> int:
        """Memory of all that is held of samples."""
        return sum(part.nbytes for part, _, _ in _parts(self))

    def rounded(self) -> LinearChain:
        """Return the chain with its numbers rounded to bfloat16, whose products are some thousandths off.

        It takes no more memory than the chain, and is made once for all parts of one.
        """
        whole = self._whole or self
        if whole._rounded is None:
            whole._rounded = whole._made_rounded()
        part = whole._rounded.holding(self.names)
        assert part is not None
        return part

    def _made_rounded(self) -> LinearChain:
        layers = [
            replace(
                layer,
                matrix=_low(layer.matrix),
                h=_low(layer.h),
                delta=_low(layer.delta),
                by_columns=(_low(layer.h.T).contiguous().T, _low(layer.delta.T).contiguous().T),
            )
            for layer in self._layers
        ]
        activations = [ChainActivation(_low(one.slope), _low(one.bend)) for one in self._activations]
        behind, dtype = self._behind, self.dtype
        if isinstance(behind, Tensor):
            return LinearChain(layers, activations, _low(behind))
        return LinearChain(layers, activations, lambda directions: _low(behind(directions.to(dtype))))

    def multiply(self, vectors: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> None:
        """Multiply n vectors with the Hessian block of the named parameters.

        Parameters
        ----------
        vectors
            One tensor of shape (n, *parameter) for each parameter of the block.
        products
            Tensors of the same names and shapes, which are overwritten; of a rounded chain in float32.
        """
        n = len(next(iter(vectors.values())))
        if self._space is None or self._space.n != n:
            self._space = None  # what is there goes first
            self._space = _Space(self._layers, n, whole=callable(self._behind))
        for start in range(0, len(self._layers[0].h), self._space.samples):
            tile = _Tile(self._space, slice(start, start + self._space.samples), len(self._layers[0].h))
            self._forwards(vectors, tile)
            self._backwards(vectors, products, tile, beta=int(start > 0))

    def _forwards(self, vectors: Mapping[str, Tensor], tile: _Tile) -> None:
        """Leave R z and R h of all layers."""
        for i, layer in enumerate(self._layers):
            z, vector = tile.z[i], vectors.get(layer.weight)
            bias = None if layer.bias is None else vectors.get(layer.bias)
            if vector is not None:
                torch.mm(layer.h[tile.there], vector.flatten(0, 1).T, out=z.flatten(1))
            elif bias is not None:
                z.copy_(bias)
            else:
                z.zero_()
            if i:
                slope = self._activations[i - 1].slope[tile.there, None]
                torch.mul(tile.z[i - 1], slope, out=tile.h[i - 1])
                z.flatten(0, 1).addmm_(tile.h[i - 1].flatten(0, 1), layer.matrix.T)
            if vector is not None and bias is not None:
                z += bias

    def _backwards(
        self, vectors: Mapping[str, Tensor], products: Mapping[str, Tensor], tile: _Tile, beta: int
    ) -> None:
        """Take R delta from the last layer to the first; add to beta times the products on the way."""
        along = self._multiplied_behind(tile)
        for i, layer in reversed(list(enumerate(self._layers))):
            vector, delta = vectors.get(layer.weight), layer.delta[tile.there]
            if layer.bias is not None and layer.bias in products:
                _add_sum(products[layer.bias], along, beta)
            if vector is not None:
                h, of_output = layer.by_columns or (layer.h, layer.delta)
                _add_outer(products[layer.weight], along, h[tile.there, None], beta)
                if i:
                    _add_outer(products[layer.weight], of_output[tile.there, None], tile.h[i - 1], 1)
            if i:
                pulled, activation = tile.pulled(i - 1), self._activations[i - 1]
                torch.mm(along.flatten(0, 1), layer.matrix, out=pulled.flatten(0, 1))
                if vector is not None:
                    pulled.flatten(1).addmm_(delta, vector.transpose(0, 1).flatten(1))
                along = tile.z[i - 1].mul_(activation.bend[tile.there, None])
                along.addcmul_(activation.slope[tile.there, None], pulled)

    def _multiplied_behind(self, tile: _Tile) -> Tensor:
        """Return R delta of the last layer, shape (m, n, out)."""
        if callable(self._behind):
            return self._behind(tile.z[-1]).contiguous()
        # samples last: they are many, and there is one processor instruction for several
        columns = tile.z[-1].permute(2, 1, 0).contiguous()
        seconds = self._behind[:, :, None, tile.there]
        products = seconds[:, 0] * columns[0]
        for j in range(1, len(columns)):
            products.addcmul_(seconds[:, j], columns[j])
        return products.permute(2, 1, 0).contiguous()


class _Space:
    """The numbers that change from product to product, in one place for all of them.

    Memory that is handed back and asked for anew comes in pages of zeros, which took a fifth of the time.
    All have the shape (m, n, d) of m samples, so that n vectors share one matrix product.
    """

    def __init__(self, layers: Sequence[ChainLayer], n: int, *, whole: bool) -> None:
        like, widths = layers[0].h, [len(layer.matrix) for layer in layers]
        self.n = n
        self.samples = len(like) if whole else min(len(like), max(_TILE // (n * max(widths)), 256))
        self.z = [like.new_empty(self.samples, n, width) for width in widths]
        self.h = [torch.empty_like(z) for z in self.z[:-1]]
        self.pulled = like.new_empty(max((z.numel() for z in self.h), default=0))


class _Tile:
    """The same for some of the samples, of which the last may be fewer."""

    def __init__(self, space: _Space, there: slice, total: int) -> None:
        self.there, m = there, min(there.stop, total) - there.start
        self.z, self.h = [z[:m] for z in space.z], [h[:m] for h in space.h]
        self._pulled = space.pulled

    def pulled(self, i: int) -> Tensor:
        """Return room for derivatives by the outputs of an activation."""
        return self._pulled[: self.h[i].numel()].view(self.h[i].shape)


def _low(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def _add_sum(product: Tensor, along: Tensor, beta: int) -> None:
    """Set products (n, out) to beta times themselves and the sums over samples of along (m, n, out)."""
    if beta:
        product += along.sum(0)
    elif along.dtype == product.dtype:
        torch.sum(along, 0, out=product)
    else:
        product.copy_(along.sum(0))  # of a rounded chain


def _add_outer(product: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """Set products (n, out, in) to beta times themselves and the sums over samples of outer products.

    ``left`` has shape (m, n, out) and ``right`` (m, n, in); one of the two n may be 1 for n.
    """
    if left.dtype != product.dtype:  # a rounded chain, which takes one vector at a time
        a, b = left[:, 0], right[:, 0]
        outer = (b.T @ a).T if b.stride(0) == 1 else a.T @ b  # by the columns that are there
        product[0].copy_(outer) if beta == 0 else product[0].add_(outer)
        return
    if len(product) == 1:
        product[0].addmm_(left[:, 0].T, right[:, 0], beta=beta)
        return
    outer = left.flatten(1).T @ right.flatten(1)
    outer = outer.view(left.shape[1], left.shape[2], right.shape[1], right.shape[2])
    summed = outer[:, :, 0] if right.shape[1] == 1 else outer[0].transpose(0, 1)
    product.copy_(summed) if beta == 0 else product.add_(summed)


class ChainsOfBatches:
    """The chains of several batches made one, batch by batch, in memory that is there from the start.

    Parameters
    ----------
    samples
        Number of samples of all batches.
    max_bytes
        Memory that the chains of several batches may take.
    """

    def __init__(self, samples: int, max_bytes: int) -> None:
        self._samples, self._filled, self._max_bytes = samples, 0, max_bytes
        self._chains: dict[tuple[str, ...], LinearChain] | None = None

    @property
    def chains(self) -> list[LinearChain]:
        """Chains that all batches have, of which all is held as numbers, and that fit."""
        return list((self._chains or {}).values())

    def add(self, weight: float, samples: int, chains: Iterable[LinearChain]) -> None:
        """Take the chains of the next batch of some samples, whose mean loss has a weight in the whole."""
        if samples == self._samples:
            self._chains = {chain.names: chain for chain in chains}
            return
        held = {chain.names: chain for chain in chains if isinstance(chain._behind, Tensor)}
        if self._chains is None:
            self._chains = self._rooms(held, samples)
        self._chains = {names: chain for names, chain in self._chains.items() if names in held}
        for names, chain in self._chains.items():
            for (whole, dim, weighted), (part, _, _) in zip(_parts(chain), _parts(held[names]), strict=True):
                there = whole.narrow(dim, self._filled, samples)
                torch.mul(part, weight if weighted else 1, out=there)
        self._filled += samples

    def _rooms(
        self, held: Mapping[tuple[str, ...], LinearChain], samples: int
    ) -> dict[tuple[str, ...], LinearChain]:
        """Return the same chains with room for all samples, as many as fit."""
        rooms, free = {}, self._max_bytes
        for names, chain in held.items():
            free -= chain.nbytes * self._samples // samples
            if free >= 0:
                rooms[names] = self._room_for(chain)
        return rooms

    def _room_for(self, chain: LinearChain) -> LinearChain:
        """Return the same chain with empty tensors for all samples."""

        def empty(tensor: Tensor, dim: int = 0) -> Tensor:
            return tensor.new_empty(*tensor.shape[:dim], self._samples, *tensor.shape[dim + 1 :])

        layers = [replace(layer, h=empty(layer.h), delta=empty(layer.delta)) for layer in chain._layers]
        activations = [ChainActivation(empty(one.slope), empty(one.bend)) for one in chain._activations]
        assert isinstance(chain._behind, Tensor)
        return LinearChain(layers, activations, empty(chain._behind, 2))


def _parts(chain: LinearChain) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield all that is held of samples, the dim of samples, and whether the batch's weight is in it."""
    for layer in chain._layers:
        yield layer.h, 0, False
        yield layer.delta, 0, True
    for activation in chain._activations:
        yield activation.slope, 0, False
        yield activation.bend, 0, True
    if isinstance(chain._behind, Tensor):
        yield chain._behind, 2, True
