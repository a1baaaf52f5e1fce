"""Operators: products, matrices and traces of every block against dense matrices, peers and closed forms."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature.blocks import Block, BlockKind, resolve_blocks
from hild_xr.recorders.curvature.columns import FisherMC
from hild_xr.recorders.curvature.engine import Curvature, MatrixKind
from hild_xr.recorders.curvature.graph import LossGraph
from hild_xr.recorders.curvature.linear_layers import LinearLayers
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    ChainHessian,
    FactoredRowsSecondMoment,
    NetworkGaussNewton,
    NetworkHessian,
    NetworkSecondMoment,
    RowsSecondMoment,
    SecondMoment,
    StreamedSecondMoment,
    WeightedRows,
)
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.problems import GaussianMixture, XorMixture

KINDS: tuple[BlockKind, ...] = ("layer", "rows", "module", "model")
EXACT: tuple[MatrixKind, ...] = ("hessian", "ggn", "gmatrix", "gmatrix_centered", "fisher")
MATRICES: tuple[MatrixKind, ...] = (*EXACT, "fisher_mc")


def sub_blocks(
    case: Any, whole: dict[str, Tensor], block: Block, matrix: MatrixKind, regularised: bool
) -> Tensor:
    """Return the dense matrix of each sub-block, cut out of the whole one."""
    exact, theta, beta = whole[matrix], case.flat(), regularised * case.l2
    if matrix == "gmatrix":
        mean = case.gradients().mean(0) * beta
        exact = (
            exact + torch.outer(mean, theta) + torch.outer(theta, mean) + beta**2 * torch.outer(theta, theta)
        )
    elif matrix != "gmatrix_centered":
        exact = exact + beta * torch.eye(len(exact), dtype=exact.dtype)
    columns = case.columns(block.parameters).reshape(block.count, block.size)
    return torch.stack([exact[index][:, index] for index in columns])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-12)


def check(operator: BlockOperator, exact: Tensor) -> None:
    """Check products (rows in and out of order, one twice), whole matrices and the trace."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, operator.size, generator=generator, dtype=torch.float64)
    everything = torch.arange(operator.count)
    for rows in (torch.tensor([operator.count - 1, 0, operator.count - 1]), everything, everything.flip(0)):
        taken = vectors[torch.arange(len(rows)) % 3]
        close(operator.product(taken, rows), (exact[rows] @ taken[:, :, None])[:, :, 0], 1e-10)
    trace = operator.trace()
    if trace is not None:
        close(trace, exact.diagonal(dim1=1, dim2=2).sum(1), 1e-10)


@pytest.mark.parametrize("matrix", EXACT)
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("max_bytes", [2**30, 1])
def test_operator__equals_the_dense_matrix(
    case: Any, whole_matrices: Any, matrix: MatrixKind, batch_size: int | None, max_bytes: int
) -> None:
    """All kinds of blocks, held as factors and tensors or multiplied through the network."""
    with Curvature(case.model, case.objective(batch_size), max_bytes=max_bytes) as curvature:
        for kind in KINDS:
            blocks = resolve_blocks(case.model, kind)
            blocks = blocks[:: max(1, len(blocks) // 4)]
            for regularised in (True, False):
                operators = list(curvature.operators(blocks, matrix, regularised))
                assert [operator.block for operator in operators] == blocks
                for operator in operators:
                    exact = sub_blocks(case, whole_matrices(case.name), operator.block, matrix, regularised)
                    check(operator, exact)
                    if batch_size is None and max_bytes > 1:
                        close(operator.matrix(torch.arange(operator.count)), exact, 1e-10)


@pytest.mark.parametrize("matrix", EXACT)
def test_regulariser__is_part_of_the_objectives_own_curvature_by_default(
    get_case: Any, whole_matrices: Any, matrix: MatrixKind
) -> None:
    case = get_case("gmm")
    with Curvature(case.model, case.objective()) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), matrix)
        regularised = matrix in ("hessian", "ggn")
        check(operator, sub_blocks(case, whole_matrices("gmm"), operator.block, matrix, regularised))


