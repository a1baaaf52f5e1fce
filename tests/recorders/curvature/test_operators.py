"""Operators: products, matrices and traces of every block against dense matrices, peers and closed forms."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature.blocks import Block, BlockKind, resolve_blocks
from hild_xr.recorders.curvature.engine import Curvature, MatrixKind
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    FactoredRowsSecondMoment,
    NetworkHessian,
    RowsSecondMoment,
    SecondMoment,
    StreamedSecondMoment,
    WeightedRows,
)
from hild_xr.recorders.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: tuple[BlockKind, ...] = ("layer", "rows", "model")
MATRICES: tuple[MatrixKind, ...] = ("hessian", "gmatrix")


def reference(
    case: Any, dense: tuple[Tensor, Tensor], block: Block, matrix: MatrixKind, regularised: bool
) -> Iterator[Tensor]:
    """Yield the dense matrix of each sub-block."""
    hessian, gradients = dense
    for index in case.columns(block.parameters).reshape(block.count, block.size):
        if matrix == "hessian":
            yield hessian[index][:, index] + regularised * case.l2 * torch.eye(
                len(index), dtype=torch.float64
            )
        else:
            rows = gradients[:, index] + regularised * case.l2 * case.flat()[index]
            yield rows.T @ rows / len(rows)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-12)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("regularised", [True, False])
def test_operator__equals_the_dense_matrix(
    case: Any,
    dense_matrices: Any,
    kind: BlockKind,
    matrix: MatrixKind,
    batch_size: int | None,
    regularised: bool | None,
) -> None:
    blocks = resolve_blocks(case.model, kind)
    generator = torch.Generator().manual_seed(0)
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        operators = list(curvature.operators(blocks, matrix, regularised))
        assert [operator.block for operator in operators] == blocks
        for operator in operators:
            exact = torch.stack(
                list(reference(case, dense_matrices(case.name), operator.block, matrix, regularised))
            )
            # Rows out of order, and the last one twice.
            rows = torch.tensor([operator.count - 1, 0, operator.count - 1])
            vectors = torch.randn(3, operator.size, generator=generator, dtype=torch.float64)
            close(operator.product(vectors, rows), (exact[rows] @ vectors[:, :, None])[:, :, 0], 1e-10)
            everything = torch.arange(operator.count)
            close(
                operator.product(vectors[:1].expand(operator.count, -1), everything),
                exact @ vectors[0],
                1e-10,
            )
            backwards = everything.flip(0)
            close(
                operator.product(vectors[:1].expand(operator.count, -1), backwards),
                exact[backwards] @ vectors[0],
                1e-10,
            )
            if batch_size is None:
                close(operator.matrix(everything), exact, 1e-10)
            trace = operator.trace()
            if matrix == "gmatrix" or isinstance(operator, WeightedRows):
                assert trace is not None
                close(trace, exact.diagonal(dim1=1, dim2=2).sum(1), 1e-10)


@pytest.mark.parametrize("matrix", MATRICES)
def test_operator__takes_the_path_it_should(get_case: Any, matrix: MatrixKind) -> None:
    def paths(name: str, kind: BlockKind, max_bytes: int = 2**30) -> list[type[BlockOperator]]:
        case = get_case(name)
        with Curvature(case.model, case.objective(), max_bytes=max_bytes) as curvature:
            return [type(o) for o in curvature.operators(resolve_blocks(case.model, kind), matrix)]

    if matrix == "hessian":
        assert set(paths("mlp-relu", "rows")) == {WeightedRows}
        assert paths("cnn", "rows") == [NetworkHessian, WeightedRows]
        assert set(paths("mlp-relu", "layer")) == {NetworkHessian}
    else:
        assert set(paths("mlp-relu", "rows")) == {FactoredRowsSecondMoment}
        assert paths("cnn", "rows") == [RowsSecondMoment, FactoredRowsSecondMoment]
        assert paths("cnn", "model") == [SecondMoment]
        assert paths("cnn", "rows", 1000) == [StreamedSecondMoment, FactoredRowsSecondMoment]
        assert paths("cnn", "model", 1000) == [StreamedSecondMoment]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regularised", [True, False])
def test_streamed__equals_the_dense_matrix(
    get_case: Any, dense_matrices: Any, kind: BlockKind, regularised: bool
) -> None:
    case = get_case("attention")
    with Curvature(case.model, case.objective(), max_bytes=3000) as curvature:
        operators = list(curvature.operators(resolve_blocks(case.model, kind), "gmatrix", regularised))
        streamed = [operator for operator in operators if isinstance(operator, StreamedSecondMoment)]
        assert streamed
        state = curvature._state
        assert state is not None
        assert sum(kept.nbytes for kept in state._explicit.values()) <= 3000
        for operator in streamed[:3]:
            exact = list(reference(case, dense_matrices(case.name), operator.block, "gmatrix", regularised))
            close(operator.matrix(torch.arange(operator.count)), torch.stack(exact), 1e-10)
            close(operator.trace(), torch.stack([block.trace() for block in exact]), 1e-10)


# curvlinops takes Hessian products in forward mode, which torch 2.13 lacks for GroupNorm and gets
# wrong for LayerNorm, and knows no math kernel for attention.
PEER_CASES = [(name, m) for name in ("mlp-tanh", "mlp-relu", "gmm", "frozen") for m in MATRICES] + [
    ("cnn", "gmatrix")
]


@pytest.mark.parametrize(("name", "matrix"), PEER_CASES)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_product__agrees_with_curvlinops(
    get_case: Any, name: str, matrix: MatrixKind, batch_size: int | None
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        import curvlinops

    case = get_case(name)
    model = copy.deepcopy(case.model).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = curvlinops.HessianLinearOperator if matrix == "hessian" else curvlinops.EFLinearOperator
    data = [(case.inputs, case.targets)]  # one batch: curvlinops weights unequal ones wrongly
    peer = kind(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    vector = torch.randn(case.flat().numel(), dtype=torch.float64)
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), matrix, False)
        ours = operator.product(vector[None], torch.zeros(1, dtype=torch.long))[0]
    close(ours, (peer @ vector).detach(), 1e-10)


def test_hessian__agrees_with_finite_differences_of_the_gradient(case: Any) -> None:
    if case.name in ("mlp-relu", "cnn", "xor"):
        case.inputs = case.inputs * 0.9  # away from the kinks that random data never meet exactly
    model = copy.deepcopy(case.model).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    vector = torch.randn(case.flat().numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradient(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, value, direction in zip(
                parameters,
                case.trainable.values(),
                vector.split([p.numel() for p in parameters]),
                strict=True,
            ):
                parameter.copy_(value + step * direction.reshape(value.shape))
        loss = case.loss(model(case.inputs), case.targets)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    step = 1e-6
    expected = (gradient(step) - gradient(-step)) / (2 * step)
    with Curvature(case.model, case.objective()) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), "hessian", False)
        close(operator.product(vector[None], torch.zeros(1, dtype=torch.long))[0], expected, 1e-6)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("regularised", [True, False])
def test_gaussian_mixture__has_the_closed_forms_of_softmax_regression(
    get_case: Any, matrix: MatrixKind, regularised: bool
) -> None:
    case = get_case("gmm")
    Y, beta = case.inputs, case.l2
    x = case.model.weight.detach()
    phi, y = (Y @ x.T).softmax(1), F.one_hot(case.targets, 3)
    with Curvature(case.model, case.objective()) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "rows"), matrix, regularised)
        found = operator.matrix(torch.arange(3))
    for c in range(3):
        if matrix == "hessian":
            weights = phi[:, c] * (1 - phi[:, c])
            expected = (weights[:, None] * Y).T @ Y / len(Y) + regularised * beta * torch.eye(
                6, dtype=Y.dtype
            )
        else:
            gradients = (phi - y)[:, c, None] * Y + regularised * beta * x[c]
            expected = gradients.T @ gradients / len(Y)
        close(found[c], expected, 1e-12)


def test_xor__has_the_closed_forms_of_the_two_layer_network(get_case: Any) -> None:
    case = get_case("xor")
    Y, y, beta = case.inputs, case.targets, case.l2
    W, v = case.model.W.detach(), case.model.v.detach()
    active, g = (Y @ W.T > 0).double(), (Y @ W.T).relu()
    sigma = (g @ v).sigmoid()
    slope, error = sigma * (1 - sigma), (sigma - y) ** 2

    def weighted(weights: Tensor, features: Tensor) -> Tensor:
        return (weights[:, None] * features).T @ features / len(features)

    with Curvature(case.model, case.objective()) as curvature:
        layer, rows = resolve_blocks(case.model, "layer", ["v"]), resolve_blocks(case.model, "rows")
        for matrix, weights, ridge in (("hessian", slope, beta), ("gmatrix", error, 0.0)):
            (of_v,), (of_w,) = (list(curvature.operators(b, matrix)) for b in (layer, rows))
            identity = torch.eye(4, dtype=Y.dtype)
            close(
                of_v.matrix(torch.zeros(1, dtype=torch.long))[0],
                weighted(weights, g) + ridge * identity,
                1e-12,
            )
            found = of_w.matrix(torch.arange(4))
            for i in range(4):
                expected = weighted(weights * v[i] ** 2 * active[:, i], Y) + ridge * torch.eye(
                    6, dtype=Y.dtype
                )
                close(found[i], expected, 1e-12)


def test_hessian__of_an_unused_parameter_is_the_regulariser() -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1, bias=False)
            self.spare = nn.Parameter(torch.ones(3))

    objective = Objective(F.mse_loss, torch.randn(4, 2), torch.zeros(4, 1), l2=0.25)
    net = Unused()
    with Curvature(net, objective) as curvature:
        _, spare = curvature.operators(resolve_blocks(net, "layer"))
        assert spare.block.label == "spare"
        assert torch.equal(spare.matrix(torch.zeros(1, dtype=torch.long))[0], 0.25 * torch.eye(3))
        (gmatrix,) = curvature.operators([spare.block], "gmatrix")
        assert torch.equal(gmatrix.matrix(torch.zeros(1, dtype=torch.long))[0], torch.zeros(3, 3))


def test_hessian__of_a_loss_linear_in_the_parameters_is_zero() -> None:
    net = nn.Linear(2, 1, bias=False)
    objective = Objective(lambda o, t: (o * t).mean(), torch.randn(4, 2), torch.ones(4, 1))
    with Curvature(net, objective) as curvature:
        for kind in KINDS:
            for operator in curvature.operators(resolve_blocks(net, kind)):
                assert torch.equal(operator.matrix(torch.zeros(1, dtype=torch.long))[0], torch.zeros(2, 2))


def test_hessian__of_recurrent_layers_agrees_between_precisions() -> None:
    for layer in (nn.LSTM, nn.GRU, nn.RNN):

        class Recurrent(nn.Module):
            def __init__(self, layer: type[nn.RNNBase]) -> None:
                super().__init__()
                self.rnn = layer(3, 4, batch_first=True)
                self.out = nn.Linear(4, 2)

            def forward(self, inputs: Tensor) -> Tensor:
                outputs: Tensor = self.out(self.rnn(inputs)[0][:, -1])
                return outputs

        torch.manual_seed(0)
        net = Recurrent(layer)
        objective = Objective(F.cross_entropy, torch.randn(6, 5, 3), torch.arange(6) % 2)
        vector = torch.randn(1, sum(p.numel() for p in net.parameters()))
        products = []
        for dtype in (None, torch.float64):
            with Curvature(net, objective, dtype=dtype) as curvature:
                (operator,) = curvature.operators(resolve_blocks(net, "model"))
                products.append(operator.product(vector.to(operator.dtype), torch.zeros(1, dtype=torch.long)))
        close(products[0].double(), products[1], 1e-5)
