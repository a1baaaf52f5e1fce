from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import consecutive_angles, grassmann_distances, pairwise_angles, principal_angles
from hild_xr.analysis.subspaces.bases import FloatArray
from hild_xr.analysis.subspaces.grassmann import RESULTS, grassmann_distances_kernel

PAIR = {"vector_dims": "in", "number_dim": "eig"}


def span(rng: np.random.Generator, p: int, k: int) -> xr.DataArray:
    return xr.DataArray(np.linalg.qr(rng.standard_normal((p, k)))[0].T, dims=("eig", "in"))


def projector(u: xr.DataArray) -> FloatArray:
    product: FloatArray = u.values.T @ u.values
    return product


@settings(max_examples=40)
@given(seed=st.integers(0, 999), p=st.integers(1, 9), data=st.data())
def test_grassmann_distances__follow_from_the_projectors(seed: int, p: int, data: st.DataObject) -> None:
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, p))
    u, v = span(rng, p, k), span(rng, p, k)
    found = grassmann_distances(principal_angles(u, v, **PAIR))
    difference = projector(u) - projector(v)
    assert float(found["chordal_distance"]) == pytest.approx(
        np.linalg.norm(difference) / np.sqrt(2), abs=1e-12
    )
    assert float(found["projection_distance"]) == pytest.approx(np.linalg.norm(difference, 2), abs=1e-12)


def test_grassmann_distances__geodesic_is_the_length_of_the_path() -> None:
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((2, 3))
    velocity = np.block([[np.zeros((2, 2)), -skew], [skew.T, np.zeros((3, 3))]])
    time = 1.0 / np.linalg.norm(skew, 2)  # short of the cut locus at pi / 2
    u = xr.DataArray(np.eye(5)[:2], dims=("eig", "in"))
    v = xr.DataArray(scipy.linalg.expm(time * velocity)[:, :2].T, dims=("eig", "in"))
    found = grassmann_distances(principal_angles(u, v, **PAIR))
    # the metric is half the squared norm of the velocity, whose two blocks are equal in size
    assert float(found["geodesic_distance"]) == pytest.approx(time * np.linalg.norm(skew), abs=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), ks=st.tuples(*[st.integers(1, 5)] * 3))
def test_grassmann_distances__are_metrics_with_the_difference_of_dimensions(
    seed: int, ks: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(seed)
    spans = [span(rng, 5, k) for k in ks]

    def distances(i: int, j: int) -> xr.Dataset:
        u, v = spans[i], spans[j].rename(eig="other")
        angles = principal_angles(u, v, vector_dims="in", number_dim=("eig", "other"))
        return grassmann_distances(angles, dimension_difference=abs(ks[i] - ks[j]))

    direct, detour = distances(0, 2), distances(0, 1) + distances(1, 2)
    for name in RESULTS:
        assert float(direct[name]) <= float(detour[name]) + 1e-12
        assert (float(direct[name]) > 1e-8) or ks[0] == ks[2]


def test_grassmann_distances__zero_for_containment_unless_dimensions_count() -> None:
    angles = principal_angles(
        *(xr.DataArray(np.eye(4)[:k], dims=(f"n{k}", "in")) for k in (1, 3)),
        vector_dims="in",
        number_dim=("n1", "n3"),
    )
    assert [float(d) for d in grassmann_distances(angles).values()] == [0, 0, 0]
    found = grassmann_distances(angles, dimension_difference=2)
    assert [float(found[name]) for name in RESULTS] == pytest.approx([np.pi / np.sqrt(2), np.sqrt(2), 1])


def test_grassmann_distances__keep_the_accuracy_of_tiny_angles() -> None:
    geodesic, chordal, projection = grassmann_distances_kernel(np.array([3e-12, 4e-12]))
    np.testing.assert_allclose([geodesic, chordal, projection], [5e-12, 5e-12, 4e-12], rtol=1e-12)


@pytest.mark.parametrize("dimension_difference", [0, 1])
def test_grassmann_distances__of_missing_records_are_nan(dimension_difference: int) -> None:
    angles = np.array([[0.1, np.nan], [np.nan, np.nan], [0.1, 0.2]])
    for found in grassmann_distances_kernel(angles, dimension_difference=dimension_difference):
        np.testing.assert_array_equal(np.isnan(found), [True, True, False])


def test_grassmann_distances__take_the_angles_of_every_function() -> None:
    rng = np.random.default_rng(0)
    u = xr.DataArray(
        np.linalg.qr(rng.standard_normal((4, 6, 2)))[0].swapaxes(1, 2),
        dims=("step", "eig", "in"),
        coords={"step": [0, 1, 5, 9]},
        attrs={"vector_dims": ["in"], "number_dim": "eig"},
    )
    pairs = grassmann_distances(pairwise_angles(u))
    assert pairs["geodesic_distance"].dims == ("step", "step_")
    assert pairs["geodesic_distance"].attrs["units"] == "rad"
    after = grassmann_distances(consecutive_angles(u))["chordal_distance"]
    expected = [pairs["chordal_distance"].sel(step=s, step_=t) for s, t in ((0, 1), (1, 5), (5, 9))]
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-14)


def test_grassmann_distances__say_what_is_wrong() -> None:
    u = xr.DataArray(np.eye(3), dims=("eig", "in"))
    with pytest.raises(ValueError, match=r"along a dim 'angle', came \('eig', 'in'\); bases go to"):
        grassmann_distances(u)
    angles = xr.DataArray([0.1], dims="angle")
    with pytest.raises(ValueError, match="at least one angle"):
        grassmann_distances(angles[:0])
    with pytest.raises(ValueError, match=r"came -1; pass abs\(k1 - k2\)"):
        grassmann_distances(angles, dimension_difference=-1)
    with pytest.raises(TypeError, match="expected real numbers in angles"):
        grassmann_distances(angles * 1j)
