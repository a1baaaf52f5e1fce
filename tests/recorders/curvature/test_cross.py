"""Blocks beside the diagonal against dense matrices, closed forms and SciPy."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from hild_xr.recorders.curvature import Block, Curvature, MatrixKind, NonFiniteCurvatureError, resolve_blocks
from hild_xr.recorders.curvature.block_parts import BlockPart, PartChoice, resolve_part, union
from hild_xr.recorders.curvature.cross_operators import (
    CrossOfUnion,
    CrossOperator,
    CrossSecondMoment,
    NetworkCrossHessian,
)
from hild_xr.recorders.curvature.cross_spectrum import CrossSpectrum, singular_triplets
from hild_xr.recorders.objective import Objective

FIRST = torch.zeros(1, dtype=torch.int64)

PAIRS: list[tuple[str, PartChoice, PartChoice]] = [
    ("mlp-tanh", "0.weight", "2.weight"),
    ("mlp-tanh", "4.*", ["0.bias", "2.weight"]),  # the second interleaved with the first
    ("mlp-tanh", ["0.weight", "4.weight"], ["2.weight", "4.bias"]),
    ("mlp-relu", ("0.weight", 1), ("0.weight", 4)),  # two neurons of one layer
    ("mlp-relu", ("2.weight", 0), "2.bias"),
    ("cnn", "0.*", "5.weight"),
    ("cnn", ("0.weight", 2), "1.*"),
    ("attention", "embedding.weight", "layers.1.*"),
    ("attention", ("embedding.weight", 3), ("layers.0.linear1.weight", 2)),
    ("gmm", ("weight", 0), ("weight", 2)),
    ("xor", "v", ("W", 1)),
    ("frozen", "0.weight", "2.*"),
]
pairs = pytest.mark.parametrize(("name", "a", "b"), PAIRS)
both = pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])


def columns(case: Any, part: BlockPart) -> Tensor:
    found: Tensor = case.columns(part.block.parameters)
    return found if part.row is None else found.reshape(-1, part.size)[part.row]


def dense(case: Any, matrices: Any, matrix: str, *, regularised: bool = False) -> Tensor:
    """Return the whole matrix, over all trainable parameters."""
    hessian, gradients = matrices(case.name)
    if matrix == "hessian":
        ridge: Tensor = hessian + regularised * case.l2 * torch.eye(len(hessian), dtype=torch.float64)
        return ridge
    g = gradients + regularised * case.l2 * case.flat()
    exact: Tensor = g.T @ g / len(g)
    return exact


def close(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), floor)


@pairs
@both
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("regularised", [True, False])
def test_operator__equals_the_dense_matrix(
    get_case: Any,
    dense_matrices: Any,
    name: str,
    a: PartChoice,
    b: PartChoice,
    matrix: MatrixKind,
    batch_size: int | None,
    regularised: bool,
) -> None:
    case = get_case(name)
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        operator = curvature.cross_operator(a, b, matrix, regularised)
        whole = dense(case, dense_matrices, matrix, regularised=regularised)
        exact = whole[columns(case, operator.a)][:, columns(case, operator.b)]
        assert operator.shape == exact.shape
        right = torch.randn(3, exact.shape[1], dtype=torch.float64)
        left = torch.randn(2, exact.shape[0], dtype=torch.float64)
        close(operator.product(right), right @ exact.T, 1e-10)
        close(operator.adjoint_product(left), left @ exact, 1e-10)
        if min(operator.shape) < 50:
            close(operator.matrix(), exact, 1e-10)
    kind = NetworkCrossHessian if matrix == "hessian" else CrossSecondMoment
    assert isinstance(operator, kind)


@pytest.mark.parametrize("matrix", get_args(MatrixKind))
@pytest.mark.parametrize(("a", "b"), [("0.*", ["2.bias", "4.weight"]), (("2.weight", 1), "0.weight")])
@pytest.mark.parametrize("regularised", [True, False])
def test_every_matrix__has_the_blocks_of_the_whole_one(
    get_case: Any, a: PartChoice, b: PartChoice, matrix: MatrixKind, regularised: bool
) -> None:
    case = get_case("mlp-relu")
    with Curvature(case.model, case.objective(), max_bytes=2**24) as curvature:
        (model,) = curvature.operators(resolve_blocks(case.model, "model"), matrix, regularised)
        whole = model.matrix(FIRST)[0]
        operator = curvature.cross_operator(a, b, matrix, regularised)
        rows, cols = columns(case, operator.a), columns(case, operator.b)
        close(operator.matrix(), whole[rows][:, cols], 1e-10)
        norms = [float(whole[i][:, j].norm()) for i, j in ((rows, cols), (rows, rows), (cols, cols))]
        expected = norms[0] / math.sqrt(norms[1] * norms[2])
        assert curvature.coupling(a, b, matrix, regularised) == pytest.approx(expected, rel=1e-9)
        if matrix != "hessian":
            assert expected <= 1 + 1e-9


@pytest.mark.parametrize("max_bytes", [1000, 2**30])
def test_gmatrix_beyond_the_memory__is_cut_out_of_the_union(
    get_case: Any, dense_matrices: Any, max_bytes: int
) -> None:
    case = get_case("cnn")
    whole = dense(case, dense_matrices, "gmatrix")
    with Curvature(case.model, case.objective(), max_bytes=max_bytes) as curvature:
        operator = curvature.cross_operator(["0.weight", "1.bias"], ("5.weight", 2), "gmatrix")
        assert isinstance(operator, CrossOfUnion) == (max_bytes == 1000)
        exact = whole[columns(case, operator.a)][:, columns(case, operator.b)]
        vectors = torch.randn(2, exact.shape[1], dtype=torch.float64)
        close(operator.product(vectors), vectors @ exact.T, 1e-10)
        vectors = torch.randn(2, exact.shape[0], dtype=torch.float64)
        close(operator.adjoint_product(vectors), vectors @ exact, 1e-10)


@pairs
@both
@pytest.mark.parametrize("dense_up_to", [0, 10_000])
def test_singular_triplets__equal_those_of_the_dense_matrix(
    get_case: Any,
    dense_matrices: Any,
    name: str,
    a: PartChoice,
    b: PartChoice,
    matrix: MatrixKind,
    dense_up_to: int,
) -> None:
    case = get_case(name)
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.cross_singular(2, a, b, matrix, tol=1e-6, dense_up_to=dense_up_to)
    exact = dense(case, dense_matrices, matrix)[columns(case, found.a)][:, columns(case, found.b)]
    close(found.singular_values, torch.linalg.svdvals(exact)[:2], 1e-8)
    assert bool(found.converged.all())
    check_true_residuals(found, exact, 1e-6)
    assert (found.path == "dense") == (min(exact.shape) <= max(dense_up_to, 8))
    assert (found.n_matvec == 0) == (found.path == "dense")


def check_true_residuals(found: CrossSpectrum, exact: Tensor, tol: float) -> None:
    """Check orthonormality, and that no residual is larger than the one stated, within rounding."""
    k = len(found.singular_values)
    left, right = (side.double().reshape(k, -1) for side in (found.left, found.right))
    identity = torch.eye(k, dtype=torch.float64)
    for side in (left, right):
        assert float((side @ side.T - identity).abs().max()) <= 1e-5
    errors = [right @ exact.T - found.singular_values[:, None] * left]
    errors += [left @ exact - found.singular_values[:, None] * right]
    norms = (sum(error.square().sum(1) for error in errors) / 2) ** 0.5
    scale = torch.maximum(found.singular_values, 1e-3 * found.singular_values.max())
    true = torch.where(norms == 0, 0.0, norms / scale)
    rounding = 1e-5 if found.left.dtype == torch.float32 else 1e-9
    assert bool((true <= found.residuals + rounding / scale.clamp(min=1e-30) * exact.norm()).all())
    assert torch.equal(found.converged, found.residuals <= tol)


def test_vectors__lie_on_the_dims_of_the_weights(get_case: Any) -> None:
    case = get_case("cnn")
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.cross_singular(2, "0.weight", ("5.weight", 1))
        flat = curvature.cross_singular(2, "1.*", "5.weight")
    assert (found.left.shape, found.right.shape) == ((2, 4, 1, 3, 3), (2, 36))
    assert (found.a.label, found.b.label) == ("0.weight", "5.weight[1]")
    assert (flat.left.shape, flat.right.shape) == ((2, 8), (2, 3, 36))


def test_float32__agrees_with_float64(get_case: Any, dense_matrices: Any) -> None:
    for name, a, b in PAIRS[:3]:
        case = get_case(name)
        single = case.to(torch.float32)
        for matrix in ("hessian", "gmatrix"):
            with Curvature(single.model, single.objective()) as curvature:
                found = curvature.cross_singular(2, a, b, matrix, tol=1e-4, dense_up_to=0)
            exact = dense(case, dense_matrices, matrix)[columns(case, found.a)][:, columns(case, found.b)]
            assert found.left.dtype == torch.float32
            close(found.singular_values, torch.linalg.svdvals(exact)[:2], 1e-5)
            assert bool(found.converged.all())


def test_singular_values__agree_with_scipy(get_case: Any) -> None:
    case = get_case("attention")
    with Curvature(case.model, case.objective()) as curvature:
        operator = curvature.cross_operator("layers.0.*", "layers.1.*")

        def times(product: Any) -> Any:
            return lambda v: product(torch.from_numpy(v.reshape(1, -1).copy()))[0].numpy()

        peer = LinearOperator(
            operator.shape,
            matvec=times(operator.product),
            rmatvec=times(operator.adjoint_product),
            dtype="float64",
        )
        expected: Any = svds(peer, k=4, return_singular_vectors=False, tol=1e-12)
        found = singular_triplets(operator, 4, tol=1e-6)
    assert found.path == "lanczos"
    close(found.singular_values, torch.tensor(expected[::-1].copy()), 1e-9)


def test_gaussian_mixture__has_the_closed_form_of_two_classes(get_case: Any) -> None:
    """H_ab = mean of -phi_a phi_b Y Y^T, G_ab = mean of (phi_a - y_a)(phi_b - y_b) Y Y^T (science.md, A3)."""
    case = get_case("gmm")
    phi = (case.inputs @ case.model.weight.detach().T).softmax(1)
    error = phi - F.one_hot(case.targets, 3)
    weights = {"hessian": -phi[:, 0] * phi[:, 2], "gmatrix": error[:, 0] * error[:, 2]}
    with Curvature(case.model, case.objective()) as curvature:
        for matrix, weight in weights.items():
            exact = (case.inputs * weight[:, None]).T @ case.inputs / len(case.inputs)
            close(curvature.cross_operator(("weight", 0), ("weight", 2), matrix).matrix(), exact, 1e-12)


def test_xor__has_the_closed_form_of_both_layers(get_case: Any) -> None:
    """H_vW_i = mean of [sigma' v_i g + (sigma - y) e_i] 1{W_i.Y > 0} Y^T, and G_vW_i (science.md, A3)."""
    case = get_case("xor")
    W, v, Y = case.model.W.detach(), case.model.v.detach(), case.inputs
    g = (Y @ W.T).relu()
    sigma = (g @ v).sigmoid()
    for i in range(len(v)):
        fires = (Y @ W[i] > 0).double()
        unit = torch.zeros(len(v), dtype=torch.float64)
        unit[i] = 1
        h = (sigma * (1 - sigma) * v[i])[:, None] * g + (sigma - case.targets)[:, None] * unit
        gm = ((sigma - case.targets) ** 2 * v[i])[:, None] * g
        with Curvature(case.model, case.objective()) as curvature:
            for matrix, factor in (("hessian", h), ("gmatrix", gm)):
                exact = (factor * fires[:, None]).T @ Y / len(Y)
                close(curvature.cross_operator("v", ("W", i), matrix).matrix(), exact, 1e-12)


def test_transpose__is_the_block_of_the_parts_exchanged(get_case: Any) -> None:
    case = get_case("cnn")
    with Curvature(case.model, case.objective()) as curvature:
        for matrix in ("hessian", "gmatrix"):
            ab = curvature.cross_operator("0.*", ("5.weight", 1), matrix).matrix()
            ba = curvature.cross_operator(("5.weight", 1), "0.*", matrix).matrix()
            close(ab, ba.T, 1e-12)
            there = curvature.coupling("0.*", "5.bias", matrix)
            assert there == pytest.approx(curvature.coupling("5.bias", "0.*", matrix), rel=1e-12)


# ---------------------------------------------------------------------------- planted singular values


class Planted(CrossOperator):
    """A matrix given."""

    def __init__(self, matrix: Tensor) -> None:
        sides = [
            BlockPart(name, Block(name, "layer", (name,), ((n,),)))
            for name, n in zip("ab", matrix.shape, strict=True)
        ]
        super().__init__(*sides, matrix.dtype, matrix.device)
        self.given, self.count = matrix, 0

    def product(self, vectors: Tensor) -> Tensor:
        self.count += len(vectors)
        return vectors @ self.given.T

    def adjoint_product(self, vectors: Tensor) -> Tensor:
        self.count += len(vectors)
        return vectors @ self.given


def planted(values: list[float], n: int, m: int, seed: int, dtype: torch.dtype = torch.float64) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    r = len(values)
    left, _ = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))
    return Planted(((left * torch.tensor(values, dtype=torch.float64)) @ right.T).to(dtype))


