"""Trace and Frobenius norm: exact where said so, unbiased with true standard errors elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature import Curvature, NonFiniteCurvatureError
from hild_xr.recorders.curvature.solve import SolveOptions, solve
from hild_xr.recorders.curvature.traces import frobenius_norm, trace

if TYPE_CHECKING:
    from collections.abc import Callable

P = 300
SPECTRUM = torch.cat([torch.tensor([50.0, 20.0, -9.0]), torch.linspace(-1, 2, P - 3)]).double()
NORM = float(SPECTRUM.square().sum().sqrt())


@pytest.mark.parametrize("products", [2, 5, 30])
@pytest.mark.parametrize(("function", "exact"), [(trace, float(SPECTRUM.sum())), (frobenius_norm, NORM)])
def test_estimates__are_unbiased_with_true_standard_errors(
    products: int,
    function: Callable[..., Any],
    exact: float,
    operator_of: Callable[..., Any],
    planted: Callable[..., Tensor],
) -> None:
    operator = operator_of(planted(SPECTRUM))
    found = [function(operator, products, seed=seed) for seed in range(200)]
    assert not any(estimate.exact for estimate in found)
    values = torch.stack([estimate.value for estimate in found])
    errors = torch.stack([estimate.standard_error for estimate in found])
    spread = float(values.std())
    # The root of an unbiased square is biased by about half its relative variance.
    bias = 0.0 if function is trace else spread**2 / (2 * exact)
    assert abs(float(values.mean()) + bias - exact) < 4 * spread / 200**0.5 + 0.3 * bias
    assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.35)
    assert {int(estimate.n_matvec) for estimate in found} == {products}


def test_trace__by_hutch_plus_plus_beats_plain_probes(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator = operator_of(planted(SPECTRUM))
    sketched = torch.stack([trace(operator, 30, seed=seed).value for seed in range(40)]).std()
    plain = (2 * SPECTRUM.square().sum() / 30).sqrt()
    assert sketched < 0.65 * plain


@pytest.mark.parametrize(("function", "exact"), [(trace, float(SPECTRUM.sum())), (frobenius_norm, NORM)])
def test_estimates__use_known_pairs(
    function: Callable[..., Any],
    exact: float,
    operator_of: Callable[..., Any],
    planted: Callable[..., Tensor],
) -> None:
    operator = operator_of(planted(SPECTRUM))
    known = solve(operator, SolveOptions(3, tol=1e-10))
    with_known = [function(operator, 2, seed=seed, known=known) for seed in range(100)]
    without = torch.stack([function(operator, 2, seed=seed).value for seed in range(100)])
    values = torch.stack([estimate.value for estimate in with_known])
    assert values.std() < without.std() / 1.5
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 10 + 1e-3 * exact


@pytest.mark.parametrize("function", [trace, frobenius_norm])
def test_estimates__of_rows_are_those_of_each_row(
    function: Callable[..., Any], operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    spectra = [SPECTRUM, torch.zeros(P).double(), -2 * SPECTRUM]
    operator = operator_of(torch.stack([planted(s, seed=n) for n, s in enumerate(spectra)]))
    known = solve(operator, SolveOptions(3, tol=1e-10))
    exact = [s.sum() if function is trace else s.square().sum().sqrt() for s in spectra]
    for pairs in (None, known):
        found = function(operator, 30, known=pairs)
        assert found.value.shape == found.standard_error.shape == found.n_matvec.shape == (3,)
        assert ((found.value - torch.stack(exact)).abs() <= 5 * found.standard_error + 1e-8).all()
        apart = function(operator, 30, known=pairs, max_bytes=1)
        assert ((apart.value - torch.stack(exact)).abs() <= 5 * apart.standard_error + 1e-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "eigenvalues",
    [torch.zeros(60), torch.ones(60), torch.cat([torch.tensor([7.0]), torch.zeros(59)])],
    ids=["zero", "identity", "rank-1"],
)
def test_trace__without_a_spread_is_found_exactly(
    eigenvalues: Tensor, dtype: torch.dtype, operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    found = trace(operator_of(planted(eigenvalues).to(dtype)), 12)
    assert float(found.value) == pytest.approx(float(eigenvalues.sum()), abs=1e-4)
    assert float(found.standard_error) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 7])
def test_estimates__small_matrices_are_exact(
    size: int, operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    eigenvalues = torch.linspace(-1, 3, size, dtype=torch.float64)
    operator = operator_of(planted(eigenvalues))
    found, norm = trace(operator, 7), frobenius_norm(operator, 7)
    assert found.exact
    assert norm.exact
    assert float(found.value) == pytest.approx(float(eigenvalues.sum()), abs=1e-12)
    assert float(norm.value) == pytest.approx(float(eigenvalues.norm()), abs=1e-12)
    assert int(found.n_matvec) == size


@pytest.mark.parametrize("function", [trace, frobenius_norm])
@pytest.mark.parametrize("products", [20, 400])
def test_estimates__name_the_block_of_numbers_that_are_not_finite(
    function: Callable[..., Any], products: int, operator_of: Callable[..., Any]
) -> None:
    matrix = torch.eye(P)
    matrix[3, 3] = torch.nan
    with pytest.raises(NonFiniteCurvatureError, match="planted"):
        function(operator_of(matrix), products)


@pytest.mark.parametrize("function", [trace, frobenius_norm])
def test_estimates__refuse_a_budget_without_an_error(
    function: Callable[..., Any], operator_of: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        function(operator_of(torch.eye(3)), 1)


@pytest.mark.parametrize(
    ("matrix", "blocks"),
    [
        ("hessian", "layer"),
        ("hessian", "model"),
        ("gmatrix", "model"),
        ("gmatrix_centered", "rows"),
        ("ggn", "model"),
    ],
)
def test_curvature__trace_and_norm_are_those_of_the_dense_matrix(case: Any, matrix: Any, blocks: Any) -> None:
    with Curvature(case.model, case.objective()) as curvature:
        traces = curvature.trace(matrix, blocks, products=20)
        norms = curvature.frobenius_norm(matrix, blocks, products=20)
        spectra = curvature.eigenpairs(1, matrix, blocks, matrix_up_to=10_000)
    for label in spectra:
        whole = spectra[label].matrix
        assert whole is not None
        for found, exact in (
            (traces[label], whole.diagonal(dim1=-2, dim2=-1).sum(-1)),
            (norms[label], whole.square().sum((-2, -1)).sqrt()),
        ):
            assert (
                (found.value - exact).abs() <= 8 * found.standard_error + 1e-9 * exact.abs() + 1e-12
            ).all()
    if matrix.startswith("gmatrix"):
        assert all(found.exact for found in traces.values())


def test_trace__of_softmax_regression_is_the_sum_of_its_closed_form(get_case: Callable[[str], Any]) -> None:
    """Science.md item 17: tr H_cc = mean of phi_c (1 - phi_c) |Y|^2 + beta d."""
    case = get_case("gmm")
    phi = torch.softmax(case.model(case.inputs), 1).detach()
    weight = (phi * (1 - phi) * case.inputs.square().sum(1, keepdim=True)).mean(0)
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.trace("hessian", "rows")["weight"]
    assert found.exact
    assert torch.allclose(found.value, weight + case.l2 * case.inputs.shape[1])
