"""The public kernel: eigenpairs of every block against dense ones, and training left as it was."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature import (
    BlockSpectrum,
    Curvature,
    FisherMC,
    NonFiniteCurvatureError,
    Which,
    resolve_blocks,
)
from hild_xr.recorders.curvature.blocks import BlockKind
from hild_xr.recorders.curvature.engine import MatrixKind
from hild_xr.recorders.curvature.operators import NetworkGaussNewton
from hild_xr.recorders.curvature.pairs import ranking
from hild_xr.recorders.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: tuple[BlockKind, ...] = ("layer", "rows", "model")
MATRICES: tuple[MatrixKind, ...] = ("hessian", "gmatrix")
AT_OUTPUTS: tuple[MatrixKind, ...] = ("ggn", "fisher", "fisher_mc")
ALL: tuple[MatrixKind, ...] = (*MATRICES, *AT_OUTPUTS, "gmatrix_centered")
MEASURED: list[tuple[MatrixKind, BlockKind]] = [(m, b) for m in MATRICES for b in KINDS]
MEASURED += [(m, "rows") for m in AT_OUTPUTS]


def eigenpairs(
    model: nn.Module,
    objective: Objective,
    k: int,
    *choice: Any,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, BlockSpectrum]:
    """Solve in a context of its own."""
    with Curvature(model, objective, dtype=dtype) as curvature:
        return curvature.eigenpairs(k, *choice, **options)


def exact_blocks(
    case: Any, dense: tuple[Tensor, Tensor], found: BlockSpectrum, matrix: MatrixKind, regularised: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the dense matrix, the eigenvalues found and the flat eigenvectors found of each sub-block."""
    hessian, gradients = dense
    k = found.eigenvalues.shape[-1]
    columns = case.columns(found.block.parameters).reshape(found.block.count, found.block.size)
    eigenvalues = found.eigenvalues.reshape(-1, k)
    vectors = found.eigenvectors.reshape(found.block.count, k, found.block.size)
    for index, values, rows in zip(columns, eigenvalues, vectors, strict=True):
        if matrix == "hessian":
            exact = hessian[index][:, index] + regularised * case.l2 * torch.eye(
                len(index), dtype=torch.float64
            )
        else:
            g = gradients[:, index] + regularised * case.l2 * case.flat()[index]
            exact = g.T @ g / len(g)
        yield exact, values, rows


