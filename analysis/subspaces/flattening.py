"""Weights in the flat layout of blocks over several parameter tensors.

Eigenvectors of a module, a custom group or the whole model run over their parameters one
after the other, on the dim ``param``; weights and gradients are stored by layer. Brought
into the same layout they go into :func:`~hild_xr.analysis.alignment` and its like.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import apply_kernel, require_real, require_same_labels
from hild_xr.variables import DIM_PARAM, DIM_SKETCH

if TYPE_CHECKING:
    from numpy.typing import NDArray

# ---------------------------------------------------------------------------- kernel


def flatten_kernel(*tensors: NDArray[Any], n_axes: Sequence[int]) -> NDArray[Any]:
    """Flatten the last axes of each array in C order and join them.

    Parameters
    ----------
    *tensors
        Arrays of shapes (..., *tensor shape).
    n_axes
        Number of axes of each tensor.

    Returns
    -------
    numpy.ndarray
        Shape (..., p) with p the total number of components; the leading axes broadcast.

    Examples
    --------
    >>> flatten_kernel(np.array([[1, 2], [3, 4]]), np.array([5]), n_axes=[2, 1])
    array([1, 2, 3, 4, 5])
    """
    flat = [
        array.reshape(*array.shape[: array.ndim - n], math.prod(array.shape[array.ndim - n :]))
        for array, n in zip(tensors, n_axes, strict=True)
    ]
    shape = np.broadcast_shapes(*(array.shape[:-1] for array in flat))
    return np.concatenate([np.broadcast_to(array, (*shape, array.shape[-1])) for array in flat], axis=-1)


# ---------------------------------------------------------------------------- labelled


def flatten_like(weights: xr.DataTree | Mapping[str, xr.DataArray], like: xr.DataArray) -> xr.DataArray:
    """Bring weights of several layers into the flat layout of a block's eigenvectors.

    Parameters
    ----------
    weights
        Node of a run with a child for each layer (``run["weights"]``, ``run["gradients"]``),
        or an array for each layer by its qualified name. The arrays say in their attr
        ``vector_dims`` which dims span the tensor, in the order of its axes. Layers that
        the block does not hold are left out.
    like
        Eigenvectors of a block over several tensors: its attrs ``layers`` and
        ``layer_shapes`` are the layout.

    Returns
    -------
    xarray.DataArray
        The layers' components one after the other on the dim ``param``, on the other dims of
        the arrays, with the attrs that all of them share, ``vector_dims`` and the layout.
        Lazy if an array is dask-backed. NaN where a layer's record is missing.

    Raises
    ------
    KeyError
        If a layer of the block is missing.
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If ``like`` has no such layout or is a sketch, or an array is a sketch, lacks
        ``vector_dims``, has another shape or other labels than the others.

    Examples
    --------
    >>> layout = {"vector_dims": ["param"], "number_dim": "eig",
    ...           "layers": ["fc.weight", "fc.bias"], "layer_shapes": [[2, 2], [2]]}
    >>> vectors = xr.DataArray(np.eye(6)[:2], dims=("eig", "param"), attrs=layout)
    >>> weights = {
    ...     name: xr.DataArray(values, dims=dims, attrs={"vector_dims": dims})
    ...     for name, values, dims in (
    ...         ("fc.weight", np.ones((2, 2)), ["out", "in"]), ("fc.bias", np.zeros(2), ["out"])
    ...     )
    ... }
    >>> flat = flatten_like(weights, vectors)
    >>> flat.values
    array([1., 1., 1., 1., 0., 0.])
    >>> from hild_xr.analysis import alignment
    >>> float(alignment(flat, vectors).round(3))
    0.707
    """
    layers, shapes = _layout_of(like)
    held = _by_layer(weights)
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise KeyError(f"the block also holds {missing}: give an array for each of {layers}, came {[*held]}")
    arrays, core_dims = [], []
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        # layers share names of dims ("out", "in") that differ in size
        array, dims = _own_dims(layer, held[layer], shape)
        own = {dim: f"__axis_{j}_of_{i}__" for j, dim in enumerate(dims)}
        labels = [name for name, coord in array.coords.items() if set(coord.dims) & set(dims)]
        arrays.append(array.drop_vars(labels).rename(own))
        core_dims.append(list(own.values()))
    require_same_labels(dict(zip(layers, arrays, strict=True)))
    flat: xr.DataArray = apply_kernel(
        functools.partial(flatten_kernel, n_axes=[len(dims) for dims in core_dims]),
        arrays,
        core_dims,
        output_dims=((DIM_PARAM,),),
        output_sizes={DIM_PARAM: sum(math.prod(shape) for shape in shapes)},
        output_dtypes=(np.result_type(*arrays),),
    )
    names = {array.name for array in arrays}
    flat = flat.rename(names.pop() if len(names) == 1 else None)
    first, *others = arrays
    shared = {
        key: value
        for key, value in first.attrs.items()
        if all(key in other.attrs and np.array_equal(other.attrs[key], value) for other in others)
    }
    flat.attrs = shared | {
        "vector_dims": [DIM_PARAM],
        "layers": layers,
        "layer_shapes": [list(shape) for shape in shapes],
    }
    return flat


def _layout_of(like: xr.DataArray) -> tuple[list[str], list[tuple[int, ...]]]:
    if "sketch" in like.attrs:
        raise ValueError(
            f"{like.name!r} holds sketches, not whole vectors: sketch the weights alike, with "
            "hild_xr.sketch.sketch_model(weights, like)"
        )
    if "layers" not in like.attrs or "layer_shapes" not in like.attrs:
        raise ValueError(
            f"expected attrs 'layers' and 'layer_shapes' on {like.name!r}, came {sorted(like.attrs)}: only "
            "blocks over several tensors (module, model, custom groups) are flat; eigenvectors of one layer "
            "have the dims of its weights and are compared with them directly"
        )
    layers = like.attrs["layers"]
    shapes = [tuple(int(size) for size in shape) for shape in like.attrs["layer_shapes"]]
    return [layers] if isinstance(layers, str) else list(map(str, layers)), shapes


def _by_layer(weights: xr.DataTree | Mapping[str, xr.DataArray]) -> Mapping[str, xr.DataArray]:
    if not isinstance(weights, xr.DataTree):
        return weights
    held = {}
    for layer, node in weights.children.items():
        if len(node.data_vars) != 1:
            raise ValueError(
                f"expected one variable in each node below {weights.path!r}, as in run['weights'], came "
                f"{sorted(map(str, node.data_vars))} in {layer!r}; pass an array for each layer by its name"
            )
        (held[layer],) = node.data_vars.values()
    return held


def _own_dims(
    layer: str, array: xr.DataArray, shape: tuple[int, ...]
) -> tuple[xr.DataArray, tuple[str, ...]]:
    """Return the array of a layer and the dims of its tensor, checked against the layout."""
    require_real(layer, array)
    if "vector_dims" not in array.attrs:
        raise ValueError(
            f"no vector dims: expected an attr 'vector_dims' on {layer!r} with dims {array.dims}, came none; "
            f"set array.attrs['vector_dims'] = [...], the dims of its tensor of shape {shape} in their order"
        )
    stated = array.attrs["vector_dims"]
    dims = (stated,) if isinstance(stated, str) else tuple(map(str, stated))
    if DIM_SKETCH in dims:
        raise ValueError(f"{layer!r} is a sketch, and cannot be brought into the layout of whole vectors")
    if not set(dims) <= set(array.dims):
        raise ValueError(
            f"the attr 'vector_dims' of {layer!r} names {list(dims)}, but its dims are {array.dims}: give "
            "the array as recorded, nothing selected from its tensor, or set the attr anew after renaming"
        )
    found = tuple(array.sizes[dim] for dim in dims)
    if found != shape:
        raise ValueError(
            f"expected shape {shape} of {layer!r}, the layout of the block, came {found} on {list(dims)}"
        )
    return array, dims
