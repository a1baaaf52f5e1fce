from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis.features.layers import arrays_by_layer, over_layers, stack_layers


def tree() -> xr.DataTree:
    return xr.DataTree.from_dict(
        {
            "/fc2": xr.Dataset({"activations": ("unit", [1.0, 2.0])}),
            "/fc1": xr.Dataset({"activations": ("unit", [5.0])}),
        }
    )


def test_layers__of_a_node_and_of_a_mapping_are_the_same_in_their_order() -> None:
    held = arrays_by_layer("a", tree())
    assert [*held] == ["fc2", "fc1"]
    for layers in (tree(), held):
        found = over_layers("a", lambda name, a: a.sum(), layers)
        assert found.dims == ("layer",)
        assert found.layer.values.tolist() == ["fc2", "fc1"]
        assert found.values.tolist() == [3.0, 5.0]


def test_layers__of_one_array_have_no_layer_dim() -> None:
    found = over_layers("a", lambda name, a: a.sum().assign_attrs(name=name), xr.DataArray([1.0, 2.0]))
    assert found.dims == ()
    assert found.attrs["name"] is None


def test_stack_layers__refuses_layers_with_other_steps() -> None:
    one = xr.DataArray([1.0, 2.0], dims="step", coords={"step": [0, 1]})
    for other in (one.assign_coords(step=[0, 2]), one.isel(step=[0]), one.drop_vars("step").isel(step=[0])):
        with pytest.raises(ValueError, match=r"equal labels along dim 'step', came 2 in 'a'.*xr.align"):
            stack_layers({"a": one, "b": other})
        with pytest.raises(ValueError, match=r"equal labels along dim 'step', came 2 in 'a'"):
            stack_layers({"a": one.to_dataset(name="nc1"), "b": other.to_dataset(name="nc1")})


def test_layers__refuses_what_holds_none_or_several_variables() -> None:
    two = xr.DataTree.from_dict({"/fc": xr.Dataset({"a": ("unit", [1.0]), "b": ("unit", [1.0])})})
    with pytest.raises(ValueError, match=r"one variable in each node .* came \['a', 'b'\] in 'fc'"):
        arrays_by_layer("activations", two)
    with pytest.raises(ValueError, match="at least one layer in activations"):
        arrays_by_layer("activations", {})
    with pytest.raises(TypeError, match="came ndarray"):
        arrays_by_layer("activations", np.zeros(2))
