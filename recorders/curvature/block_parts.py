"""The two sides of a block beside the diagonal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from hild_xr.recorders.curvature.blocks import Block, select_parameters, trainable_shapes
from hild_xr.recorders.curvature.isolation import unwrapped

if TYPE_CHECKING:
    from torch import nn

PartChoice: TypeAlias = str | tuple[str, int] | Sequence[str] | Block
"""One side of an off-diagonal block.

A parameter's qualified name or a pattern of names, a row ``(name, index)`` of a parameter, a
sequence of names and patterns, or a block made before.
"""


@dataclass(frozen=True)
class BlockPart:
    """One side of an off-diagonal block: a block, or one row of a parameter.

    Parameters
    ----------
    label
        Name in results: the parameter's, ``"name[row]"``, or the block's.
    block
        Block of the whole parameters.
    row
        Index of the row, or ``None`` for all of the block.

    Examples
    --------
    >>> part = resolve_part(torch.nn.Linear(3, 2), ("weight", 1))
    >>> part.label, part.size, part.vector_shape
    ('weight[1]', 3, (3,))
    """

    label: str
    block: Block
    row: int | None = None

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of one vector: that of the parameter or of its row, or flat over several parameters."""
        return self.block.vector_shape if self.row is None else self.block.vector_shape[1:]

    @property
    def size(self) -> int:
        """Number of components of one vector."""
        return math.prod(self.vector_shape)

    @property
    def own(self) -> Block:
        """The block on the diagonal that the part is, or is a row of."""
        if self.row is None:
            return self.block
        return Block(self.block.label, "rows", self.block.parameters, self.block.shapes)

    def within(self, block: Block) -> slice | Tensor:
        """Return where the part's components stand in the flat vector of a block that holds it."""
        starts = dict(zip(block.parameters, _running_sums(block.sizes), strict=True))
        if self.row is not None:
            first = starts[self.block.parameters[0]] + self.row * self.size
            return slice(first, first + self.size)
        pieces = [
            (starts[name], starts[name] + size)
            for name, size in zip(self.block.parameters, self.block.sizes, strict=True)
        ]
        if all(stop == start for (_, stop), (start, _) in itertools.pairwise(pieces)):
            return slice(pieces[0][0], pieces[-1][1])
        return torch.cat([torch.arange(start, stop) for start, stop in pieces])

    def overlaps(self, other: BlockPart) -> bool:
        """Whether the two share a component."""
        if not set(self.block.parameters) & set(other.block.parameters):
            return False
        both_rows = self.row is not None and other.row is not None
        return not both_rows or self.row == other.row


def resolve_part(model: nn.Module, choice: PartChoice) -> BlockPart:
    """Find one side of an off-diagonal block in a model.

    Parameters
    ----------
    model
        The model.
    choice
        See :data:`PartChoice`.

    Raises
    ------
    ValueError
        If a name or pattern is unknown, frozen or tied, a row is out of range, or a
        block is one of rows.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> resolve_part(model, "0.weight").vector_shape, resolve_part(model, "0.*").vector_shape
    ((2, 3), (8,))
    """
    if isinstance(choice, Block):
        if choice.kind == "rows":
            raise ValueError(
                f"block {choice.label!r} is a batch of rows; name one of them as ({choice.label!r}, index)"
            )
        return BlockPart(choice.label, choice)
    shapes = trainable_shapes(unwrapped(model))
    if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], int):
        name, row = choice
        select_parameters(model, [name], name)
        shape = shapes.get(name, ())
        if len(shape) < 2 or not 0 <= row < shape[0]:
            raise ValueError(
                f"{name!r} has shape {shape} and so no row {row}: only parameters of two dims or more have "
                "rows, numbered from 0"
            )
        return BlockPart(f"{name}[{row}]", Block(name, "layer", (name,), (shape,)), row)
    label = choice if isinstance(choice, str) else "+".join(map(str, choice))
    names = select_parameters(model, choice if isinstance(choice, str) else list(map(str, choice)), label)
    kind: Literal["layer", "group"] = "layer" if len(names) == 1 else "group"
    return BlockPart(label, Block(label, kind, tuple(names), tuple(shapes[name] for name in names)))


def require_disjoint(a: BlockPart, b: BlockPart) -> None:
    """Check that two parts share no component, so that their block lies beside the diagonal.

    Raises
    ------
    ValueError
        If they do.
    """
    if a.overlaps(b):
        raise ValueError(
            f"{a.label!r} and {b.label!r} share parameters, so what couples them is not a block beside the "
            "diagonal: choose disjoint parts"
        )


def union(model: nn.Module, a: BlockPart, b: BlockPart) -> Block:
    """Return the flat block of all parameters of which two parts hold something, in the model's order."""
    held = {*a.block.parameters, *b.block.parameters}
    shapes = {name: shape for name, shape in trainable_shapes(unwrapped(model)).items() if name in held}
    return Block(f"{a.label} x {b.label}", "group", tuple(shapes), tuple(shapes.values()))


def _running_sums(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