def check_against_dense(
    exact: Tensor, values: Tensor, vectors: Tensor, which: Which, relative: float
) -> None:
    """Check eigenvalues to a relative accuracy, and the span of every cluster that is not cut."""
    k = len(values)
    spectrum, basis = torch.linalg.eigh(exact)
    order = ranking(spectrum, which)
    spectrum, basis = spectrum[order], basis[:, order]
    scale = float(spectrum.abs().max())
    ours, theirs = values.double().cpu(), spectrum[:k]
    if which == "magnitude":
        ours, theirs = ours.abs(), theirs.abs()
    # Gradients of a nearly dead neuron are differences that cancel: below 1e-6 the scale is the network's.
    assert float((ours - theirs).abs().max()) <= relative * max(scale, 1e-6)
    rows = vectors.double().cpu()
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(rows @ rows.T, identity, rtol=0, atol=1e-5)
    # The largest gap within reach is the place to cut; the sine of the largest angle is then small.
    key = {"magnitude": -spectrum.abs(), "largest": -spectrum, "smallest": spectrum}[which]
    gaps = key[1 : k + 1] - key[: len(key[1 : k + 1])]
    if len(gaps) == 0 or float(gaps.max()) < 0.05 * scale:
        return
    cut = int(gaps.argmax()) + 1
    span = basis[:, :cut]
    sine = torch.linalg.matrix_norm(rows[:cut] - rows[:cut] @ span @ span.T, 2)
    assert float(sine) <= 1e-4


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 6])
def test_eigenpairs__equal_dense_ones_in_float64(
    case: Any, dense_matrices: Any, kind: BlockKind, matrix: MatrixKind, batch_size: int | None
) -> None:
    with Curvature(case.model, case.objective(batch_size)) as curvature:
        spectra = curvature.eigenpairs(2, matrix, kind, tol=1e-6)
    assert list(spectra) == [block.label for block in resolve_blocks(case.model, kind)]
    for found in spectra.values():
        assert bool(found.converged.all())
        for exact, values, vectors in exact_blocks(
            case, dense_matrices(case.name), found, matrix, matrix == "hessian"
        ):
            check_against_dense(exact, values, vectors, "magnitude", 1e-8)


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "gmatrix_centered"])
@pytest.mark.parametrize("dense_up_to", [0, 128])
@pytest.mark.parametrize("max_bytes", [2**30, 1])
def test_eigenpairs__of_the_other_matrices_equal_dense_ones(
    case: Any, whole_matrices: Any, matrix: MatrixKind, dense_up_to: int, max_bytes: int
) -> None:
    whole = whole_matrices(case.name)[matrix]
    with Curvature(case.model, case.objective(), dense_up_to=dense_up_to, max_bytes=max_bytes) as curvature:
        for kind in KINDS:
            blocks = resolve_blocks(case.model, kind)
            layers = (
                None if kind == "model" else [block.label for block in blocks[:: max(1, len(blocks) // 2)]]
            )
            k = min(3, min(block.size for block in blocks))
            spectra = curvature.eigenpairs(k, matrix, kind, layers, tol=1e-6)
            for found in spectra.values():
                assert bool(found.converged.all())
                columns = case.columns(found.block.parameters).reshape(found.block.count, found.block.size)
                pairs = zip(
                    columns,
                    found.eigenvalues.reshape(-1, k),
                    found.eigenvectors.reshape(len(columns), k, -1),
                    strict=True,
                )
                for index, values, vectors in pairs:
                    ridge = (matrix == "ggn") * case.l2 * torch.eye(len(index), dtype=torch.float64)
                    check_against_dense(whole[index][:, index] + ridge, values, vectors, "magnitude", 1e-8)


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_gram_trick__serves_every_second_moment(get_case: Any, whole_matrices: Any, which: Which) -> None:
    case = get_case("frozen")  # 8 samples, 35 parameters
    assert len(case.inputs) * 3 < case.flat().numel()
    for matrix in ("ggn", "fisher", "gmatrix", "gmatrix_centered"):
        whole = whole_matrices(case.name)[matrix]
        regularised = matrix == "ggn"
        whole = whole + regularised * case.l2 * torch.eye(len(whole), dtype=torch.float64)
        with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
            (found,) = curvature.eigenpairs(4, matrix, "model", which=which, tol=1e-6).values()
        assert found.path == ("lanczos" if which == "smallest" else "gram")
        assert bool(found.converged.all())
        check_against_dense(whole, found.eigenvalues, found.eigenvectors, which, 1e-8)
        assert float(found.trace) == pytest.approx(float(whole.trace()), rel=1e-10)


def test_gram_trick__completes_a_set_beyond_the_rank_with_the_regularisers_eigenvalue(get_case: Any) -> None:
    case = get_case("frozen")
    case.inputs, case.targets = case.inputs[:2], case.targets[:2]
    with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
        (found,) = curvature.eigenpairs(6, "ggn", "model").values()
    assert found.path == "gram"
    assert bool(found.converged.all())
    torch.testing.assert_close(found.eigenvalues[4:], torch.full((2,), case.l2).double())
    assert bool((found.eigenvalues[:4] > 1.01 * case.l2).all())


@pytest.mark.parametrize("batch_size", [None, 3])
def test_fisher_mc__is_the_same_for_a_seed_whatever_the_batches(
    get_case: Any, batch_size: int | None
) -> None:
    case = get_case("mlp-tanh")
    values = {}
    for draws, seed in ((2, 5), (2, 6), (1, 0)):
        matrix = FisherMC(draws=draws, seed=seed)
        torch.manual_seed(draws)
        with Curvature(case.model, case.objective(batch_size)) as curvature:
            values[draws, seed] = curvature.eigenpairs(3, matrix, "model")["model"].eigenvalues
            again = curvature.eigenpairs(3, matrix, "model")["model"].eigenvalues
            assert torch.equal(again, values[draws, seed])
    with Curvature(case.model, case.objective()) as curvature:
        whole = curvature.eigenpairs(3, FisherMC(2, 5), "model")["model"].eigenvalues
        torch.testing.assert_close(whole, values[2, 5], rtol=1e-9, atol=0)
        by_name = curvature.eigenpairs(3, "fisher_mc", "model")["model"].eigenvalues
        torch.testing.assert_close(by_name, values[1, 0], rtol=1e-9, atol=0)
    assert not torch.allclose(values[2, 5], values[2, 6], rtol=1e-3)


def test_fisher_mc__nears_the_exact_one_as_draws_grow(get_case: Any, whole_matrices: Any) -> None:
    for name in ("mlp-tanh", "xor"):
        case, exact = get_case(name), whole_matrices(name)["fisher"]
        errors = []
        for draws in (1, 60, 3_000):
            with Curvature(case.model, case.objective()) as curvature:
                (operator,) = curvature.operators(resolve_blocks(case.model, "model"), FisherMC(draws))
                found = operator.matrix(torch.zeros(1, dtype=torch.long))[0]
            errors.append(float((found - exact).norm() / exact.norm()))
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        assert errors[2] < 0.03


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 1.5}, {"seed": -1}, {"draws": True}])
def test_fisher_mc__refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="draws must be an integer of at least 1"):
        FisherMC(**options)


