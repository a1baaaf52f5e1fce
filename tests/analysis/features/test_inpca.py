from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import inpca, pairwise_bhattacharyya


def bhattacharyya(m: int = 9, seed: int = 0) -> xr.DataArray:
    p = np.random.default_rng(seed).dirichlet(np.ones(3), (m, 5))
    steps = xr.DataArray(p, dims=("step", "sample", "class_"), coords={"step": np.arange(m) * 10})
    return pairwise_bhattacharyya(steps)


def reproduced(found: xr.Dataset, dim: str) -> Any:
    x, e = found["inpca_coordinates"], found["inpca_eigenvalues"]
    return (np.sign(e) * (x - x.rename({dim: f"{dim}_"})) ** 2).sum("component")


@given(m=st.integers(1, 12), seed=st.integers(0, 999))
def test_coordinates__reproduce_the_distances_exactly(m: int, seed: int) -> None:
    D = bhattacharyya(m, seed)
    found = inpca(D, dim="step")
    np.testing.assert_allclose(reproduced(found, "step"), D, atol=5e-15)


def test_coordinates__of_distances_that_are_not_euclidean_need_negative_eigenvalues() -> None:
    D = bhattacharyya()
    D = D.copy(data=D.values + D.values**2)
    found = inpca(D, dim="step")
    assert float(found["inpca_eigenvalues"].min()) < -1e-3
    np.testing.assert_allclose(reproduced(found, "step"), D, atol=5e-15)
    sizes = np.abs(found["inpca_eigenvalues"].values)
    assert (np.diff(sizes) <= 0).all()


def test_coordinates__of_points_in_the_plane_are_their_principal_components() -> None:
    points = np.random.default_rng(0).standard_normal((7, 2)) * [3, 1]
    D = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    found = inpca(xr.DataArray(D, dims=("model", "model_")))
    U, s, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    x = found["inpca_coordinates"].values
    np.testing.assert_allclose(np.abs(x[:, :2]), np.abs(U * s), rtol=1e-9)
    np.testing.assert_allclose(x[:, 2:], 0, atol=1e-6)
    assert float(found["explained_stress"][1]) == pytest.approx(1, abs=1e-6)


def test_stress__is_that_of_the_definition() -> None:
    D = bhattacharyya().values
    L = np.eye(9) - 1 / 9
    W = -L @ D @ L / 2
    e = np.linalg.eigvalsh(W)
    e = e[np.argsort(-np.abs(e))]
    expected = 1 - np.sqrt(np.clip(1 - np.cumsum(e**2) / np.sum(W**2), 0, None))
    found = inpca(xr.DataArray(D, dims=("model", "model_")), n_components=4)
    assert found.sizes["component"] == 4
    np.testing.assert_allclose(found["explained_stress"], expected[:4], rtol=1e-6)
    np.testing.assert_allclose(found["inpca_eigenvalues"], e[:4], rtol=1e-9)


@given(seed=st.integers(0, 999))
def test_embedding__does_not_depend_on_the_order_of_the_points(seed: int) -> None:
    D = bhattacharyya()
    order = np.random.default_rng(seed).permutation(9)
    expected = inpca(D, dim="step").isel(step=order, component=slice(3))
    found = inpca(D.isel(step=order, step_=order), dim="step").isel(component=slice(3))
    xr.testing.assert_allclose(found, expected, atol=1e-9)


def test_distances__that_are_infinite_or_not_symmetric_are_marked() -> None:
    D = np.stack([bhattacharyya().values] * 4)
    D[0, 1, 2] = D[0, 2, 1] = np.inf
    D[1, 1, 2] += 0.1
    D[2, 3, 3] = 0.1
    found = inpca(xr.DataArray(D, dims=("layer", "model", "model_")))
    for a in found.values():
        bad = a.isnull().any([d for d in a.dims if d != "layer"])
        assert bad.values.tolist() == [True, True, True, False]


def test_equal_points__have_no_stress_to_explain() -> None:
    found = inpca(xr.DataArray(np.zeros((3, 3)), dims=("model", "model_")))
    assert (found["inpca_coordinates"] == 0).all()
    assert found["explained_stress"].isnull().all()


def test_inpca__refuses_bad_arguments() -> None:
    D = bhattacharyya()
    with pytest.raises(ValueError, match=r"missing \['model', 'model_'\]"):
        inpca(D)
    with pytest.raises(ValueError, match="same points along 'step' and 'step_'"):
        inpca(D.isel(step=slice(3)), dim="step")
    with pytest.raises(ValueError, match="same points"):
        inpca(D.assign_coords(step_=np.arange(9)), dim="step")
    with pytest.raises(ValueError, match="n_components <= 9"):
        inpca(D, dim="step", n_components=10)
