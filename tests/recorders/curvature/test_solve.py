"""Which path solves a block, and the Gram path on planted per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature.blocks import Block
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.operators import RowsSecondMoment, SecondMoment
from hild_xr.recorders.curvature.sample_gradients import ExplicitGradients, FactoredGradients, SampleGradients
from hild_xr.recorders.curvature.solve import SolveOptions, choose_path, gram_eigenpairs, solve


def gmatrix(gradients: Tensor, shift: Tensor | None = None) -> SecondMoment:
    block = Block("fc.weight", "layer", ("fc.weight",), ((gradients.shape[1],),))
    parts = [ExplicitGradients(gradients)]
    return SecondMoment(block, parts, len(gradients), shift, gradients.dtype, gradients.device)


def planted_gradients(squares: list[float], n: int, p: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return J (n, p) such that J^T J / n has these eigenvalues, and zeros."""
    generator = torch.Generator().manual_seed(0)
    r = len(squares)
    left, _ = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(p, r, generator=generator, dtype=torch.float64))
    gradients: Tensor = (left * (n * torch.tensor(squares, dtype=torch.float64)).sqrt()) @ right.T
    return gradients.to(dtype)


def test_choose_path__is_the_documented_rule() -> None:
    few, many = gmatrix(torch.randn(50, 400)), gmatrix(torch.randn(500, 400))
    assert choose_path(few, SolveOptions(3)) == "gram"
    assert choose_path(few, SolveOptions(3, which="smallest")) == "lanczos"
    assert choose_path(few, SolveOptions(3, max_bytes=50 * 50 * 4)) == "gram"
    assert choose_path(few, SolveOptions(3, max_bytes=50 * 50 * 4 - 1)) == "lanczos"
    assert choose_path(many, SolveOptions(3)) == "lanczos"
    assert choose_path(many, SolveOptions(3, dense_up_to=400)) == "dense"
    assert choose_path(many, SolveOptions(3, matrix_up_to=400)) == "dense"
    assert choose_path(many, SolveOptions(133)) == "dense"
    assert choose_path(many, SolveOptions(132)) == "lanczos"


@pytest.mark.parametrize("n", [60, 700])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_gram__finds_the_planted_eigenpairs_over_many_orders_of_magnitude(
    n: int, dtype: torch.dtype, accuracy: float
) -> None:
    squares = [1.0, 0.5, 0.5, 1e-2, 1e-4, 1e-5]
    gradients = planted_gradients([*squares, *[1e-7] * 20], n, 900, dtype)
    operator = gmatrix(gradients)
    pairs = gram_eigenpairs(operator, SolveOptions(6, tol=1e-4))
    torch.testing.assert_close(
        pairs.eigenvalues[0], torch.tensor(squares, dtype=torch.float64), rtol=0, atol=accuracy
    )
    assert bool(pairs.converged.all())
    vectors = pairs.eigenvectors[0].double()
    exact = gradients.double().T @ gradients.double() / n
    residuals = (vectors @ exact - pairs.eigenvalues[0][:, None] * vectors).norm(dim=1)
    assert bool((residuals <= pairs.residuals[0] + 1e-6).all())
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_gram__pairs_converge_in_a_spectrum_that_decays_without_a_gap(dtype: torch.dtype, tol: float) -> None:
    squares = [float(i) ** -1.5 for i in range(1, 601)]
    gradients = planted_gradients(squares, 700, 900, dtype)
    pairs = gram_eigenpairs(gmatrix(gradients), SolveOptions(15, tol=tol))
    assert bool(pairs.converged.all())
    expected = torch.tensor(squares[:15], dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvalues[0], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rank", "n"), [(2, 30), (4, 4), (0, 30), (3, 700)])
def test_gram__completes_a_low_rank_matrix_with_its_null_space(rank: int, n: int, dtype: torch.dtype) -> None:
    squares = [float(rank - i) for i in range(rank)]
    operator = gmatrix(planted_gradients(squares, n, 900, dtype))
    pairs = gram_eigenpairs(operator, SolveOptions(6))
    expected = torch.tensor(squares + [0.0] * (6 - rank), dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvalues[0], expected, rtol=0, atol=1e-5)
    assert bool(pairs.converged.all())
    vectors = pairs.eigenvectors[0].double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_gram__of_factors_equals_that_of_explicit_gradients_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(9, 10, generator=generator, dtype=torch.float64)
    h = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    factors, shift = FactoredGradients(delta, h), torch.randn(200, generator=generator, dtype=torch.float64)
    block = Block("fc.weight", "layer", ("fc.weight",), ((10, 20),))
    factored = SecondMoment(block, [factors], 9, shift, torch.float64, torch.device("cpu"))
    explicit = factors.explicit() + shift
    expected = torch.linalg.eigvalsh(explicit @ explicit.T / 9).flip(0)
    found = solve(factored, SolveOptions(9))
    assert found.path == "gram"
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.trace, explicit.square().sum() / 9)
    assert found.eigenvectors.shape == (9, 10, 20)


