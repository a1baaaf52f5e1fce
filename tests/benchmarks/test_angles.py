"""Principal angles beside a loop over ``scipy.linalg.subspace_angles``, on the same thread.

At the size of a recorded run: 200 steps, 10 eigenvectors, 20,000 parameters.
The subspaces either move a good deal from record to record, as early in
training, or lie within 1e-3 rad of each other, as late in training, where
every angle has to come from sines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from pytest_benchmark.fixture import BenchmarkFixture

from hild_xr.analysis import angles_to_reference, consecutive_angles, pairwise_angles
from hild_xr.analysis.subspaces.bases import FloatArray

LAYER = {"vector_dims": ["param"], "number_dim": "eig"}
MOVING, SETTLED = 0.3, 1e-4

drifts = pytest.mark.parametrize("drift", [MOVING, SETTLED], ids=["moving", "settled"])


def recorded(drift: float, steps: int, k: int, p: int) -> xr.DataArray:
    """Orthonormal eigenvectors on a random walk; each step turns them by about the drift."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((p, k)))[0]
    rows = np.empty((steps, k, p))
    for row in rows:
        row[:] = U.T
        U = np.linalg.qr(U + drift / np.sqrt(p) * rng.standard_normal((p, k)))[0]
    return xr.DataArray(
        rows, dims=("step", "eig", "param"), coords={"step": 10 * np.arange(steps)}, attrs=LAYER
    )


def subject(benchmark: BenchmarkFixture, drift: float) -> xr.DataArray:
    """Full size under ``make bench``, a small one where benchmarks run once as tests."""
    return recorded(drift, 12, 4, 500) if benchmark.disabled else recorded(drift, 200, 10, 20_000)


def scipy_angles(u: xr.DataArray, pairs: Iterator[tuple[int, int]]) -> FloatArray:
    """Angles pair by pair, the way they are computed without this package."""
    values = u.values
    return np.array([scipy.linalg.subspace_angles(values[s].T, values[t].T)[::-1] for s, t in pairs])


def fastest(function: Callable[[], object], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def compared(benchmark: BenchmarkFixture, seconds: dict[str, float], at_least: float) -> None:
    """Write how many times faster this package is than each other way, and check the one that is promised."""
    if benchmark.stats is None:  # benchmarks run once as tests
        return
    mine = benchmark.stats.stats.min
    for name, other in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = other
        benchmark.extra_info[f"times faster than {name}"] = other / mine
    assert seconds["scipy"] / mine > at_least


@drifts
def test_angles_to_reference(benchmark: BenchmarkFixture, drift: float) -> None:
    u = subject(benchmark, drift)
    found = benchmark.pedantic(angles_to_reference, args=(u, 0), rounds=5, warmup_rounds=1)
    n = u.sizes["step"]
    expected = scipy_angles(u, ((s, 0) for s in range(n)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    rows = u.values
    seconds = {
        "scipy": fastest(lambda: scipy_angles(u, ((s, 0) for s in range(n))), 2),
        "the Gram matrices": fastest(lambda: rows @ rows.swapaxes(1, 2)),
        "the products with the reference": fastest(lambda: rows[0] @ rows.reshape(-1, rows.shape[-1]).T),
        "one pass over the data": fastest(rows.sum),
    }
    compared(benchmark, seconds, at_least=5)


@drifts
def test_consecutive_angles(benchmark: BenchmarkFixture, drift: float) -> None:
    u = subject(benchmark, drift)
    found = benchmark.pedantic(consecutive_angles, args=(u,), rounds=5, warmup_rounds=1)
    pairs = [(s, s - 1) for s in range(1, u.sizes["step"])]
    np.testing.assert_allclose(found, scipy_angles(u, iter(pairs)), rtol=0, atol=1e-12)
    compared(benchmark, {"scipy": fastest(lambda: scipy_angles(u, iter(pairs)), 2)}, at_least=1)


@drifts
def test_pairwise_angles(benchmark: BenchmarkFixture, drift: float) -> None:
    u = subject(benchmark, drift)
    found = benchmark.pedantic(pairwise_angles, args=(u,), rounds=2 if drift == MOVING else 1)
    n = u.sizes["step"]
    # all 40,000 pairs would take scipy several minutes: the time of a sample is scaled
    sample = list(zip(*np.random.default_rng(1).integers(0, n, (2, 100)), strict=True))
    s, t = np.array(sample).T
    np.testing.assert_allclose(found.values[s, t], scipy_angles(u, iter(sample)), rtol=0, atol=1e-12)
    rows = u.values.reshape(-1, u.sizes["param"])
    others = rows.copy()  # BLAS would compute half of the product of an array with itself
    seconds = {
        "scipy": fastest(lambda: scipy_angles(u, iter(sample)), 2) * n**2 / len(sample),
        "one matrix product": fastest(lambda: rows @ others.T, 1),
    }
    compared(benchmark, seconds, at_least=50 if drift == MOVING else 30)
