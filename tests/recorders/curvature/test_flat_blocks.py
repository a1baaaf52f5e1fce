"""Modules and custom groups: their matrices against dense ones, from the passes that all blocks share."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature import Block, Curvature, MatrixKind, resolve_blocks
from hild_xr.recorders.curvature.operators import SecondMoment
from hild_xr.recorders.objective import Objective


def choices(case: Any) -> list[Any]:
    """Modules, and overlapping groups of those parameters that the case has."""
    groups = {"all": "*", "first": [next(iter(case.trainable))]}
    if any(".weight" in name for name in case.trainable):
        groups |= {"weights": "*.weight", "ends": [next(iter(case.trainable)), list(case.trainable)[-1]]}
    return ["module", groups]


def dense(case: Any, dense_matrices: Any, matrix: str, block: Block, regularised: bool) -> Tensor:
    hessian, gradients = dense_matrices(case.name)
    index = case.columns(block.parameters)
    if matrix == "hessian":
        ridge: Tensor = regularised * case.l2 * torch.eye(len(index), dtype=torch.float64)
        exact: Tensor = hessian[index][:, index] + ridge
        return exact
    g: Tensor = gradients[:, index] + regularised * case.l2 * case.flat()[index]
    return g.T @ g / len(g)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-12)


@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("regularised", [True, False])
def test_operator__equals_the_dense_matrix(
    case: Any, dense_matrices: Any, matrix: MatrixKind, batch_size: int | None, regularised: bool
) -> None:
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        for choice in choices(case):
            for operator in curvature.operators(resolve_blocks(case.model, choice), matrix, regularised):
                exact = dense(case, dense_matrices, matrix, operator.block, regularised)
                vectors = torch.randn(2, operator.size, dtype=torch.float64)
                close(operator.product(vectors, torch.tensor([0, 0])), vectors @ exact, 1e-10)
                if batch_size is None and operator.size < 200:
                    close(operator.matrix(torch.zeros(1, dtype=torch.int64))[0], exact, 1e-10)
                if matrix == "gmatrix":
                    trace = operator.trace()
                    assert trace is not None
                    close(trace[0], exact.trace(), 1e-10)


@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
@pytest.mark.parametrize("dense_up_to", [0, 10_000])
def test_eigenpairs__equal_dense_ones(
    case: Any, dense_matrices: Any, matrix: MatrixKind, dense_up_to: int
) -> None:
    with Curvature(case.model, case.objective()) as curvature:
        for choice in choices(case):
            blocks = [block for block in resolve_blocks(case.model, choice) if block.size >= 2]
            found = curvature.eigenpairs(2, matrix, blocks, tol=1e-6, dense_up_to=dense_up_to)
            assert list(found) == [block.label for block in blocks]
            for label, spectrum in found.items():
                exact = dense(case, dense_matrices, matrix, spectrum.block, matrix == "hessian")
                expected = torch.linalg.eigvalsh(exact)
                expected = expected[expected.abs().argsort(descending=True)][:2]
                scale = max(float(expected.abs().max()), 1e-6)
                difference = spectrum.eigenvalues.abs() - expected.abs()
                assert float(difference.abs().max()) <= 1e-8 * scale, label
                assert spectrum.eigenvectors.shape == (2, spectrum.block.size)
                assert bool(spectrum.converged.all())
                assert (spectrum.path == "dense") == (spectrum.block.size <= max(dense_up_to, 8))


@pytest.mark.parametrize("matrix", get_args(MatrixKind))
@pytest.mark.parametrize("batch_size", [None, 6])
def test_every_matrix__has_the_blocks_of_the_whole_one(
    get_case: Any, matrix: MatrixKind, batch_size: int | None
) -> None:
    case = get_case("mlp-tanh")
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        first = torch.zeros(1, dtype=torch.int64)
        (model,) = curvature.operators(resolve_blocks(case.model, "model"), matrix)
        whole = model.matrix(first)[0]
        for choice in ("module", {"a": ["0.bias", "4.weight"], "b": "*.bias"}):
            for operator in curvature.operators(resolve_blocks(case.model, choice), matrix):
                index = case.columns(operator.block.parameters)
                close(operator.matrix(first)[0], whole[index][:, index], 1e-10)


def test_gmatrix_of_few_samples__takes_the_gram_path(get_case: Any, dense_matrices: Any) -> None:
    for name in ("mlp-tanh", "cnn", "attention"):
        case = get_case(name)
        with Curvature(case.model, case.objective()) as curvature:
            found = curvature.eigenpairs(3, "gmatrix", {"all": "*"}, dense_up_to=0, tol=1e-6)["all"]
        assert found.path == "gram"
        exact = torch.linalg.eigvalsh(dense(case, dense_matrices, "gmatrix", found.block, False))
        close(found.eigenvalues, exact.flip(0)[:3], 1e-8)


def test_gmatrix_that_does_not_fit__is_streamed_and_the_same(get_case: Any, dense_matrices: Any) -> None:
    case = get_case("cnn")
    with Curvature(case.model, case.objective(), max_bytes=1000) as curvature:
        blocks = resolve_blocks(case.model, {"all": "*", "head": "5.*"})
        for operator in curvature.operators(blocks, "gmatrix"):
            # only the head is a linear layer, whose factors do without the gradients
            assert isinstance(operator, SecondMoment) == (operator.block.label == "head")
            vector = torch.randn(1, operator.size, dtype=torch.float64)
            exact = dense(case, dense_matrices, "gmatrix", operator.block, False)
            close(operator.product(vector, torch.zeros(1, dtype=torch.int64)), vector @ exact, 1e-10)


class Counted(nn.Module):
    """An MLP with a layer of no closed form, that counts how often it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(inputs)
        return out


def test_all_blocks_and_matrices_of_a_record__share_one_forward_pass() -> None:
    torch.manual_seed(0)
    model = Counted()
    objective = Objective(F.cross_entropy, torch.randn(40, 4), torch.arange(40) % 3)
    groups = {"norm and head": ["inner.2.*", "inner.3.*"], "all": "*"}
    with Curvature(model, objective, dense_up_to=0) as curvature:
        entered = model.calls
        curvature.eigenpairs(2, "hessian", "module")
        curvature.eigenpairs(2, "hessian", groups)
        curvature.cross_singular(1, "inner.0.*", "inner.3.*")
        assert model.calls == entered
        curvature.eigenpairs(2, "gmatrix", "module")
        after = model.calls
        curvature.eigenpairs(2, "gmatrix", groups)
        curvature.cross_singular(1, "inner.0.*", "inner.3.*", "gmatrix")
        curvature.coupling("inner.0.*", "inner.2.*", "gmatrix")
        assert model.calls == after


def test_module_of_a_tied_weight__has_the_curvature_of_all_its_uses(
    get_case: Any, dense_matrices: Any
) -> None:
    case = get_case("attention")
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.eigenpairs(3, blocks="module", layers=["embedding"], dense_up_to=500, tol=1e-8)
    exact = dense(case, dense_matrices, "hessian", found["embedding"].block, True)
    expected = torch.linalg.eigvalsh(exact)
    expected = expected[expected.abs().argsort(descending=True)][:3]
    close(found["embedding"].eigenvalues, expected, 1e-9)
