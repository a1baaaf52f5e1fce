"""Which float32 matrix products are taken: never less exact ones, unless they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, precision
from hild_xr.recorders.curvature.linear_chain import LinearChain
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
    multiplying, searching = [], []
    multiplied, orthogonalised = LinearChain.multiply, Subspace._orthogonalised

    def noted_product(self: LinearChain, *args: Any) -> None:
        multiplying.append(setting())
        multiplied(self, *args)

    def noted_search(self: Subspace, *args: Any) -> Any:
        searching.append(setting())  # products of a matrix and a vector
        return orthogonalised(self, *args)

    monkeypatch.setattr(LinearChain, "multiply", noted_product)
    monkeypatch.setattr(Subspace, "_orthogonalised", noted_search)

    class Asking(nn.Linear):
        """Asks what torch does not tell while another library is chosen."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.get_float32_matmul_precision() == "highest"
            return super().forward(x)

    model = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Sequential(Asking(4, 4), nn.Linear(4, 2)))
    for batch_size in (None, 5):
        objective = Objective(F.cross_entropy, torch.eye(12), torch.arange(12) % 2, batch_size=batch_size)
        for choice, expected in (("fastest", "bf16"), ("default", "none")):
            multiplying.clear()
            with Curvature(model, objective, matrix_products=choice) as curvature:
                found = curvature.eigenpairs(1, layers=["0.weight", "2.1.weight"], dense_up_to=0)
            assert set(multiplying) == {expected}
            assert set(searching) == {"none"}
            assert all(bool(pairs.converged.all()) for pairs in found.values())
    assert setting() == "none"


@needs_switch
@pytest.mark.parametrize("first", ["fast", "rounded"])
def test_settings__of_two_threads_leave_nothing_behind(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One enters after the other and leaves after it."""
    pretend(monkeypatch, better=True)
    contexts = {
        "fast": lambda: precision._SETTING.held("fast"),
        "rounded": lambda: product_precision("bfloat16"),
    }
    outer, inner = contexts[first](), contexts["rounded" if first == "fast" else "fast"]()
    outer.__enter__()
    with ThreadPoolExecutor(1) as other:
        other.submit(inner.__enter__).result()
        assert torch.get_float32_matmul_precision() == "medium"
        outer.__exit__(None, None, None)
        if first == "fast":
            assert torch.get_float32_matmul_precision() == "medium"
        else:
            assert setting() == "bf16"
        other.submit(inner.__exit__, None, None, None).result()
    assert setting() == "none"
    assert torch.get_float32_matmul_precision() == "highest"


@needs_switch
def test_setting__that_follows_the_one_above_it_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, better=True)
    above: Any = torch.backends
    try:
        above.fp32_precision = "ieee"
        with matrix_products("fastest"), chosen_products():
            assert setting() == "bf16"
        above.fp32_precision = "tf32"
        assert setting() == "tf32"
        with matrix_products("fastest"), chosen_products():
            assert setting() == "tf32"
    finally:
        above.fp32_precision = "none"
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
        (
            check_matrix_products,
            "mkl",
            "matrix_products must be one of 'fastest', 'full', 'default'; got 'mkl'",
        ),
    ],
)
def test_unknown_name__is_refused(check: Callable[[str], None], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(name)
