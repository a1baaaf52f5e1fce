"""Diagonals: closed forms of linear layers, exact small blocks, unbiased estimates elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature import Curvature, NonFiniteCurvatureError
from hild_xr.recorders.curvature.diagonals import diagonal
from hild_xr.recorders.curvature.solve import SolveOptions, solve
from hild_xr.recorders.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

P = 200
SPECTRUM = torch.cat([torch.tensor([50.0, -20.0]), torch.linspace(-1, 2, P - 2)]).double()


@pytest.mark.parametrize("pairs", [0, 2])
def test_diagonal__is_unbiased_with_true_standard_errors(
    pairs: int, operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    matrix = planted(SPECTRUM)
    operator = operator_of(matrix)
    known = solve(operator, SolveOptions(pairs)) if pairs else None
    found = [diagonal(operator, 20, seed=seed, known=known) for seed in range(40)]
    scores = torch.stack([(e.value - matrix.diagonal()) / e.standard_error for e in found])
    # t with 19 degrees of freedom has variance 19/17; 40 x 200 scores, each 40 of one entry alike
    assert float(scores.square().mean()) == pytest.approx(19 / 17, rel=0.1)
    assert scores.mean(0).abs().max() < 5 / 40**0.5
    assert int(found[0].n_matvec) == 20 + pairs


def test_diagonal__known_pairs_reduce_the_error(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    operator = operator_of(planted(SPECTRUM))
    known = solve(operator, SolveOptions(2))
    plain, better = diagonal(operator, 20), diagonal(operator, 20, known=known)
    assert better.standard_error.norm() < plain.standard_error.norm() / 2


def test_diagonal__of_rows_is_that_of_each_row(
    operator_of: Callable[..., Any], planted: Callable[..., Tensor]
) -> None:
    matrices = torch.stack([planted(SPECTRUM), planted(-SPECTRUM, seed=1)])
    found = diagonal(operator_of(matrices), 50)
    exact = matrices.diagonal(dim1=-2, dim2=-1)
    assert found.value.shape == exact.shape
    assert ((found.value - exact).abs() < 6 * found.standard_error).all()


def test_diagonal__of_a_diagonal_matrix_has_no_error_and_gives_r_med(operator_of: Callable[..., Any]) -> None:
    """Science.md item 11: R = max |H_ii| / median |H_ii| is 9/5 for diag(1..9), and 1 for the identity."""
    for products in (2, 9):
        found = diagonal(operator_of(torch.diag(torch.arange(1.0, 10.0))), products)
        assert found.exact
        assert float(found.value.abs().max() / found.value.abs().median()) == 9 / 5
    identity = diagonal(operator_of(torch.eye(300)), 2)
    assert float(identity.value.abs().max() / identity.value.abs().median()) == 1


@pytest.mark.parametrize("products", [10, 400])
def test_diagonal__names_the_block_of_numbers_that_are_not_finite(
    products: int, operator_of: Callable[..., Any]
) -> None:
    matrix = torch.eye(P)
    matrix[3, 3] = torch.inf
    with pytest.raises(NonFiniteCurvatureError, match="planted"):
        diagonal(operator_of(matrix), products)


@pytest.mark.parametrize("include_regularizer", [False, True])
@pytest.mark.parametrize(
    ("matrix", "blocks"),
    [
        ("hessian", "layer"),
        ("hessian", "rows"),
        ("gmatrix", "layer"),
        ("gmatrix", "rows"),
        ("gmatrix_centered", "rows"),
    ],
)
def test_curvature_diagonal__is_that_of_the_dense_matrix(
    case: Any, matrix: Any, blocks: Any, include_regularizer: bool
) -> None:
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.diagonal(matrix, blocks, products=6, include_regularizer=include_regularizer)
        spectra = curvature.eigenpairs(
            1, matrix, blocks, matrix_up_to=10_000, include_regularizer=include_regularizer
        )
    for label, estimate in found.items():
        whole = spectra[label].matrix
        assert whole is not None
        exact = whole.diagonal(dim1=-2, dim2=-1).reshape(estimate.value.shape)
        assert estimate.value.shape == case.trainable[label].shape
        # Together: a single entry out of six samples of signs can have any ratio to its own error.
        assert (estimate.value - exact).norm() <= 3 * estimate.standard_error.norm() + 1e-9


def test_curvature_diagonal__of_linear_layers_is_exact_and_costs_an_output_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(40, 30).double(), torch.arange(40) % 3
    with Curvature(model, Objective(nn.functional.cross_entropy, inputs, targets)) as curvature:
        found = curvature.diagonal(products=8)["0.weight"]
        sampled = curvature.diagonal(products=7)["0.weight"]
        whole = curvature.eigenpairs(1, layers=["0.weight"], matrix_up_to=240)["0.weight"].matrix
    assert found.exact
    assert int(found.n_matvec) == 8
    assert whole is not None
    assert torch.allclose(found.value.reshape(-1), whole.diagonal(), atol=1e-12)
    assert not sampled.exact