def test_ggn__of_a_loss_not_convex_in_the_outputs_is_indefinite_and_exact() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).sin().sum(1).mean()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    parameters = list(net.parameters())
    whole = torch.zeros(())
    for m in range(7):
        output = net(x[m : m + 1])[0]
        J = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(o, parameters, retain_graph=True)])
                for o in output
            ]
        )
        whole = whole - J.T @ torch.diag((output.detach() - y[m]).sin()) @ J / 7
    for kind in KINDS:
        with Curvature(net, Objective(loss, x, y)) as curvature:
            for operator in curvature.operators(resolve_blocks(net, kind), "ggn"):
                assert isinstance(operator, NetworkGaussNewton)
                if kind == "model":
                    found = operator.matrix(torch.zeros(1, dtype=torch.long))[0]
                    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
                    assert float(torch.linalg.eigvalsh(found)[0]) < -0.1


def test_ggn__takes_outputs_without_a_row_for_each_sample() -> None:
    class Tokens(nn.Module):
        """Returns its logits flattened over samples and tokens, as language models often do."""

        def __init__(self, flat: bool) -> None:
            super().__init__()
            self.embedding, self.out, self.flat = nn.Embedding(5, 4), nn.Linear(4, 5), flat

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.out(self.embedding(tokens).cumsum(1).tanh())
            return logits.flatten(0, 1) if self.flat else logits

    tokens = torch.randint(0, 5, (6, 3), generator=torch.Generator().manual_seed(0))
    products = []
    for flat in (True, False):
        torch.manual_seed(0)
        net = Tokens(flat).double()
        loss = (
            (lambda o, t: F.cross_entropy(o, t.flatten()))
            if flat
            else (lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))
        )
        with Curvature(net, Objective(loss, tokens, tokens)) as curvature:
            (operator,) = curvature.operators(resolve_blocks(net, "model"), "ggn")
            assert isinstance(operator, NetworkGaussNewton) == flat
            products.append(operator.matrix(torch.zeros(1, dtype=torch.long))[0])
            (fisher,) = curvature.eigenpairs(1, "gmatrix", "model").values()
            assert bool(fisher.converged.all())
            with pytest.raises(ValueError, match="several targets for a sample"):
                curvature.eigenpairs(1, "fisher")
    torch.testing.assert_close(products[0], products[1], rtol=1e-10, atol=1e-12)


