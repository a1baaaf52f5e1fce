"""Curvature without a recorder: what a store holds, at once and with the same labels."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import analysis
from hild_xr import recorders as rec
from hild_xr.recorders.curvature import Curvature, FisherMC, MatrixChoice

if TYPE_CHECKING:
    from collections.abc import Callable

GROUPS = {"body": "0.*", "biases": "*.bias"}
PROBES: dict[str, Callable[..., rec.Probe]] = {
    "hessian": rec.Hessian,
    "ggn": rec.GaussNewton,
    "gmatrix": rec.GMatrix,
    "gmatrix_centered": lambda k, **options: rec.GMatrix(k, centered=True, **options),
    "fisher": rec.Fisher,
    "fisher_mc": lambda k, **options: rec.Fisher(k, draws=1, **options),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(40, 8)
    return model, rec.Objective(F.cross_entropy, x, x[:, :3].argmax(1), l2=0.02)


def recorded(path: Path, *probes: rec.Probe) -> xr.DataTree:
    """Record the problem as it is, with two seeds planned and more steps to come."""
    model, objective = problem()
    with rec.Recorder(
        path, model, objective=objective, probes=probes, schedule=rec.at([0, 5]), seed=3, seeds=[3, 4]
    ):
        pass
    return hx.open(path)


def at_the_start(run: xr.DataTree, group: str) -> xr.DataTree:
    nodes = {
        node.relative_to(run[group]): node.to_dataset(inherit=False)
        .drop_vars("committed", errors="ignore")
        .isel(seed=0, step=0, drop=True, missing_dims="ignore")
        for node in run[group].subtree
    }
    return xr.DataTree.from_dict(nodes, name=group)


def assert_same(found: xr.Dataset | xr.DataTree, stored: xr.DataTree) -> None:
    """Compare values, dtypes, names and all attributes."""
    expected = stored if isinstance(found, xr.DataTree) else stored.to_dataset()
    xr.testing.assert_identical(found, expected)
    pairs = [(found, expected)]
    if isinstance(found, xr.DataTree):
        assert list(found.children) == list(expected.children)
        assert found.name == expected.name
        pairs += list(zip(found.children.values(), expected.children.values(), strict=True))
    for one, other in pairs:
        assert {name: one[name].dtype for name in one.variables} == {
            name: other[name].dtype for name in other.variables
        }


@pytest.mark.parametrize("matrix", list(PROBES))
@pytest.mark.parametrize("blocks", ["layer", "rows", "module", "model", GROUPS])
def test_eigenpairs__are_what_a_recorder_stores(tmp_path: Path, matrix: Any, blocks: Any) -> None:
    options = {"blocks": blocks, "matrix_up_to": 8, "dense_up_to": 10, "which": "largest"}
    probe = PROBES[matrix](2, **options)
    run = recorded(tmp_path / "run.zarr", probe)
    found = rec.curvature.eigenpairs(*problem(), 2, matrix, **options)
    assert found.name == probe.group
    assert found.attrs["matrix"] == matrix
    assert_same(found, at_the_start(run, probe.group))


def test_no_time__gives_pairs_that_say_how_far_they_are_off() -> None:
    found = rec.curvature.eigenpairs(*problem(), 2, blocks="model", dense_up_to=0, max_seconds=0.0)
    assert not bool(found["converged"].any())
    assert bool((found["residuals"] > 1e-3).all())
    assert int(found["n_certain"].sel(layer="model")) == 0
    assert int(found["n_matvec"].sel(layer="model")) < 8


def test_sketched_eigenpairs__are_what_a_recorder_stores(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run.zarr", rec.Hessian(2, sketch=20))
    found = rec.curvature.eigenpairs(*problem(), 2, sketch=20)
    assert found["0.weight/eigenvectors"].dims == ("eig", "sketch")
    assert_same(found, at_the_start(run, "hessian"))


@pytest.mark.parametrize("blocks", ["layer", "rows", GROUPS])
@pytest.mark.parametrize(
    ("function", "probe", "options"),
    [
        (rec.curvature.density, rec.Density, {"k_steps": 8, "probes": 3, "n_nodes": 12, "seed": 2}),
        (rec.curvature.trace, rec.Trace, {"products": 4, "seed": 2}),
        (rec.curvature.frobenius_norm, rec.FrobeniusNorm, {"products": 4, "seed": 2}),
        (rec.curvature.diagonal, rec.Diagonal, {"products": 4, "seed": 2}),
    ],
)
def test_densities_and_estimates__are_what_a_recorder_stores(
    tmp_path: Path, function: Any, probe: Any, options: dict[str, Any], blocks: Any
) -> None:
    for matrix in ("hessian", FisherMC(2, 5)):
        one = probe(matrix, blocks=blocks, **options)
        run = recorded(tmp_path / f"{one.group}.zarr", one)
        found = function(*problem(), matrix, blocks, **options)
        has_nodes = blocks == "rows" or probe is rec.Diagonal
        assert isinstance(found, xr.DataTree if has_nodes else xr.Dataset)
        assert_same(found, at_the_start(run, one.group))


@pytest.mark.parametrize("matrix", ["hessian", "gmatrix_centered", FisherMC(3, 1)])
def test_eigenpairs__are_those_of_the_kernel(matrix: MatrixChoice) -> None:
    model, objective = problem()
    found = rec.curvature.eigenpairs(model, objective, 3, matrix, "module", tol=1e-5, dense_up_to=0)
    with Curvature(model, objective) as curvature:
        expected = curvature.eigenpairs(3, matrix, "module", tol=1e-5, dense_up_to=0)
    assert found["layer"].values.tolist() == list(expected) == ["0", "3"]
    for label, spectrum in expected.items():
        numbers = found.to_dataset().sel(layer=label)
        for name in ("eigenvalues", "residuals", "converged", "n_matvec", "trace"):
            kept = getattr(spectrum, name).numpy().astype(numbers[name].dtype)
            np.testing.assert_array_equal(numbers[name], kept)
        np.testing.assert_array_equal(found[f"{label}/eigenvectors"], spectrum.eigenvectors)


def moved(model: nn.Module, step: float) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("blocks", ["layer", "rows", "module", GROUPS])
def test_start__saves_products_and_finds_the_same_pairs(blocks: Any) -> None:
    model, objective = problem()
    options: dict[str, Any] = {"blocks": blocks, "dense_up_to": 0, "which": "largest", "tol": 1e-2}
    before = rec.curvature.eigenpairs(model, objective, 1, **options)
    moved(model, 1e-4)
    fresh = rec.curvature.eigenpairs(model, objective, 1, **options)
    warm = rec.curvature.eigenpairs(model, objective, 1, start=before, **options)
    for node in ("0.weight", "3.weight") if blocks == "rows" else ("/",):
        assert bool(warm[node]["converged"].all())
        assert int(warm[node]["n_matvec"].sum()) < int(fresh[node]["n_matvec"].sum())
        np.testing.assert_allclose(warm[node]["eigenvalues"], fresh[node]["eigenvalues"], rtol=1e-3)


def test_start__may_be_a_record_of_a_store(tmp_path: Path) -> None:
    options: dict[str, Any] = {"blocks": "model", "dense_up_to": 0, "tol": 1e-2}
    run = recorded(tmp_path / "run.zarr", rec.Hessian(2, **options))
    record = run["hessian_model"].isel(seed=0).sel(step=0)
    model, objective = problem()
    moved(model, 1e-4)
    stored = rec.curvature.eigenpairs(model, objective, 2, start=record, **options)
    measured = rec.curvature.eigenpairs(*problem(), 2, **options)
    expected = rec.curvature.eigenpairs(model, objective, 2, start=measured, **options)
    xr.testing.assert_identical(stored, expected)
    fresh = rec.curvature.eigenpairs(model, objective, 2, **options)
    assert int(stored["n_matvec"].sum()) < int(fresh["n_matvec"].sum())
    # not recorded yet, so NaN: searched from random vectors
    empty = run["hessian_model"].isel(seed=1, step=0)
    xr.testing.assert_identical(rec.curvature.eigenpairs(model, objective, 2, start=empty, **options), fresh)


def test_start__of_some_blocks_leaves_the_others_to_a_fresh_search() -> None:
    model, objective = problem()
    options: dict[str, Any] = {"dense_up_to": 0, "tol": 1e-2}
    before = rec.curvature.eigenpairs(model, objective, 1, layers=["0.weight"], **options)
    fresh = rec.curvature.eigenpairs(model, objective, 1, **options)["n_matvec"]
    warm = rec.curvature.eigenpairs(model, objective, 1, start=before, **options)["n_matvec"]
    assert int(warm.sel(layer="0.weight")) < int(fresh.sel(layer="0.weight"))
    np.testing.assert_array_equal(warm.sel(layer="3.weight"), fresh.sel(layer="3.weight"))


def test_start__says_what_it_needs(tmp_path: Path) -> None:
    model, objective = problem()
    run = recorded(tmp_path / "run.zarr", rec.Hessian(1), rec.Trace())
    sketched = rec.curvature.eigenpairs(model, objective, 1, sketch=8)
    for start, kind, message in (
        (run["hessian"], ValueError, r"several records of block '0.weight', along seed and step.*isel"),
        (sketched, ValueError, "sketches of the eigenvectors"),
        (run["hessian_trace"].isel(seed=0, step=0), ValueError, "holds no eigenvectors"),
        (rec.curvature.trace(model, objective), TypeError, "DataTree .* got Dataset"),
    ):
        with pytest.raises(kind, match=message):
            rec.curvature.eigenpairs(model, objective, 1, start=start)
    with pytest.raises(ValueError, match=r"none of the blocks model, but 0.weight"):
        rec.curvature.eigenpairs(
            model, objective, 1, blocks="model", start=rec.curvature.eigenpairs(model, objective, 1)
        )


@pytest.mark.parametrize(
    ("settings", "attrs"),
    [
        ({"guard": 0, "probe_steps": 0}, {"guard": 0, "probe_steps": 0}),
        ({"probe_steps": 20}, {"probe_steps": 20}),
        ({"seed": 5}, {"search_seed": 5}),
    ],
)
def test_search_settings__are_those_of_the_kernel_and_are_told(
    settings: dict[str, int], attrs: dict[str, int]
) -> None:
    model, objective = problem()
    options: dict[str, Any] = {"blocks": "model", "dense_up_to": 0, "matrix": "hessian"}
    usual = rec.curvature.eigenpairs(model, objective, 2, **options)
    found = rec.curvature.eigenpairs(model, objective, 2, **options, **settings)
    with Curvature(model, objective) as curvature:
        expected = curvature.eigenpairs(2, **options, **settings)["model"]
    np.testing.assert_array_equal(found["model/eigenvectors"], expected.eigenvectors)
    assert int(found["n_matvec"].sum()) == int(expected.n_matvec)
    assert not np.array_equal(found["model/eigenvectors"], usual["model/eigenvectors"])
    assert {name: value for name, value in found.attrs.items() if name not in usual.attrs} == attrs


@pytest.mark.parametrize(("given", "beta"), [(None, 0.02), (True, 0.02), (False, 0.0)])
def test_regulariser__takes_part_as_asked_and_the_attributes_say_so(given: bool | None, beta: float) -> None:
    model, objective = problem()
    with Curvature(model, objective) as curvature:
        data_part = curvature.eigenpairs(1, "hessian", "model", include_regularizer=False)["model"]
    found = rec.curvature.eigenpairs(model, objective, 1, blocks="model", include_regularizer=given)
    assert found.attrs["regularizer"] == beta
    assert float(found["eigenvalues"].squeeze()) - float(data_part.eigenvalues) == pytest.approx(
        beta, abs=1e-6
    )


def test_dtype__is_that_of_computation_and_result() -> None:
    model, objective = problem()
    state = copy.deepcopy(model.state_dict())
    double = rec.Objective(F.cross_entropy, objective.inputs.double(), objective.targets, l2=objective.l2)
    expected = rec.curvature.eigenpairs(copy.deepcopy(model).double(), double, 3)
    found = rec.curvature.eigenpairs(model, objective, 3, dtype=torch.float64)
    xr.testing.assert_identical(found, expected)
    assert found["eigenvalues"].dtype == found["0.weight/eigenvectors"].dtype == np.float64
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.dtype == objective.inputs.dtype == torch.float32


def test_measuring__leaves_the_model_and_the_random_numbers_alone() -> None:
    model, objective = problem()
    rng, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        rec.curvature.eigenpairs(model, objective, 1)
        rec.curvature.density(model, objective, "fisher_mc", k_steps=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_results__go_into_the_analysis_as_they_are() -> None:
    model, objective = problem()
    hessian = rec.curvature.eigenpairs(model, objective, 2, blocks="rows", tol=1e-6)
    weight = xr.DataArray(model[0].weight.detach().numpy(), dims=("out", "in"))
    vectors = hessian["0.weight/eigenvectors"]
    rho = analysis.alignment(weight, vectors, vector_dims=["in"])
    basis = torch.from_numpy(vectors.values)
    true = torch.einsum("oei,oi->oe", basis, model[0].weight).norm(dim=1) / model[0].weight.norm(dim=1)
    np.testing.assert_allclose(rho, true.detach(), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"matrix": "kfac"}, ValueError, r"matrix must be one of .* or FisherMC\(...\); got 'kfac'"),
        ({"k": 0}, ValueError, "at least 1"),
        ({"k": 4}, ValueError, r"fewer parameters: 3\.bias \(3\)"),
        ({"blocks": ["0.weight"]}, TypeError, "or a mapping of labels"),
        ({"layers": ["0.wieght"]}, ValueError, "did you mean '0.weight'"),
        ({"which": "LA"}, ValueError, "got 'LA'"),
    ],
)
def test_eigenpairs__refuse_what_cannot_be(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rec.curvature.eigenpairs(*problem(), **{"k": 1, **arguments})


def test_not_finite__is_an_error_and_no_result() -> None:
    model, objective = problem()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    for function in (rec.curvature.trace, rec.curvature.density, rec.curvature.diagonal):
        with pytest.raises(rec.NonFiniteCurvatureError, match="loss"):
            function(model, objective)


# ---------------------------------------------------------------------------- operators of other packages


def symmetric(size: int = 30, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T).to(dtype)


class OnlyProducts:
    """The least that is asked: a shape and products with torch vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self.shape = matrix, matrix.shape

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector


