from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import (
    noise_scale,
    participation_ratio,
    positive_fraction,
    r_med,
    spectral_distribution,
    trace_to_frobenius,
)
from hild_xr.analysis.spectra.curvature_scalars import (
    noise_scale_kernel,
    positive_fraction_kernel,
    r_med_kernel,
)

NAN, INF = np.nan, np.inf
RULE = ("probe", "node")


def test_r_med__of_one_to_nine_is_nine_fifths_and_of_the_identity_one() -> None:
    diagonal = xr.DataArray(np.arange(1.0, 10.0), dims="in", attrs={"vector_dims": ["in"]})
    assert float(r_med(diagonal)) == 9 / 5
    assert float(r_med(diagonal**0, vector_dims="in")) == 1.0


@given(seed=st.integers(0, 999), n=st.integers(1, 9), scale=st.sampled_from([1e-200, -3.0, 1e200]))
def test_r_med__does_not_know_order_sign_and_scale(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n)
    expected = np.abs(values).max() / np.median(np.abs(values))
    changed = scale * rng.permutation(values) * rng.choice([-1, 1], n)
    assert float(r_med_kernel(changed)) == pytest.approx(expected, rel=1e-12)


def test_r_med__is_taken_of_each_layer_over_all_its_dims() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5))
    values[1, 2, 3] = NAN
    attrs = {"vector_dims": ["out", "in"]}
    found = r_med(
        xr.DataArray(values, dims=("step", "out", "in"), attrs=attrs).transpose("in", "step", "out")
    )
    flat = np.abs(values.reshape(3, -1))
    np.testing.assert_allclose(found, flat.max(1) / np.median(flat, 1), rtol=1e-14)
    assert found.isnull().values.tolist() == [False, True, False]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.0, 1.0], INF), ([0.0, 0.0], NAN), ([NAN], NAN)])
def test_r_med__of_a_median_of_zero(values: list[float], expected: float) -> None:
    assert float(r_med_kernel(np.array(values))) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("p", [1, 9, 100])
def test_trace_to_frobenius__of_the_identity_is_the_root_of_its_size(p: int) -> None:
    eigenvalues = np.ones(p)
    found = trace_to_frobenius(xr.DataArray(eigenvalues.sum()), xr.DataArray(np.linalg.norm(eigenvalues)))
    assert float(found) == pytest.approx(p**0.5, rel=1e-14)


def test_trace_to_frobenius__squared_is_the_participation_ratio_of_positive_eigenvalues() -> None:
    eigenvalues = xr.DataArray(np.random.default_rng(0).uniform(0, 1, (4, 6)), dims=("step", "eig"))
    found = trace_to_frobenius(eigenvalues.sum("eig"), (eigenvalues**2).sum("eig") ** 0.5)
    np.testing.assert_allclose(found**2, participation_ratio(eigenvalues), rtol=1e-12)


def test_trace_to_frobenius__of_missing_and_zero_matrices_is_unknown() -> None:
    trace, norm = (
        xr.DataArray([1.0, NAN, 0.0, -2.0], dims="step"),
        xr.DataArray([NAN, 1.0, 0.0, 2.0], dims="step"),
    )
    np.testing.assert_array_equal(trace_to_frobenius(trace, norm), [NAN, NAN, NAN, -1.0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 0.0, -2.0], 0.5),
        ([3.0, 1.0, 1e-20, -1e-20], 0.5),
        ([3.0, -1.0, NAN, NAN], 0.5),
        ([0.0, 0.0], 0.0),
        ([NAN, 1.0], NAN),
        ([NAN, NAN], NAN),
    ],
)
def test_positive_fraction__of_eigenvalues(values: list[float], expected: float) -> None:
    found = positive_fraction(xr.DataArray(values, dims="eig"))
    assert float(found) == pytest.approx(expected, nan_ok=True)