def test_matrices_at_the_outputs__find_the_one_that_the_loss_uses() -> None:
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> dict[str, Any]:
            hidden = self.hidden(inputs).tanh()
            return {"hidden": hidden, "logits": self.out(hidden), "name": "answer"}

    torch.manual_seed(0)
    net = Answers().double()
    plain = nn.Sequential(net.hidden, nn.Tanh(), net.out)
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    for matrix in (*AT_OUTPUTS, "gmatrix"):
        for max_bytes in (2**30, 1):
            with Curvature(
                net, Objective(lambda o, t: F.cross_entropy(o["logits"], t), x, y), max_bytes=max_bytes
            ) as curvature:
                found = curvature.eigenpairs(2, matrix, "model")["model"]
            with Curvature(plain, Objective(F.cross_entropy, x, y)) as curvature:
                expected = curvature.eigenpairs(2, matrix, "model")["model"]
            torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=0)


class CentredOutputs(nn.Linear):
    """Subtracts the mean over the batch, as BatchNorm in training mode does, in any mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs - outputs.mean(0)


@pytest.mark.parametrize("matrix", ALL)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_batch_coupling__is_an_error_that_says_what_to_do(matrix: MatrixKind, batch_size: int | None) -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    without_statistics = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    for net in (CentredOutputs(4, 3), without_statistics):
        objective = Objective(F.cross_entropy, x, y, batch_size=batch_size)
        with pytest.raises(ValueError, match="BatchNorm with running statistics"):
            eigenpairs(net, objective, 1, matrix)


@pytest.mark.parametrize("matrix", ALL)
def test_batch_norm__left_in_training_mode_is_measured_on_its_running_statistics(matrix: MatrixKind) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    net(x)
    net.train()
    objective = Objective(F.cross_entropy, x, y)
    found = eigenpairs(net, objective, 2, matrix, "model")["model"]
    assert net.training
    expected = eigenpairs(net.eval(), objective, 2, matrix, "model")["model"]
    assert torch.equal(found.eigenvalues, expected.eigenvalues)


@pytest.mark.filterwarnings("ignore:torch.func.vmap does not support this model")
@pytest.mark.parametrize("matrix", ["ggn", "gmatrix", "gmatrix_centered"])
@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers__that_vmap_does_not_take_have_the_dense_matrix(
    layer: type[nn.RNNBase], matrix: MatrixKind
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = layer(3, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.out(self.rnn(inputs)[0][:, -1])
            return outputs

    torch.manual_seed(0)
    net = Recurrent().double()
    x, y = torch.randn(5, 4, 3).double(), torch.arange(5) % 3
    parameters = list(net.parameters())
    rows = []
    for m in range(5):
        entries = [*net(x[m : m + 1])[0], F.cross_entropy(net(x[m : m + 1]), y[m : m + 1])]
        gradients = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in entries]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]))
    J, g = torch.stack(rows)[:, :3], torch.stack(rows)[:, 3]
    p = net(x).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    g = g - g.mean(0) if matrix == "gmatrix_centered" else g
    exact = (J.mT @ inner @ J).mean(0) if matrix == "ggn" else g.T @ g / 5
    for max_bytes in (2**30, 1):
        with Curvature(net, Objective(F.cross_entropy, x, y), max_bytes=max_bytes) as curvature:
            (operator,) = curvature.operators(resolve_blocks(net, "model"), matrix)
            found = operator.matrix(torch.zeros(1, dtype=torch.long))[0]
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_eigenpairs__equal_dense_ones_through_products_only(
    get_case: Any, dense_matrices: Any, kind: BlockKind, matrix: MatrixKind, which: Which
) -> None:
    for name in ("mlp-tanh", "mlp-relu", "cnn"):
        case = get_case(name)
        with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
            spectra = curvature.eigenpairs(1, matrix, kind, which=which, tol=1e-7, include_regularizer=True)
        paths = {found.path for found in spectra.values() if found.block.size > 5}
        assert paths <= {"lanczos", "gram"}
        assert paths
        for found in spectra.values():
            assert bool(found.converged.all())
            for exact, values, vectors in exact_blocks(case, dense_matrices(name), found, matrix, True):
                check_against_dense(exact, values, vectors, which, 1e-8)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense_up_to", [0, 128])
def test_eigenpairs__equal_dense_ones_in_float32(
    case: Any, dense_matrices: Any, kind: BlockKind, matrix: MatrixKind, dense_up_to: int
) -> None:
    single = case.to(torch.float32)
    with Curvature(single.model, single.objective(), dense_up_to=dense_up_to) as curvature:
        spectra = curvature.eigenpairs(2, matrix, kind, tol=1e-4)
    for found in spectra.values():
        assert found.eigenvectors.dtype == torch.float32
        assert found.eigenvalues.dtype == torch.float64
        assert bool(found.converged.all())
        for exact, values, vectors in exact_blocks(
            case, dense_matrices(case.name), found, matrix, matrix == "hessian"
        ):
            check_against_dense(exact, values, vectors, "magnitude", 1e-5)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_residuals__are_those_of_a_product_recomputed(
    get_case: Any, dense_matrices: Any, kind: BlockKind, matrix: MatrixKind
) -> None:
    case = get_case("mlp-relu")
    with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
        spectra = curvature.eigenpairs(1, matrix, kind, tol=1e-2)
    for found in spectra.values():
        residuals = found.residuals.reshape(-1)
        blocks = exact_blocks(case, dense_matrices(case.name), found, matrix, matrix == "hessian")
        for (exact, values, vectors), residual in zip(blocks, residuals, strict=True):
            norm = (vectors[0] @ exact - values[0] * vectors[0]).norm()
            scale = torch.linalg.eigvalsh(exact).abs().max()
            expected = float(norm / scale) if scale > 0 else 0.0
            assert float(residual) == pytest.approx(expected, rel=0.05, abs=1e-12)


def test_regularizer__is_in_the_hessian_and_not_in_the_gmatrix_by_default(get_case: Any) -> None:
    case = get_case("gmm")
    with Curvature(case.model, case.objective()) as curvature:
        for matrix, default in (("hessian", True), ("gmatrix", False)):
            first = curvature.eigenpairs(6, matrix, "rows")["weight"]
            same = curvature.eigenpairs(6, matrix, "rows", include_regularizer=default)["weight"]
            other = curvature.eigenpairs(6, matrix, "rows", include_regularizer=not default)["weight"]
            assert torch.equal(first.eigenvalues, same.eigenvalues)
            assert not torch.allclose(first.eigenvalues, other.eigenvalues, rtol=1e-3)
        hessian = curvature.eigenpairs(6, "hessian", "rows")["weight"]
        assert float(hessian.eigenvalues.min()) >= case.l2  # the data part is positive semi-definite


def test_loss__is_the_objectives_value(case: Any) -> None:
    for batch_size in (None, 4):
        with Curvature(case.model, case.objective(batch_size)) as curvature:
            assert curvature.loss == pytest.approx(case.objective().value(case.model), rel=1e-12)


def test_shapes__are_those_of_the_weights(get_case: Any) -> None:
    case = get_case("cnn")
    with Curvature(case.model, case.objective()) as curvature:
        layer = curvature.eigenpairs(3, blocks="layer", layers=["0.weight"], matrix_up_to=36)["0.weight"]
        rows = curvature.eigenpairs(3, blocks="rows", matrix_up_to=9)
        model = curvature.eigenpairs(3, blocks="model", matrix_up_to=158)["model"]
    assert layer.eigenvalues.shape == layer.residuals.shape == layer.converged.shape == (3,)
    assert layer.eigenvectors.shape == (3, 4, 1, 3, 3)
    assert layer.n_matvec.shape == layer.trace.shape == ()
    assert layer.matrix is not None
    assert layer.matrix.shape == (36, 36)
    conv, linear = rows["0.weight"], rows["5.weight"]
    assert conv.eigenvalues.shape == conv.residuals.shape == conv.converged.shape == (4, 3)
    assert conv.eigenvectors.shape == (4, 3, 1, 3, 3)
    assert conv.n_matvec.shape == conv.trace.shape == (4,)
    assert conv.matrix is not None
    assert conv.matrix.shape == (4, 9, 9)
    assert linear.eigenvectors.shape == (3, 3, 36)
    assert linear.matrix is None
    assert model.eigenvectors.shape == (3, 159)
    assert model.matrix is None
    assert model.path == "lanczos"
    assert math.isnan(model.trace)


def test_matrix_and_trace__are_exact_where_given(case: Any, dense_matrices: Any) -> None:
    with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
        for matrix in MATRICES:
            for kind in KINDS:
                for found in curvature.eigenpairs(1, matrix, kind, matrix_up_to=40).values():
                    exact = torch.stack(
                        [
                            e
                            for e, _, _ in exact_blocks(
                                case, dense_matrices(case.name), found, matrix, matrix == "hessian"
                            )
                        ]
                    )
                    scale = float(exact.abs().max()) or 1.0
                    if found.block.size <= 40:
                        assert found.matrix is not None
                        difference = found.matrix.reshape(exact.shape) - exact
                        assert float(difference.abs().max()) <= 1e-10 * scale
                        assert found.n_matvec.sum() == 0
                    known = ~found.trace.isnan()
                    traces = exact.diagonal(dim1=1, dim2=2).sum(1).reshape(found.trace.shape)
                    torch.testing.assert_close(found.trace[known], traces[known], rtol=1e-9, atol=1e-12)
                    assert bool(known.all()) or (matrix == "hessian" and found.path == "lanczos")


def test_float64__of_a_float32_model_is_exact(get_case: Any, dense_matrices: Any) -> None:
    case = get_case("mlp-tanh").to(torch.float32)
    exact = case.to(torch.float64).hessian()
    found = eigenpairs(case.model, case.objective(), 4, blocks="model", tol=1e-9, dtype=torch.float64)[
        "model"
    ]
    expected = torch.linalg.eigvalsh(exact)
    expected = expected[expected.abs().argsort(descending=True)][:4]
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-9, atol=0)
    assert next(case.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16__is_multiplied_in_half_precision_and_solved_in_float32(
    get_case: Any, matrix: MatrixKind, kind: BlockKind
) -> None:
    for name in ("mlp-tanh", "cnn"):
        case = get_case(name)
        half = case.to(torch.bfloat16)
        with Curvature(case.model, case.objective()) as curvature:
            exact = curvature.eigenpairs(1, matrix, kind)
        with Curvature(half.model, half.objective()) as curvature:
            for label, found in curvature.eigenpairs(1, matrix, kind).items():
                assert found.eigenvectors.dtype == torch.float32
                scale = float(exact[label].eigenvalues.abs().max())
                difference = found.eigenvalues - exact[label].eigenvalues
                assert float(difference.abs().max()) < 0.3 * scale


def test_compiled_model__has_the_curvature_of_the_module_inside(get_case: Any) -> None:
    case = get_case("mlp-relu")
    expected = eigenpairs(case.model, case.objective(), 2)
    found = eigenpairs(torch.compile(case.model, backend="eager"), case.objective(), 2)
    assert list(found) == list(expected)
    assert all(torch.equal(found[label].eigenvalues, expected[label].eigenvalues) for label in expected)


def test_eigenpairs__are_deterministic_for_a_seed(get_case: Any) -> None:
    case = get_case("mlp-relu")
    found = []
    for draws, seed in ((0, 3), (7, 3), (0, 4)):
        torch.randn(draws)
        with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
            found.append(curvature.eigenpairs(2, blocks="model", seed=seed)["model"].eigenvectors)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Everything(nn.Module):
    """Dropout, BatchNorm, attention and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(inputs)).mean(1)
        outputs: Tensor = self.out(self.frozen(self.dropout(self.norm(hidden))))
        return outputs


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("context", ["plain", "no_grad", "inference", "autocast"])
def test_curvature__leaves_training_bit_identical(context: str, batch_size: int | None) -> None:
    torch.manual_seed(0)
    net = Everything()
    net.norm.eval()
    x, y = torch.randn(8, 5, 3), torch.arange(8) % 3
    hooked: list[Tensor] = []
    net.out.weight.register_hook(hooked.append)
    loss = F.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    hooked.clear()
    state = copy.deepcopy(net.state_dict())
    gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    versions = {n: p._version for n, p in [*net.named_parameters(), *net.named_buffers()]}
    flags, rng = [m.training for m in net.modules()], torch.get_rng_state()
    contexts: dict[str, contextlib.AbstractContextManager[object]] = {
        "plain": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    objective = Objective(F.cross_entropy, x, y, batch_size=batch_size, l2=0.1)
    with contexts[context], Curvature(net, objective) as curvature:
        spectra = [curvature.eigenpairs(1, m, b) for m, b in MEASURED]
        for operator in curvature.operators(resolve_blocks(net, "model")):
            operator.product(torch.ones(1, operator.size), torch.zeros(1, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert {n: p._version for n, p in [*net.named_parameters(), *net.named_buffers()]} == versions
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name])
    assert hooked == []
    assert not any(module._forward_hooks for module in net.modules())
    loss.backward()  # the user's own graph still works
    found = [s for by_label in spectra for s in by_label.values()]
    assert not any(s.eigenvectors.requires_grad or s.eigenvectors.is_inference() for s in found)
    for other, spectrum in zip(_plain_spectra(net, objective), found, strict=True):
        torch.testing.assert_close(spectrum.eigenvalues, other.eigenvalues, rtol=1e-6, atol=1e-9)


def _plain_spectra(net: nn.Module, objective: Objective) -> list[BlockSpectrum]:
    with Curvature(copy.deepcopy(net).eval(), objective) as curvature:
        return [s for m, b in MEASURED for s in curvature.eigenpairs(1, m, b).values()]


@pytest.mark.parametrize("fails", [False, True])
def test_exit__frees_the_graph_without_the_garbage_collector(get_case: Any, fails: bool) -> None:
    case = get_case("mlp-relu")
    alive: list[weakref.ref[Any]] = []

    def record() -> Curvature:
        with Curvature(case.model, case.objective()) as curvature:
            curvature.eigenpairs(1, "hessian", "rows")
            curvature.eigenpairs(1, "gmatrix", "layer")
            for matrix in AT_OUTPUTS:
                curvature.eigenpairs(1, matrix, "layer")
                curvature.eigenpairs(1, matrix, "model")
            matrices = curvature._matrices
            assert matrices is not None
            graph = matrices.graphs.kept
            assert graph is not None
            alive.extend(weakref.ref(thing) for thing in (matrices, matrices.graphs, graph, graph.loss))
            del graph
            alive.extend(weakref.ref(leaf) for leaf in matrices.network.trainable.values())
            if fails:
                raise KeyError("inside")
        return curvature

    kept: list[Curvature] = []
    gc.collect()
    gc.disable()
    try:
        try:
            kept.append(record())  # the object outlives its context, its graph does not
        except KeyError:
            assert fails
        assert len(alive) > 5
        assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_single_batch__runs_one_forward_for_all_blocks_and_both_matrices(get_case: Any) -> None:
    case, calls = get_case("mlp-tanh"), []
    objective = case.objective()
    objective.check(case.model)
    with Curvature(case.model, objective) as curvature:
        handle = case.model.register_forward_hook(lambda *args: calls.append(1))
        for matrix in ALL:
            for kind in KINDS:
                curvature.eigenpairs(1, matrix, kind)
        handle.remove()
    assert calls == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_enter__raises_when_the_loss_is_not_finite(get_case: Any, value: float) -> None:
    case = get_case("mlp-tanh")
    with torch.no_grad():
        case.model[4].bias[0] = value
    for batch_size in (None, 4):
        with pytest.raises(NonFiniteCurvatureError, match="value of 'loss'") as error:
            Curvature(case.model, case.objective(batch_size)).__enter__()
        assert error.value.block == "loss"
    assert case.model.training


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "gmatrix", "gmatrix_centered", "fisher"])
@pytest.mark.parametrize("dense_up_to", [0, 128])
def test_eigenpairs__raise_and_name_the_block_whose_product_is_not_finite(
    matrix: MatrixKind, dense_up_to: int
) -> None:
    class Root(nn.Module):
        """The square root of zero has a finite value and no finite derivative."""

        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Parameter(torch.ones(8))
            self.bad = nn.Parameter(torch.zeros(8))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs * self.good).sum(1) + (inputs.square() * self.bad).abs().sqrt().sum(1)

    objective = Objective(F.mse_loss, torch.randn(12, 8), torch.zeros(12))
    with Curvature(Root(), objective, dense_up_to=dense_up_to) as curvature:
        assert bool(curvature.eigenpairs(1, matrix, layers=["good"])["good"].converged.all())
        with pytest.raises(NonFiniteCurvatureError, match="of 'bad' is NaN or infinite") as error:
            curvature.eigenpairs(1, matrix)
        assert error.value.block == "bad"


