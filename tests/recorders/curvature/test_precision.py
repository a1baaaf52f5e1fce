"""Which float32 matrix products are taken: never less exact ones, unless they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, precision
from hild_xr.recorders.curvature.precision import (
    check_matrix_products,
    check_precision,
    chosen_products,
    matrix_products,
    product_precision,
)
from hild_xr.recorders.curvature.subspace import Subspace
from hild_xr.recorders.objective import Objective

needs_switch = pytest.mark.skipif(precision._switch() is None, reason="torch before 2.9 has no such switch")


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    precision._other_library_is_better.cache_clear()
    yield
    precision._other_library_is_better.cache_clear()


def setting() -> str:
    found: str = precision._switch().fp32_precision
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, *, better: bool) -> None:
    monkeypatch.setattr(precision, "other_library_is_better", lambda: better)


def test_fastest__is_as_exact_as_float32() -> None:
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    with matrix_products("fastest"), chosen_products():
        error = float((a @ b - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm())
    assert error < 2e-6


@needs_switch
@pytest.mark.parametrize("better", [True, False])
def test_fastest__is_taken_where_it_is_better_and_put_back(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, better=better)
    with pytest.raises(KeyError), matrix_products("fastest"), chosen_products():
        assert setting() == ("bf16" if better else "none")
        raise KeyError
    assert setting() == "none"
    with matrix_products("default"), chosen_products():
        assert setting() == "none"


@needs_switch
def test_highest__is_no_choice_against_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, better=True)
    try:
        torch.set_float32_matmul_precision("highest")
        before = setting()
        with matrix_products("fastest"), chosen_products():
            assert setting() == "bf16"
        assert setting() == before
    finally:
        precision._switch().fp32_precision = "none"


@needs_switch
def test_setting__of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, better=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        chosen = setting()
        with matrix_products("fastest"), chosen_products():
            assert setting() == chosen
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        precision._switch().fp32_precision = "none"


@needs_switch
def test_bfloat16__inside_the_fastest_is_taken_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, better=True)
    with matrix_products("fastest"), chosen_products():
        with product_precision("bfloat16"):
            assert torch.get_float32_matmul_precision() == "medium"
        assert setting() == "bf16"
    assert setting() == "none"
    assert torch.get_float32_matmul_precision() == "highest"


@needs_switch
def test_library__is_refused_that_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMX it really does; elsewhere a limit of no error at all stands for it."""
    monkeypatch.setattr(precision, "_AS_EXACT", 0.0)
    monkeypatch.setattr(precision, "_FASTER", torch.inf)
    assert not precision._other_library_is_better(1)


@needs_switch
@pytest.mark.parametrize(("faster", "taken"), [(torch.inf, True), (0.0, False)])
def test_library__is_refused_that_is_slower(
    faster: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_AS_EXACT", torch.inf)
    monkeypatch.setattr(precision, "_FASTER", faster)
    assert precision._other_library_is_better(1) == taken
    assert setting() == "none"


@needs_switch
def test_curvature__is_taken_by_the_faster_library_and_the_search_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, better=True)
    seen, searching = [], []
    orthogonalised = Subspace._orthogonalised

    def noted(self: Subspace, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        searching.append(setting())  # products of a matrix and a vector
        return orthogonalised(self, *args)

    monkeypatch.setattr(Subspace, "_orthogonalised", noted)

    class Seeing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(setting())
            return super().forward(x)

    model = Seeing(12, 2)
    objective = Objective(F.cross_entropy, torch.eye(12), torch.arange(12) % 2)
    for choice, expected in (("fastest", "bf16"), ("default", "none")):
        seen.clear()
        with Curvature(model, objective, matrix_products=choice) as curvature:
            assert setting() == "none"  # between the solves
            found = curvature.eigenpairs(1, dense_up_to=0)
        assert seen[-1] == expected
        assert set(searching) == {"none"}
        assert bool(found["weight"].converged.all())
    assert setting() == "none"


PROGRAM = """
import torch
from hild_xr.recorders.curvature import precision
torch.set_num_threads(1)
a, b = torch.randn(1024, 512), torch.randn(512, 256)
exact = a.double() @ b.double()
with precision.matrix_products("fastest"), precision.chosen_products():
    error = float((a @ b - exact).norm() / exact.norm())
print(precision._switch() is not None, error)
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "ALL"])
def test_fastest__is_float32_on_processors_of_all_kinds(isa: str) -> None:
    """MKL as on other makers' processors, oneDNN up to several instruction sets, of those there are here."""
    environment = os.environ | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": isa}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert float(output.split()[1]) < 2e-6


@pytest.mark.parametrize(
    ("check", "name", "message"),
    [
        (check_precision, "half", "precision must be one of 'full', 'bfloat16'; got 'half'"),
        (check_matrix_products, "mkl", "matrix_products must be one of 'fastest', 'default'; got 'mkl'"),
    ],
)
def test_unknown_name__is_refused(check: Callable[[str], None], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(name)
