"""The recurrence and the positive rule made of it, against closed forms and whole spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from hild_xr.recorders.curvature import NonFiniteCurvatureError
from hild_xr.recorders.curvature.quadrature import (
    Recurrence,
    lanczos_recurrence,
    quadrature,
    wasserstein,
)


def recurrence_of(eigenvalues: Tensor, steps: int, starts: Tensor | None = None) -> Recurrence:
    """Run on a diagonal matrix; by default from the vector that sees all eigenvalues alike."""
    p = len(eigenvalues)
    starts = torch.full((1, p), p**-0.5, dtype=eigenvalues.dtype) if starts is None else starts
    return lanczos_recurrence(lambda vectors, _: vectors * eigenvalues, starts, steps)


def semicircle(p: int) -> Tensor:
    """Eigenvalues at the quantiles of the semicircle law on (-1, 1)."""
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    cdf = 0.5 + (grid * (1 - grid**2).clamp(min=0).sqrt() + torch.asin(grid)) / torch.pi
    quantiles = (torch.arange(p, dtype=torch.float64) + 0.5) / p
    return grid[torch.searchsorted(cdf, quantiles)]


@given(
    eigenvalues=st.lists(st.floats(-10, 10), min_size=30, max_size=60),
    steps=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_quadrature__is_exact_for_the_moments_of_the_start_vectors_measure(
    eigenvalues: list[float], steps: int, seed: int
) -> None:
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    start = torch.randn(2, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start = start / start.norm(dim=1, keepdim=True)
    nodes, weights = quadrature(recurrence_of(values, steps, start), 4 * steps)
    assert bool((weights >= 0).all())
    size = values.abs().max().clamp(min=1e-300)
    for order in range(2 * steps):
        moments = (weights * (nodes / size) ** order).sum(1)
        exact = (start.square() * (values / size) ** order).sum(1)
        assert torch.allclose(moments, exact, atol=1e-7)


def test_recurrence__has_the_coefficients_of_the_semicircle() -> None:
    found = recurrence_of(semicircle(20_000), 12)
    assert found.diagonal.abs().max() < 1e-4
    assert torch.allclose(found.off_diagonal, torch.tensor(0.5, dtype=torch.float64), atol=1e-3)


def test_quadrature__spreads_a_smooth_density_better_than_the_gauss_rule() -> None:
    truth = semicircle(20_000)
    even = torch.full_like(truth, 1 / len(truth))[None]
    recurrence = recurrence_of(truth, 10)
    gauss = wasserstein(*quadrature(recurrence, 10), truth[None], even)
    continued = wasserstein(*quadrature(recurrence, 100), truth[None], even)
    assert float(gauss) > 0.02
    assert float(continued) < float(gauss) / 5


def test_quadrature__leaves_resolved_mass_where_it_is() -> None:
    spectrum = torch.cat([torch.full((900,), -2.0), torch.tensor([5.0, 9.0]), semicircle(98)]).double()
    nodes, weights = quadrature(recurrence_of(spectrum, 30), 120)
    for value, mass in ((5.0, 0.001), (9.0, 0.001), (-2.0, 0.9)):
        near = (nodes - value).abs() < 1e-3
        assert float(weights[near].sum()) == pytest.approx(mass, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrence__stops_where_the_space_is_exhausted(dtype: torch.dtype) -> None:
    eigenvalues = torch.tensor([3.0, -1.0, 0.5]).repeat_interleave(20).to(dtype)
    found = recurrence_of(eigenvalues, 10)
    assert found.length.tolist() == [3]
    assert found.exhausted.tolist() == [True]
    nodes, weights = quadrature(found, 40)
    assert float(weights.sum()) == pytest.approx(1)
    used = nodes[weights > 1e-12]
    assert all(min(abs(float(node) - value) for value in (3.0, -1.0, 0.5)) < 1e-5 for node in used)
    for value in (3.0, -1.0, 0.5):
        assert float(weights[(nodes - value).abs() < 1e-5].sum()) == pytest.approx(1 / 3, abs=1e-5)


def test_recurrence__exhausted_at_its_last_step_is_not_continued() -> None:
    assert recurrence_of(torch.tensor([1.0, 4.0]).double(), 2).exhausted.tolist() == [True]
    # What rounding left of the last coupling carries no weight away.
    diagonal, off_diagonal = torch.tensor([[[2.5, 2.5]], [[1.5, 1e-3]]]).double()
    ended = Recurrence(diagonal, off_diagonal, torch.tensor([2]), torch.tensor([True]))
    nodes, weights = quadrature(ended, 20)
    assert torch.allclose(nodes[weights > 1e-13], torch.tensor([1.0, 4.0]).double(), atol=1e-12)
    assert float(weights[(nodes - 1).abs() < 1e-9].sum()) == pytest.approx(0.5)


def test_recurrence__start_vectors_that_end_at_different_steps_do_not_disturb_each_other() -> None:
    eigenvalues = torch.linspace(-1, 2, 50, dtype=torch.float64)
    starts = torch.zeros(3, 50, dtype=torch.float64)
    starts[0, 7] = 1
    starts[1] = 50**-0.5
    starts[2, [1, 2]] = 0.5**0.5
    together = recurrence_of(eigenvalues, 8, starts)
    assert together.length.tolist() == [1, 8, 2]
    alone = recurrence_of(eigenvalues, 8, starts[1:2])
    assert torch.equal(together.diagonal[1], alone.diagonal[0])
    assert torch.equal(together.off_diagonal[1], alone.off_diagonal[0])


def test_quadrature__of_fewer_steps_is_that_of_a_shorter_run() -> None:
    eigenvalues = torch.linspace(-1, 2, 50, dtype=torch.float64)
    for steps in (1, 2, 5, 8):
        short = quadrature(recurrence_of(eigenvalues, steps), 20)
        cut = quadrature(recurrence_of(eigenvalues, 8), 20, steps)
        for one, other in zip(short, cut, strict=True):
            assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_recurrence__refuses_products_that_are_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteCurvatureError, match=r"fc\.weight"):
        lanczos_recurrence(lambda vectors, _: vectors * bad, torch.ones(1, 1), 3, "fc.weight")


def test_wasserstein__is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes, others = torch.randn(3, 20, generator=generator), torch.randn(3, 7, generator=generator)
    weights, other_weights = torch.rand(3, 20, generator=generator), torch.rand(3, 7, generator=generator)
    weights, other_weights = (
        weights / weights.sum(1, keepdim=True),
        other_weights / other_weights.sum(1, keepdim=True),
    )
    found = wasserstein(nodes, weights, others, other_weights)
    for n in range(3):
        exact = wasserstein_distance(nodes[n], others[n], weights[n], other_weights[n])
        assert float(found[n]) == pytest.approx(exact, abs=1e-5)
