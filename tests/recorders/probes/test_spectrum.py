"""Spectra of modules and custom groups, from a training run to the opened store."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import analysis
from hild_xr import recorders as rec
from hild_xr.recorders.curvature import Curvature, solve
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.pairs import Eigenpairs
from hild_xr.sketch import sketch_model
from hild_xr.store.errors import PlanMismatchError

GROUPS = {"body": ["0.*", "2.weight"], "head": ["4.bias", "4.weight"], "biases": "*.bias"}
STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def problem() -> tuple[nn.Sequential, rec.Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(48, 8, dtype=torch.float64)
    return model, rec.Objective(F.cross_entropy, x, (x[:, :3].argmax(1)), l2=0.02)


def record(
    path: Path, probes: list[rec.Probe], *, after_step: Any = None, steps: int = STEPS
) -> tuple[xr.DataTree, list[nn.Sequential]]:
    """Train, and return the opened run with the model as it was at each record."""
    model, objective = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    states = [copy.deepcopy(model)]
    with rec.Recorder(
        path, model, optimizer, objective=objective, probes=probes, schedule=rec.every(1, total_steps=steps)
    ):
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            objective.mean_loss(model(objective.inputs), objective.targets).backward()
            if after_step is not None:
                after_step(step, model)
            optimizer.step()
            states.append(copy.deepcopy(model))
    return hx.open(path), states


def both(**options: Any) -> list[rec.Probe]:
    return [probe(3, **options) for probe in (rec.Hessian, rec.GMatrix)]


def dense_hessian(model: nn.Sequential, names: list[str]) -> Tensor:
    """Return the Hessian over the named parameters one after the other, by plain double backward."""
    _, objective = problem()
    parameters = [model.get_parameter(name) for name in names]
    loss = F.cross_entropy(model(objective.inputs), objective.targets)
    loss = loss + objective.l2 / 2 * sum(p.square().sum() for p in model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def test_default_groups__tell_the_blocks() -> None:
    assert rec.Hessian(2, blocks="module").group == "hessian_module"
    assert rec.GMatrix(2, blocks={"a": "*"}).group == "gmatrix_groups"
    assert rec.Hessian(2, blocks={"a": "*"}, group="mine").group == "mine"
    with pytest.raises(TypeError, match=r"or a mapping of labels .*; got \['fc.weight'\]"):
        rec.Hessian(2, blocks=["fc.weight"])


def test_recorded_modules_and_groups__are_sound_and_those_of_the_dense_matrix(tmp_path: Path) -> None:
    run, states = record(tmp_path / "run.zarr", [*both(blocks="module"), *both(blocks=GROUPS)])
    report = hx.validate(tmp_path / "run.zarr")
    assert report.findings == (), report
    layouts = {
        "hessian_module": {
            "0": ["0.weight", "0.bias"],
            "2": ["2.weight", "2.bias"],
            "4": ["4.weight", "4.bias"],
        },
        "hessian_groups": {
            "body": ["0.weight", "0.bias", "2.weight"],
            "head": ["4.weight", "4.bias"],
            "biases": ["0.bias", "2.bias", "4.bias"],
        },
    }
    for group, blocks in layouts.items():
        node = run[group]
        assert node["layer"].values.tolist() == list(blocks)
        assert node["eigenvalues"].dims == ("seed", "step", "layer", "eig")
        assert node["converged"].values.all()
        for label, names in blocks.items():
            vectors = run[f"{group}/{label}/eigenvectors"]
            assert vectors.dims == ("seed", "step", "eig", "param")
            assert vectors.attrs["vector_dims"] == ["param"]
            assert vectors.attrs["layers"] == names
            shapes = [list(states[0].get_parameter(name).shape) for name in names]
            assert vectors.attrs["layer_shapes"] == shapes
            for step in (0, STEPS):
                exact = dense_hessian(states[step], names)
                values = node["eigenvalues"].sel(step=step, layer=label).isel(seed=0).values
                expected = torch.linalg.eigvalsh(exact)
                expected = expected[expected.abs().argsort(descending=True)][:3]
                np.testing.assert_allclose(values, expected.numpy(), rtol=1e-6)
                rows = torch.from_numpy(vectors.sel(step=step).isel(seed=0).values)
                error = rows @ exact - torch.from_numpy(values)[:, None] * rows
                assert float(error.norm(dim=1).max()) <= 1e-2 * float(expected.abs().max())


def test_group_attributes__say_how_the_parameters_were_cut(tmp_path: Path) -> None:
    probes: list[rec.Probe] = [
        rec.Hessian(2, blocks="module", dense_up_to=10),
        rec.GMatrix(2, blocks={"head": "4.*", "all": ["*.weight", "*.bias"]}),
    ]
    run, _ = record(tmp_path / "run.zarr", probes, steps=1)
    assert run["hessian_module"].attrs["blocks"] == "module"
    assert run["hessian_module"].attrs["dense_up_to"] == 10
    assert run["gmatrix_groups"].attrs["blocks"] == {"head": ["4.*"], "all": ["*.weight", "*.bias"]}
    assert "dense_up_to" not in run["gmatrix_groups"].attrs


def test_dense_up_to__decides_how_blocks_are_solved(tmp_path: Path) -> None:
    probes: list[rec.Probe] = [
        rec.Hessian(3, blocks="module", dense_up_to=bound, group=f"up_to_{bound}") for bound in (0, 60)
    ]
    run, _ = record(tmp_path / "run.zarr", [*probes, rec.Hessian(3, blocks="module")], steps=1)
    products = {group: run[group]["n_matvec"].sel(layer="0") for group in ("up_to_0", "up_to_60")}
    assert (products["up_to_0"] > 0).all()
    assert (products["up_to_60"] == 0).all()
    assert (run["hessian_module/n_matvec"] == 0).all()  # the solver's own rule: all of these are small
    np.testing.assert_allclose(run["up_to_0/eigenvalues"], run["up_to_60/eigenvalues"], rtol=1e-5)


@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
def test_alignment_with_a_block_over_several_tensors__needs_no_hand_work(tmp_path: Path, matrix: str) -> None:
    probes = [
        rec.Weights(),
        rec.Gradient(),
        *both(blocks="module"),
        *both(blocks=GROUPS),
        *both(blocks="model"),
    ]
    run, states = record(tmp_path / "run.zarr", probes)
    for path, names in (
        (f"{matrix}_module/2", ["2.weight", "2.bias"]),
        (f"{matrix}_groups/body", ["0.weight", "0.bias", "2.weight"]),
        (f"{matrix}_model/model", [name for name, _ in states[0].named_parameters()]),
    ):
        vectors = run[f"{path}/eigenvectors"]
        flat = run["weights"].hild.flatten_like(run[path])
        assert flat.chunks is not None
        assert flat.identical(analysis.flatten_like(run["weights"], vectors))
        expected = [torch.cat([s.get_parameter(name).detach().reshape(-1) for name in names]) for s in states]
        np.testing.assert_array_equal(flat.isel(seed=0), torch.stack(expected).numpy())
        rho = analysis.alignment(flat, vectors).isel(seed=0)
        for step, state in enumerate(expected):
            basis = torch.from_numpy(vectors.isel(seed=0, step=step).values)
            true = float((basis @ state).norm() / state.norm())
            assert float(rho.sel(step=step)) == pytest.approx(true, rel=1e-9)
        gradient = run["gradients"].hild.flatten_like(run[path])
        assert gradient.name == "gradient"
        assert gradient.dims == ("seed", "step", "param")


def test_sketched_groups__are_compared_through_sketch_model(tmp_path: Path) -> None:
    probes: list[rec.Probe] = [
        rec.Weights(),
        rec.Hessian(2, blocks={"all": "*.weight"}, sketch=40),
        rec.Hessian(2, blocks={"all": "*.weight"}, group="whole"),
    ]
    run, _ = record(tmp_path / "run.zarr", probes, steps=2)
    assert hx.validate(tmp_path / "run.zarr").ok
    sketched, whole = run["hessian_groups/all/eigenvectors"], run["whole/all/eigenvectors"]
    assert sketched.attrs["sketch"]["layers"] == whole.attrs["layers"]
    weights = {name: node["weight"] for name, node in run["weights"].children.items()}
    flat = sketch_model(weights, sketched)
    assert analysis.alignment(flat, sketched).dims == ("seed", "step")
    with pytest.raises(ValueError, match=r"sketch_model\(weights, like\)"):
        run["weights"].hild.flatten_like(sketched)


def test_block_whose_parameters_change__is_missing_from_then_on(tmp_path: Path) -> None:
    def freeze(step: int, model: nn.Sequential) -> None:
        if step == 3:
            model[0].bias.requires_grad_(False)

    run, _ = record(tmp_path / "run.zarr", [*both(blocks="module"), *both(blocks=GROUPS)], after_step=freeze)
    assert hx.validate(tmp_path / "run.zarr").ok
    for group, affected in (("hessian_module", {"0"}), ("gmatrix_groups", {"body", "biases"})):
        for label in run[group]["layer"].values:
            values = run[group]["eigenvalues"].sel(layer=label).isel(seed=0)
            vectors = run[f"{group}/{label}/eigenvectors"].isel(seed=0)
            there = ~(values.isnull().any("eig") | vectors.isnull().any(["eig", "param"]))
            expected = [step < 3 or label not in affected for step in range(STEPS + 1)]
            assert there.values.tolist() == expected
            assert (run[group]["n_matvec"].sel(layer=label).isel(seed=0) >= 0).values.tolist() == expected


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a/b": ["4.*"]}, "a layer name becomes a folder"),
        ({"trace": ["4.*"]}, r"cannot be named like an array of its probe's group: \['trace'\]"),
        ({"Head": ["4.*"], "head": ["4.*"]}, "differ only in upper and lower case"),
        ({"head": ["4.wieght"]}, "did you mean '4.weight'"),
        ({"head": ["7.*"]}, "fits no trainable parameter"),
        (
            {"small": ["4.bias"], "head": "4.*"},
            r"k=4 .*small \(3\)\. Ask for k=3 or less, or leave these groups",
        ),
    ],
)
def test_blocks_that_cannot_be__are_refused_before_a_store_is_made(
    tmp_path: Path, blocks: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record(tmp_path / "run.zarr", [rec.Hessian(4, blocks=blocks)])
    assert not (tmp_path / "run.zarr").exists()


def test_resume__refuses_other_groups_under_the_same_label(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", [rec.Hessian(2, blocks={"a": "0.*"})], steps=1)
    with pytest.raises(PlanMismatchError, match="attrs/blocks/a"):
        record(tmp_path / "run.zarr", [rec.Hessian(2, blocks={"a": "4.*"})], steps=1)


def test_record__is_what_the_kernel_gives(tmp_path: Path) -> None:
    run, states = record(tmp_path / "run.zarr", both(blocks=GROUPS, matrix_up_to=25), steps=2)
    _, objective = problem()
    for matrix in ("hessian", "gmatrix"):
        with Curvature(states[2], objective) as curvature:
            found = curvature.eigenpairs(3, matrix, GROUPS, matrix_up_to=25)
        node = run[f"{matrix}_groups"].isel(seed=0).sel(step=2)
        for label, spectrum in found.items():
            np.testing.assert_array_equal(node["eigenvalues"].sel(layer=label), spectrum.eigenvalues)
            np.testing.assert_array_equal(node["residuals"].sel(layer=label), spectrum.residuals)
            np.testing.assert_array_equal(node[f"{label}/eigenvectors"], spectrum.eigenvectors)
            assert ("matrix" in node[label]) == (spectrum.block.size <= 25)
        np.testing.assert_array_equal(node["head/matrix"], found["head"].matrix)


class Quadratic(nn.Module):
    """A model whose Hessian is diagonal: what emerges on one axis is coupled to no other."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(curvatures), dtype=curvatures.dtype))
        self.roots = nn.Parameter(curvatures.sqrt(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.roots) @ self.weight


def record_quadratic(
    path: Path, probe: rec.Probe, emerging: int, steps: int, *, resume_at: int | None = None
) -> xr.DataTree:
    """Train a quadratic of 200 parameters in which an outlier emerges on an axis of its own."""
    size = 200
    curvatures = torch.linspace(0.1, 1.0, size, dtype=torch.float64)
    curvatures[:3] = torch.tensor([9.0, 8.0, 7.0])
    model = Quadratic(curvatures)
    objective = rec.Objective(
        lambda outputs, targets: ((outputs - targets) ** 2).mean() * size / 2,
        torch.eye(size, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def grow(step: int) -> None:
        with torch.no_grad():
            model.roots[100] = (0.5 + max(0, step - emerging + 1) * 4.0) ** 0.5
            model.roots[:3] = (curvatures[:3] * (1 + 1e-3 * step)).sqrt()

    grow(resume_at or 0)
    with rec.Recorder(
        path,
        model,
        optimizer,
        objective=objective,
        probes=[probe],
        schedule=rec.every(1, total_steps=24),
        resume=resume_at is not None,
        start_step=resume_at,
    ):
        for step in range((resume_at or 0) + 1, steps + 1):
            grow(step)
            optimizer.step()
    return hx.open(path)


@pytest.mark.parametrize("cold_every", [1, 4, 10])
def test_outlier_that_emerges__is_found_by_the_next_fresh_search(tmp_path: Path, cold_every: int) -> None:
    emerging = 6
    probe = rec.Hessian(3, layers=["weight"], tol=1e-6, cold_every=cold_every, dense_up_to=0)
    run = record_quadratic(tmp_path / "run.zarr", probe, emerging, steps=24)
    largest = run["hessian/eigenvalues"].isel(seed=0, layer=0).max("eig")
    step = run["hessian/step"]
    before = step < emerging + 2
    true = (9.0 * (1 + 1e-3 * step)).where(before, 0.5 + (step - emerging + 1) * 4.0)
    found_from = -(-(emerging + 2) // cold_every) * cold_every
    known = before | (step >= found_from)
    np.testing.assert_allclose(largest.where(known, drop=True), true.where(known, drop=True), rtol=1e-6)
    assert bool(run["hessian/converged"].all())
    products = run["hessian/n_matvec"].isel(seed=0, layer=0)
    assert int(products[0]) > 10
    if cold_every > 1:
        assert int(products[1]) < int(products[0]) / 2
    assert run["hessian"].attrs.get("cold_every", 10) == cold_every
    assert hx.validate(tmp_path / "run.zarr").ok


@pytest.mark.parametrize("stop", [9, 10, 12, 13])
def test_resume__begins_with_the_stored_eigenvectors_bit_for_bit(tmp_path: Path, stop: int) -> None:
    probe = rec.Hessian(3, layers=["weight"], cold_every=5, dense_up_to=0)
    whole = record_quadratic(tmp_path / "whole.zarr", probe, 50, steps=24)
    record_quadratic(tmp_path / "parts.zarr", probe, 50, steps=stop)
    parts = record_quadratic(tmp_path / "parts.zarr", probe, 50, steps=24, resume_at=stop)
    for name in ("hessian", "hessian/weight"):
        xr.testing.assert_equal(
            whole[name].to_dataset().drop_vars("committed", errors="ignore"),
            parts[name].to_dataset().drop_vars("committed", errors="ignore"),
        )
    assert int(whole["hessian/n_matvec"].min()) < int(whole["hessian/n_matvec"].max())


def test_fresh_searches__begin_at_other_random_vectors_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair that one start vector hardly holds is missed; the next search must not begin there again."""
    seeds: list[int] = []

    def noted(*args: Any, seed: int, **kwargs: Any) -> Eigenpairs:
        seeds.append(seed)
        return lanczos_eigenpairs(*args, seed=seed, **kwargs)

    monkeypatch.setattr(solve, "lanczos_eigenpairs", noted)
    probe = rec.Hessian(3, layers=["weight"], cold_every=2, dense_up_to=0)
    record_quadratic(tmp_path / "run.zarr", probe, 50, steps=9)
    record_quadratic(tmp_path / "run.zarr", probe, 50, steps=12, resume_at=9)
    assert seeds == [record // 2 for record in range(13)]


def test_cold_every__below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="cold_every counts records"):
        rec.GMatrix(3, cold_every=0)


def test_both_ends__are_recorded_and_valid(tmp_path: Path) -> None:
    run, _ = record(tmp_path / "run.zarr", [rec.Hessian(3, blocks="model", which="both")], steps=2)
    values = run["hessian_model/eigenvalues"].isel(seed=0, layer=0)
    assert bool((values.isel(eig=0) > values.isel(eig=2)).all())
    assert bool((values.isel(eig=2) > values.isel(eig=1)).all())
    assert hx.validate(tmp_path / "run.zarr").ok