@pytest.mark.parametrize("dense_up_to", [0, 10_000])
@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (90, 90)])
@pytest.mark.parametrize(
    "values",
    [
        [3.0, 2.0, 1.0, 0.5, 0.1],
        [2.0, 2.0, 2.0, 1.0],  # one value many times
        [1.0, 0.5],  # rank below k
        [5.0] * 60,  # all alike
        [1.0, 1e-2, 1e-4, 1e-5],
        [0.0],  # nothing
    ],
)
def test_planted_singular_values__are_found(
    values: list[float], shape: tuple[int, int], dense_up_to: int
) -> None:
    operator = planted(values, *shape, seed=1)
    found = singular_triplets(operator, 3, tol=1e-5, dense_up_to=dense_up_to)
    expected = torch.tensor((values + [0.0] * 3)[:3], dtype=torch.float64)
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-9, atol=1e-12)
    check_true_residuals(found, operator.given, 1e-5)
    assert bool(found.converged.all())
    if found.path == "lanczos":
        assert found.n_matvec == operator.count


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(150, 260), (260, 150)])
def test_small_values_in_float32__survive_that_the_first_search_squares_them(
    shape: tuple[int, int], tol: float
) -> None:
    operator = planted([1.0, 1e-2, 1e-3, 1e-5], *shape, seed=0, dtype=torch.float32)
    found = singular_triplets(operator, 3, tol=tol, dense_up_to=0)
    expected = torch.tensor([1.0, 1e-2, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-4, atol=0)
    assert found.converged[:2].all()
    assert bool(found.converged.all()) or tol == 1e-5  # that is 1e-8 of the largest value, less than eps
    assert found.n_matvec == operator.count


@pytest.mark.parametrize("values", [[1.0, 2e-3, 2e-3, 2e-3, 1e-5], [1.0, 1e-3], [1.0]])
def test_clusters_and_zeros_in_float32__have_orthonormal_vectors_on_both_sides(values: list[float]) -> None:
    operator = planted(values, 150, 260, seed=0, dtype=torch.float32)
    found = singular_triplets(operator, 4, dense_up_to=0)
    assert bool(found.converged.all())
    identity = torch.eye(4)
    torch.testing.assert_close(found.left @ found.left.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.right @ found.right.T, identity, rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 4),
    shape=st.tuples(st.integers(20, 60), st.integers(20, 60)),
    exponents=st.lists(st.floats(-6, 2), min_size=1, max_size=20),
    twins=st.booleans(),
    budget=st.integers(0, 60),
    single=st.booleans(),
)
def test_law__no_triplet_with_a_larger_residual_is_flagged_converged(
    seed: int,
    k: int,
    shape: tuple[int, int],
    exponents: list[float],
    twins: bool,
    budget: int,
    single: bool,
) -> None:
    values = sorted((10.0**e for e in exponents for _ in range(1 + twins)), reverse=True)[:20]
    dtype = torch.float32 if single else torch.float64
    operator = planted(values, *shape, seed=seed, dtype=dtype)
    found = singular_triplets(operator, k, tol=1e-3, dense_up_to=0, max_matvec=6 * k + 4 + budget)
    assert found.n_matvec <= 6 * k + 4 + budget
    exact = operator.given.double()
    left, right = (side.double() for side in (found.left, found.right))
    errors = [right @ exact.T - found.singular_values[:, None] * left]
    errors += [left @ exact - found.singular_values[:, None] * right]
    norms = (sum(error.square().sum(1) for error in errors) / 2) ** 0.5
    scale = torch.maximum(found.singular_values, 1e-3 * found.singular_values.max())
    rounding = 1e-4 if single else 1e-9
    assert bool((norms[found.converged] <= (1e-3 + rounding) * scale[found.converged]).all())
    # Ritz values never exceed the true ones, in order.
    true = torch.linalg.svdvals(exact)[:k]
    assert bool((found.singular_values <= true + 1e-5 * true[0]).all())


