"""One function over the activations of one layer, or of all layers of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import xarray as xr

from hild_xr.variables import DIM_LAYER

if TYPE_CHECKING:
    from collections.abc import Sequence

Layers = xr.DataArray | xr.DataTree | Mapping[str, xr.DataArray]
"""An array of one layer, an array for each layer by its name, or the node of a run that holds them."""


def arrays_by_layer(name: str, layers: xr.DataTree | Mapping[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """Return the array of each layer by the layer's name, in the order given.

    Parameters
    ----------
    name
        Name of the argument, for messages.
    layers
        Node of a run with a child for each layer that holds one variable
        (``run["activations"]``, ``run["weights"]``), or a mapping.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If there is no layer, or a node holds several variables.

    Examples
    --------
    >>> arrays_by_layer("weights", {"fc.weight": xr.DataArray([1.0])}).keys()
    dict_keys(['fc.weight'])
    """
    if isinstance(layers, xr.DataTree):
        held: dict[str, xr.DataArray] = {}
        for layer, node in layers.children.items():
            if len(node.data_vars) != 1:
                raise ValueError(
                    f"expected one variable in each node below {layers.path!r}, came "
                    f"{sorted(map(str, node.data_vars))} in {layer!r}; pass an array for each layer"
                )
            (held[layer],) = node.data_vars.values()
    elif isinstance(layers, Mapping):
        held = dict(cast("Mapping[str, xr.DataArray]", layers))
    else:
        raise TypeError(
            f"expected a mapping of layer names to DataArrays or a node of a run as {name}, came "
            f"{type(layers).__name__}"
        )
    if not held:
        raise ValueError(f"expected at least one layer in {name}, came none")
    return held


def stack_layers(results: Mapping[str, Any]) -> Any:
    """Join the results of the layers on the dim ``layer``, labelled by the layers' names.

    Raises
    ------
    ValueError
        If the layers have different labels along a dim they share.

    Examples
    --------
    >>> stack_layers({"fc1": xr.DataArray(1.0), "fc2": xr.DataArray(2.0)}).layer.values.tolist()
    ['fc1', 'fc2']
    """
    _require_same_labels(results)
    layer = xr.DataArray([*results], dims=DIM_LAYER, name=DIM_LAYER, coords={DIM_LAYER: [*results]})
    first: Sequence[Any] = [*results.values()]
    stacked = xr.concat(
        first, dim=layer, join="exact", coords="minimal", compat="override", combine_attrs="override"
    )
    return stacked.transpose(..., DIM_LAYER)


def _require_same_labels(results: Mapping[str, Any]) -> None:
    (name, one), *others = results.items()
    for other_name, other in others:
        for dim in [dim for dim in one.sizes if dim in other.sizes]:
            mine, theirs = one.indexes.get(dim), other.indexes.get(dim)
            labelled = mine is not None and theirs is not None
            if one.sizes[dim] != other.sizes[dim] or (labelled and not mine.equals(theirs)):
                raise ValueError(
                    f"expected layers with equal labels along dim {dim!r}, came {one.sizes[dim]} in {name!r} "
                    f"and {other.sizes[dim]}, or others, in {other_name!r}; keep those that all have: "
                    f"xr.align(*layers.values(), join='inner', exclude=['unit'])"
                )


def over_layers(name: str, function: Callable[[str | None, xr.DataArray], Any], layers: Layers) -> Any:
    """Call a function of (layer's name, array) for one array (name None) or each layer of many.

    Raises
    ------
    TypeError, ValueError
        As :func:`arrays_by_layer`.

    Examples
    --------
    >>> over_layers("a", lambda name, a: a.sum(), {"fc": xr.DataArray([1.0, 2.0], dims="unit")}).values
    array([3.])
    """
    if isinstance(layers, xr.DataArray):
        return function(None, layers)
    return stack_layers({layer: function(layer, a) for layer, a in arrays_by_layer(name, layers).items()})