def test_budget__is_kept_and_its_pairs_are_not_flagged(get_case: Any) -> None:
    case = get_case("attention")
    with Curvature(case.model, case.objective(), dense_up_to=0) as curvature:
        found = curvature.eigenpairs(4, blocks="model", tol=1e-9, max_matvec=12)["model"]
    assert int(found.n_matvec) == 12
    assert not bool(found.converged.all())
    assert bool((found.residuals[~found.converged] > 1e-9).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"k": 7}, r"fewer parameters: .*2\.bias \(6\)"),
        ({"matrix": "kfac"}, r"'hessian', 'ggn', .*, or FisherMC\(...\); got 'kfac'"),
        ({"blocks": "neuron"}, "got 'neuron'"),
        ({"which": "LA"}, "got 'LA'"),
        ({"tol": -1.0}, "tol, the relative residual"),
        ({"layers": ["0.weigth"]}, "did you mean '0.weight'"),
    ],
)
def test_eigenpairs__refuse_arguments_out_of_range(
    get_case: Any, arguments: dict[str, Any], message: str
) -> None:
    case = get_case("mlp-relu")
    with Curvature(case.model, case.objective()) as curvature, pytest.raises(ValueError, match=message):
        curvature.eigenpairs(**{"k": 1, **arguments})


