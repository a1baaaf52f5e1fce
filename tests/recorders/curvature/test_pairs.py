"""What an eigensolver returns, and the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.pairs import Which, dense_eigenpairs, ranking

KINDS: tuple[Which, ...] = ("magnitude", "largest", "smallest", "both")
VALUES = torch.arange(-20.0, 0.0, dtype=torch.float64)


def planted(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    matrix: Tensor = (basis * VALUES) @ basis.T
    return matrix.to(dtype)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_ranking__of_both_ends_is_a_permutation_that_takes_them_in_turn(n: int) -> None:
    values = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    ranked = values[ranking(values, "both")].tolist()
    ends = [n - 1 - i // 2 if i % 2 == 0 else i // 2 for i in range(n)]
    assert ranked == ends


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense__solves_a_batch(which: Which, dtype: torch.dtype) -> None:
    matrices = torch.stack([planted(dtype), torch.zeros(20, 20, dtype=dtype)])
    pairs = dense_eigenpairs(matrices[:, None], 3, which=which)
    assert pairs.eigenvalues.shape == (2, 1, 3)
    assert pairs.eigenvectors.shape == (2, 1, 3, 20)
    assert pairs.eigenvectors.dtype == dtype
    expected = VALUES[ranking(VALUES, which)[:3]]
    torch.testing.assert_close(pairs.eigenvalues[0, 0], expected, rtol=0, atol=1e-4)
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
