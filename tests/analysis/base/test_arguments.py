from __future__ import annotations

import dask.array
import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis.base.arguments import (
    apply_kernel,
    as_basis,
    declared,
    number_of,
    on_stacked,
    require_same_labels,
    subspaces,
    vector_dims_of,
)


def array(*dims: str, **attrs: object) -> xr.DataArray:
    sizes = {"step": 4, "eig": 2, "out": 3, "in": 5}
    shape = [sizes[dim] for dim in dims]
    return xr.DataArray(np.arange(np.prod(shape), dtype=float).reshape(shape), dims=dims, attrs=attrs)


@pytest.mark.parametrize("stated", [["out", "in"], ("out", "in"), np.array(["out", "in"])])
def test_vector_dims_of__takes_any_sequence_of_names_from_attrs(stated: object) -> None:
    assert vector_dims_of({"u": array("step", "out", "in", vector_dims=stated)}) == ("out", "in")


def test_vector_dims_of__takes_a_bare_name() -> None:
    assert vector_dims_of({"u": array("out", "in", vector_dims="in")}) == ("in",)
    assert vector_dims_of({"u": array("out", "in")}, "in") == ("in",)


def test_vector_dims_of__other_order_is_no_disagreement() -> None:
    u, v = array("out", "in", vector_dims=["out", "in"]), array("out", "in", vector_dims=["in", "out"])
    assert vector_dims_of({"u": u, "v": v}) == ("out", "in")


def test_vector_dims_of__refuses_none_at_all() -> None:
    with pytest.raises(ValueError, match="at least one vector dim"):
        vector_dims_of({"u": array("out", "in")}, [])


def test_as_basis__drops_coords_along_the_number_dim_and_keeps_the_others() -> None:
    u = array("step", "eig", "in").assign_coords(eig=[0, 1], sign=("eig", [1, -1]), step=[0, 1, 2, 3])
    basis = as_basis("u", u, ("in",), "eig")
    assert basis.dims == ("step", number_of("u"), "in")
    assert list(basis.coords) == ["step"]


def test_subspaces__counts_the_number_dims() -> None:
    with pytest.raises(ValueError, match="one number dim for each of u"):
        subspaces({"u": array("eig", "in")}, ["in"], ("eig", "eig"))


def test_require_same_labels__a_missing_coordinate_is_no_label() -> None:
    a = array("step", "in")
    require_same_labels({"u": a, "v": a.assign_coords(step=[1, 2, 3, 4])})
    with pytest.raises(ValueError, match="without coordinate"):
        require_same_labels({"u": a, "v": a.isel(step=[0])})


def test_on_stacked__flattens_bases_and_vectors_in_the_same_order() -> None:
    basis, vector = np.arange(24.0).reshape(1, 2, 3, 4), np.arange(12.0).reshape(3, 4)
    U, v = on_stacked(lambda *a: a, 2, bases=(True, False))(basis, vector)
    assert U.shape == (1, 12, 2)
    np.testing.assert_array_equal(U[0, :, 1], basis[0, 1].ravel())
    np.testing.assert_array_equal(v, vector.ravel())


def test_apply_kernel__joins_chunks_of_core_dims_and_keeps_the_others() -> None:
    a = array("in", "step").chunk({"in": 2, "step": 3})
    result = apply_kernel(lambda x: x.sum(-1), [a], [["in"]])
    assert result.chunks == ((3, 1),)
    np.testing.assert_array_equal(result, a.values.sum(axis=0))


def test_apply_kernel__takes_other_chunks_and_arrays_in_memory_together() -> None:
    a = array("step", "in")
    for b in (a, a.chunk(step=1), a.chunk(step=3)):
        result = apply_kernel(lambda x, y: (x * y).sum(-1), [a.chunk(step=2), b], [["in"], ["in"]])
        assert isinstance(result.data, dask.array.Array)
        np.testing.assert_array_equal(result, (a * a).sum("in"))


def test_declared__replaces_name_and_attributes() -> None:
    result = declared(xr.DataArray(0.5, name="x", attrs={"note": "of the input"}), "alignment", k=3)
    assert result.name == "alignment"
    assert "note" not in result.attrs
    assert result.attrs["k"] == 3


def sketched(**changed: object) -> xr.DataArray:
    matrix = {"scheme": "osnap-splitmix64-1", "m": 4, "nonzeros": 4, "seed": 0, "layers": ["a"], "sizes": [9]}
    return xr.DataArray(
        np.ones((2, 4)),
        dims=("eig", "sketch"),
        attrs={"vector_dims": ["sketch"], "number_dim": "eig", "sketch": matrix | changed},
    )


@pytest.mark.parametrize("changed", [{"seed": 1}, {"layers": ["b"]}, {"nonzeros": 2}, {"sizes": [8]}])
def test_vector_dims_of__refuses_sketches_by_different_matrices(changed: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=f"u and v are sketches by different matrices: {next(iter(changed))}"
    ):
        vector_dims_of({"u": sketched(), "v": sketched(**changed)})


def test_vector_dims_of__takes_sketches_by_one_matrix_of_other_shapes() -> None:
    assert vector_dims_of({"u": sketched(), "v": sketched(shape=[3, 3])}) == ("sketch",)


def product(*arrays: xr.DataArray) -> xr.DataArray:
    result: xr.DataArray = apply_kernel(lambda x, y: (x * y).sum(-1), arrays, [["in"]] * 2)
    return result


def test_apply_kernel__keeps_scalar_coords_that_agree_and_drops_those_that_do_not() -> None:
    u = array("step", "in").assign_coords(step=[0, 5, 10, 15], layer="fc1", epoch=("step", [0, 1, 2, 3]))
    found = product(u.sel(step=15), u.sel(step=0))
    assert dict(found.coords).keys() == {"layer"}
    assert (u * u).isel(step=0).coords.keys() == product(u.sel(step=0), u.sel(step=0)).coords.keys()
    for pair in ((u, u.sel(step=15)), (u.sel(step=15), u)):
        both = product(*pair)
        assert both["step"].values.tolist() == [0, 5, 10, 15]
        assert both["epoch"].values.tolist() == [0, 1, 2, 3]
        assert both["layer"].item() == "fc1"


def test_apply_kernel__drops_lazy_scalar_coords_of_other_tasks_without_computing_them() -> None:
    times = [xr.Variable((), value).chunk() for value in (0.5, 1.5)]
    u, v = (array("in").assign_coords(time=time) for time in times)

    def compute(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=compute):
        assert "time" not in product(u, v).coords
        assert "time" in product(u, u).coords


def test_apply_kernel__refuses_dims_named_as_those_of_the_result() -> None:
    u = array("step", "in").rename(step="angle")
    with pytest.raises(ValueError, match=r"without the dims \['angle'\].*rename\(angle='other'\)"):
        apply_kernel(np.copy, [u], [["in"]], output_dims=[["angle"]], output_sizes={"angle": 5})
