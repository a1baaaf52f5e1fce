"""Eigenpairs of Hessian and G, beside what other packages take for pairs as exact; see curvature_tasks.py.

``python -m tests.benchmarks.peer_table`` prints the same as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks.curvature_states import SETTINGS, TINY_SETTING, State, state
from tests.benchmarks.curvature_tasks import TASKS, Comparison, Gemm, RowBlocks, gemms, one_thread
from tests.benchmarks.curvature_training import TINY_TRAINING, TRAININGS, Training, compare
from tests.benchmarks.density_tasks import DensityComparison
from tests.benchmarks.peers import Found, missing
from tests.benchmarks.true_residuals import RESIDUAL, Exact, best_first

TINY = "tiny"
ROUNDS = 3
TINY_K = 3
HOUR = 3600


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take all states where benchmarks are measured, and a tiny one where they run once as tests."""
    enabled = metafunc.config.getoption("benchmark_enable")
    if "at" in metafunc.fixturenames:
        metafunc.parametrize("at", SETTINGS if enabled else [TINY], indirect=True)
    if "training" in metafunc.fixturenames:
        metafunc.parametrize("training", TRAININGS if enabled else [TINY], indirect=True)


@pytest.fixture
def at(request: pytest.FixtureRequest) -> State:
    """Return the state that the curvature is taken of."""
    return state(TINY_SETTING if request.param == TINY else SETTINGS[request.param])


@pytest.fixture
def training(request: pytest.FixtureRequest) -> Training:
    """Return the training that is recorded."""
    return TINY_TRAINING if request.param == TINY else TRAININGS[request.param]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _skip_without(*peers: str) -> None:
    reason = missing(*peers)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.timeout(HOUR)
@pytest.mark.parametrize("gemm", gemms())
@pytest.mark.parametrize("task", TASKS)
def test_eigenpairs(benchmark: BenchmarkFixture, task: str, at: State, gemm: Gemm) -> None:
    _skip_without(*TASKS[task].peers)
    asked = replace(TASKS[task], k=TINY_K) if benchmark.disabled else TASKS[task]
    comparison = Comparison(asked, at, gemm)
    found: Found = benchmark.pedantic(
        comparison.ours, setup=comparison.others, rounds=1 if benchmark.disabled else ROUNDS
    )
    facts = comparison.facts()
    benchmark.extra_info.update(facts)
    assert facts["hild-xr: true residual"] <= RESIDUAL
    if benchmark.disabled:
        _check_all_solvers(comparison, at)
        assert len(found.blocks) == len(asked.names(at))


def _check_all_solvers(comparison: Comparison, at: State) -> None:
    """Hold what every solver returned against the eigenvalues of the whole matrices."""
    exact, matrix = Exact(at), comparison.task.matrix
    for solver in ("hild-xr", *comparison.peers):
        for pairs in comparison.found(solver).blocks:
            whole = torch.linalg.eigvalsh(exact.matrix(matrix, pairs.names))
            best = best_first(whole)[: comparison.task.k]
            torch.testing.assert_close(pairs.eigenvalues.double(), best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gemm", gemms())
def test_row_blocks(benchmark: BenchmarkFixture, at: State, gemm: Gemm) -> None:
    """No peer solves rows at all: they are held against our own whole Hessian."""
    blocks = RowBlocks(at, 2 if benchmark.disabled else 5, gemm)
    benchmark.pedantic(blocks.ours, setup=blocks.others, rounds=1 if benchmark.disabled else ROUNDS)
    facts = blocks.facts()
    benchmark.extra_info.update(facts)
    assert facts["rows"] == sum(p.shape[0] for p in at.model.parameters() if p.ndim == 2)
    assert facts["hild-xr: true residual"] <= RESIDUAL


@pytest.mark.timeout(HOUR)
def test_recorded_training(benchmark: BenchmarkFixture, tmp_path: Path, training: Training) -> None:
    _skip_without("curvlinops")
    facts = benchmark.pedantic(compare, args=(training, tmp_path), rounds=1)
    benchmark.extra_info.update(facts)
    assert facts["curvlinops: records measured"] == training.peer_records
    assert facts["hild-xr: true residual"] <= RESIDUAL


@pytest.mark.timeout(HOUR)
@pytest.mark.parametrize("gemm", gemms())
def test_density(benchmark: BenchmarkFixture, at: State, gemm: Gemm) -> None:
    _skip_without("curvlinops", "hessian_eigenthings")
    small: dict[str, int] = {"steps": 12, "probes": 3} if benchmark.disabled else {}
    comparison = DensityComparison(at, gemm, **small)
    benchmark.pedantic(comparison.ours, setup=comparison.others, rounds=1 if benchmark.disabled else ROUNDS)
    facts = comparison.facts()
    benchmark.extra_info.update(facts)
    for solver in comparison.solvers:
        assert facts[f"{solver}: Wasserstein error"] < 0.1
