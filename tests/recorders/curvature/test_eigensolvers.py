"""The eigensolvers, on matrices whose spectra are planted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hild_xr.recorders.curvature.eigensolvers import (
    Eigenpairs,
    Which,
    dense_eigenpairs,
    lanczos_eigenpairs,
    ranking,
    rotate_in_place,
)
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS: tuple[Which, ...] = ("magnitude", "largest", "smallest")


def planted(eigenvalues: list[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )
    matrix: Tensor = (basis * values) @ basis.T
    return matrix.to(dtype)


def product(matrix: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda vectors, problems: vectors @ matrix


def expected(eigenvalues: list[float] | Tensor, k: int, which: Which) -> Tensor:
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return values[ranking(values, which)[:k]]


def check_honest(pairs: Eigenpairs, matrix: Tensor, tol: float) -> None:
    """Check residuals, flags and orthonormality against the matrix in float64."""
    exact, vectors = matrix.double(), pairs.eigenvectors.double()
    norms = (vectors @ exact - pairs.eigenvalues[..., None] * vectors).norm(dim=-1)
    scale = torch.linalg.eigvalsh(exact).abs().max()
    noise = 1e-12 + 100 * torch.finfo(matrix.dtype).eps
    residuals = norms / scale if scale > 0 else norms
    # The solver's denominator is a Ritz value, never above the true largest one.
    assert bool((residuals <= pairs.residuals + noise).all())
    assert bool((residuals[pairs.converged] <= tol + noise).all())
    assert torch.equal(pairs.converged, pairs.residuals <= tol)
    identity = torch.eye(vectors.shape[-2], dtype=torch.float64)
    torch.testing.assert_close(
        vectors @ vectors.mT, identity.expand(*vectors.shape[:-2], -1, -1), rtol=0, atol=1e-4
    )


SPECTRA: dict[str, list[float]] = {
    "distinct": [float(i) for i in range(-20, 60)],
    "triple": [5.0] * 3 + [3.0, 2.0] + [0.5 * i / 95 for i in range(95)],
    "plus-minus": [4.0, -4.0, 4.0, -3.0] + [0.01 * i for i in range(60)],
    "two values": [1.0] * 30 + [-1.0] * 30,
    "identity": [2.0] * 50,
    "rank 2": [3.0, -2.0] + [0.0] * 70,
    "zero": [0.0] * 60,
    "tiny": [1e-12 * i for i in range(40)],
    "huge": [1e12 * i for i in range(40)],
}


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("dtype", "tol", "accuracy"), [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-3, 1e-4)]
)
def test_lanczos__finds_the_planted_spectrum_with_its_multiplicities(
    which: Which, spectrum: str, dtype: torch.dtype, tol: float, accuracy: float
) -> None:
    values = SPECTRA[spectrum]
    matrix = planted(values, dtype=dtype)
    pairs = lanczos_eigenpairs(product(matrix), len(values), 5, which=which, tol=tol, dtype=dtype)
    scale = max(map(abs, values)) or 1.0
    found, exact = pairs.eigenvalues[0] / scale, expected(values, 5, which) / scale
    if which == "magnitude":  # of equal magnitudes any sign may come first
        found, exact = found.abs(), exact.abs()
    torch.testing.assert_close(found, exact, rtol=0, atol=accuracy)
    assert bool(pairs.converged.all())
    check_honest(pairs, matrix, tol)


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 40])
def test_lanczos__finds_all_pairs(size: int, which: Which) -> None:
    values = [float(i) - size / 3 + 0.1 for i in range(size)]
    matrix = planted(values)
    pairs = lanczos_eigenpairs(product(matrix), size, size, which=which, tol=1e-10, dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvalues[0], expected(values, size, which), rtol=0, atol=1e-9)
    assert bool(pairs.converged.all())
    check_honest(pairs, matrix, 1e-10)


@settings(max_examples=250, deadline=None)
@given(
    outliers=st.lists(st.floats(2.0, 20.0), min_size=0, max_size=6),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6),
    copies=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1e-9, 1e-4, 1e-2]),
    bulk=st.sampled_from(["zero", "uniform", "semicircle"]),
    size=st.integers(30, 120),
    k=st.integers(1, 8),
    which=st.sampled_from(KINDS),
    tol=st.sampled_from([1e-2, 1e-3, 1e-6]),
    precise=st.booleans(),
    max_matvec=st.sampled_from([None, 20, 40]),
    seed=st.integers(0, 5),
)
def test_lanczos__never_flags_a_pair_whose_true_residual_is_above_the_tolerance(
    outliers: list[float],
    signs: list[float],
    copies: int,
    spread: float,
    bulk: str,
    size: int,
    k: int,
    which: Which,
    tol: float,
    precise: bool,
    max_matvec: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
    values = {"zero": 0 * noise, "uniform": noise, "semicircle": noise.sign() * (1 - noise**2).sqrt()}[bulk]
    clustered = [
        s * x * (1 + spread * c) for s, x in zip(signs, outliers, strict=False) for c in range(copies)
    ]
    values[: len(clustered)] = torch.tensor(clustered, dtype=torch.float64)
    dtype = torch.float64 if precise else torch.float32
    matrix = planted(values, seed, dtype)
    calls = []

    def counted(vectors: Tensor, problems: Tensor) -> Tensor:
        calls.append(len(vectors))
        return vectors @ matrix

    pairs = lanczos_eigenpairs(
        counted, size, k, which=which, tol=tol, dtype=dtype, max_matvec=max_matvec, seed=seed
    )
    check_honest(pairs, matrix, tol)
    assert int(pairs.n_matvec[0]) == sum(calls) <= (max_matvec or 40 * k + 200)
    # A converged pair lies within its residual of some eigenvalue.
    exact = torch.linalg.eigvalsh(matrix.double())
    distance = (pairs.eigenvalues[0][:, None] - exact).abs().amin(1)
    scale = exact.abs().max()
    assert bool((distance <= pairs.residuals[0] * scale + 1e-5 * scale).all())


@settings(max_examples=120, deadline=None)
@given(
    outliers=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    bulk_seed=st.integers(0, 100),
    seed=st.integers(0, 100),
    precise=st.booleans(),
)
def test_lanczos__finds_every_copy_of_every_outlier(
    outliers: list[int], bulk_seed: int, seed: int, precise: bool
) -> None:
    # Outliers on a grid, so that equal ones are exactly equal and others well apart.
    bulk = torch.rand(100, generator=torch.Generator().manual_seed(bulk_seed), dtype=torch.float64)
    values = torch.cat([torch.tensor(outliers, dtype=torch.float64), bulk])
    dtype = torch.float64 if precise else torch.float32
    matrix = planted(values, seed, dtype)
    k = len(outliers)
    pairs = lanczos_eigenpairs(product(matrix), len(values), k, tol=1e-3, dtype=dtype, seed=seed)
    assert bool(pairs.converged.all())
    # The error of an eigenvalue is quadratic in the residual: (1e-3 * 40)^2 over a gap of 1.
    torch.testing.assert_close(pairs.eigenvalues[0], expected(values, k, "magnitude"), rtol=0, atol=2e-3)


def test_lanczos__solves_independent_problems_in_lockstep() -> None:
    spectra = [
        SPECTRA["distinct"][:60],
        SPECTRA["two values"],
        [0.0] * 60,
        [float(2**i) for i in range(10)] + [0.0] * 50,
    ]
    matrices = torch.stack([planted(values, seed) for seed, values in enumerate(spectra)])

    def multiply(vectors: Tensor, problems: Tensor) -> Tensor:
        return (matrices[problems] @ vectors[:, :, None])[:, :, 0]

    pairs = lanczos_eigenpairs(multiply, 60, 4, n_problems=4, tol=1e-9, dtype=torch.float64)
    for i, values in enumerate(spectra):
        exact = expected(values, 4, "magnitude")
        torch.testing.assert_close(pairs.eigenvalues[i].abs(), exact.abs(), rtol=0, atol=1e-7)
        alone = Eigenpairs(*(getattr(pairs, name)[i : i + 1] for name in Eigenpairs.__dataclass_fields__))
        check_honest(alone, matrices[i], 1e-9)
    assert bool(pairs.converged.all())
    assert len(set(pairs.n_matvec.tolist())) > 1  # a finished problem is not multiplied on


def test_lanczos__subspace_is_accurate_to_residual_over_gap() -> None:
    values = [10.0, 9.0, 8.0] + [1.0 - i / 100 for i in range(97)]
    matrix = planted(values)
    exact = dense_eigenpairs(matrix, 3).eigenvectors
    found = lanczos_eigenpairs(product(matrix), 100, 3, tol=1e-6, dtype=torch.float64).eigenvectors[0]
    largest_sine = (found - found @ exact.T @ exact).norm(2)
    assert float(largest_sine) < 1e-5 * 10 / 7


def test_lanczos__is_deterministic_and_leaves_the_global_rng_alone() -> None:
    matrix = planted(SPECTRA["distinct"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = lanczos_eigenpairs(product(matrix), 80, 3, seed=7, dtype=torch.float64)
    torch.randn(5)
    second = lanczos_eigenpairs(product(matrix), 80, 3, seed=7, dtype=torch.float64)
    other = lanczos_eigenpairs(product(matrix), 80, 3, seed=8, dtype=torch.float64)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)
    torch.set_rng_state(state)
    lanczos_eigenpairs(product(matrix), 80, 3, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)


def test_lanczos__restarts_within_a_small_basis() -> None:
    values = [float(i) for i in range(400)]
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    small = lanczos_eigenpairs(product(matrix), 400, 4, tol=1e-6, max_basis=10, dtype=torch.float64)
    large = lanczos_eigenpairs(product(matrix), 400, 4, tol=1e-6, max_basis=400, dtype=torch.float64)
    torch.testing.assert_close(small.eigenvalues, large.eigenvalues, rtol=0, atol=1e-4)
    assert bool(small.converged.all() & large.converged.all())
    assert int(small.n_matvec) >= int(large.n_matvec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_lanczos__keeps_its_basis_orthogonal_over_many_restarts(dtype: torch.dtype, tol: float) -> None:
    # Sample covariances: some outliers, and pairs asked for deep inside a bulk without gaps.
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(3, 800, 200, generator=generator, dtype=torch.float64)
    samples[..., :4] *= 3
    matrices = (samples.mT @ samples / 800).to(dtype)

    def multiply(vectors: Tensor, problems: Tensor) -> Tensor:
        return (matrices[problems] @ vectors[:, :, None])[:, :, 0]

    pairs = lanczos_eigenpairs(multiply, 200, 10, n_problems=3, tol=tol, dtype=dtype, max_matvec=2000)
    assert bool(pairs.converged.all())
    assert int(pairs.n_matvec.min()) > 60  # a basis holds 32
    exact = torch.linalg.eigvalsh(matrices.double()).flip(1)[:, :10]
    torch.testing.assert_close(pairs.eigenvalues, exact, rtol=0, atol=20 * tol)
    for i in range(3):
        alone = Eigenpairs(*(getattr(pairs, name)[i : i + 1] for name in Eigenpairs.__dataclass_fields__))
        check_honest(alone, matrices[i], tol)


def test_lanczos__stops_at_its_budget_and_says_so() -> None:
    matrix = torch.diag(torch.arange(500, dtype=torch.float64))
    pairs = lanczos_eigenpairs(product(matrix), 500, 4, tol=1e-10, max_matvec=15, dtype=torch.float64)
    assert int(pairs.n_matvec) == 15
    assert not bool(pairs.converged.any())
    check_honest(pairs, matrix, 1e-10)


def test_lanczos__does_not_claim_more_than_the_precision_allows() -> None:
    matrix = planted(SPECTRA["distinct"], dtype=torch.float32)
    pairs = lanczos_eigenpairs(product(matrix), 80, 3, tol=1e-12)
    assert not bool(pairs.converged.any())
    assert float(pairs.residuals.max()) < 1e-5


def test_lanczos__costs_few_products_for_separated_outliers() -> None:
    values = [100.0, 80.0, 60.0] + [1.0 - i / 2000 for i in range(997)]
    matrix = planted(values)
    pairs = lanczos_eigenpairs(
        product(matrix), 1000, 3, tol=1e-3, guard=0, probe_steps=0, dtype=torch.float64
    )
    assert bool(pairs.converged.all())
    assert int(pairs.n_matvec) <= 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [1, 5])
def test_lanczos__raises_on_a_product_that_is_not_finite(value: float, call: int) -> None:
    matrix, calls = planted(SPECTRA["distinct"]), [0]

    def broken(vectors: Tensor, problems: Tensor) -> Tensor:
        calls[0] += 1
        return vectors @ matrix if calls[0] < call else torch.full_like(vectors, value)

    with pytest.raises(NonFiniteCurvatureError, match=r"'fc1.weight'") as error:
        lanczos_eigenpairs(broken, 80, 2, dtype=torch.float64, name="fc1.weight")
    assert error.value.block == "fc1.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be between 1 and the size 10"),
        ({"k": 11}, "got 11"),
        ({"tol": 0.0}, "tol, the relative residual"),
        ({"tol": float("nan")}, "tol, the relative residual"),
        ({"max_matvec": 5}, "allow at least 6"),
        ({"max_basis": 4}, "max_basis=4 is too small"),
        ({"which": "LM"}, "'magnitude', 'largest', 'smallest'; got 'LM'"),
    ],
)
def test_lanczos__refuses_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos_eigenpairs(product(torch.eye(10)), 10, **{"k": 2, **arguments})


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense__solves_a_batch(which: Which, dtype: torch.dtype) -> None:
    matrices = torch.stack([planted(SPECTRA["distinct"][:20], 0, dtype), torch.zeros(20, 20, dtype=dtype)])
    pairs = dense_eigenpairs(matrices[:, None], 3, which=which)
    assert pairs.eigenvalues.shape == (2, 1, 3)
    assert pairs.eigenvectors.shape == (2, 1, 3, 20)
    assert pairs.eigenvectors.dtype == dtype
    torch.testing.assert_close(
        pairs.eigenvalues[0, 0], expected(SPECTRA["distinct"][:20], 3, which), rtol=0, atol=1e-4
    )
    assert torch.equal(pairs.residuals[1], torch.zeros(1, 3, dtype=torch.float64))
    assert bool(pairs.converged.all())
    assert pairs.n_matvec.tolist() == [[0], [0]]


def test_dense__residual_counts_the_asymmetry_of_the_matrix() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    matrix[0, 2] = 0.5
    pairs = dense_eigenpairs(matrix, 3)
    assert not bool(pairs.converged.all())


def test_dense__raises_on_entries_that_are_not_finite() -> None:
    with pytest.raises(NonFiniteCurvatureError, match="entry of the matrix of 'fc'"):
        dense_eigenpairs(torch.full((2, 2), torch.nan), 1, name="fc")


def test_rotate_in_place__is_a_product_whatever_the_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 5, 13, generator=generator)
    coefficients = torch.randn(2, 3, 4, generator=generator)
    expected_rows = coefficients @ vectors[:, :4]
    rotated = vectors.clone()
    rotate_in_place(rotated, coefficients, 4, chunk=5)
    torch.testing.assert_close(rotated[:, :3], expected_rows)
    assert torch.equal(rotated[:, 3:], vectors[:, 3:])
