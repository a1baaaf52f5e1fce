"""The basis of a search: what is known of its vectors when products are exact, rounded or replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature.subspace import Matrices, Subspace, make_orthonormal

SIZE = 60


def matrix(seed: int = 0) -> Tensor:
    normal = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    symmetric: Tensor = (normal + normal.T) / 2
    return symmetric


def matrices(of: Tensor) -> Matrices:
    return Matrices(lambda vectors, _: vectors @ of, SIZE, torch.float64, torch.device("cpu"), "test", 0)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(exact: Tensor, rounded: Tensor) -> tuple[Subspace, float]:
    """Return a basis of four vectors with exact products and three with others, and the largest error."""
    space = Subspace(matrices(exact), torch.tensor([0]), 12)
    space.append(randn(1, 4, SIZE))
    error = float(torch.linalg.matrix_norm(rounded - exact, 2))
    space.append(randn(1, 3, SIZE, seed=2), by=matrices(rounded), errors=torch.tensor([error]))
    return space, error


def true_residuals(space: Subspace, exact: Tensor, n_pairs: int) -> Tensor:
    ritz = space.ritz("magnitude")
    vectors = ritz.coefficients[0, :n_pairs] @ space.vectors[0, : space.filled]
    norms: Tensor = (vectors @ exact - ritz.eigenvalues[0, :n_pairs, None] * vectors).norm(dim=1)
    return norms


def test_residuals__of_products_with_errors_are_bounds() -> None:
    exact = matrix()
    space, error = filled(exact, exact + 0.5 * matrix(5))
    bounds = space.residuals(space.ritz("magnitude"), 7)[0]
    true = true_residuals(space, exact, 7)
    assert bool((bounds >= true).all())
    assert bool((bounds <= true + 2 * 7**0.5 * error).all())
    space.errors.zero_()
    without = space.residuals(space.ritz("magnitude"), 7)[0]
    assert bool((without < true).any()), "the bounds are not needed"


def test_errors__go_with_the_vectors_at_a_restart() -> None:
    exact = matrix()
    space, _ = filled(exact, exact + 0.5 * matrix(5))
    before = space.residuals(space.ritz("magnitude"), 3)
    space.restart(space.ritz("magnitude"), 3)
    torch.testing.assert_close(space.residuals(space.ritz("magnitude"), 3), before)


def test_errors__are_forgotten_with_the_products_that_had_them() -> None:
    exact = matrix()
    space, _ = filled(exact, exact + 0.5 * matrix(5))
    differences = space.multiply_anew(slice(4, 7), matrices(exact))
    rounded = space.vectors[0, 4:7] @ (0.5 * matrix(5))
    torch.testing.assert_close(differences[0], rounded.norm(dim=1))
    ritz = space.ritz("magnitude")
    torch.testing.assert_close(space.residuals(ritz, 7)[0], true_residuals(space, exact, 7))
    space.aim(randn(1, SIZE, seed=4))
    space.errors[:, space.filled] = 7.0  # of a vector that was there before
    space.extend()
    assert float(space.errors[0, : space.filled].max()) == 0


def test_entries_between_exact_and_rounded_vectors__are_exact() -> None:
    exact = matrix()
    space, _ = filled(exact, exact + 0.5 * matrix(5))
    basis = space.vectors[0, :7]
    projected = basis @ exact @ basis.T
    torch.testing.assert_close(space.projected[0, :4, :7], projected[:4, :7])
    torch.testing.assert_close(space.projected[0, :7, :4], projected[:7, :4])
    assert float((space.projected[0, 4:7, 4:7] - projected[4:, 4:]).abs().max()) > 0.1


@pytest.mark.parametrize("dependent", ["zero", "in the basis", "twice the same"])
def test_append__of_dependent_directions_keeps_the_basis_orthonormal(dependent: str) -> None:
    space = Subspace(matrices(matrix()), torch.tensor([0]), 12)
    first = torch.zeros(1, 2, SIZE, dtype=torch.float64)
    first[0, 0, 0] = first[0, 1, 1] = 1.0  # where QR puts what it does not know
    space.append(first)
    directions = randn(1, 3, SIZE)
    if dependent == "zero":
        directions[0, 1] = 0.0
    elif dependent == "in the basis":
        directions[0, 1] = first[0, 0]
    else:
        directions[0, 1] = directions[0, 2]
    space.append(directions)
    basis = space.vectors[0, : space.filled]
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("closeness", [1.0, 1e-2, 1e-5])
def test_make_orthonormal__keeps_the_span(closeness: float) -> None:
    vectors = randn(2, 4, SIZE)
    vectors[:, 3] = vectors[:, 0] + closeness * vectors[:, 3]
    vectors /= vectors.norm(dim=-1, keepdim=True)
    before = vectors.clone()
    make_orthonormal(vectors)
    make_orthonormal(vectors)
    identity = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    torch.testing.assert_close(vectors @ vectors.mT, identity, rtol=0, atol=1e-13)
    outside = before - (before @ vectors.mT) @ vectors
    assert float(outside.abs().max()) < 1e-9
