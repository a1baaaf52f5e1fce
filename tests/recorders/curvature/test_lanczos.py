"""Lanczos, on matrices whose spectra are planted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.pairs import Eigenpairs, Which, dense_eigenpairs, ranking
from hild_xr.recorders.curvature.subspace import rotate_in_place

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS: tuple[Which, ...] = ("magnitude", "largest", "smallest", "both")


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
    assert int(pairs.n_matvec.min()) > 50  # a basis holds 32
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
        ({"max_matvec": 4}, "allow at least 5"),
        ({"max_basis": 4}, "max_basis=4 is too small"),
        ({"which": "LM"}, "'magnitude', 'largest', 'smallest', 'both'; got 'LM'"),
    ],
)
def test_lanczos__refuses_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos_eigenpairs(product(torch.eye(10)), 10, **{"k": 2, **arguments})


def test_rotate_in_place__is_a_product_whatever_the_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 5, 13, generator=generator)
    coefficients = torch.randn(2, 3, 4, generator=generator)
    expected_rows = coefficients @ vectors[:, :4]
    rotated = vectors.clone()
    rotate_in_place(rotated, coefficients, 4, chunk=5)
    torch.testing.assert_close(rotated[:, :3], expected_rows)
    assert torch.equal(rotated[:, 3:], vectors[:, 3:])


def drifting(seed: int, angle: float, size: int = 300, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a matrix with outliers whose eigenvectors have turned by about an angle, each its own way."""
    values = torch.cat([torch.tensor([10.0, 9.0, -8.0, 6.0, 5.0]), 2 * torch.rand(size - 5) - 1]).double()
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    skew = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turn = torch.matrix_exp(angle * (skew - skew.T) / size**0.5)
    basis = turn @ basis
    matrix: Tensor = (basis * values) @ basis.T
    return matrix.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("angle", "most"), [(1e-4, 6), (3e-3, 16), (0.1, 18), (1.5, 30)])
def test_start__of_a_moment_ago_saves_products_and_nothing_else(
    dtype: torch.dtype, angle: float, most: int
) -> None:
    torch.manual_seed(0)
    earlier = dense_eigenpairs(drifting(0, 0.0, dtype=dtype), 5).eigenvectors
    torch.manual_seed(0)
    matrix = drifting(0, angle, dtype=dtype)
    pairs = lanczos_eigenpairs(product(matrix), 300, 5, tol=1e-3, dtype=dtype, start=earlier[None])
    cold = lanczos_eigenpairs(product(matrix), 300, 5, tol=1e-3, dtype=dtype)
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvalues, cold.eigenvalues, rtol=0, atol=1e-4)
    check_honest(pairs, matrix, 1e-3)
    assert int(pairs.n_matvec) <= min(most, int(cold.n_matvec) + 1)