def test_gram__raises_on_gradients_that_are_not_finite() -> None:
    gradients = torch.randn(600, 900)
    gradients[3, 5] = torch.nan
    for operator in (gmatrix(gradients), gmatrix(gradients[:10])):
        with pytest.raises(NonFiniteCurvatureError, match=r"'fc\.weight'"):
            solve(operator, SolveOptions(2))


@pytest.mark.parametrize("dense_up_to", [0, 100])
@pytest.mark.parametrize("max_bytes", [1, 60_000, 2**30])
def test_solve__does_not_depend_on_how_many_rows_are_solved_at_once(max_bytes: int, dense_up_to: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(7, 200, 40, generator=generator, dtype=torch.float64)
    gradients *= torch.arange(1, 41) ** 1.0
    operator = RowsSecondMoment(Block("w", "rows", ("w",), ((7, 40),)), gradients)
    options = SolveOptions(3, tol=1e-9, dense_up_to=dense_up_to, max_bytes=max_bytes)
    found = solve(operator, options)
    exact = torch.linalg.eigvalsh(gradients.mT @ gradients / 200).flip(1)[:, :3]
    assert found.path == ("dense" if dense_up_to else "lanczos")
    torch.testing.assert_close(found.eigenvalues, exact, rtol=1e-9, atol=0)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.trace, gradients.square().sum((1, 2)) / 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [3.0, 30.0, 3000.0])
@pytest.mark.parametrize("shifted", [False, True])
def test_gram__residuals_are_those_of_real_products(dtype: torch.dtype, spread: float, shifted: bool) -> None:
    gradients = planted_gradients([spread ** (-i / 4) for i in range(12)], 700, 900, dtype)
    shift = 0.01 * torch.ones(900, dtype=dtype) if shifted else None
    # a loose search, so that residuals are large enough to compare
    pairs = gram_eigenpairs(gmatrix(gradients, shift), SolveOptions(5, tol=0.05))
    rows = gradients.double() + (0 if shift is None else shift.double())
    vectors = pairs.eigenvectors[0].double()
    true = (vectors @ rows.T @ rows / 700 - pairs.eigenvalues[0][:, None] * vectors).norm(dim=1)
    rounding = 20 * torch.finfo(dtype).eps * spread**1.5
    torch.testing.assert_close(pairs.residuals[0], true / pairs.eigenvalues[0], rtol=0.02, atol=rounding)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(vectors @ vectors.T, identity, rtol=0, atol=1e-5)


def test_gram__of_a_layer_with_its_bias_shares_one_product() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, h = torch.randn(600, 3, generator=generator), torch.randn(600, 5, generator=generator)
    block = Block("0", "module", ("0.weight", "0.bias"), ((3, 5), (3,)))
    parts: list[SampleGradients] = [FactoredGradients(delta, h), ExplicitGradients(delta)]
    operator = SecondMoment(block, parts, 600, None, delta.dtype, delta.device)
    rows = torch.cat([part.explicit() for part in parts], dim=1)
    torch.testing.assert_close(operator.gram(), rows @ rows.T / 600)


@pytest.mark.parametrize(("guard", "probe_steps"), [(0, 0), (2, 8), (30, 20)])
def test_search__takes_as_much_certainty_as_is_asked_for(guard: int, probe_steps: int) -> None:
    rows = torch.randn(600, 200, generator=torch.Generator().manual_seed(1))
    operator = gmatrix(rows)
    found = solve(operator, SolveOptions(3, dense_up_to=0, guard=guard, probe_steps=probe_steps))
    assert found.path == "lanczos"
    assert bool(found.converged.all())
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double() / 600).flip(0)
    torch.testing.assert_close(found.eigenvalues, exact[:3], rtol=1e-4, atol=0)


def test_certainty__costs_products() -> None:
    rows = torch.randn(600, 200, generator=torch.Generator().manual_seed(1))
    operator = gmatrix(rows)
    unguarded = solve(operator, SolveOptions(3, dense_up_to=0, guard=0, probe_steps=0))
    guarded = solve(operator, SolveOptions(3, dense_up_to=0))
    assert int(unguarded.n_matvec) + 8 <= int(guarded.n_matvec)


@pytest.mark.parametrize("wrong", [{"guard": -1}, {"probe_steps": -1}])
def test_options__refuse_negative_certainty(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        SolveOptions(3, **wrong)