def test_positive_fraction__of_a_density_is_one_less_its_distribution_at_zero() -> None:
    rng = np.random.default_rng(0)
    nodes = xr.DataArray(rng.standard_normal((3, *(4, 7))), dims=("step", *RULE))
    weights = xr.DataArray(rng.uniform(0, 1, (3, 4, 7)), dims=("step", *RULE))
    weights = weights / weights.sum("node")
    found = positive_fraction(nodes, weights, dim=RULE)
    below = spectral_distribution(nodes, weights, [0.0])["spectral_distribution"].isel(eigenvalue=0)
    np.testing.assert_allclose(found, 1 - below, rtol=1e-12)
    # an unused node says nothing, whatever it holds
    unused = np.where(np.arange(7) == 3, 0.0, weights.values)
    values = np.where(np.arange(7) == 3, NAN, nodes.values)
    again = positive_fraction_kernel(values, unused, n_axes=2)
    assert np.isfinite(again).all()
    np.testing.assert_allclose(
        again, (unused * (nodes.values > 0)).sum((1, 2)) / unused.sum((1, 2)), rtol=1e-12
    )


def samples(seed: int = 0) -> xr.DataArray:
    values = np.random.default_rng(seed).standard_normal((3, 50, 2, 4)) + 0.5
    return xr.DataArray(values, dims=("step", "sample", "out", "in"))


@pytest.mark.parametrize("centered", [False, True])
def test_noise_scale__is_the_trace_of_the_covariance_by_the_squared_mean(centered: bool) -> None:
    g = samples()
    mean = g.mean("sample").assign_attrs(vector_dims=["out", "in"])
    trace = ((g - mean if centered else g) ** 2).sum(["out", "in"]).mean("sample")
    found = noise_scale(trace, mean, centered=centered)
    for i in range(3):
        flat = g.values[i].reshape(50, 8)
        covariance = np.cov(flat.T, bias=True)
        assert float(found[i]) == pytest.approx(np.trace(covariance) / np.sum(flat.mean(0) ** 2), rel=1e-11)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-130, -4.0, 1e130]))
