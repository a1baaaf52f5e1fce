from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import (
    alignment,
    principal_angles,
    random_alignment_baseline,
    subspace_alignment,
    subspace_overlap,
)
from hild_xr.analysis.subspaces.alignment import (
    alignment_kernel,
    subspace_alignment_kernel,
    subspace_overlap_kernel,
)
from hild_xr.analysis.subspaces.bases import FloatArray

LAYER = {"vector_dims": ["out", "in"], "number_dim": "eig"}


def run(seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Weights (seed, step, out, in) and eigenvectors (seed, step, eig, out, in) of a layer."""
    rng = np.random.default_rng(seed)
    coords = {"seed": [0, 1], "step": [0, 5, 9]}
    weight = xr.DataArray(
        rng.standard_normal((2, 3, 4, 5)), dims=("seed", "step", "out", "in"), coords=coords
    )
    weight.attrs["vector_dims"] = ["out", "in"]
    rows = np.swapaxes(np.linalg.qr(rng.standard_normal((2, 3, 20, 3)))[0], -1, -2).reshape(2, 3, 3, 4, 5)
    vectors = xr.DataArray(rows, dims=("seed", "step", "eig", "out", "in"), coords=coords, attrs=LAYER)
    return weight, vectors


def projection_by_least_squares(v: FloatArray, B: FloatArray) -> float:
    fitted = B @ np.linalg.lstsq(B, v, rcond=None)[0]
    return float(np.linalg.norm(fitted) / np.linalg.norm(v))


# ---------------------------------------------------------------------------- kernels


def test_alignment_kernel__is_the_cosine_of_the_angle_to_the_subspace() -> None:
    for angle in (0.0, 1e-9, 0.3, np.pi / 2):
        v = np.array([np.cos(angle) * 0.6, np.cos(angle) * 0.8, np.sin(angle)])
        assert alignment_kernel(7 * v, np.eye(3)[:, :2]) == pytest.approx(np.cos(angle), abs=1e-15)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), p=st.integers(1, 12), k=st.integers(1, 6))
def test_alignment_kernel__is_that_of_the_least_squares_projection(seed: int, p: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    v, B = rng.standard_normal((3, p)), rng.standard_normal((3, p, k))
    expected = [projection_by_least_squares(a, A) for a, A in zip(v, B, strict=True)]
    np.testing.assert_allclose(alignment_kernel(v, B), expected, rtol=0, atol=1e-10)
    mixed = B @ rng.standard_normal((k, k)) if k <= p else B
    np.testing.assert_allclose(alignment_kernel(-3 * v, mixed), expected, rtol=0, atol=1e-8)


def test_alignment_kernel__dependent_vectors_count_once() -> None:
    rng = np.random.default_rng(0)
    v, B = rng.standard_normal(9), rng.standard_normal((9, 2))
    twice = np.concatenate([B, B @ [[1.0], [2.0]], np.zeros((9, 1))], axis=1)
    assert alignment_kernel(v, twice) == pytest.approx(alignment_kernel(v, B), abs=1e-14)
    assert alignment_kernel(v, np.zeros((9, 2))) == 0


def test_alignment_kernel__is_nan_for_zero_and_missing_vectors_only() -> None:
    v = np.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [3.0, 4.0]])
    np.testing.assert_allclose(alignment_kernel(v, np.eye(2)[:, :1]), [np.nan, np.nan, np.nan, 0.6])
    assert np.isnan(alignment_kernel(v[3], np.array([[np.nan], [1.0]])))


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e200, 1e308])
def test_alignment_kernel__does_not_depend_on_the_length(scale: float) -> None:
    v = np.array([0.3, 0.4]) * scale
    rtol = 1e-2 if scale < 1e-307 else 1e-14  # subnormal numbers carry few digits themselves
    np.testing.assert_allclose(alignment_kernel(v, np.eye(2)[:, :1]), 0.6, rtol=rtol)


def test_alignment_kernel__of_integers_and_float32() -> None:
    assert alignment_kernel(np.array([3, 4]), np.array([[1], [0]])) == pytest.approx(0.6, abs=1e-15)
    assert alignment_kernel(np.array([3, 4], dtype=np.float32), np.eye(2)[:, :1]).dtype == np.float64


@settings(max_examples=40)
@given(seed=st.integers(0, 999), k1=st.integers(1, 4), k2=st.integers(1, 4), p=st.integers(4, 9))
def test_subspace_kernels__follow_from_scipys_principal_angles(seed: int, k1: int, k2: int, p: int) -> None:
    rng = np.random.default_rng(seed)
    U, V = rng.standard_normal((p, k1)), rng.standard_normal((p, k2))
    cosines = np.cos(scipy.linalg.subspace_angles(U, V))
    np.testing.assert_allclose(subspace_overlap_kernel(U, V), np.mean(cosines**2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(subspace_alignment_kernel(U, V), cosines.min(), rtol=0, atol=1e-12)


def test_subspace_alignment_kernel__is_the_worst_alignment_of_a_unit_vector() -> None:
    rng = np.random.default_rng(0)
    U, V = rng.standard_normal((7, 2)), rng.standard_normal((7, 2))
    angle = np.linspace(0, np.pi, 20001)
    around = np.linalg.qr(U)[0] @ np.stack([np.cos(angle), np.sin(angle)])
    worst = alignment_kernel(around.T, V).min()
    assert subspace_alignment_kernel(U, V) == pytest.approx(worst, abs=1e-7)


def test_subspace_kernels__are_nan_for_dependent_or_missing_bases() -> None:
    U = np.random.default_rng(0).standard_normal((3, 5, 2))
    U[0, :, 1], U[1, 2, 0] = U[0, :, 0], np.nan
    for kernel in (subspace_overlap_kernel, subspace_alignment_kernel):
        np.testing.assert_allclose(kernel(U, U), [np.nan, np.nan, 1.0], rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------- labelled


def test_alignment__of_a_layer_with_its_eigenvectors() -> None:
    weight, vectors = run()
    found = alignment(weight, vectors)
    assert found.dims == ("seed", "step")
    for seed, step in itertools.product([0, 1], [0, 5, 9]):
        v, B = weight.sel(seed=seed, step=step), vectors.sel(seed=seed, step=step)
        expected = projection_by_least_squares(v.values.ravel(), B.values.reshape(3, 20).T)
        assert found.sel(seed=seed, step=step) == pytest.approx(expected, abs=1e-13)


def test_alignment__of_rows_with_row_blocks() -> None:
    weight, _ = run()
    blocks = xr.DataArray(
        np.random.default_rng(1).standard_normal((2, 3, 4, 2, 5)), dims=("seed", "step", "out", "eig", "in")
    )
    blocks.attrs = {"vector_dims": ["in"], "number_dim": "eig"}
    with pytest.raises(
        ValueError, match=r"came \['out', 'in'\] on vector, \['in'\] on basis; pass vector_dims"
    ):
        alignment(weight, blocks)
    found = alignment(weight, blocks, vector_dims=["in"])
    assert found.dims == ("seed", "step", "out")
    expected = projection_by_least_squares(weight.values[1, 2, 3], blocks.values[1, 2, 3].T)
    assert found.values[1, 2, 3] == pytest.approx(expected, abs=1e-13)


def test_alignment__with_class_means_that_the_vector_has_a_dim_of_too() -> None:
    weight = run()[0].rename(out="class").assign_coords({"class": [0, 1, 2, 3]})
    means = xr.DataArray(np.random.default_rng(2).standard_normal((4, 5)), dims=("class", "in"))
    found = alignment(weight, means, vector_dims="in", number_dim="class")
    assert found.dims == ("seed", "step", "class")
    assert found["class"].values.tolist() == [0, 1, 2, 3]
    expected = projection_by_least_squares(weight.values[0, 1, 2], means.values.T)
    assert found.values[0, 1, 2] == pytest.approx(expected, abs=1e-13)


def test_alignment__with_more_means_than_dims_is_one() -> None:
    weight, _ = run()
    means = xr.DataArray(np.random.default_rng(2).standard_normal((7, 5)), dims=("class", "in"))
    np.testing.assert_allclose(alignment(weight, means, vector_dims="in", number_dim="class"), 1, atol=1e-14)


def test_alignment__of_each_eigenvector_with_the_span_of_others() -> None:
    _, vectors = run()
    found = alignment(vectors, vectors.isel(eig=slice(2)))
    assert found.dims == ("seed", "step", "eig")
    np.testing.assert_allclose(found, np.broadcast_to([1, 1, 0], (2, 3, 3)), atol=1e-14)


def test_alignment__masks_dead_neurons_of_the_same_record() -> None:
    weight, _ = run()
    weight[{"out": 1}] *= 1e-5  # dead in every record
    weight[{"step": 2}] *= 1e-9  # a whole record is small: its neurons are compared with each other only
    weight[{"out": 3, "step": 0}] = 0.0
    means = xr.DataArray(np.eye(5)[:2], dims=("class", "in"))
    options = {"vector_dims": "in", "number_dim": "class"}
    masked = alignment(weight, means, min_norm=1e-3, **options)
    everything = alignment(weight, means, **options)
    dead = xr.zeros_like(masked, dtype=bool)
    dead[{"out": 1}], dead[{"out": 3, "step": 0}] = True, True
    xr.testing.assert_allclose(masked, everything.where(~dead), rtol=0, atol=1e-15)
    assert everything.isnull().sum() == 2  # the zero vectors alone


def test_alignment__masks_nothing_where_there_is_one_vector_a_record() -> None:
    weight, vectors = run()
    weight[{"step": 1}] *= 1e-9
    xr.testing.assert_identical(alignment(weight, vectors, min_norm=0.5), alignment(weight, vectors))


@pytest.mark.parametrize("min_norm", [-0.1, 1.0, np.nan])
def test_alignment__refuses_a_min_norm_that_is_no_fraction(min_norm: float) -> None:
    with pytest.raises(ValueError, match="expected min_norm in"):
        alignment(*run(), min_norm=min_norm)


def test_alignment__refuses_different_cadences() -> None:
    weight, vectors = run()
    with pytest.raises(ValueError, match=r"vector and basis differ along dim 'step'.*xr\.align"):
        alignment(weight, vectors.isel(step=[0, 2]))


def test_alignment__of_random_vectors_is_the_baseline_on_average() -> None:
    v = np.random.default_rng(0).standard_normal((20_000, 30))
    rho = alignment_kernel(v, np.eye(30)[:, :3])
    # variance of rho^2 is that of a Beta(3/2, 27/2) distribution
    error = np.sqrt(1.5 * 13.5 / (15**2 * 16) / len(rho))
    assert abs(np.mean(rho**2) - random_alignment_baseline(3, 30) ** 2) < 4 * error


def test_random_alignment_baseline__takes_arrays_and_refuses_the_impossible() -> None:
    np.testing.assert_allclose(random_alignment_baseline([1, 4], 16), [0.25, 0.5])
    for k, p in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="expected a subspace"):
            random_alignment_baseline(k, p)


def test_subspace_functions__agree_with_principal_angles() -> None:
    _, u = run(0)
    _, v = run(1)
    v = v.isel(eig=slice(2))
    cosines = np.cos(principal_angles(u, v))
    xr.testing.assert_allclose(
        subspace_overlap(u, v).drop_attrs(), (cosines**2).mean("angle").drop_attrs(), rtol=0, atol=1e-13
    )
    xr.testing.assert_allclose(subspace_alignment(u, v), cosines.min("angle"), rtol=0, atol=1e-13)


def test_subspace_overlap__of_random_subspaces_is_the_dimension_by_p() -> None:
    rng = np.random.default_rng(0)
    overlap = subspace_overlap_kernel(rng.standard_normal((2000, 40, 4)), rng.standard_normal((2000, 40, 4)))
    assert overlap.mean() == pytest.approx(4 / 40, abs=4 * overlap.std() / np.sqrt(2000))
