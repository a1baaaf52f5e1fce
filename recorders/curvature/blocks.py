"""Blocks: the parts of the parameter vector whose curvature is taken on its own.

One concept serves every matrix, solver and store. A :class:`Block` is a set of
parameters, seen either as one vector or as many vectors of equal shape (one for
each row of a weight).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hild_xr.recorders.curvature.isolation import unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

BlockKind = Literal["layer", "rows", "model"]
"""How the parameters are cut: by tensor, by output neuron or class, or not at all."""


@dataclass(frozen=True)
class Block:
    """A diagonal block of a curvature matrix, or a batch of them.

    Parameters
    ----------
    label
        Name in results: the parameter's qualified name, or ``"model"``.
    kind
        How the parameters were cut.
    parameters
        Qualified names of the parameters in the block, in the model's order.
    shapes
        Shape of each of these parameters.

    Examples
    --------
    >>> block = Block("fc.weight", "rows", ("fc.weight",), ((10, 32),))
    >>> block.batch_shape, block.vector_shape, block.size, block.count
    ((10,), (32,), 32, 10)
    """

    label: str
    kind: BlockKind
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch of independent sub-blocks: ``(rows,)``, or ``()`` for a single block."""
        return self.shapes[0][:1] if self.kind == "rows" else ()

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of one vector of the block, on the dims of the weights it lives on."""
        if self.kind == "rows":
            return self.shapes[0][1:]
        if self.kind == "layer":
            return self.shapes[0]
        return (sum(math.prod(shape) for shape in self.shapes),)

    @property
    def size(self) -> int:
        """Number of components p of one vector."""
        return math.prod(self.vector_shape)

    @property
    def count(self) -> int:
        """Number of independent sub-blocks."""
        return math.prod(self.batch_shape)


def resolve_blocks(model: nn.Module, blocks: BlockKind, layers: Sequence[str] | None = None) -> list[Block]:
    """Cut a model's trainable parameters into blocks.

    Parameters
    ----------
    model
        The model; frozen parameters are left out, tied ones appear once.
    blocks
        ``"layer"``: one block for each parameter tensor. ``"rows"``: for each
        parameter of two dims or more, one block for each index of its first dim
        (output neuron, class, channel, token). ``"model"``: one flat block.
    layers
        Qualified names of the parameters to take, in any order; the blocks come
        in the model's order. ``None`` takes all that fit.

    Returns
    -------
    list of Block
        In the model's order.

    Raises
    ------
    ValueError
        If ``blocks`` is unknown, a name in ``layers`` is unknown, frozen, tied to
        another name or has no rows, or nothing is left.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(block.label, block.size) for block in resolve_blocks(model, "layer")]
    [('0.weight', 12), ('0.bias', 3), ('2.weight', 6), ('2.bias', 2)]
    >>> [(block.label, block.batch_shape, block.size) for block in resolve_blocks(model, "rows")]
    [('0.weight', (3,), 4), ('2.weight', (2,), 3)]
    >>> resolve_blocks(model, "model")[0].size
    23
    """
    if blocks not in get_args(BlockKind):
        raise ValueError(f"blocks must be one of {', '.join(map(repr, get_args(BlockKind)))}; got {blocks!r}")
    model = unwrapped(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if not shapes:
        raise ValueError(
            "the model has no trainable parameter (requires_grad=True); unfreeze the parameters of interest"
        )
    if blocks == "model":
        if layers is not None:
            raise ValueError(
                "blocks='model' takes all trainable parameters: leave layers out, or use blocks='layer'"
            )
        return [Block("model", "model", tuple(shapes), tuple(shapes.values()))]
    if layers is not None:
        layers = [layers] if isinstance(layers, str) else layers
        for name in layers:
            _check_name(model, name, shapes, blocks)
        shapes = {name: shape for name, shape in shapes.items() if name in set(layers)}
    elif blocks == "rows":
        shapes = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
    if not shapes:
        raise ValueError(
            f"no parameter is left for blocks={blocks!r}: select a trainable one"
            + (" of two dims or more" if blocks == "rows" else "")
        )
    return [Block(name, blocks, (name,), (shape,)) for name, shape in shapes.items()]


def check_k(blocks: Sequence[Block], k: int) -> None:
    """Check that every block is large enough for k eigenpairs.

    Raises
    ------
    ValueError
        If k is below 1, or larger than a block; all such blocks are listed.

    Examples
    --------
    >>> check_k([Block("fc.bias", "layer", ("fc.bias",), ((10,),))], 10)
    """
    if k < 1:
        raise ValueError(f"k, the number of eigenpairs, must be at least 1; got {k}")
    small = [block for block in blocks if block.size < k]
    if small:
        sizes = ", ".join(f"{block.label} ({block.size})" for block in small)
        large = [block.label for block in blocks if block.size >= k]
        ask = f"k={min(block.size for block in small)} or less"
        leave = f", or leave them out with layers={large}" if large else ""
        raise ValueError(
            f"k={k} eigenpairs do not fit blocks with fewer parameters: {sizes}. Ask for {ask}{leave}"
        )


def _check_name(model: nn.Module, name: str, shapes: dict[str, tuple[int, ...]], blocks: BlockKind) -> None:
    if name in shapes:
        if blocks == "rows" and len(shapes[name]) < 2:
            raise ValueError(
                f"{name!r} has shape {shapes[name]} and so no rows: leave it out of layers, "
                "or use blocks='layer'"
            )
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    if name in named:
        tied = [other for other in shapes if named[other] is named[name]]
        if tied:
            raise ValueError(f"{name!r} is tied to {tied[0]!r}: name the parameter {tied[0]!r}")
        raise ValueError(
            f"{name!r} is frozen (requires_grad=False), so it has no curvature: unfreeze it or leave it out"
        )
    near = difflib.get_close_matches(name, shapes, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"the model has no parameter {name!r}{hint} Its trainable parameters are {', '.join(shapes)}"
    )