def test_same_seed__gives_the_same_bits() -> None:
    operator = planted([3.0, 2.0, 1.0], 60, 80, seed=0)
    one, same, other = (singular_triplets(operator, 2, dense_up_to=0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.left, same.left)
    assert torch.equal(one.singular_values, same.singular_values)
    assert not torch.equal(one.left, other.left)


def test_not_finite__names_the_parts() -> None:
    for size in (5, 300):
        matrix = torch.ones(size, size + 1)
        matrix[2, 3] = math.nan
        with pytest.raises(NonFiniteCurvatureError, match="'a x b'"):
            singular_triplets(Planted(matrix), 1, dense_up_to=10)


def test_arguments_out_of_range__are_refused(get_case: Any) -> None:
    operator = planted([1.0], 30, 40, seed=0)
    with pytest.raises(ValueError, match="between 1 and 30, the smaller side of a x b; got 31"):
        singular_triplets(operator, 31)
    with pytest.raises(ValueError, match="got 0"):
        singular_triplets(operator, 0)
    with pytest.raises(ValueError, match="positive number; got 0"):
        singular_triplets(operator, 1, tol=0.0)
    with pytest.raises(ValueError, match="allow at least 10 products"):
        singular_triplets(operator, 1, dense_up_to=0, max_matvec=9)
    case = get_case("mlp-tanh")
    with Curvature(case.model, case.objective()) as curvature:
        for a, b, message in (
            ("0.weight", "0.*", "share parameters"),
            (("0.weight", 1), ("0.weight", 1), "share parameters"),
            (("0.weight", 1), "0.weight", "share parameters"),
            ("0.wieght", "2.bias", "did you mean '0.weight'"),
            (("0.weight", 6), "2.bias", r"shape \(6, 5\) and so no row 6"),
            (("0.bias", 0), "2.bias", r"shape \(6,\) and so no row 0"),
            (("0.weight", -1), "2.bias", "no row -1"),
            (resolve_blocks(case.model, "rows")[0], "2.bias", "a batch of rows"),
        ):
            with pytest.raises(ValueError, match=message):
                curvature.cross_operator(a, b)
        with pytest.raises(ValueError, match="matrix must be one of"):
            curvature.cross_operator("0.bias", "2.bias", "jacobian")
    with pytest.raises(RuntimeError, match="inside the context only"):
        curvature.cross_operator("0.bias", "2.bias")


# ---------------------------------------------------------------------------- coupling


def test_coupling__is_zero_where_parts_do_not_interact_and_one_where_they_are_copies() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.twin = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x[:, :2]) + self.twin(x[:, :2]), self.b(x[:, 2:])], 1)

    torch.manual_seed(0)
    model, x = Apart().double(), torch.randn(30, 4, dtype=torch.float64)
    objective = Objective(F.mse_loss, x, torch.zeros(30, 2, dtype=torch.float64))
    with Curvature(model, objective) as curvature:
        assert curvature.coupling("a.*", "b.*") == 0.0
        assert curvature.coupling("a.*", "twin.*") == pytest.approx(1.0, rel=1e-12)
        assert curvature.coupling("a.*", "twin.*", "gmatrix") == pytest.approx(1.0, rel=1e-12)
        assert 0 < curvature.coupling("a.*", "b.*", "gmatrix") < 1