def paths(
    case: Any, matrix: MatrixKind, kind: BlockKind, max_bytes: int = 2**30
) -> list[type[BlockOperator]]:
    with Curvature(case.model, case.objective(), max_bytes=max_bytes) as curvature:
        return [type(o) for o in curvature.operators(resolve_blocks(case.model, kind), matrix)]


def test_operator__takes_the_path_it_should(get_case: Any) -> None:
    relu, cnn = get_case("mlp-relu"), get_case("cnn")
    assert set(paths(relu, "hessian", "rows")) == {WeightedRows}
    assert paths(cnn, "hessian", "rows") == [NetworkHessian, WeightedRows]
    assert set(paths(relu, "hessian", "model")) == {ChainHessian}
    assert paths(cnn, "hessian", "model") == [NetworkHessian]
    for matrix in ("gmatrix", "gmatrix_centered"):
        assert set(paths(relu, matrix, "rows")) == {FactoredRowsSecondMoment}
        assert paths(cnn, matrix, "rows") == [RowsSecondMoment, FactoredRowsSecondMoment]
        assert paths(cnn, matrix, "model") == [SecondMoment]
        assert paths(cnn, matrix, "rows", 1000) == [NetworkSecondMoment, FactoredRowsSecondMoment]
        assert paths(cnn, matrix, "model", 1000) == [NetworkSecondMoment]
    for matrix in ("ggn", "fisher", "fisher_mc"):
        assert set(paths(relu, matrix, "rows")) == {WeightedRows}
        assert paths(cnn, matrix, "rows") == [RowsSecondMoment, WeightedRows]
        assert paths(cnn, matrix, "model") == [SecondMoment]
        through = NetworkGaussNewton if matrix == "ggn" else NetworkSecondMoment
        assert paths(cnn, matrix, "rows", 1) == [through, through]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["mlp-relu", "cnn"])
@pytest.mark.parametrize("regularised", [True, False])
def test_diagonal__of_rows_is_known_where_they_are_held(
    get_case: Any, name: str, matrix: MatrixKind, regularised: bool
) -> None:
    case = get_case(name)
    objective = Objective(case.loss, case.inputs, case.targets, l2=0.3)
    with Curvature(case.model, objective) as curvature:
        for operator in curvature.operators(resolve_blocks(case.model, "rows"), matrix, regularised):
            found = operator.diagonal()
            if isinstance(operator, NetworkHessian):
                assert found is None
                continue
            assert found is not None
            exact = operator.matrix(torch.arange(operator.count)).diagonal(dim1=-2, dim2=-1)
            assert found.shape == (operator.count, operator.size)
            close(found, exact, 1e-12)


@pytest.mark.parametrize("matrix", ["gmatrix", "gmatrix_centered", "ggn", "fisher"])
@pytest.mark.parametrize("regularised", [True, False])
def test_norm_from_gram__is_that_of_the_whole_matrix(
    get_case: Any, matrix: MatrixKind, regularised: bool
) -> None:
    case = get_case("mlp-relu")
    with Curvature(case.model, case.objective()) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), matrix, regularised)
        assert isinstance(operator, SecondMoment)
        exact = operator.matrix(torch.zeros(1, dtype=torch.int64)).norm().reshape(1)
        close(operator.norm_from_gram(operator.gram()), exact, 1e-12)


def test_rows__of_a_block_with_a_label_of_its_own_are_those_of_its_parameter(get_case: Any) -> None:
    case = get_case("mlp-relu")
    block = Block("2.weight", "rows", ("0.weight",), ((6, 5),))
    with Curvature(case.model, case.objective()) as curvature:
        (named,) = curvature.operators([block])
        (plain,) = curvature.operators(resolve_blocks(case.model, "rows", ["0.weight"]))
        rows = torch.arange(6)
        close(named.matrix(rows), plain.matrix(rows), 1e-12)


