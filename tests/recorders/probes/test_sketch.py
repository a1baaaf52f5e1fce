"""The sketch on the device against NumPy, and sketched records of real networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import analysis
from hild_xr import recorders as rec
from hild_xr import sketch as sk
from hild_xr.recorders.probes import sketching
from hild_xr.recorders.problems import Digits
from hild_xr.sketch import JohnsonLindenstrauss, Sketch, standard_error

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------- NumPy and torch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nonzeros", [1, 3, 4])
def test_torch__gives_the_bits_of_numpy(device: str, nonzeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sk, "CHUNK", 4096)
    scales = 10.0 ** np.array([[0], [-300], [280], [-40]])
    x = np.random.default_rng(0).normal(size=(4, 10_007)) * scales
    x[3, 5] = 1e30  # far beyond its neighbours
    sketch = JohnsonLindenstrauss(m=60, seed=5, nonzeros=nonzeros).over({"a": 10_000, "b": 7})
    found = sketching.apply(sketch, torch.from_numpy(x).to(device)).cpu().numpy()
    np.testing.assert_array_equal(found, sketch.apply(x))
    for dtype in (torch.float32, torch.float16):
        narrow = torch.from_numpy(x[:1]).to(device, dtype)
        exact = sketch.apply(narrow.cpu().numpy())
        np.testing.assert_array_equal(sketching.apply(sketch, narrow).cpu().numpy(), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_hash_on_the_device__is_that_of_numpy(device: str, key: int) -> None:
    place = torch.device(device)
    for start, stop, m, nonzeros in ((0, 1000, 1024, 4), (2**40, 2**40 + 100, 2**28, 1), (5, 500, 15, 5)):
        found = sketching.device_buckets(key, start, stop, m, nonzeros, place)
        np.testing.assert_array_equal(found.cpu().numpy(), sk.buckets(key, start, stop, m, nonzeros))


@pytest.mark.parametrize("device", DEVICES)
def test_torch__marks_what_is_not_finite_and_keeps_no_graph(device: str) -> None:
    x = torch.ones(3, 50, device=device, requires_grad=True)
    with torch.no_grad():
        x[1, 3], x[2, 4] = math.nan, -math.inf
    found = sketching.apply(JohnsonLindenstrauss(m=8).over({"a": 50}), x)
    assert not found.requires_grad
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()


def test_torch__takes_stacks_parameters_and_bfloat16() -> None:
    sketch = JohnsonLindenstrauss(m=8).over({"a": 50})
    parameter = nn.Parameter(torch.randn(2, 3, 50, generator=torch.manual_seed(0)).bfloat16())
    found = sketching.apply(sketch, parameter)
    np.testing.assert_array_equal(found.numpy(), sketch.apply(parameter.detach().float().numpy()))
    with pytest.raises(ValueError, match="vectors of 50 numbers"):
        sketching.apply(sketch, torch.ones(51))


# ---------------------------------------------------------------------------- records


def wide_net() -> tuple[nn.Module, rec.Objective]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    x = torch.randn(60, 40, generator=generator)
    y = torch.randint(5, (60,), generator=generator)
    return model, rec.Objective(F.cross_entropy, x, y, l2=0.01)


def record(
    path: Path, probes: list[rec.Probe], model: nn.Module, objective: rec.Objective, steps: int = 2
) -> xr.DataTree:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rec.Recorder(
        path,
        model,
        optimizer,
        objective=objective,
        probes=probes,
        schedule=rec.every(1, total_steps=steps),
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = objective.mean_loss(model(objective.inputs), objective.targets)
            loss.backward()
            optimizer.step()
    return hx.open(path)


def both_ways(m: int | JohnsonLindenstrauss, k: int = 2) -> list[rec.Probe]:
    """Probes that record sketches, each beside one that records the same whole."""
    pairs: list[rec.Probe] = []
    for sketch, suffix in ((m, ""), (None, "_whole")):
        rows = sketch is not None
        pairs += [
            rec.Weights(sketch=sketch, group=f"weights{suffix}"),
            rec.Weights(sketch=sketch, sketch_rows=rows, group=f"weight_rows{suffix}"),
            rec.Gradient(sketch=sketch, group=f"gradients{suffix}"),
            rec.Hessian(k, sketch=sketch, group=f"hessian{suffix}"),
            rec.GMatrix(k, blocks="rows", sketch=sketch, group=f"rows{suffix}"),
            rec.GMatrix(k, blocks="model", sketch=sketch, group=f"model{suffix}"),
        ]
    return pairs


def test_records__are_sketches_by_the_matrix_in_their_attrs(tmp_path: Path) -> None:
    model, objective = wide_net()
    run = record(tmp_path / "run.zarr", both_ways(JohnsonLindenstrauss(m=24, seed=3)), model, objective)
    assert run["weights/0.weight/weight"].dims == ("seed", "step", "sketch")
    assert run["hessian/0.weight/eigenvectors"].dims == ("seed", "step", "eig", "sketch")
    assert run["rows/0.weight/eigenvectors"].dims == ("seed", "step", "out", "eig", "sketch")
    assert run["weight_rows/0.weight/weight"].dims == ("seed", "step", "out", "sketch")
    assert run["model/model/eigenvectors"].dims == ("seed", "step", "eig", "sketch")
    arrays = {
        "weights/0.weight/weight": {"0.weight": 1200},
        "weight_rows/0.weight/weight": {"0.weight": 40},
        "gradients/2.weight/gradient": {"2.weight": 150},
        "hessian/0.weight/eigenvectors": {"0.weight": 1200},
        "rows/2.weight/eigenvectors": {"2.weight": 30},
        "model/model/eigenvectors": {"0.weight": 1200, "0.bias": 30, "2.weight": 150, "2.bias": 5},
    }
    for path, sizes in arrays.items():
        stored = run[path]
        group, rest = path.split("/", 1)
        whole = run[f"{group}_whole/{rest}"]
        attr = stored.attrs["sketch"]
        assert stored.attrs["vector_dims"] == ["sketch"]
        assert (attr["scheme"], attr["m"], attr["seed"], attr["nonzeros"]) == (sk.SCHEME, 24, 3, 4)
        assert dict(zip(attr["layers"], attr["sizes"], strict=True)) == sizes
        assert "sqrt" in attr["error"]
        vectors = whole.values.reshape(*stored.shape[:-1], sum(sizes.values()))
        expected = Sketch.from_json(attr).apply(vectors)
        np.testing.assert_array_equal(stored.values, expected.astype(np.float32))
        # the helper for a user's own vectors is the same map
        found = sk.sketch(whole, like=stored)
        np.testing.assert_array_equal(found.transpose(*stored.dims).values, expected)


def test_small_tensors__are_stored_whole(tmp_path: Path) -> None:
    model, objective = wide_net()
    run = record(tmp_path / "run.zarr", both_ways(152), model, objective)
    for path in (
        "weights/2.weight/weight",
        "gradients/0.bias/gradient",
        "hessian/2.bias/eigenvectors",
        "rows/0.weight/eigenvectors",
        "weight_rows/0.weight/weight",
    ):
        group, rest = path.split("/", 1)
        stored, whole = run[path], run[f"{group}_whole/{rest}"]
        assert "sketch" not in stored.attrs
        np.testing.assert_array_equal(stored.values, whole.values)
        assert sk.sketch(whole, like=stored) is whole
    # by rows the vectors are rows, sketched or not
    assert run["weight_rows/0.weight/weight"].attrs["vector_dims"] == ["in"]
    assert "sketch" in run["weights/0.weight/weight"].attrs


def test_model_sketch__of_layers_is_that_of_the_flat_vector(tmp_path: Path) -> None:
    model, objective = wide_net()
    run = record(tmp_path / "run.zarr", both_ways(24), model, objective)
    like = run["model/model/eigenvectors"]
    layers = {name: run[f"weights/{name}/weight"] for name in like.attrs["layers"]}
    assert "sketch" not in layers["2.bias"].attrs
    flat = np.concatenate(
        [run[f"weights_whole/{name}/weight"].values.reshape(1, 3, -1) for name in layers], axis=-1
    )
    found = sk.sketch_model(layers, like)
    np.testing.assert_allclose(found.values, Sketch.from_json(like.attrs["sketch"]).apply(flat), atol=1e-6)
    assert analysis.alignment(found, like).dims == ("seed", "step")


def test_layers_in_two_runs__have_the_same_matrix(tmp_path: Path) -> None:
    model, objective = wide_net()
    one = record(tmp_path / "one.zarr", [rec.Weights(sketch=24)], model, objective, steps=0)
    other = record(tmp_path / "two.zarr", [rec.Weights(sketch=24)], model, objective, steps=0)
    for name in ("0.weight", "2.weight"):
        xr.testing.assert_identical(one[f"weights/{name}/weight"], other[f"weights/{name}/weight"])


def test_spectra__are_the_same_with_and_without_sketch(tmp_path: Path) -> None:
    model, objective = wide_net()
    run = record(tmp_path / "run.zarr", both_ways(24), model, objective)
    for name in ("eigenvalues", "residuals", "converged"):
        np.testing.assert_array_equal(run[f"hessian/{name}"].values, run[f"hessian_whole/{name}"].values)
    within = run["hessian/0.weight/eigenvectors"].attrs["orthonormal_within"]
    assert within == pytest.approx(math.sqrt(2 * 3 / 24))
    assert "orthonormal_within" not in run["hessian/2.bias/eigenvectors"].attrs


def test_size_estimate__knows_the_sketch() -> None:
    model, _ = wide_net()
    sizes = {}
    for m in (None, 24):
        plan = rec.Weights(sketch=m).plan(model, None, None)
        sizes[m] = sum(node.arrays["weight"].record_nbytes for node in plan.values())
    assert sizes == {None: 4 * (1200 + 30 + 150 + 5), 24: 4 * (24 + 24 + 24 + 5)}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: rec.Hessian(20, sketch=24), "take m=40 at least"),
        (lambda: rec.Weights(sketch=10), "take m=12"),
        (lambda: rec.Weights(sketch_rows=True), "needs sketch=m"),
        (lambda: rec.Gradient(sketch_rows=True), "needs sketch=m"),
    ],
)
def test_settings_that_have_no_meaning__are_refused_at_once(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# ---------------------------------------------------------------------------- what sketches are for


def sines(u: xr.DataArray, v: xr.DataArray) -> xr.DataArray:
    angles = analysis.principal_angles(u, v)
    return angles.copy(data=np.sin(angles.values))


def test_digits_network__alignment_and_angles_stay_within_the_stated_factor(tmp_path: Path) -> None:
    k, m = 5, 512
    pytest.importorskip("sklearn")
    problem = Digits(hidden=64)
    model = problem.model(seed=0)
    objective = problem.objective()
    layer = "fc1.weight"
    assert dict(model.named_parameters())[layer].numel() == 8 * m
    probes: list[rec.Probe] = []
    for sketch, suffix in ((m, ""), (None, "_whole")):
        probes += [
            rec.Weights(layers=[layer], sketch=sketch, group=f"weights{suffix}"),
            rec.GMatrix(k, layers=[layer], sketch=sketch, group=f"gmatrix{suffix}"),
            rec.Hessian(k, layers=[layer], sketch=sketch, group=f"hessian{suffix}"),
        ]
    run = record(tmp_path / "run.zarr", probes, model, objective, steps=3)

    def stored(suffix: str) -> list[xr.DataArray]:
        groups = ("weights", "weight"), ("hessian", "eigenvectors"), ("gmatrix", "eigenvectors")
        return [xr.DataArray(run[f"{group}{suffix}/{layer}/{name}"].load()) for group, name in groups]

    weight, U, V = stored("_whole")
    s_weight, s_U, s_V = stored("")
    matrix = Sketch.from_json(s_U.attrs["sketch"])
    stacked = np.concatenate(
        [a.values.reshape(4, -1, matrix.size) for a in (weight, U, V)], axis=1
    )  # all vectors of a step
    Q = np.linalg.qr(np.swapaxes(stacked, 1, 2))[0]
    values = np.linalg.svd(matrix.apply(np.swapaxes(Q, 1, 2)), compute_uv=False)
    delta = np.abs(values**2 - 1).max(axis=-1)
    D = 2 * k + 1
    assert (delta < 5 * math.sqrt(D * (D + 1) / m)).all()
    assert (delta < 0.9).all()
    factor = xr.DataArray(np.sqrt((1 + delta) / (1 - delta))[None], dims=("seed", "step")) * (1 + 1e-4)

    exact, found = sines(U, V), sines(s_U, s_V)
    assert (found <= exact * factor + 1e-4).all()
    assert (found >= exact / factor - 1e-4).all()
    away, s_away = 1 - analysis.alignment(weight, U) ** 2, 1 - analysis.alignment(s_weight, s_U) ** 2
    assert (s_away <= away * factor**2).all()
    assert (s_away >= away / factor**2).all()
    # in practice the errors are those of m independent numbers: a sine errs by about 1 / sqrt(m) of itself
    relative = (found / exact - 1).where(exact > 0.1)
    assert float(np.sqrt((relative**2).mean())) < 3 / math.sqrt(m)


def test_two_million_parameters__keep_inner_products_within_five_standard_errors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m, k = 1024, 2
    model = nn.Sequential(
        nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 10)
    )
    assert sum(p.numel() for p in model.parameters()) > 2_000_000
    objective = rec.Objective(F.cross_entropy, torch.randn(64, 1000), torch.randint(10, (64,)), l2=1e-3)
    probes: list[rec.Probe] = []
    for sketch, suffix in ((m, ""), (None, "_whole")):
        probes += [
            rec.Weights(sketch=sketch, group=f"weights{suffix}"),
            rec.Gradient(sketch=sketch, group=f"gradients{suffix}"),
            rec.GMatrix(k, blocks="model", sketch=sketch, group=f"model{suffix}"),
            rec.GMatrix(k, layers=["2.weight"], sketch=sketch, group=f"layer{suffix}"),
        ]
    run = record(tmp_path / "run.zarr", probes, model, objective, steps=1)
    assert run["weights"].nbytes < run["weights_whole"].nbytes / 100

    def vectors(suffix: str, of: str) -> np.ndarray:
        """All recorded vectors of a layer or the model, both steps: weights, gradients, eigenvectors."""
        if of == "model":
            like = run[f"model{suffix}/model/eigenvectors"]
            arrays = []
            for group, name in (("weights", "weight"), ("gradients", "gradient")):
                layers = {layer: run[f"{group}{suffix}/{layer}/{name}"] for layer in like.attrs["layers"]}
                if suffix:
                    flat = [a.values.reshape(2, -1) for a in layers.values()]
                    arrays.append(np.concatenate(flat, axis=1))
                else:
                    arrays.append(sk.sketch_model(layers, like).values.reshape(2, -1))
        else:
            like = run[f"layer{suffix}/{of}/eigenvectors"]
            arrays = [
                run[f"{group}{suffix}/{of}/{name}"].values.reshape(2, -1)
                for group, name in (("weights", "weight"), ("gradients", "gradient"))
            ]
        return np.concatenate([*arrays, like.values.reshape(2 * k, -1)]).astype(np.float64)

    for of in ("model", "2.weight"):
        whole, sketched = vectors("_whole", of), vectors("", of)
        assert sketched.shape == (4 + 2 * k, m)
        exact, found = whole @ whole.T, sketched @ sketched.T
        squares = np.diag(exact)
        errors = np.abs(found - exact) / standard_error(squares[:, None], squares, exact, m)
        assert errors.max() < 5
        assert errors.max() > 0.1  # they are sketches