@pairs
@both
def test_coupling__is_the_ratio_of_frobenius_norms(
    get_case: Any, dense_matrices: Any, name: str, a: PartChoice, b: PartChoice, matrix: MatrixKind
) -> None:
    case = get_case(name)
    with Curvature(case.model, case.objective()) as curvature:
        found = curvature.coupling(a, b, matrix)
    whole = dense(case, dense_matrices, matrix, regularised=matrix == "hessian")
    i, j = (columns(case, resolve_part(case.model, part)) for part in (a, b))
    expected = whole[i][:, j].norm() / (whole[i][:, i].norm() * whole[j][:, j].norm()).sqrt()
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_coupling__from_gram_matrices_equals_that_of_whole_ones(get_case: Any, dense_matrices: Any) -> None:
    case = get_case("cnn")  # 11 samples, so Gram matrices are far smaller
    whole = dense(case, dense_matrices, "gmatrix")
    i, j = case.columns(("0.weight", "0.bias")), case.columns(("5.weight",))
    expected = whole[i][:, j].norm() / (whole[i][:, i].norm() * whole[j][:, j].norm()).sqrt()
    with Curvature(case.model, case.objective()) as curvature:
        assert curvature.coupling("0.*", "5.weight", "gmatrix") == pytest.approx(float(expected), rel=1e-10)


