from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis import (
    bulk_distance,
    bulk_weights,
    spectral_density,
    spectral_distribution,
    spectral_moments,
)
from hild_xr.analysis.spectra import density as module
from hild_xr.analysis.spectra.density import spectral_density_kernel

NAN = np.nan
RULE = ("probe", "node")


def rule(nodes: object, weights: object) -> tuple[xr.DataArray, xr.DataArray]:
    nodes, weights = np.asarray(nodes, dtype=float), np.asarray(weights, dtype=float)
    lead = ("step",)[: nodes.ndim - 2]
    return xr.DataArray(nodes, dims=(*lead, *RULE)), xr.DataArray(weights, dims=(*lead, *RULE))


def exact_rule(
    eigenvalues: np.ndarray, probes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What Lanczos with as many steps as eigenvalues finds: weights <u_i, z>^2 of random unit vectors."""
    z = rng.standard_normal((probes, len(eigenvalues)))
    weights = z**2 / (z**2).sum(1, keepdims=True)
    return np.broadcast_to(eigenvalues, weights.shape).copy(), weights


def lanczos_rule(A: np.ndarray, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gauss rule of one random vector by Lanczos with full reorthogonalisation."""
    basis = [(z := rng.standard_normal(len(A))) / np.linalg.norm(z)]
    alpha, beta = [], []
    for _ in range(steps):
        w = A @ basis[-1]
        alpha.append(w @ basis[-1])
        for v in basis + basis:
            w -= (w @ v) * v
        beta.append(np.linalg.norm(w))
        basis.append(w / beta[-1])
    nodes, vectors = scipy.linalg.eigh_tridiagonal(np.array(alpha), np.array(beta[:-1]))
    return nodes, vectors[0] ** 2


def some_rule(seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 1, (3, 4, 7))
    return rule(rng.standard_normal((3, 4, 7)), weights / weights.sum(-1, keepdims=True))


def test_density__is_the_mixture_of_gaussians() -> None:
    nodes, weights = some_rule()
    points = np.linspace(-3, 3, 11)
    found = spectral_density(nodes, weights, points, width=0.2)
    each = scipy.stats.norm.pdf(points, nodes.values[..., None], 0.2)
    expected = (weights.values[..., None] * each).sum(-2)
    np.testing.assert_allclose(found["spectral_density"], expected.mean(1), rtol=1e-12)
    error = expected.std(1, ddof=1) / 2
    np.testing.assert_allclose(found["spectral_density_standard_error"], error, rtol=1e-12)
    assert found["eigenvalue"].values.tolist() == points.tolist()
    assert found["spectral_density"].attrs["width"] == 0.2
    assert found["spectral_density"].attrs["kernel"] == "gaussian"


def test_density__integrates_to_one_and_its_mean_is_the_first_moment() -> None:
    nodes, weights = some_rule()
    x = np.linspace(-8, 8, 4001)
    rho = spectral_density(nodes, weights, x, width=0.1)["spectral_density"]
    np.testing.assert_allclose(rho.integrate("eigenvalue"), 1.0, rtol=1e-9)
    mean = spectral_moments(nodes, weights, [1])["spectral_moment"].isel(order=0)
    np.testing.assert_allclose((rho * rho["eigenvalue"]).integrate("eigenvalue"), mean, atol=1e-9)


def test_density__takes_a_width_for_each_record() -> None:
    nodes, weights = some_rule()
    widths = xr.DataArray([0.1, 0.5, NAN], dims="step")
    found = spectral_density(nodes, weights, [0.0, 1.0], width=widths)["spectral_density"]
    for i, width in enumerate([0.1, 0.5]):
        alone = spectral_density(nodes[i], weights[i], [0.0, 1.0], width=width)["spectral_density"]
        np.testing.assert_allclose(found[i], alone, rtol=1e-14)
    assert found[2].isnull().all()


def test_density__in_blocks_of_records_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, weights = some_rule()
    whole = spectral_density(nodes, weights, [0.0, 1.0], width=0.3)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    xr.testing.assert_identical(spectral_density(nodes, weights, [0.0, 1.0], width=0.3), whole)


@given(seed=st.integers(0, 999))
def test_distribution__counts_nodes_up_to_and_at_the_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, weights = some_rule(seed)
    nodes = nodes.round(1)
    points = np.sort(rng.standard_normal(5)).round(1)
    found = spectral_distribution(nodes, weights, points)["spectral_distribution"]
    for i in range(3):
        for j, point in enumerate(points):
            expected = [w[n <= point].sum() for n, w in zip(nodes.values[i], weights.values[i], strict=True)]
            assert float(found[i, j]) == pytest.approx(np.mean(expected), abs=1e-14)
    ends = spectral_distribution(nodes, weights, [-99.0, 99.0])["spectral_distribution"]
    np.testing.assert_allclose(ends, [[0.0, 1.0]] * 3, atol=1e-14)


def test_moments__of_a_lanczos_rule_are_exact_up_to_twice_the_steps() -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((40, 40))
    A = (A + A.T) / 9
    state = rng.bit_generator.state
    nodes, weights = lanczos_rule(A, 6, rng)
    rng.bit_generator.state = state
    z = rng.standard_normal(40)
    z /= np.linalg.norm(z)
    orders = range(12)  # 2 * 6 - 1 and below
    found = spectral_moments(*rule(nodes[None], weights[None]), orders)["spectral_moment"]
    expected = [z @ np.linalg.matrix_power(A, m) @ z for m in orders]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_standard_errors__cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    eigenvalues = np.concatenate([rng.uniform(0, 1, 57), [3.0, 4.0, 5.0]])
    rules = [exact_rule(eigenvalues, 20, rng) for _ in range(400)]
    nodes, weights = rule(np.stack([n for n, _ in rules]), np.stack([w for _, w in rules]))
    points = np.array([0.3, 0.7, 3.5])
    for found, truth in (
        (spectral_moments(nodes, weights, [1, 2]), [np.mean(eigenvalues), np.mean(eigenvalues**2)]),
        (spectral_distribution(nodes, weights, points), [np.mean(eigenvalues <= x) for x in points]),
        (
            spectral_density(nodes, weights, points, width=0.2),
            [scipy.stats.norm.pdf(x, eigenvalues, 0.2).mean() for x in points],
        ),
    ):
        value, error = found.data_vars.values()
        z = (value.values - truth) / error.values
        # Student's t with 19 degrees of freedom leaves 6 % beyond two standard errors
        assert np.mean(np.abs(z) > 2, axis=0) == pytest.approx(0.06, abs=0.05)
        assert np.abs(value.values.mean(0) - truth).max() < 0.02 * np.max(truth)


def test_standard_errors__of_the_same_rule_for_all_probes_are_zero_and_of_one_probe_unknown() -> None:
    nodes, weights = some_rule()
    same = [a.isel(probe=[0, 0, 0]) for a in (nodes, weights)]
    errors = spectral_moments(*same)["spectral_moment_standard_error"]
    np.testing.assert_allclose(errors, 0.0, atol=1e-14)
    one = spectral_moments(nodes.isel(probe=[0]), weights.isel(probe=[0]))
    assert one["spectral_moment_standard_error"].isnull().all()
    assert one["spectral_moment"].notnull().all()


def test_bulk_weights__are_those_of_the_deflated_matrix() -> None:
    rng = np.random.default_rng(0)
    eigenvalues = np.concatenate([rng.uniform(0, 1, 50), [3.0, 4.0, -2.0]])
    nodes, weights = exact_rule(eigenvalues, 6, rng)
    found = bulk_weights(*rule(nodes, weights), lower=-1.0, upper=2.0)
    left = np.where((nodes > -1) & (nodes < 2), weights, 0.0)
    np.testing.assert_allclose(found["quadrature_weights"], left / left.sum(1, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(found["outlier_mass"], weights[:, 50:].sum(1).mean(), rtol=1e-12)


def test_bulk_weights__of_a_lanczos_rule_leave_the_bulk() -> None:
    rng = np.random.default_rng(0)
    bulk = rng.uniform(0, 1, 397)
    Q = np.linalg.qr(rng.standard_normal((400, 400)))[0]
    A = (Q * np.concatenate([bulk, [5.0, 7.0, 9.0]])) @ Q.T
    nodes, weights = map(np.stack, zip(*(lanczos_rule(A, 30, rng) for _ in range(10)), strict=True))
    labelled = rule(nodes, weights)
    found = bulk_weights(*labelled, upper=3.0)
    truth = xr.DataArray(bulk, dims="eig").expand_dims("probe").rename(eig="node")
    masses = (found["quadrature_weights"], None)
    after = bulk_distance(labelled[0], truth, weights=masses, dim=RULE)["wasserstein_distance"]
    before = bulk_distance(labelled[0], truth, weights=(labelled[1], None), dim=RULE)["wasserstein_distance"]
    assert float(after) < 0.015
    assert float(before) > 0.04
    assert float(found["outlier_mass"]) == pytest.approx(3 / 400, abs=0.005)


def test_bulk_weights__take_edges_of_each_record_and_mark_what_has_no_bulk() -> None:
    nodes, weights = some_rule()
    edge = xr.DataArray([0.0, -99.0, NAN], dims="step")
    found = bulk_weights(nodes, weights, upper=edge)
    np.testing.assert_allclose(found["quadrature_weights"][0].sum("node"), 1.0, rtol=1e-14)
    assert (found["quadrature_weights"][0].values[nodes[0].values > 0] == 0).all()
    assert found["quadrature_weights"][1:].isnull().all()
    np.testing.assert_allclose(found["outlier_mass"][1:], [1.0, NAN], rtol=1e-14)


def test_densities__pass_over_unused_nodes_and_mark_missing_records() -> None:
    nodes, weights = some_rule()
    weights[0, :, 6] = 0.0
    expected = spectral_moments(nodes[0], weights[0])["spectral_moment"]
    nodes[0, :, 6] = NAN
    nodes[1, 2, 3] = NAN
    weights[2, 0, 0] = NAN
    found = spectral_moments(nodes, weights)["spectral_moment"]
    np.testing.assert_allclose(found[0], expected, rtol=1e-14)
    assert found[1:].isnull().all()
    edges = bulk_weights(nodes, weights, upper=99.0)["quadrature_weights"]
    assert edges[0].notnull().all()
    assert edges[1:].isnull().all()


def test_densities__do_not_know_the_order_of_probes_and_nodes() -> None:
    nodes, weights = some_rule()
    order = {"probe": [2, 0, 3, 1], "node": [6, 5, 4, 3, 2, 1, 0]}
    found = spectral_density(nodes.isel(order), weights.isel(order), [0.0], width=0.4)
    xr.testing.assert_allclose(found, spectral_density(nodes, weights, [0.0], width=0.4), rtol=1e-12)


def test_density_kernel__takes_stacks_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    nodes = rng.standard_normal((2, 1, 3, 5))
    density, error = spectral_density_kernel(
        nodes, np.full(nodes.shape, 0.2), np.ones((2, 1)), points=np.zeros(4)
    )
    assert density.shape == error.shape == (2, 1, 4)


@pytest.mark.parametrize("width", [0.0, -1.0])
def test_density__refuses_a_width_that_is_not_positive(width: float) -> None:
    with pytest.raises(ValueError, match="expected a width > 0"):
        spectral_density(*some_rule(), [0.0], width=width)


@pytest.mark.parametrize("points", [[], [[0.0]], [NAN], 1.0])
def test_density__refuses_points_that_are_no_list_of_numbers(points: object) -> None:
    with pytest.raises(ValueError, match="expected points as a list"):
        spectral_density(*some_rule(), points, width=0.1)


def test_functions__refuse_bad_arguments() -> None:
    nodes, weights = some_rule()
    with pytest.raises(ValueError, match=r"expected dims \['probe', 'node'\] on weights"):
        spectral_moments(nodes, weights.rename(node="eig"))
    with pytest.raises(ValueError, match="whole numbers"):
        spectral_moments(nodes, weights, [0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="whole numbers"):
        spectral_moments(nodes, weights, [])
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        spectral_moments(nodes, weights[:2])
    with pytest.raises(ValueError, match="no dim 'order'"):
        spectral_moments(nodes.rename(step="order"), weights.rename(step="order"))
    with pytest.raises(ValueError, match="expected one upper"):
        bulk_weights(nodes, weights, upper=nodes)
    with pytest.raises(TypeError, match="complex"):
        spectral_moments(nodes * 1j, weights)


def test_functions__refuse_points_and_widths_that_are_not_real() -> None:
    rule_of_all = some_rule()
    for points in ([1j], ["1"], [True]):
        with pytest.raises(TypeError, match="expected points as real numbers, came dtype"):
            spectral_density(*rule_of_all, points, width=0.1)
        with pytest.raises(TypeError, match="expected points as real numbers, came dtype"):
            spectral_distribution(*rule_of_all, points)
    with pytest.raises(TypeError, match="real number as width"):
        spectral_density(*rule_of_all, [0.0], width="0.1")
    with pytest.raises(TypeError, match="real number as upper"):
        bulk_weights(*rule_of_all, upper=1j)