class Auxiliary(nn.Module):
    """Keeps a part of the loss for itself, as a mixture of experts does: G has no columns at the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept = self.table.square().sum()
        return inputs @ self.table

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.3 * self.kept


@pytest.mark.parametrize("matrix", ["gmatrix", "gmatrix_centered"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regularised", [True, False])
def test_streamed__equals_the_dense_matrix(kind: BlockKind, matrix: MatrixKind, regularised: bool) -> None:
    torch.manual_seed(0)
    net = Auxiliary().double()
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    gradients = []
    for m in range(9):
        value = net.loss(net(inputs[m : m + 1]), targets[m : m + 1])
        gradients.append(torch.autograd.grad(value, net.table)[0].reshape(-1))
    g = torch.stack(gradients) + regularised * 0.2 * net.table.detach().reshape(-1)
    g = g - g.mean(0) if matrix == "gmatrix_centered" else g
    objective = Objective(net.loss, inputs, targets, l2=0.2)
    with Curvature(net, objective, max_bytes=300) as curvature:
        (operator,) = curvature.operators(resolve_blocks(net, kind), matrix, regularised)
        assert isinstance(operator, StreamedSecondMoment)
        rows = g.reshape(9, operator.count, operator.size).transpose(0, 1)
        exact = rows.mT @ rows / 9
        check(operator, exact)
        close(operator.matrix(torch.arange(operator.count)), exact, 1e-10)


def test_matrices_at_the_outputs__refuse_a_loss_that_is_no_function_of_them() -> None:
    net = Auxiliary()
    objective = Objective(net.loss, torch.randn(9, 4), torch.arange(9) % 3)

    def doubled(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.mul_(2), targets)

    inner = nn.Linear(4, 3)
    for model, refused in (
        (net, objective),
        (inner, Objective(doubled, objective.inputs, objective.targets)),
    ):
        with Curvature(model, refused) as curvature:
            for matrix in ("ggn", "fisher", "fisher_mc"):
                with pytest.raises(ValueError, match=r"return one tensor and .*'hessian' or 'gmatrix'"):
                    (operator,) = curvature.operators(resolve_blocks(model, "model"), matrix)
                    operator.product(torch.ones(1, operator.size), torch.zeros(1, dtype=torch.long))
            list(curvature.operators(resolve_blocks(model, "model"), "hessian"))


# curvlinops takes Hessian and Gauss-Newton products in forward mode, which torch 2.13 lacks for GroupNorm
# and gets wrong for LayerNorm, and knows no math kernel for attention.
PEER_MATRICES: tuple[MatrixKind, ...] = ("hessian", "ggn", "gmatrix", "fisher_mc")
PEER_CASES = [(name, m) for name in ("mlp-tanh", "mlp-relu", "rnn", "gmm", "frozen") for m in PEER_MATRICES]


@pytest.mark.parametrize(("name", "matrix"), [*PEER_CASES, ("cnn", "gmatrix")])
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
    kind = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
        "gmatrix": curvlinops.EFLinearOperator,
        # with an expectation over draws: its Monte Carlo one has draws of its own
        "fisher_mc": curvlinops.GGNLinearOperator,
    }[matrix]
    data = [(case.inputs, case.targets)]  # one batch: curvlinops weights unequal ones wrongly
    peer = kind(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    vector = torch.randn(case.flat().numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    choice = FisherMC(draws=500) if matrix == "fisher_mc" else matrix
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), choice, False)
        ours = operator.product(vector[None], torch.zeros(1, dtype=torch.long))[0]
    expected = (peer @ vector).detach()
    if matrix == "fisher_mc":
        assert 0 < float((ours - expected).norm()) < 0.15 * float(expected.norm())
    else:
        close(ours, expected, 1e-10)


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


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "gmatrix"])
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
        if matrix != "gmatrix":
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
        expectations = (
            ("hessian", slope, beta),
            ("ggn", slope, beta),
            ("fisher", slope, 0.0),
            ("gmatrix", error, 0.0),
        )
        for matrix, weights, ridge in expectations:
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


@pytest.mark.parametrize("matrix", EXACT)
def test_problems_of_the_papers__have_their_closed_forms(matrix: MatrixKind) -> None:
    """Class blocks of the k-GMM, and both layers of the XOR-GMM (science: arXiv 2310.03010, section A3)."""
    mixture = GaussianMixture(dimension=8, classes=3, snr=5.0, beta=0.2)
    net, objective = mixture.model(seed=1), mixture.objective(60, seed=0)
    Y, y = objective.inputs.double(), F.one_hot(objective.targets, 3).double()
    phi = (Y @ net.linear.weight.detach().double().T).softmax(1)
    weights = {"gmatrix": (phi - y).square(), "gmatrix_centered": (phi - y).square()}.get(
        matrix, phi * (1 - phi)
    )
    ridge = 0.2 * (matrix in ("hessian", "ggn"))
    mean = ((phi - y).T @ Y / 60) * (matrix == "gmatrix_centered")
    with Curvature(net, objective, dtype=torch.float64) as curvature:
        (classes,) = curvature.operators(resolve_blocks(net, "rows"), matrix)
        for c, found in enumerate(classes.matrix(torch.arange(3))):
            exact = (
                (weights[:, c, None] * Y).T @ Y / 60
                + ridge * torch.eye(8).double()
                - torch.outer(mean[c], mean[c])
            )
            close(found, exact, 1e-10)

    xor = XorMixture(dimension=7, hidden=5, snr=5.0, beta=0.1)
    two, objective = xor.model(seed=1), xor.objective(60, seed=0)
    Y, labels = objective.inputs.double(), objective.targets[:, 0].double()
    W, v = two.first.weight.detach().double(), two.second.weight.detach()[0].double()
    hidden, active = (Y @ W.T).relu(), (Y @ W.T > 0).double()
    sigma = (hidden @ v).sigmoid()
    of_g = matrix in ("gmatrix", "gmatrix_centered")
    s, ridge = (
        (sigma - labels).square() if of_g else sigma * (1 - sigma),
        0.1 * (matrix in ("hessian", "ggn")),
    )
    with Curvature(two, objective, dtype=torch.float64) as curvature:
        first, second = curvature.operators(resolve_blocks(two, "rows"), matrix)
        features = [(first, i, v[i] * active[:, i, None] * Y) for i in range(5)] + [(second, 0, hidden)]
        for operator, i, row in features:
            mean = ((sigma - labels) @ row / 60) * (matrix == "gmatrix_centered")
            exact = (
                (s[:, None] * row).T @ row / 60
                + ridge * torch.eye(row.shape[1]).double()
                - torch.outer(mean, mean)
            )
            close(operator.matrix(torch.tensor([i]))[0], exact, 1e-10)


def test_products_of_several_vectors__rebuild_each_batchs_graph_once(get_case: Any) -> None:
    case, calls = get_case("mlp-tanh"), []
    objective = case.objective(4)
    n_batches = -(-len(objective) // 4)
    with Curvature(case.model, objective, max_bytes=1) as curvature:
        for matrix in ("hessian", "ggn", "fisher"):
            (operator,) = curvature.operators(resolve_blocks(case.model, "model"), matrix)
            handle = case.model.register_forward_hook(lambda *args: calls.append(1))
            vectors = torch.randn(7, operator.size, dtype=torch.float64)
            operator.product(vectors, torch.zeros(7, dtype=torch.long))
            handle.remove()
            assert len(calls) == n_batches, matrix
            calls.clear()


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_products_in_one_pass__equal_those_one_by_one(
    case: Any, matrix: MatrixKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearLayers, "chains", lambda *_: [])  # not by way of the layers
    products, passes = [], []
    taken = LossGraph.hessian_products, LossGraph.output_products

    def counted(method: int, *args: Any) -> Any:
        passes.append(len(args[2][0]))
        return taken[method](*args)

    monkeypatch.setattr(LossGraph, "hessian_products", lambda *args: counted(0, *args))
    monkeypatch.setattr(LossGraph, "output_products", lambda *args: counted(1, *args))
    for at_once in (1, 3):
        monkeypatch.setattr(LossGraph, "vectors_at_once", at_once)
        with Curvature(case.model, case.objective(), max_bytes=1) as curvature:
            (operator,) = curvature.operators(resolve_blocks(case.model, "model"), matrix)
            generator = torch.Generator().manual_seed(0)
            vectors = torch.randn(5, operator.size, generator=generator, dtype=torch.float64)
            products.append(operator.product(vectors, torch.zeros(5, dtype=torch.long)))
        if at_once == 1:
            assert passes == [1] * 5
            passes.clear()
    # GroupNorm's second derivative cannot be batched
    assert passes == ([1] * 5 if (case.name, matrix) == ("cnn", "hessian") else [3, 2])
    close(products[1], products[0], 1e-12)


def test_products__go_on_one_by_one_after_a_pass_that_torch_could_not_batch(
    get_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, passes, taken = get_case("mlp-tanh"), [], LossGraph.hessian_products
    monkeypatch.setattr(LinearLayers, "chains", lambda *_: [])

    def single(*args: Any) -> Any:
        passes.append(len(args[2][0]))
        if passes[-1] > 1:
            raise RuntimeError("no batching rule")
        return taken(*args)

    monkeypatch.setattr(LossGraph, "hessian_products", single)
    monkeypatch.setattr(LossGraph, "vectors_at_once", 3)
    with Curvature(case.model, case.objective()) as curvature:
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), "hessian")
        operator.product(torch.ones(2, operator.size, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
        operator.product(torch.ones(2, operator.size, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    assert passes == [2, 1, 1, 1, 1]


class Normed(nn.Module):
    """A network with GroupNorm over six channels at six positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(2, 6, 1), nn.GroupNorm(1, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.norm(self.conv(x)).tanh().mean(2))
        return outputs


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("samples", [1, 6])
def test_products_in_one_pass__of_group_norm_are_right_where_sizes_agree_by_chance(
    matrix: MatrixKind, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Normed().double()
    objective = Objective(
        F.cross_entropy, torch.randn(samples, 2, 6, dtype=torch.float64), torch.arange(samples) % 3
    )
    found = []
    for at_once in (1, 5):
        monkeypatch.setattr(LossGraph, "vectors_at_once", at_once)
        with Curvature(model, objective, max_bytes=1) as curvature:
            (operator,) = curvature.operators(resolve_blocks(model, "layer", "conv.weight"), matrix)
            found.append(operator.matrix(torch.zeros(1, dtype=torch.long)))
    close(found[1], found[0], 1e-10)


def test_products_in_one_pass__let_other_threads_warn(get_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, passes, raised = get_case("mlp-tanh"), [], []
    monkeypatch.setattr(LinearLayers, "chains", lambda *_: [])
    taken = LossGraph.hessian_products

    def warn() -> None:
        try:
            warnings.warn("from a loader of data", UserWarning, stacklevel=1)
        except UserWarning as warning:
            raised.append(warning)

    def beside_a_thread(*args: Any) -> Any:
        passes.append(len(args[2][0]))
        thread = threading.Thread(target=warn)
        thread.start()
        thread.join()
        warn()
        return taken(*args)

    monkeypatch.setattr(LossGraph, "hessian_products", beside_a_thread)
    monkeypatch.setattr(LossGraph, "vectors_at_once", 3)
    with warnings.catch_warnings(), Curvature(case.model, case.objective()) as curvature:
        warnings.simplefilter("ignore")
        (operator,) = curvature.operators(resolve_blocks(case.model, "model"), "hessian")
        operator.product(torch.ones(5, operator.size, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    assert passes == [3, 2]
    assert raised == []


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