def test_coupling__of_parts_too_large_says_what_to_do(get_case: Any) -> None:
    case = get_case("mlp-tanh")
    with (
        Curvature(case.model, case.objective(), max_bytes=1000) as curvature,
        pytest.raises(
            ValueError,
            match=r"of 30 and 24 parameters, some 14,400 bytes, and max_bytes is 1,000: .*cross_sing",
        ),
    ):
        curvature.coupling("0.weight", "2.weight")


def test_coupling__with_a_part_without_curvature_is_nan() -> None:
    model = nn.Linear(2, 1).double()
    x = torch.zeros(5, 2, dtype=torch.float64)
    with Curvature(model, Objective(F.mse_loss, x, torch.ones(5, 1, dtype=torch.float64))) as curvature:
        assert math.isnan(curvature.coupling("weight", "bias"))


# ---------------------------------------------------------------------------- parts


def test_union__holds_both_parts_in_the_models_order(get_case: Any) -> None:
    model = get_case("mlp-tanh").model
    a, b = resolve_part(model, ["4.bias", "0.bias"]), resolve_part(model, ("2.weight", 1))
    block = union(model, a, b)
    assert block.parameters == ("0.bias", "2.weight", "4.bias")
    flat = torch.arange(block.size)
    assert flat[a.within(block)].tolist() == [*range(6), *range(30, 33)]
    assert flat[b.within(block)].tolist() == [*range(12, 18)]
    assert (a.label, b.label, block.label) == ("4.bias+0.bias", "2.weight[1]", "4.bias+0.bias x 2.weight[1]")


def test_part__takes_a_block_made_before(get_case: Any) -> None:
    case = get_case("mlp-tanh")
    body, head = resolve_blocks(case.model, {"body": ["0.*", "2.*"], "head": "4.*"})
    with Curvature(case.model, case.objective()) as curvature:
        by_block = curvature.cross_operator(body, head)
        by_name = curvature.cross_operator(["0.*", "2.*"], "4.*")
        assert (by_block.a.label, by_block.b.label) == ("body", "head")
        assert torch.equal(by_block.matrix(), by_name.matrix())