WAYS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tensor": (lambda a: a, "float64"),
    "float32 tensor": (lambda a: a.float(), "float32"),
    "bfloat16 tensor": (lambda a: a.bfloat16(), "float32"),
    "shape and product": (lambda a: OnlyProducts(a.float()), "float32"),
    "array": (lambda a: a.numpy(), "float64"),
    "sparse": (lambda a: scipy.sparse.csr_array(a.numpy()), "float64"),
    "scipy": (lambda a: scipy.sparse.linalg.aslinearoperator(a.numpy()), "float64"),
    "float32 scipy": (lambda a: scipy.sparse.linalg.aslinearoperator(a.float().numpy()), "float32"),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
def test_operator__of_any_kind_gives_its_eigenpairs(way: str, which: Any) -> None:
    make, dtype = WAYS[way]
    exact = symmetric()
    # what bfloat16 rounds is another matrix, which products in bfloat16 round again
    tol = 3e-2 if way.startswith("bfloat16") else 1e-4
    found = rec.curvature.operator_eigenpairs(make(exact), 4, which=which, tol=tol, name="A")
    values = torch.linalg.eigvalsh(exact)
    order = {
        "magnitude": values.abs().argsort(descending=True)[:4],
        "largest": values.argsort(descending=True)[:4],
        "smallest": values.argsort()[:4],
        "both": torch.tensor([29, 0, 28, 1]),
    }[which]
    np.testing.assert_allclose(found["eigenvalues"], values[order], rtol=tol)
    assert found["eigenvalues"].dims == found["residuals"].dims == ("eig",)
    assert found["eigenvectors"].dims == ("eig", "param")
    assert str(found["eigenvectors"].dtype) == dtype
    assert found.attrs == {"matrix": "A", "k": 4, "which": which, "tolerance": tol}
    assert found["eigenvalues"].attrs["long_name"] == "eigenvalue"
    assert int(found["n_matvec"]) > 4
    if not way.startswith("bfloat16"):
        vectors = torch.from_numpy(found["eigenvectors"].values).double()
        error = (vectors @ exact - torch.from_numpy(found["eigenvalues"].values)[:, None] * vectors).norm(
            dim=1
        )
        true = error / values[order].abs()
        assert bool((true <= 2 * tol).all())
        np.testing.assert_allclose(found["residuals"], true, rtol=0.1, atol=1e-6)
        assert found["converged"].values.all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operator_by_autograd__works_in_any_mode_of_the_caller(mode: Any) -> None:
    model, objective = problem()
    parameters = list(model.eval().parameters())

    class HessianProduct:
        shape = (sum(p.numel() for p in parameters),) * 2

        def __matmul__(self, vector: Tensor) -> Tensor:
            loss = F.cross_entropy(model(objective.inputs), objective.targets)
            first = torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)]
            )
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(first @ vector, parameters)])

    with mode():
        found = rec.curvature.operator_eigenpairs(HessianProduct(), 2, model=model)
    ours = rec.curvature.eigenpairs(model, objective, 2, blocks="model", include_regularizer=False)
    assert found.attrs["matrix"] == "HessianProduct"
    np.testing.assert_allclose(found["eigenvalues"], ours["eigenvalues"].squeeze("layer"), rtol=1e-4)


