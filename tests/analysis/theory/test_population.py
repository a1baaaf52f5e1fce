from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss

from hild_xr.analysis.subspaces.bases import FloatArray
from hild_xr.analysis.theory import (
    LowRankPlusIdentity,
    gmatrix_at_zero,
    hessian_at_zero,
    population_gmatrix,
    population_hessian,
    weighted_second_moment,
)

SNR = 3.0


def softmax(s: FloatArray) -> FloatArray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    phi: FloatArray = e / e.sum(axis=-1, keepdims=True)
    return phi


def problem(k: int, d: int, size: float = 1.0, seed: int = 0) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights, oblique means and unequal priors."""
    rng = np.random.default_rng(seed)
    priors = rng.uniform(0.5, 1, k)
    return size * rng.standard_normal((k, d)) / np.sqrt(d), rng.standard_normal((k, d)), priors / priors.sum()


def gauss_cube(d: int, n: int) -> tuple[FloatArray, FloatArray]:
    """Nodes (n**d, d) and weights of a quadrature over all d input dims, by loops as in the definition."""
    nodes, weights = hermegauss(n)
    grid = np.stack(np.meshgrid(*[nodes] * d), axis=-1).reshape(-1, d)
    density = np.stack(np.meshgrid(*[weights / np.sqrt(2 * np.pi)] * d), axis=-1).reshape(-1, d).prod(axis=1)
    return grid, density


def blocks_by_definition(
    x: FloatArray, means: FloatArray, priors: FloatArray, c: int, n: int = 40
) -> tuple[FloatArray, FloatArray]:
    """H_cc and G_cc as means over samples: quadrature over the whole input space."""
    noise, density = gauss_cube(means.shape[1], n)
    H, G = np.zeros((2, means.shape[1], means.shape[1]))
    for b, prior in enumerate(priors):
        Y = means[b] + noise / np.sqrt(SNR)
        phi = softmax(Y @ x.T)[:, c]
        H += prior * (Y.T * (density * phi * (1 - phi))) @ Y
        G += prior * (Y.T * (density * (phi - (b == c)) ** 2)) @ Y
    return H, G


@pytest.mark.parametrize(("k", "d"), [(2, 3), (3, 3), (4, 3), (2, 2), (1, 3)])
@pytest.mark.parametrize("size", [0.5, 1.5])
def test_blocks__equal_quadrature_over_the_whole_input_space(k: int, d: int, size: float) -> None:
    x, means, priors = problem(k, d, size)
    for c in range(k):
        H, G = blocks_by_definition(x, means, priors, c)
        found = population_hessian(x, means, c, snr=SNR, priors=priors, beta=0.2).dense()
        np.testing.assert_allclose(found, H + 0.2 * np.eye(d), rtol=0, atol=1e-8)
        np.testing.assert_allclose(
            population_gmatrix(x, means, c, snr=SNR, priors=priors).dense(), G, rtol=0, atol=1e-8
        )


def test_blocks__equal_steins_formula_with_derivatives() -> None:
    """The formula as it stands in the paper, gradient and Hessian of h by hand."""
    k, d, c = 3, 7, 1
    x, means, priors = problem(k, d)
    noise, density = gauss_cube(k, 30)
    root = np.linalg.cholesky(x @ x.T)  # logits of class b: N(x mu_b, x x^T / snr)
    expected = np.zeros((d, d))
    for b, prior in enumerate(priors):
        phi = softmax(x @ means[b] + noise @ root.T / np.sqrt(SNR))
        e, h = np.eye(k)[c], (phi[:, c] - (b == c)) ** 2
        first = phi[:, [c]] * (e - phi)  # d phi_c / d s
        second = phi[:, c, None, None] * (
            (e - phi)[:, :, None] * (e - phi)[:, None, :]
            - phi[:, :, None] * np.eye(k)
            + phi[:, :, None] * phi[:, None, :]
        )
        outer = phi[:, c] - (b == c)
        gradient = x.T @ (density * outer * 2 @ first)
        curvature = 2 * outer[:, None, None] * second + 2 * first[:, :, None] * first[:, None, :]
        hessian = x.T @ np.einsum("n,nij->ij", density, curvature) @ x
        mass = density @ h
        expected += prior * (
            mass * np.outer(means[b], means[b])
            + (np.outer(gradient, means[b]) + np.outer(means[b], gradient)) / SNR
            + hessian / SNR**2
            + mass / SNR * np.eye(d)
        )
    found = population_gmatrix(x, means, c, snr=SNR, priors=priors).dense()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("snr", [0.5, 10.0])
def test_at_zero__closed_forms_are_the_population_blocks(k: int, snr: float) -> None:
    d, beta = 9, 0.05
    zero, means = np.zeros((k, d)), np.linalg.qr(np.random.default_rng(0).standard_normal((d, k)))[0].T
    for block, closed in (
        (population_hessian(zero, means, 1, snr=snr, beta=beta), hessian_at_zero(k, snr=snr, beta=beta)),
        (population_gmatrix(zero, means, 1, snr=snr), gmatrix_at_zero(k, snr=snr)),
    ):
        assert closed.outliers.shape == (k,)
        expected = np.concatenate([closed.outliers, np.full(d - k, closed.bulk)])
        np.testing.assert_allclose(block.eigenvalues(), expected, rtol=1e-12)
    top = population_gmatrix(zero, means, 1, snr=snr).eigenvectors()[:, 0]
    if k > 2:
        assert abs(top @ means[1]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_at_zero__closed_forms_are_empirical_on_an_exactly_white_design(k: int) -> None:
    """Inputs mu_b +- sqrt(d / snr) e_j have mean mu_b and covariance I / snr, so a finite sample is exact."""
    d, snr = 6, 10.0
    steps = np.sqrt(d / snr) * np.concatenate([np.eye(d), -np.eye(d)])
    Y = (np.eye(d)[:k, None] + steps).reshape(-1, d)
    label = np.repeat(np.arange(k), 2 * d)
    phi = 1 / k
    H = phi * (1 - phi) * Y.T @ Y / len(Y)
    G = (Y.T * (phi - (label == 0)) ** 2) @ Y / len(Y)
    for matrix, closed in ((H, hessian_at_zero(k, snr=snr)), (G, gmatrix_at_zero(k, snr=snr))):
        expected = np.concatenate([closed.outliers, np.full(d - k, closed.bulk)])
        np.testing.assert_allclose(np.linalg.eigvalsh(matrix)[::-1], expected, rtol=1e-12)


def test_blocks__are_the_limit_of_sample_means() -> None:
    x, means, priors = problem(3, 5, size=2.0)
    rng = np.random.default_rng(1)
    n = 200_000
    label = rng.choice(3, n, p=priors)
    Y = means[label] + rng.standard_normal((n, 5)) / np.sqrt(SNR)
    h = (softmax(Y @ x.T)[:, 0] - (label == 0)) ** 2
    products = h[:, None, None] * Y[:, :, None] * Y[:, None, :]
    error = products.std(axis=0) / np.sqrt(n)
    exact = population_gmatrix(x, means, 0, snr=SNR, priors=priors).dense()
    assert (np.abs(products.mean(axis=0) - exact) < 5 * error).all()


def test_blocks__trace_is_the_mean_weight_times_squared_norm() -> None:
    x, means, priors = problem(3, 3)
    noise, density = gauss_cube(3, 40)
    trace = 0.0
    for b, prior in enumerate(priors):
        Y = means[b] + noise / np.sqrt(SNR)
        phi = softmax(Y @ x.T)[:, 2]
        trace += prior * (density * phi * (1 - phi)) @ np.sum(Y**2, axis=1)
    found = population_hessian(x, means, 2, snr=SNR, priors=priors).eigenvalues().sum()
    assert found == pytest.approx(trace, abs=1e-9)


def test_blocks__do_not_change_when_a_vector_is_added_to_all_rows_of_x() -> None:
    x, means, priors = problem(3, 6)
    shifted = x + np.random.default_rng(5).standard_normal(6)
    for block in (population_hessian, population_gmatrix):
        expected = block(x, means, 0, snr=SNR, priors=priors).dense()
        found = block(shifted, means, 0, snr=SNR, priors=priors).dense()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_blocks__have_few_eigenvalues_beside_the_bulk() -> None:
    k, d = 3, 50
    x, means, _ = problem(k, d)
    values = population_hessian(x, means, 0, snr=SNR, beta=0.3).eigenvalues()
    bulk = population_hessian(x, means, 0, snr=SNR, beta=0.3).bulk
    assert np.sum(np.abs(values - bulk) > 1e-12) <= 2 * k - 1
    assert values.min() >= 0.3
    assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_blocks__accuracy_is_as_stated(spread: float) -> None:
    x, means, _ = problem(3, 6)
    differences = np.linalg.norm(x[:, None] - x[None], axis=-1).max()
    x *= spread * np.sqrt(SNR) / differences
    exact = population_gmatrix(x, means, 0, snr=SNR, n_nodes=300).dense()
    error = np.abs(population_gmatrix(x, means, 0, snr=SNR).dense() - exact).max()
    assert error < (1e-13 if spread == 1.0 else 1e-8)


def test_weighted_second_moment__of_a_constant_is_the_second_moment() -> None:
    x, means, priors = problem(3, 5)
    found = weighted_second_moment(lambda s, b: np.full(len(s), 2.0), x, means, snr=SNR, priors=priors)
    expected = 2 * ((means.T * priors) @ means + np.eye(5) / SNR)
    np.testing.assert_allclose(found.dense(), expected, rtol=0, atol=1e-13)


def test_weighted_second_moment__of_a_polynomial_is_isserlis_formula() -> None:
    """h = s^2 for one logit s = x.Y and one centred class: E[(x.Y)^2 YY^T] = (|x|^2 I + 2 xx^T) / snr^2."""
    x = np.array([[1.0, -2.0, 0.5, 0.0]])
    found = weighted_second_moment(lambda s, b: s[:, 0] ** 2, x, np.zeros((1, 4)), snr=SNR, n_nodes=4)
    expected = (np.sum(x**2) * np.eye(4) + 2 * x.T @ x) / SNR**2
    np.testing.assert_allclose(found.dense(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tiny", [0.0, 1e-300, 1e-12, 1e-8])
def test_blocks__are_continuous_at_zero(tiny: float) -> None:
    x, means, priors = problem(3, 6)
    expected = population_hessian(0 * x, means, 0, snr=SNR, priors=priors).dense()
    found = population_hessian(tiny * x, means, 0, snr=SNR, priors=priors).dense()
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * tiny + 1e-15)


def test_low_rank_plus_identity__eigenpairs_are_those_of_the_dense_matrix() -> None:
    rng = np.random.default_rng(0)
    core = rng.standard_normal((3, 3))
    matrix = LowRankPlusIdentity(np.linalg.qr(rng.standard_normal((8, 3)))[0], core + core.T, 0.7)
    np.testing.assert_allclose(
        matrix.eigenvalues(), np.linalg.eigvalsh(matrix.dense())[::-1], rtol=0, atol=1e-13
    )
    vectors = matrix.eigenvectors()
    values = np.diag(vectors.T @ matrix.dense() @ vectors)
    np.testing.assert_allclose(matrix.dense() @ vectors, vectors * values, rtol=0, atol=1e-13)
    assert (np.diff(values) < 0).all()


def test_population__refuses_what_does_not_fit() -> None:
    x, means, _ = problem(3, 5)
    with pytest.raises(ValueError, match=r"one shape \(k, d\)"):
        population_hessian(x[:2], means, 0, snr=SNR)
    with pytest.raises(ValueError, match="a class 0 <= c < k"):
        population_hessian(x, means, 3, snr=SNR)
    with pytest.raises(ValueError, match="expected snr > 0"):
        population_hessian(x, means, 0, snr=0.0)
    for priors in ([0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0.0]):
        with pytest.raises(ValueError, match="expected 3 priors"):
            population_hessian(x, means, 0, snr=SNR, priors=priors)
    with pytest.raises(ValueError, match=r"came \(3, 5\) and \(3, 4\)"):
        weighted_second_moment(lambda s, b: s[:, 0], x, means[:, :4], snr=SNR)
    many = np.random.default_rng(0).standard_normal((6, 9))
    with pytest.raises(ValueError, match="pass fewer nodes: x has rank 5"):
        population_hessian(many, many, 0, snr=SNR)
    for n_nodes in (0, 400):
        with pytest.raises(ValueError, match="expected 1 <= n_nodes <= 350"):
            population_hessian(x[:2], means[:2], 0, snr=SNR, n_nodes=n_nodes)
    with pytest.raises(ValueError, match="expected k >= 2 classes"):
        gmatrix_at_zero(1, snr=SNR)