def test_curvature__is_used_inside_its_context(get_case: Any) -> None:
    case = get_case("gmm")
    curvature = Curvature(case.model, case.objective())
    for use in (lambda: curvature.loss, lambda: curvature.eigenpairs(1), lambda: curvature.operators([])):
        with pytest.raises(RuntimeError, match="with Curvature"):
            use()


def test_tied_weight__is_one_block_and_its_hessian_counts_both_uses(
    get_case: Any, dense_matrices: Any
) -> None:
    case = get_case("attention")
    with Curvature(case.model, case.objective()) as curvature:
        spectra = curvature.eigenpairs(1, matrix_up_to=20)
    assert "head.weight" not in spectra
    assert spectra["embedding.weight"].block.size == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dense_up_to", [0, 128])
def test_cuda__agrees_with_the_cpu(get_case: Any, dense_up_to: int) -> None:
    fields = ("eigenvalues", "residuals", "converged", "n_matvec", "trace", "eigenvectors")
    for name in ("mlp-relu", "cnn", "attention"):
        case, spectra = get_case(name), []
        for device in ("cpu", "cuda"):
            model = copy.deepcopy(case.model).to(device)
            with Curvature(model, case.objective().to(device), dense_up_to=dense_up_to) as curvature:
                asked = [curvature.eigenpairs(1, m, b, tol=1e-6) for m in ALL for b in KINDS]
            spectra.append([spectrum for by_label in asked for spectrum in by_label.values()])
        for on_cpu, on_gpu in zip(*spectra, strict=True):
            assert {getattr(on_gpu, field).device.type for field in fields} == {"cuda"}
            torch.testing.assert_close(on_gpu.eigenvalues.cpu(), on_cpu.eigenvalues, rtol=1e-6, atol=1e-9)
