"""Arguments of the wrong type or out of range: what was expected and what came, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.curvature import Curvature, FisherMC, lanczos_eigenpairs
from hild_xr.recorders.curvature.cross_spectrum import singular_triplets


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(20, 30)
    return model, rec.Objective(F.cross_entropy, x, x[:, :3].argmax(1))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 1.5}, TypeError, r"k, the number of eigenpairs, must be a whole number.*1\.5 of type float"),
    ({"k": True}, TypeError, "whole number.*True of type bool"),
    ({"k": "3"}, TypeError, "whole number.*'3' of type str"),
    ({"tol": "a"}, TypeError, "tol, .* must be a number, as a float; got 'a'"),
    ({"tol": math.nan}, ValueError, "tol, .* positive number; got nan"),
    ({"tol": 0.0}, ValueError, "tol, .* positive number"),
    ({"max_seconds": "1"}, TypeError, "max_seconds must be a number.*'1'"),
    ({"max_seconds": math.nan}, ValueError, "max_seconds must be 0 or more.*math.inf"),
    ({"max_seconds": -1}, ValueError, "max_seconds must be 0 or more.*got -1"),
    ({"max_matvec": 20.0}, TypeError, "max_matvec, .* whole number"),
    ({"max_matvec": 0}, ValueError, "max_matvec, .* must be 1 or more"),
    ({"which": "LM"}, ValueError, "which must be one of"),
    ({"dense_up_to": "all"}, TypeError, "dense_up_to must be a whole number"),
    ({"matrix_up_to": -1}, ValueError, "matrix_up_to must be 0 or more"),
    ({"blocks": {"model": 3}}, TypeError, "block 'model' holds names of parameters.*got 3 of type int"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG)
def test_spectra__refuse_wrong_arguments_everywhere(
    settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given = {"k": 2, **settings}
    with pytest.raises(kind, match=message):
        rec.Hessian(**given)
    with pytest.raises(kind, match=message):
        rec.curvature.eigenpairs(*problem(), **given)
    with Curvature(*problem()) as curvature, pytest.raises(kind, match=message):
        curvature.eigenpairs(**given)


@pytest.mark.parametrize("name", ["guard", "probe_steps", "seed"])
def test_search_settings__are_whole_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number"):
        rec.curvature.eigenpairs(*problem(), 2, **{name: 0.5})


def test_whole_numbers_of_numpy__are_taken() -> None:
    found = rec.curvature.eigenpairs(*problem(), np.int64(2), blocks="model")
    assert found.attrs["k"] == 2
    assert found.sizes["eig"] == 2


@pytest.mark.parametrize("dtype", ["float64", torch.int64, np.float64])
def test_dtype__is_one_of_torch(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"floating torch.dtype, such as torch.float64"):
        rec.curvature.eigenpairs(*problem(), 1, dtype=dtype)
    with pytest.raises(TypeError, match=r"floating torch.dtype, such as torch.float64"):
        Curvature(*problem(), dtype=dtype)


def test_model_and_objective__are_asked_for() -> None:
    model, objective = problem()
    for wrong in (None, (F.cross_entropy, objective.inputs, objective.targets)):
        message = rf"got {type(wrong).__name__}: .* Objective\(loss, inputs, targets\)"
        with pytest.raises(TypeError, match=message):
            rec.curvature.eigenpairs(model, wrong, 1)
        with pytest.raises(TypeError, match=message):
            rec.curvature.trace(model, wrong)
        with pytest.raises(TypeError, match=message):
            Curvature(model, wrong)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got NoneType"):
        rec.curvature.density(None, objective)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got NoneType"):
        Curvature(None, objective)


@pytest.mark.parametrize("products", [2.5, "3", True])
@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "diagonal"])
def test_products__are_a_whole_number(name: str, products: Any) -> None:
    with pytest.raises(TypeError, match="products must be a whole number"):
        getattr(rec.curvature, name)(*problem(), products=products)
    with (
        Curvature(*problem()) as curvature,
        pytest.raises(TypeError, match="products must be a whole number"),
    ):
        getattr(curvature, name)(products=products)


def test_operator_eigenpairs__refuse_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="k, the number of eigenpairs, must be a whole number"):
        rec.curvature.operator_eigenpairs(np.eye(9), 1.5)
    with pytest.raises(ValueError, match="max_seconds must be 0 or more"):
        rec.curvature.operator_eigenpairs(np.eye(9), 1, max_seconds=math.nan)


def test_start__must_be_tensors_of_known_blocks() -> None:
    with Curvature(*problem()) as curvature:
        vectors = curvature.eigenpairs(1)["0.weight"].eigenvectors
        with pytest.raises(
            ValueError, match=r"unknown block '0.weigth'; did you mean '0.weight'\? The blocks"
        ):
            curvature.eigenpairs(1, start={"0.weigth": vectors})
        with pytest.raises(TypeError, match=r"block '0.weight' must be a tensor .* got ndarray"):
            curvature.eigenpairs(1, start={"0.weight": vectors.numpy()})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match=r"mapping of labels to tensors.*got Tensor"):
            curvature.eigenpairs(1, start=vectors)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "gmatrix", "fisher", FisherMC(2)])
@pytest.mark.parametrize("which", ["magnitude", "smallest"])
def test_budget__too_small_is_refused_exactly_where_a_search_would_need_more(matrix: Any, which: Any) -> None:
    """The plan refuses what the run would refuse, and lets all pass that it cannot tell of."""
    model, objective = problem()
    for blocks in ("layer", "rows"):
        for label, size in (("0.weight", 240 if blocks == "layer" else 30), ("2.weight", 24)):
            for dense_up_to in (None, 0):
                settings = {"blocks": blocks, "layers": [label], "which": which, "dense_up_to": dense_up_to}
                with Curvature(model, objective) as curvature:
                    found = curvature.eigenpairs(2, matrix, **settings)[label]
                    searched = found.path in ("lanczos", "warm")
                    if not searched:
                        again = curvature.eigenpairs(2, matrix, max_matvec=1, **settings)[label]
                        assert torch.equal(again.eigenvalues, found.eigenvalues), (blocks, size)
                        continue
                    curvature.eigenpairs(2, matrix, max_matvec=5, **settings)
                    with pytest.raises(ValueError, match="max_matvec=4 is too small"):
                        curvature.eigenpairs(2, matrix, max_matvec=4, **settings)


def test_budget__too_small_is_refused_before_training(tmp_path: Any) -> None:
    model, objective = problem()
    probes = [rec.Hessian(3, max_matvec=5)]
    recorder = rec.Recorder(
        tmp_path / "run.zarr", model, objective=objective, probes=probes, schedule=rec.at([50])
    )
    message = r"max_matvec=5 is too small for k=3 eigenpairs of block '0.weight'.*at least 6.*dense_up_to=240"
    with pytest.raises(ValueError, match=message), recorder:
        pytest.fail("the run began")
    assert not (tmp_path / "run.zarr").exists()
    whole = rec.Hessian(3, max_matvec=3, dense_up_to=240)
    with rec.Recorder(
        tmp_path / "run.zarr", model, objective=objective, probes=[whole], schedule=rec.at([0])
    ):
        pass


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("k", 2.0),
        ("k", True),
        ("tol", "1e-3"),
        ("guard", "2"),
        ("probe_steps", 1.5),
        ("seed", None),
        ("max_matvec", "9"),
        ("max_basis", 20.0),
        ("max_seconds", "1"),
    ],
)
def test_lanczos__refuses_what_is_no_number(setting: str, value: object) -> None:
    matrix = torch.diag(torch.arange(30.0))
    settings: dict[str, Any] = {"k": 2} | {setting: value}
    with pytest.raises(TypeError, match=rf"{setting}.* must be a (whole )?number"):
        lanczos_eigenpairs(lambda vectors, _: vectors @ matrix, 30, **settings)


@pytest.mark.parametrize(("setting", "value"), [("k", 1.0), ("tol", "1e-3")])
def test_singular_triplets__refuse_what_is_no_number(setting: str, value: object) -> None:
    model, objective = problem()
    settings: dict[str, Any] = {"k": 1} | {setting: value}
    with Curvature(model, objective) as curvature:
        operator = curvature.cross_operator("0.weight", "2.weight")
        with pytest.raises(TypeError, match=rf"{setting}.* must be a (whole )?number"):
            singular_triplets(operator, **settings)


def test_products__of_a_trace_are_a_whole_number() -> None:
    with pytest.raises(TypeError, match=r"products, the budget of a sub-block, must be a whole number.*'3'"):
        rec.Trace(products="3")


def test_objective__of_another_type_is_refused_before_training(tmp_path: Any) -> None:
    model, _ = problem()
    recorder = rec.Recorder(
        tmp_path / "run.zarr",
        model,
        objective=(torch.nn.functional.cross_entropy, torch.eye(3)),
        probes=[rec.Hessian(3)],
        schedule=rec.at([0]),
    )
    with (
        pytest.raises(TypeError, match=r"must be an Objective\(loss, inputs, targets\).*type tuple"),
        recorder,
    ):
        pytest.fail("the run began")
    assert not (tmp_path / "run.zarr").exists()


def test_numbers__of_numpy_are_taken() -> None:
    model, objective = problem()
    plain: dict[str, Any] = {
        "k": 2,
        "guard": 1,
        "probe_steps": 3,
        "seed": 4,
        "max_matvec": 60,
        "max_seconds": 100.0,
        "tol": 1e-3,
    }
    numpy = {name: (np.float64 if isinstance(v, float) else np.int64)(v) for name, v in plain.items()}
    with Curvature(model, objective) as curvature:
        for blocks in ("layer", "rows"):
            one = curvature.eigenpairs(**plain, blocks=blocks, dense_up_to=0)
            other = curvature.eigenpairs(**numpy, blocks=blocks, dense_up_to=np.int64(0))
            for label, found in one.items():
                assert torch.equal(found.eigenvalues, other[label].eigenvalues)