def test_operator__that_is_not_symmetric_is_not_flagged() -> None:
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    found = rec.curvature.operator_eigenpairs(torch.block_diag(*[turn] * 20), 2)
    assert not found["converged"].values.any()


def test_operator__that_runs_out_of_products_is_not_flagged() -> None:
    found = rec.curvature.operator_eigenpairs(symmetric(200), 5, tol=1e-10, max_matvec=12)
    assert int(found["n_matvec"]) == 12
    assert not found["converged"].values.all()
    assert bool((found["residuals"].values[~found["converged"].values] > 1e-10).all())


def test_operator__is_solved_the_same_way_each_time_and_draws_nothing() -> None:
    rng = torch.get_rng_state()
    one, two = (rec.curvature.operator_eigenpairs(symmetric(60), 3) for _ in range(2))
    xr.testing.assert_identical(one, two)
    assert torch.equal(torch.get_rng_state(), rng)


def curvlinops_operator(kind: str, model: nn.Module, objective: rec.Objective) -> Any:
    pytest.importorskip("curvlinops")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        import curvlinops
    data = [(objective.inputs, objective.targets)]
    parameters = list(model.parameters())
    return getattr(curvlinops, kind)(
        model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )


@pytest.mark.parametrize(
    ("kind", "matrix"), [("HessianLinearOperator", "hessian"), ("GGNLinearOperator", "ggn")]
)
@pytest.mark.parametrize("exported", [False, True])
def test_operator_of_curvlinops__gives_our_own_eigenpairs(kind: str, matrix: Any, exported: bool) -> None:
    model, objective = problem()
    model.eval()
    operator = curvlinops_operator(kind, model, objective)
    given = operator.to_scipy() if exported else operator
    with torch.no_grad():  # the operator needs autograd, whatever the caller's mode
        found = rec.curvature.operator_eigenpairs(given, 4, tol=1e-4, model=model, name=kind)
    ours = rec.curvature.eigenpairs(model, objective, 4, matrix, "model", tol=1e-4, include_regularizer=False)
    assert found["converged"].values.all()
    np.testing.assert_allclose(found["eigenvalues"], ours["eigenvalues"].squeeze("layer"), rtol=1e-4)
    theirs, expected = found["eigenvectors"], ours["model/eigenvectors"]
    for name in ("layers", "layer_shapes", "vector_dims", "number_dim"):
        assert theirs.attrs[name] == expected.attrs[name]
    cosine = np.abs((theirs.values * expected.values).sum(-1))
    np.testing.assert_allclose(cosine, 1, atol=1e-3)
    # labelled so that weights can be brought into the same order
    weights = {}
    for name, p in model.named_parameters():
        dims = ("out", "in")[: p.ndim]
        array = xr.DataArray(p.detach().numpy(), dims=dims, attrs={"vector_dims": list(dims)})
        weights[f"/{name}"] = xr.Dataset({"weight": array})
    flat = analysis.flatten_like(xr.DataTree.from_dict(weights), theirs)
    stacked = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    np.testing.assert_array_equal(flat, stacked)


