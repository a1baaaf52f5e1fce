"""How many pairs are certain: against what searches really miss."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from hild_xr.recorders.curvature.certainty import CONFIDENCE, certain_pairs
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.pairs import Eigenpairs, Which, dense_eigenpairs


def _solved(diagonal: Tensor, k: int, **options: object) -> Eigenpairs:
    return lanczos_eigenpairs(
        lambda vectors, _: vectors * diagonal,
        len(diagonal),
        k,
        dtype=diagonal.dtype,
        **options,
    )


def _bulk(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def test_errors__take_certainty_from_pairs_near_the_rest() -> None:
    found = torch.tensor([[50.0, 40.0, 2.6, 1.1, 1.0]], dtype=torch.float64)
    scale = torch.tensor([50.0], dtype=torch.float64)
    counts = [
        int(certain_pairs(found, 4, "magnitude", scale, 1000, 8, torch.tensor([errors])))
        for errors in (0.0, 1.2, 38.9, 48.9)
    ]
    assert counts == [3, 2, 1, 0]


def test_outliers__are_certain_where_they_stand_apart_and_the_bulk_is_not() -> None:
    outliers = torch.tensor([9.0, -8.0, 7.0, 6.0], dtype=torch.float64)
    pairs = _solved(torch.cat([outliers, _bulk(2000)]), 6)
    assert pairs.n_certain.tolist() == [4]


@pytest.mark.parametrize(
    ("which", "expected"), [("magnitude", 6), ("largest", 6), ("smallest", 6), ("both", 6)]
)
def test_pairs__are_certain_at_the_end_that_is_asked_for(which: Which, expected: int) -> None:
    outliers = 60.0 + torch.arange(9, dtype=torch.float64)
    diagonal = torch.cat([outliers, -outliers, _bulk(500)])
    pairs = _solved(diagonal, 6, which=which)
    assert pairs.n_certain.tolist() == [0]  # nine stand together at each end: the next is as large
    few = torch.cat([outliers[:3], -outliers[:3], _bulk(500)])
    k = {"magnitude": 6, "both": 6}.get(which, 3)
    assert _solved(few, k, which=which).n_certain.tolist() == [min(expected, k)]


def test_dense_solve__is_certain_of_all() -> None:
    matrix = torch.diag(torch.arange(5.0)).expand(3, 5, 5)
    assert dense_eigenpairs(matrix, 4).n_certain.tolist() == [4, 4, 4]


def test_all_pairs_of_a_matrix__are_certain() -> None:
    assert _solved(_bulk(5), 5).n_certain.tolist() == [5]


def test_start_and_short_budget__are_certain_of_none() -> None:
    diagonal = torch.cat([torch.tensor([90.0, 80.0], dtype=torch.float64), _bulk(300)])
    found = _solved(diagonal, 2)
    assert found.n_certain.tolist() == [2]
    assert _solved(diagonal, 2, start=found.eigenvectors).n_certain.tolist() == [0]
    assert _solved(diagonal, 2, max_matvec=5).n_certain.tolist() == [0]
    assert _solved(diagonal, 2, max_seconds=0.0).n_certain.tolist() == [0]


def test_zero_matrix__does_not_fail() -> None:
    assert 0 <= int(_solved(torch.zeros(60, dtype=torch.float64), 2).n_certain) <= 2


def test_count__grows_with_steps_and_falls_with_size() -> None:
    found = torch.tensor([[50.0, 20.0, 8.0, 3.0, 1.3, 1.0]], dtype=torch.float64)
    scale = torch.tensor([50.0])
    by_steps = [int(certain_pairs(found, 5, "magnitude", scale, 1000, steps)) for steps in (2, 4, 8, 16, 40)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] == 0
    assert by_steps[-1] == 5
    by_size = [int(certain_pairs(found, 5, "magnitude", scale, size, 6)) for size in (10, 10**4, 10**8)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[0] > by_size[-1]


@pytest.mark.parametrize("which", get_args(Which))
def test_bound__holds_for_the_probe_that_it_speaks_of(which: Which) -> None:
    """A hidden eigenvalue just larger than a certain pair is seen by at least 99 of 100 probes."""
    size, steps, trials = 400, 6, 600
    bulk = torch.linspace(-1, 1, size - 1, dtype=torch.float64)
    mus = torch.linspace(1.01, 40, 4000, dtype=torch.float64)
    sign = -1.0 if which == "smallest" else 1.0
    last = torch.full((len(mus),), sign, dtype=torch.float64)
    columns = [sign * mus, -sign, sign] if which == "both" else [sign * mus, sign]
    found = torch.stack([c if isinstance(c, Tensor) else c * last * sign for c in columns], dim=1)
    scale = torch.ones(len(mus), dtype=torch.float64)
    certain = certain_pairs(found, 1, which, scale, size, steps) == 1
    smallest = float(mus[certain][0])
    assert not bool(certain[: int(certain.int().argmax())].any())
    diagonal = torch.cat([bulk, torch.tensor([sign * smallest])])
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(trials, size, generator=generator, dtype=torch.float64)
    seen = sum(_largest_ritz_value(sign * diagonal, w, steps) > 1 for w in vectors)
    assert seen >= CONFIDENCE * trials


def _largest_ritz_value(diagonal: Tensor, start: Tensor, steps: int) -> float:
    krylov = [start / start.norm()]
    for _ in range(steps - 1):
        krylov.append(diagonal * krylov[-1])
    basis = torch.linalg.qr(torch.stack([v / v.norm() for v in krylov], dim=1))[0]
    return float(torch.linalg.eigvalsh(basis.T @ (diagonal[:, None] * basis))[-1])


def test_certain_pairs__are_never_missed_where_others_are() -> None:
    """Spectra whose smallest outliers are double, and too short probes, so that pairs are really missed."""
    missed = certain_in_all = 0
    for seed in range(120):
        draw = torch.Generator().manual_seed(seed)
        levels = torch.exp(4 * torch.rand(6, generator=draw, dtype=torch.float64))
        diagonal = torch.cat([levels, levels.sort().values[:2], 0.3 * _bulk(600)])
        pairs = _solved(diagonal, 6, guard=0, probe_steps=3, seed=seed)
        true = diagonal.sort(descending=True).values[:6]
        agree = (pairs.eigenvalues[0] - true).abs() <= 1e-3 * true
        leading = int(agree.long().cumprod(0).sum())
        certain = int(pairs.n_certain)
        missed += leading < 6
        certain_in_all += certain
        assert leading >= certain, (seed, leading, certain)
    assert missed >= 10
    assert certain_in_all >= 20
