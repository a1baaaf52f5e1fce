"""Spectral densities against planted spectra, and how often their stated errors hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature import Curvature, NonFiniteCurvatureError
from hild_xr.recorders.curvature.densities import DensityOptions, SpectralDensity, spectral_density
from hild_xr.recorders.curvature.quadrature import wasserstein
from hild_xr.recorders.curvature.solve import SolveOptions, solve

if TYPE_CHECKING:
    from collections.abc import Callable

P = 400
# The bulk of a network's spectrum with a few outliers, of both signs.
BULK = torch.cat([torch.tensor([8.0, 5.0, -3.0]), torch.linspace(-0.5, 1, P - 3).pow(3)]).double()


def distance(found: SpectralDensity, eigenvalues: Tensor) -> float:
    nodes, weights = found.nodes.reshape(-1), found.weights.reshape(-1) / found.nodes.shape[-2]
    even = torch.full_like(eigenvalues, 1 / len(eigenvalues))
    return float(wasserstein(nodes, weights, eigenvalues, even))


def options(**changes: Any) -> DensityOptions:
    return DensityOptions(**{"k_steps": 20, "probes": 1, "n_nodes": 80, "dense_up_to": 0} | changes)


def test_density__of_all_directions_is_the_truth(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    """Unbiased: the mean over many probes has the moments of the matrix, within four standard errors."""
    found = spectral_density(operator_of(planted(BULK)), options(probes=200))
    assert not found.exact
    for order in (1, 2, 3):
        value, error = found.moment(order)
        assert 0 < float(error) < 0.1 * float(BULK.abs().pow(order).mean())
        assert abs(float(value - BULK.pow(order).mean())) < 4 * float(error)


def test_density__states_its_standard_errors_truly(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator, points = operator_of(planted(BULK)), torch.tensor([0.1, 0.3], dtype=torch.float64)
    scores, heights, lengths = [], [], []
    width = 0.15
    truth = (-0.5 * ((BULK[:, None] - points) / width) ** 2).exp().mean(0) / (width * (2 * torch.pi) ** 0.5)
    for seed in range(100):
        found = spectral_density(operator, options(probes=2, seed=seed))
        value, error = found.trace()
        scores.append(float((value - BULK.sum()) / error))
        height, deviation = found.density(points, width)
        heights.append(((height - truth) / deviation).tolist())
        lengths.append((distance(found, BULK), float(found.sampling_error() + found.quadrature_error)))
    # The mean square of 100 scores has a standard deviation of 0.14 around 1.
    assert 0.6 < torch.tensor(scores).square().mean() < 1.45
    assert ((torch.tensor(heights).square().mean(0) - 1).abs() < 0.5).all()
    measured, stated = torch.tensor(lengths).mean(0).tolist()
    assert 0.5 < measured / stated < 1.5


def test_density__known_outliers_have_exact_weights(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator = operator_of(planted(BULK))
    known = solve(operator, SolveOptions(3, tol=1e-8))
    found = [spectral_density(operator, options(k_steps=10, seed=s), known) for s in range(12)]
    plain = [spectral_density(operator, options(k_steps=10, seed=s)) for s in range(12)]
    for density in found:
        assert torch.allclose(density.nodes[..., :3].sort().values, BULK[:3].sort().values)
        assert torch.allclose(density.weights[..., :3], torch.tensor(1 / P).double())
        assert torch.allclose(density.weights.sum(-1), torch.tensor(1.0).double())
        assert float(density.trace()[1]) < 0.5 * float(plain[0].trace()[1])
    mean = torch.stack([density.trace()[0] for density in found]).mean()
    assert abs(float(mean - BULK.sum())) < 4 * float(found[0].trace()[1]) / 12**0.5
    better = sum(distance(a, BULK) for a in found) / sum(distance(b, BULK) for b in plain)
    assert better < 0.8


def test_density__takes_no_pair_that_did_not_converge(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator = operator_of(planted(BULK))
    known = solve(operator, SolveOptions(3, tol=1e-8))
    known.converged[1] = False
    found = spectral_density(operator, options(), known)
    assert (found.weights[0, :3] > 0).tolist() == [True, False, True]
    assert float(found.weights.sum()) == pytest.approx(1)


def test_density__known_pairs_of_another_block_are_refused(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    other = solve(operator_of(planted(BULK[:50])), SolveOptions(2))
    with pytest.raises(ValueError, match="take them from the same blocks"):
        spectral_density(operator_of(planted(BULK)), options(), other)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.zeros(P),
        torch.ones(P),
        torch.cat([torch.tensor([7.0]), torch.zeros(P - 1)]),
        torch.tensor([2.0, -2.0]).repeat_interleave(P // 2),
    ],
    ids=["zero", "identity", "rank-1", "two-values"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density__of_few_distinct_eigenvalues_needs_few_products(
    eigenvalues: Tensor, dtype: torch.dtype, operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    found = spectral_density(operator_of(planted(eigenvalues).to(dtype)), options(probes=3))
    assert int(found.n_matvec) <= 3 * 3
    assert torch.allclose(found.weights.sum(-1), torch.tensor(1.0).double())
    used = found.nodes[found.weights > 1e-9]
    assert (used[:, None] - eigenvalues.unique()).abs().amin(1).max() < 1e-5
    value, error = found.moment(2)
    assert abs(float(value - eigenvalues.square().mean())) <= 5 * float(error) + 1e-5


def test_density__small_blocks_are_exact(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    eigenvalues = torch.tensor([3.0, 3.0, -1.0, 0.0, 0.5]).double()
    found = spectral_density(operator_of(planted(eigenvalues)), options(probes=3, dense_up_to=128))
    assert found.exact
    assert found.nodes.shape == (3, 80)
    assert distance(found, eigenvalues) < 1e-12
    for statement in (found.moment(3), found.trace()):
        assert float(statement[1]) == 0
    assert float(found.sampling_error()) == 0
    assert float(found.moment(3)[0]) == pytest.approx(float(eigenvalues.pow(3).mean()))


def test_density__of_one_parameter(operator_of: Callable[..., Any]) -> None:
    found = spectral_density(operator_of(torch.tensor([[2.5]])), options(k_steps=1, n_nodes=1))
    assert found.nodes.tolist() == [[2.5]]
    assert found.weights.tolist() == [[1.0]]


def test_density__of_rows_is_that_of_each_row(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    spectra = [BULK, 2 * BULK + 1, torch.zeros(P).double()]
    matrices = torch.stack([planted(s, seed=n) for n, s in enumerate(spectra)])
    found = spectral_density(operator_of(matrices), options(probes=2))
    assert found.nodes.shape == (3, 2, 80)
    assert found.n_matvec.tolist() == [40, 40, 2]
    value, error = found.trace()
    assert ((value - torch.stack([s.sum() for s in spectra])).abs() <= 4 * error + 1e-9).all()
    assert found.cdf(torch.tensor([0.0, 1.0]).double())[0].shape == (3, 2)
    # In chunks of one row, the same numbers.
    apart = spectral_density(operator_of(matrices), options(probes=2, max_bytes=1))
    assert torch.allclose(apart.nodes, found.nodes)


def test_density__known_pairs_of_rows_are_each_rows_own(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator = operator_of(torch.stack([planted(BULK), planted(3 * BULK, seed=1)]))
    known = solve(operator, SolveOptions(3, tol=1e-8))
    found = spectral_density(operator, options(), known)
    value, error = found.trace()
    assert ((value - torch.stack([BULK.sum(), 3 * BULK.sum()])).abs() < 4 * error).all()
    assert torch.allclose(found.nodes[:, 0, :3].abs().amax(1), torch.tensor([8.0, 24.0]).double())


def test_density__smoothed_integrates_to_one(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    found = spectral_density(operator_of(planted(BULK)), options())
    points = torch.linspace(-5, 10, 3001, dtype=torch.float64)
    value, error = found.density(points, 0.1)
    assert float(torch.trapezoid(value, points)) == pytest.approx(1, abs=1e-6)
    assert (error >= 0).all()
    with pytest.raises(ValueError, match="must be positive"):
        found.density(points, 0.0)


def test_density__equal_seeds_give_equal_bits(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    matrix = planted(BULK).float()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = spectral_density(operator_of(matrix), options(seed=3))
    torch.rand(5)
    two = spectral_density(operator_of(matrix), options(seed=3))
    assert torch.equal(one.nodes, two.nodes)
    assert torch.equal(one.weights, two.weights)
    assert not torch.equal(one.nodes, spectral_density(operator_of(matrix), options(seed=4)).nodes)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dense_up_to", [0, 1000])
def test_density__names_the_block_of_numbers_that_are_not_finite(
    dense_up_to: int, operator_of: Callable[..., Any]
) -> None:
    matrix = torch.eye(P)
    matrix[3, 3] = torch.nan
    with pytest.raises(NonFiniteCurvatureError, match="planted"):
        spectral_density(operator_of(matrix), options(dense_up_to=dense_up_to, n_nodes=P))


def test_density__low_precision_states_the_error_of_its_products(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, whose products the setting itself leaves alone.
    matrix = planted(BULK)
    operator = operator_of(matrix)
    rounded = operator_of(matrix.bfloat16().double())

    def product(vectors: Tensor, rows: Tensor) -> Tensor:
        low = torch.get_float32_matmul_precision() == "medium"
        chosen: Tensor = (rounded if low else operator).matrices[0]
        return vectors @ chosen.T

    before = torch.get_float32_matmul_precision()
    expected = float((rounded.matrices - operator.matrices).norm()) / P**0.5
    monkeypatch.setattr(operator, "product", product)
    found = spectral_density(operator, options(precision="bfloat16", probes=8))
    assert float(found.product_error) == pytest.approx(expected, rel=0.3)
    assert int(found.n_matvec) == 8 * 21
    assert torch.get_float32_matmul_precision() == before
    exact = spectral_density(operator, options(probes=8))
    assert float(exact.product_error) == 0
    low = (rounded.matrices[0] + rounded.matrices[0].T) / 2
    shift = (torch.linalg.eigvalsh(low) - torch.linalg.eigvalsh(matrix)).abs().mean()
    assert 0 < float(shift) < 1.3 * float(found.product_error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_steps": 0}, "k_steps must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"n_nodes": 10}, "cannot hold a rule of k_steps=20"),
        ({"precision": "int8"}, "precision must be one of 'full', 'bfloat16'"),
    ],
)
def test_options__out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**settings)


@pytest.mark.parametrize(
    ("matrix", "blocks"),
    [("hessian", "layer"), ("hessian", "rows"), ("gmatrix", "rows"), ("gmatrix", "model"), ("ggn", "model")],
)
def test_curvature_density__has_the_moments_of_the_dense_matrix(case: Any, matrix: Any, blocks: Any) -> None:
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.density(matrix, blocks, k_steps=20)
        spectra = curvature.eigenpairs(1, matrix, blocks, matrix_up_to=10_000)
    for label, density in found.items():
        whole = spectra[label].matrix
        assert whole is not None
        second = whole.square().sum((-2, -1)) / whole.shape[-1]
        value, error = density.moment(2)
        assert ((value - second).abs() <= 5 * error + 1e-9 * second).all()
        trace, trace_error = density.trace()
        exact = whole.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert ((trace - exact).abs() <= 5 * trace_error + 1e-9 * exact.abs()).all()