@pytest.mark.parametrize(
    ("operator", "options", "error", "message"),
    [
        (torch.ones(3, 4), {}, ValueError, r"square symmetric operator; got the shape \(3, 4\)"),
        (torch.ones(3), {}, ValueError, r"square symmetric operator; got the shape \(3,\)"),
        ([[1.0]], {}, TypeError, "needs a shape and products with vectors.*got list"),
        (
            torch.eye(3, dtype=torch.complex64),
            {},
            TypeError,
            "real floating numbers; its dtype is torch.complex64",
        ),
        (np.eye(3) * 1j, {}, TypeError, "real floating numbers; its dtype is complex128"),
        (torch.eye(3, dtype=torch.int64), {}, TypeError, "its dtype is torch.int64"),
        (torch.eye(3), {"k": 4}, ValueError, "k must be between 1 and the size 3"),
        (torch.eye(3), {"which": "LM"}, ValueError, "got 'LM'"),
        (torch.eye(3), {"model": nn.Linear(3, 1)}, ValueError, "of size 3, but the model has 4 trainable"),
    ],
)
def test_operator__refuses_what_cannot_be(
    operator: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rec.curvature.operator_eigenpairs(operator, **{"k": 1, **options})


def test_operator__whose_products_are_wrong_is_refused() -> None:
    class Column(OnlyProducts):
        def __matmul__(self, vector: Tensor) -> Tensor:
            return super().__matmul__(vector)[:, None]

    with pytest.raises(ValueError, match=r"shape \(30,\) has shape \(30, 1\)"):
        rec.curvature.operator_eigenpairs(Column(symmetric(dtype=torch.float32)), 1)
    broken = symmetric()
    broken[3, 4] = torch.nan
    with pytest.raises(rec.NonFiniteCurvatureError, match="'mine'") as error:
        rec.curvature.operator_eigenpairs(broken, 1, name="mine")
    assert error.value.block == "mine"