def test_start__serves_each_of_many_problems_by_how_far_it_turned() -> None:
    torch.manual_seed(0)
    angles = [0.0, 1e-3, 1.0, 1e-4]
    earlier, matrices = [], []
    for seed, angle in enumerate(angles):
        state = torch.get_rng_state()
        earlier.append(dense_eigenpairs(drifting(seed, 0.0), 4).eigenvectors)
        torch.set_rng_state(state)
        matrices.append(drifting(seed, angle))
    stack = torch.stack(matrices)

    def multiply(vectors: Tensor, problems: Tensor) -> Tensor:
        return (stack[problems] @ vectors[:, :, None])[:, :, 0]

    pairs = lanczos_eigenpairs(
        multiply, 300, 4, n_problems=4, tol=1e-4, dtype=torch.float64, start=torch.stack(earlier)
    )
    assert bool(pairs.converged.all())
    for i, matrix in enumerate(matrices):
        exact = dense_eigenpairs(matrix, 4).eigenvalues
        torch.testing.assert_close(pairs.eigenvalues[i], exact, rtol=0, atol=1e-6)
    assert pairs.n_matvec[0] == 4
    assert pairs.n_matvec[2] == pairs.n_matvec.max()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50),
    how=st.sampled_from(["random", "zero", "repeated", "right", "wrong end", "too many", "too few"]),
    k=st.integers(1, 6),
    which=st.sampled_from(KINDS),
    max_matvec=st.sampled_from([None, 12]),
    precise=st.booleans(),
)
def test_start__whatever_it_is__never_makes_a_flag_dishonest(
    seed: int, how: str, k: int, which: Which, max_matvec: int | None, precise: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(60, generator=generator, dtype=torch.float64) ** 3
    dtype = torch.float64 if precise else torch.float32
    matrix = planted(values, seed, dtype)
    opposite: dict[Which, Which] = {"largest": "smallest", "smallest": "largest"}
    count = {"too many": 40, "too few": max(1, k - 2)}.get(how, k)
    start = {
        "zero": torch.zeros(k, 60, dtype=dtype),
        "right": dense_eigenpairs(matrix, k, which=which).eigenvectors,
        "wrong end": dense_eigenpairs(matrix, k, which=opposite.get(which, "smallest")).eigenvectors,
        "repeated": torch.ones(k, 60, dtype=dtype),
    }.get(how, torch.randn(count, 60, generator=generator, dtype=torch.float64).to(dtype))
    pairs = lanczos_eigenpairs(
        product(matrix), 60, k, which=which, start=start[None], dtype=dtype, max_matvec=max_matvec
    )
    assert bool(pairs.eigenvectors.isfinite().all())
    assert max_matvec is None or int(pairs.n_matvec) <= max_matvec
    check_honest(pairs, matrix, 1e-3)


def test_start__of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(1, s, 10\), got \(2, 10\)"):
        lanczos_eigenpairs(product(torch.eye(10)), 10, 2, start=torch.eye(10)[:2])


def test_max_seconds__cuts_the_search_short_and_says_so() -> None:
    matrix = torch.diag(torch.arange(500, dtype=torch.float64))
    pairs = lanczos_eigenpairs(product(matrix), 500, 4, tol=1e-10, max_seconds=0.0, dtype=torch.float64)
    assert int(pairs.n_matvec) < 10
    assert not bool(pairs.converged.any())
    check_honest(pairs, matrix, 1e-10)


def test_residuals__cost_no_product_of_their_own() -> None:
    matrix, calls = planted(SPECTRA["distinct"]), []

    def counted(vectors: Tensor, problems: Tensor) -> Tensor:
        calls.append(len(vectors))
        return vectors @ matrix

    pairs = lanczos_eigenpairs(counted, 80, 3, dtype=torch.float64, guard=0, probe_steps=0)
    true = (pairs.eigenvectors @ matrix - pairs.eigenvalues[..., None] * pairs.eigenvectors).norm(dim=-1)
    torch.testing.assert_close(pairs.residuals, true / pairs.eigenvalues.abs(), rtol=1e-6, atol=1e-12)
    assert sum(calls) == int(pairs.n_matvec)


def test_residuals__count_the_asymmetry_of_a_product() -> None:
    matrix = planted(SPECTRA["distinct"])
    matrix = matrix + 0.5 * torch.triu(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
    pairs = lanczos_eigenpairs(lambda vectors, _: vectors @ matrix.T, 80, 3, dtype=torch.float64)
    true = (pairs.eigenvectors @ matrix.T - pairs.eigenvalues[..., None] * pairs.eigenvectors).norm(dim=-1)
    assert bool((true / pairs.eigenvalues.abs() <= 1.01 * pairs.residuals).all())
    assert not bool(pairs.converged.any())


@pytest.mark.parametrize("seed", range(8))
def test_lanczos__finds_the_top_ten_of_a_cluster_as_before_training(seed: int) -> None:
    # At initialisation the largest eigenvalues of a network lie within tenths of a percent of each other.
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.0005 + 0.0002 * torch.rand(60, generator=generator, dtype=torch.float64)
    top = 0.238 - gaps.cumsum(0)
    bulk = 0.2 * (2 * torch.rand(4000, generator=generator, dtype=torch.float64) - 1)
    values = torch.cat([top, bulk]).float()
    pairs = lanczos_eigenpairs(lambda vectors, _: vectors * values, len(values), 10, seed=seed)
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvalues[0], top[:10], rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_matvec", range(12, 60, 4))
def test_start__that_corrections_do_not_settle_stays_within_the_budget(max_matvec: int) -> None:
    # Neighbours in a dense bulk, which corrections remove slowly, and of which the sum shows nothing.
    values = torch.cat([torch.linspace(1.0, 1.01, 5), torch.linspace(0.5, 0.995, 295)]).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 300, generator=generator, dtype=torch.float64)
    start = torch.eye(300, dtype=torch.float64)[:5] + 1e-3 * (noise - noise.mean(0))
    calls = []

    def counted(vectors: Tensor, problems: Tensor) -> Tensor:
        del problems
        calls.append(len(vectors))
        return vectors * values

    pairs = lanczos_eigenpairs(
        counted, 300, 5, start=start[None], tol=1e-4, max_matvec=max_matvec, dtype=torch.float64
    )
    assert int(pairs.n_matvec) == sum(calls) <= max_matvec
    check_honest(pairs, torch.diag(values), 1e-4)


@pytest.mark.parametrize(("classes", "d", "k"), [(4, 60, 5), (10, 60, 10), (10, 60, 5), (4, 200, 3)])
def test_multiple_eigenvalues__are_found_with_all_their_copies(classes: int, d: int, k: int) -> None:
    """Softmax regression at zero weights: each eigenvalue of the inputs' covariance, classes - 1 times."""
    centred = torch.eye(classes) - 1 / classes
    for seed in range(14):
        inputs = torch.randn(600, d, generator=torch.Generator().manual_seed(seed))
        covariance = inputs.T @ inputs / 600

        def product(vectors: Tensor, _: Tensor, covariance: Tensor = covariance) -> Tensor:
            weights = vectors.reshape(-1, classes, d)
            return (centred @ weights @ covariance / classes).reshape(len(vectors), -1)

        pairs = lanczos_eigenpairs(product, classes * d, k, seed=seed)
        levels = torch.linalg.eigvalsh(covariance.double()).flip(0) / classes
        expected = levels.repeat_interleave(classes - 1)[:k]
        assert bool(pairs.converged.all())
        torch.testing.assert_close(pairs.eigenvalues[0], expected, rtol=1e-3, atol=0)


def test_multiple_eigenvalues_of_some_problems__cost_the_others_nothing() -> None:
    bulk = torch.linspace(-1.99, 1.99, 3000, dtype=torch.float64)
    simple = torch.cat([torch.linspace(2, 4, 8, dtype=torch.float64), bulk])
    multiple = torch.cat([torch.full((4,), 4.0), torch.full((4,), 3.9), 0.3 * bulk])
    both = torch.stack([simple, multiple])
    pairs = lanczos_eigenpairs(
        lambda vectors, problems: vectors * both[problems], 3008, 6, n_problems=2, dtype=torch.float64
    )
    alone = lanczos_eigenpairs(lambda vectors, _: vectors * simple, 3008, 6, dtype=torch.float64)
    for found, spectrum in zip(pairs.eigenvalues, both, strict=True):
        expected = spectrum.sort(descending=True).values[:6]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    # several problems are looked at every fourth product
    assert int(pairs.n_matvec[0]) <= int(alone.n_matvec[0]) + 3
    assert int(pairs.n_matvec[0]) < int(pairs.n_matvec[1])


@pytest.mark.parametrize("scale", [1e-21, 1.0, 1e15])
def test_residuals__of_float32_neither_vanish_nor_overflow(scale: float) -> None:
    """Squares of such numbers do: a search cut short would pass for one that has converged."""
    matrix = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    matrix = scale * (matrix + matrix.T)
    found = lanczos_eigenpairs(
        lambda vectors, _: vectors @ matrix, 200, 3, tol=1e-7, max_matvec=50, probe_steps=0
    )
    vectors = found.eigenvectors[0].double()
    rest = vectors @ matrix.double() - found.eigenvalues[0][:, None] * vectors
    true = rest.norm(dim=1) / found.eigenvalues[0].abs()
    assert float(true[2]) > 1e-5  # the last one, far above float32's own rounding
    torch.testing.assert_close(found.residuals[0, 2], true[2], rtol=0.05, atol=0)
    assert not bool(found.converged[0, 2])