def test_noise_scale__does_not_know_scale_and_basis(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((20, 4)) + 0.3
    Q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    expected = noise_scale_kernel(np.square(g).sum(1).mean(), g.mean(0))
    turned = scale * (g @ Q)
    assert float(noise_scale_kernel(np.square(turned).sum(1).mean(), turned.mean(0))) == pytest.approx(
        float(expected), rel=1e-9
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_scale__of_equal_gradients_is_zero(dtype: str) -> None:
    g = np.random.default_rng(0).standard_normal(30).astype(dtype)
    trace = np.asarray(np.square(g).sum(dtype=dtype))
    assert float(noise_scale_kernel(trace, g)) == 0.0


def test_noise_scale__of_what_is_missing_or_contradicts_itself_is_unknown() -> None:
    g = np.array([[3.0, 4.0]] * 4 + [[0.0, 0.0], [3.0, NAN]])
    trace = np.array([50.0, 25.0, 20.0, NAN, 7.0, 50.0])
    np.testing.assert_allclose(noise_scale_kernel(trace, g), [1.0, 0.0, NAN, NAN, NAN, NAN], atol=1e-14)


@pytest.mark.parametrize("chunked", [False, True])
def test_functions__of_a_run_without_records_are_empty(chunked: bool) -> None:
    layer = xr.DataArray(np.ones((0, 2, 3)), dims=("step", "out", "in"))
    numbers = xr.DataArray(np.ones(0), dims="step")
    if chunked:
        layer, numbers = layer.chunk(), numbers.chunk()
    for found in (
        r_med(layer, vector_dims=["out", "in"]),
        positive_fraction(layer, layer, dim=["out", "in"]),
        noise_scale(numbers, layer, vector_dims=["out", "in"]),
        trace_to_frobenius(numbers, numbers),
    ):
        assert found.compute().shape == (0,)


def test_functions__refuse_bad_arguments() -> None:
    array = xr.DataArray(np.ones((2, 3)), dims=("step", "in"))
    with pytest.raises(ValueError, match="no vector dims"):
        r_med(array)
    with pytest.raises(ValueError, match="at least one value"):
        r_med(array.isel({"in": slice(0)}), vector_dims="in")
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        trace_to_frobenius(array, array.isel(step=[0]))
    with pytest.raises(ValueError, match=r"rtol in \[0, 1\)"):
        positive_fraction(array, dim="in", rtol=1.0)
    with pytest.raises(ValueError, match="missing"):
        positive_fraction(array)
    with pytest.raises(ValueError, match="without the dims"):
        noise_scale(array, array, vector_dims="in")
    with pytest.raises(TypeError, match="complex"):
        r_med(array * 1j, vector_dims="in")
    with pytest.raises(TypeError, match="complex"):
        trace_to_frobenius(array, array * 1j)
    with pytest.raises(TypeError, match="complex"):
        positive_fraction(array * 1j, dim="in")
    with pytest.raises(TypeError, match="complex"):
        noise_scale(array.sum("in") * 1j, array, vector_dims="in")


LAYER_NAMES = ["fc1.weight", "fc2.weight"]


def of_layers(matrix: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Traces of two layers as a run stores them, and the gradient of the first."""
    trace = xr.DataArray(
        [[9.0, 70.0], [5.0, 60.0]],
        dims=("step", "layer"),
        coords={"step": [0, 5], "layer": LAYER_NAMES},
        attrs={"matrix": matrix},
    )
    gradient = xr.DataArray(
        [[[1.0, 2.0]], [[2.0, 0.0]]], dims=("step", "out", "in"), coords={"step": [0, 5]}
    ).assign_attrs(vector_dims=["out", "in"])
    return trace, gradient


def test_noise_scale__of_one_layer_takes_the_trace_of_that_layer() -> None:
    trace, gradient = of_layers("gmatrix")
    assert noise_scale(trace.sel(layer="fc1.weight"), gradient).values.tolist() == [0.8, 0.25]
    with pytest.raises(ValueError, match=r"came \['layer'\] on trace alone.*trace.sel\(layer='fc1.weight'\)"):
        noise_scale(trace, gradient)
    with pytest.raises(ValueError, match=r"of one layer, came \['fc2.weight', 'fc1.weight'\]"):
        noise_scale(trace.sel(layer="fc2.weight"), gradient.assign_coords(layer="fc1.weight"))


def test_noise_scale__is_not_broadcast_over_records_or_rows() -> None:
    trace, gradient = of_layers("gmatrix")
    trace = trace.sel(layer="fc1.weight", drop=True)
    with pytest.raises(ValueError, match=r"came \['step'\] on trace alone.*trace.sel\(step=0\)"):
        noise_scale(trace, gradient.isel(step=0))
    with pytest.raises(ValueError, match=r"came \['step'\] on gradient alone"):
        noise_scale(trace.isel(step=0), gradient)
    with pytest.raises(ValueError, match=r"came \['out'\] on gradient alone"):
        noise_scale(trace, gradient, vector_dims="in")


def test_noise_scale__refuses_the_trace_of_another_matrix() -> None:
    for matrix, centered, message in (
        ("hessian", False, "expected the trace of 'gmatrix' with centered=False, came 'hessian'$"),
        ("gmatrix_centered", False, "came 'gmatrix_centered'; pass centered=True"),
        ("gmatrix", True, "came 'gmatrix'; pass centered=False"),
    ):
        trace, gradient = of_layers(matrix)
        with pytest.raises(ValueError, match=message):
            noise_scale(trace.isel(layer=0), gradient, centered=centered)
    trace, gradient = of_layers("gmatrix_centered")
    assert noise_scale(trace.isel(layer=0), gradient, centered=True).values.tolist() == [1.8, 1.25]


def test_trace_to_frobenius__refuses_two_matrices_or_layers() -> None:
    (trace, _), (norm, _) = of_layers("gmatrix"), of_layers("hessian")
    with pytest.raises(ValueError, match="'trace': 'gmatrix', 'frobenius_norm': 'hessian'"):
        trace_to_frobenius(trace, norm)
    assert (trace_to_frobenius(norm, norm) == 1).all()
    with pytest.raises(ValueError, match=r"came \['layer'\] on trace alone"):
        trace_to_frobenius(norm, norm.isel(layer=0))
    with pytest.raises(ValueError, match="of one layer"):
        trace_to_frobenius(norm.isel(layer=1), norm.isel(layer=0))
