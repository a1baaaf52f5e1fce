from __future__ import annotations

import itertools

import numpy as np
import pytest

from hild_xr.analysis.subspaces.bases import FloatArray
from hild_xr.analysis.theory import (
    covered_centres_probability,
    xor_first_layer_outlier,
    xor_fixed_point_norm,
    xor_second_layer_outlier,
)
from hild_xr.analysis.theory.xor import Matrix

BETAS = [0.01, 0.05, 0.1, 0.12]
MU, NU = np.eye(3)[:2]
CENTRES = np.stack([MU, -MU, NU, -NU])
LABELS = np.array([1.0, 1.0, 0.0, 0.0])


def network(beta: float, neurons_per_centre: int = 1) -> tuple[FloatArray, FloatArray]:
    """Outer and inner weights at a fixed point where all centres are covered."""
    size = np.sqrt(xor_fixed_point_norm(beta) / neurons_per_centre)
    v = np.repeat([size, size, -size, -size], neurons_per_centre)
    return v, np.abs(v)[:, None] * np.repeat(CENTRES, neurons_per_centre, axis=0)


def logits(v: FloatArray, W: FloatArray, Y: FloatArray) -> FloatArray:
    s: FloatArray = np.maximum(Y @ W.T, 0) @ v
    return s


def sample_weights(s: FloatArray, y: FloatArray, matrix: Matrix) -> FloatArray:
    sigma = 1 / (1 + np.exp(-s))
    return sigma * (1 - sigma) if matrix == "hessian" else (sigma - y) ** 2


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("neurons", [1, 3])
def test_fixed_point__has_no_gradient(beta: float, neurons: int) -> None:
    v, W = network(beta, neurons)
    residual = 1 / (1 + np.exp(-logits(v, W, CENTRES))) - LABELS
    hidden = np.maximum(CENTRES @ W.T, 0)
    gradient_v = (residual[:, None] * hidden).mean(axis=0) + beta * v
    gate = CENTRES @ W.T > 0
    gradient_W = np.einsum("n,ni,i,nd->id", residual, gate, v, CENTRES) / 4 + beta * W
    np.testing.assert_allclose(gradient_v, 0, atol=1e-15)
    np.testing.assert_allclose(gradient_W, 0, atol=1e-15)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("neurons", [1, 3])
@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
def test_second_layer_outlier__is_an_eigenvalue_for_each_centre(
    beta: float, neurons: int, matrix: Matrix
) -> None:
    v, W = network(beta, neurons)
    hidden = np.maximum(CENTRES @ W.T, 0)
    h = sample_weights(logits(v, W, CENTRES), LABELS, matrix)
    eigenvalues = np.linalg.eigvalsh((hidden.T * h) @ hidden / 4)[::-1]
    np.testing.assert_allclose(eigenvalues[:4], xor_second_layer_outlier(beta, matrix), rtol=1e-12)
    np.testing.assert_allclose(eigenvalues[4:], 0, atol=1e-15)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
def test_first_layer_outlier__is_twofold_with_little_noise(beta: float, matrix: Matrix) -> None:
    """Noise so small that it only decides the gates on the centres orthogonal to the neuron."""
    v, W = network(beta)
    noise = 1e-7 * np.array(list(itertools.product([-1, 1], repeat=3)))
    Y = (CENTRES[:, None] + noise).reshape(-1, 3)
    h = sample_weights(logits(v, W, Y), np.repeat(LABELS, 8), matrix)
    for i in range(4):
        gated = Y[Y @ W[i] > 0]
        block = v[i] ** 2 * (gated.T * h[Y @ W[i] > 0]) @ gated / len(Y)
        eigenvalues = np.linalg.eigvalsh(block)[::-1]
        expected = xor_first_layer_outlier(float(v[i]), beta, matrix)
        np.testing.assert_allclose(eigenvalues, [expected, expected, 0], rtol=1e-5, atol=1e-6 * expected)


def test_numbers__at_beta_one_tenth() -> None:
    assert xor_fixed_point_norm(0.1) == pytest.approx(0.4055, abs=5e-5)
    assert np.sqrt(xor_fixed_point_norm(0.1)) == pytest.approx(0.6368, abs=5e-5)
    assert xor_second_layer_outlier(0.1, "hessian") == pytest.approx(0.02433, abs=5e-6)
    assert xor_second_layer_outlier(0.1, "gmatrix") == pytest.approx(0.01622, abs=5e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, 0.125, 0.2])
def test_fixed_point__refuses_beta_without_one(beta: float) -> None:
    message = r"expected beta in \(0, 1/8\)"
    with pytest.raises(ValueError, match=message):
        xor_fixed_point_norm(beta)
    with pytest.raises(ValueError, match=message):
        xor_second_layer_outlier(beta, "hessian")
    with pytest.raises(ValueError, match=message):
        xor_first_layer_outlier(1.0, beta, "hessian")


def test_outliers__refuse_other_matrices() -> None:
    with pytest.raises(ValueError, match="expected matrix 'hessian' or 'gmatrix', came 'fisher'"):
        xor_second_layer_outlier(0.1, "fisher")


@pytest.mark.parametrize(("n_neurons", "n_centres"), [(1, 4), (4, 4), (6, 4), (5, 3), (4, 2)])
def test_covered_centres__by_counting_all_assignments(n_neurons: int, n_centres: int) -> None:
    covered = [len(set(cells)) for cells in itertools.product(range(n_centres), repeat=n_neurons)]
    for r in range(n_centres + 1):
        expected = covered.count(r) / len(covered)
        found = covered_centres_probability(n_neurons, r, n_centres)
        assert found == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("n_neurons", "expected"),
    [(4, 0.09375), (5, 0.2344), (6, 0.3809), (8, 0.6229), (10, 0.7806), (20, 0.9873)],
)
def test_covered_centres__table_of_the_paper(n_neurons: int, expected: float) -> None:
    assert covered_centres_probability(n_neurons) == pytest.approx(expected, abs=5e-5)


def test_covered_centres__ranks_of_four_neurons() -> None:
    ranks = [covered_centres_probability(4, r) for r in (4, 3, 2, 1, 0)]
    assert ranks == [3 / 32, 9 / 16, 21 / 64, 1 / 64, 0]
    assert sum(covered_centres_probability(200, r) for r in range(5)) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("arguments", [(0,), (4, 5), (4, -1)])
def test_covered_centres__refuses_the_impossible(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected n_neurons >= 1"):
        covered_centres_probability(*arguments)
