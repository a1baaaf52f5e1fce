"""What a residual says of an eigenpair: the evidence on which a tolerance is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.objective import Objective

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
K = 6


class Evidence:
    """Errors of converged pairs of a trained network's Hessian, solved at ever smaller tolerances."""

    def __init__(self) -> None:
        model, objective = _trained()
        with Curvature(model, objective) as curvature:
            whole = curvature.eigenpairs(K + 4, blocks="model", dense_up_to=10_000, matrix_up_to=10_000)
            exact = whole["model"]
            assert exact.matrix is not None
            eigenvalues, columns = torch.linalg.eigh(exact.matrix)
            rows: list[tuple[float, float, float, float]] = []
            for tol in TOLERANCES:
                for seed in range(3):
                    found = curvature.eigenpairs(K, blocks="model", dense_up_to=0, tol=tol, seed=seed)
                    pairs = found["model"]
                    assert pairs.path == "lanczos"
                    for i in pairs.converged.nonzero()[:, 0].tolist():
                        pair = (float(pairs.eigenvalues[i]), pairs.eigenvectors[i])
                        rows.append(_errors(*pair, exact.matrix, eigenvalues, columns))
        self.residual, self.gap, self.eigenvalue_error, self.sine = np.array(rows).T
        self.scale = float(eigenvalues.abs().max())


def _trained() -> tuple[nn.Module, Objective]:
    generator = torch.Generator().manual_seed(4)
    centres = 2 * torch.randn(4, 12, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (200,), generator=generator)
    inputs = centres[targets] + torch.randn(200, 12, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, Objective(nn.functional.cross_entropy, inputs, targets)


def _errors(
    value: float, vector: Tensor, matrix: Tensor, eigenvalues: Tensor, columns: Tensor
) -> tuple[float, float, float, float]:
    """Return residual norm, gap to the rest of the spectrum, error of the value, sine of the angle."""
    nearest = int((eigenvalues - value).abs().argmin())
    rest = torch.cat([eigenvalues[:nearest], eigenvalues[nearest + 1 :]])
    residual = float((matrix @ vector - value * vector).norm())
    exact = columns[:, nearest]
    sine = float((vector - exact * (exact @ vector)).norm())
    gap = float((rest - value).abs().min())
    return residual, gap, abs(value - float(eigenvalues[nearest])), sine


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence()


def test_evidence__spans_four_decades_of_residuals(evidence: Evidence) -> None:
    assert evidence.residual.max() / evidence.residual.min() > 1e4
    assert len(evidence.residual) >= len(TOLERANCES) * 3 * K * 0.9


def test_eigenvalue_error__is_at_most_the_squared_residual_over_the_gap(evidence: Evidence) -> None:
    apart = evidence.residual < evidence.gap  # where the bound says anything
    bound = evidence.residual**2 / evidence.gap + 1e-13 * evidence.scale
    assert apart.mean() > 0.8
    assert (evidence.eigenvalue_error[apart] <= bound[apart]).all()


def test_angle__is_at_most_the_residual_over_the_gap(evidence: Evidence) -> None:
    apart = evidence.residual < evidence.gap
    assert (evidence.sine[apart] <= evidence.residual[apart] / evidence.gap[apart] + 1e-12).all()


@pytest.mark.parametrize(("error", "power"), [("eigenvalue_error", 2.0), ("sine", 1.0)])
def test_errors__fall_with_the_residual_as_stated(evidence: Evidence, error: str, power: float) -> None:
    errors = getattr(evidence, error)
    by_gap = evidence.residual / evidence.gap
    used = (by_gap < 0.3) & (errors > 1e-12 * evidence.scale)
    slope = np.polyfit(np.log(by_gap[used]), np.log((errors / evidence.gap ** (power - 1))[used]), 1)[0]
    assert slope == pytest.approx(power, abs=0.15)


def test_default_tolerance__gives_four_digits_of_eigenvalues(evidence: Evidence) -> None:
    """At a residual of 1e-3 of the eigenvalue, pairs that stand a tenth of it apart."""
    at_default = (evidence.residual < 1e-3 * evidence.scale) & (evidence.gap > 0.1 * evidence.scale)
    assert at_default.sum() > 10
    assert (evidence.eigenvalue_error[at_default] < 1e-5 * evidence.scale).all()
    assert (evidence.sine[at_default] < 1e-2).all()
