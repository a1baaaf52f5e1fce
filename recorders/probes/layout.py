"""Which dims the numbers and vectors of a block lie on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import JsonValue
from torch import nn

from hild_xr.recorders.curvature import Block
from hild_xr.recorders.host_copy import numpy_dtype
from hild_xr.recorders.layers import layer_dims
from hild_xr.variables import DIM_PARAM


def block_dims(model: nn.Module, block: Block) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the dims that number the sub-blocks, and the dims of a vector.

    Examples
    --------
    >>> block_dims(nn.Linear(3, 2), Block("weight", "rows", ("weight",), ((2, 3),)))
    (('out',), ('in',))
    """
    if block.is_flat:
        return (), (DIM_PARAM,)
    dims = layer_dims(model)[block.label]
    return (dims[:1], dims[1:]) if block.kind == "rows" else ((), dims)


def block_precision(model: nn.Module, blocks: Sequence[Block]) -> str:
    """Return the dtype that holds what is computed in the precision of the blocks' parameters.

    Examples
    --------
    >>> block_precision(nn.Linear(3, 2), [Block("bias", "layer", ("bias",), ((2,),))])
    'float32'
    """
    parameters = dict(model.named_parameters())
    names = [name for block in blocks for name in block.parameters]
    return str(np.result_type(*(numpy_dtype(parameters[name]) for name in names)))


def flat_attrs(block: Block) -> dict[str, JsonValue]:
    """Return how a flat vector is cut into tensors, for blocks over several of them.

    Examples
    --------
    >>> flat_attrs(Block("fc", "module", ("fc.weight", "fc.bias"), ((2, 3), (2,))))
    {'layers': ['fc.weight', 'fc.bias'], 'layer_shapes': [[2, 3], [2]]}
    """
    if not block.is_flat:
        return {}
    return {"layers": list(block.parameters), "layer_shapes": [list(shape) for shape in block.shapes]}
