"""Models rebuilt from stored weights are those that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def objective() -> rec.Objective:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 1, 6, generator=generator)
    return rec.Objective(F.cross_entropy, x, torch.randint(3, (12,), generator=generator))


def train(
    path: Path,
    seed: int,
    *,
    steps: int = 6,
    probe: rec.Probe | None = None,
    model: nn.Module | None = None,
    stop: bool = False,
) -> dict[int, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = net() if model is None else model
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.2), objective()
    kept = {0: {name: value.clone() for name, value in model.state_dict().items()}}
    with rec.Recorder(
        path,
        model,
        optimizer,
        objective=data,
        probes=[rec.Weights() if probe is None else probe, rec.Metrics()],
        schedule=rec.every(2, total_steps=6),
        seed=seed,
        seeds=[0, 1],
    ):
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(data.inputs), data.targets).backward()
            optimizer.step()
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
    return kept


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rebuilt") / "run.zarr"
    train(path, 0)
    train(path, 1, steps=4)
    return path


@pytest.mark.filterwarnings("ignore::hild_xr.store.MissingRecordsWarning")
def test_load_weights__gives_back_the_model_of_every_record(tmp_path: Path) -> None:
    kept = {seed: train(tmp_path / "run.zarr", seed) for seed in (0, 1)}
    run = hx.open(tmp_path / "run.zarr")
    losses = run["metrics/train_loss"]
    for seed in (0, 1):
        for step in (0, 2, 4, 6):
            for source in (run, tmp_path / "run.zarr"):
                model = rec.load_weights(net(), source, step, seed)
                for name, value in model.state_dict().items():
                    assert torch.equal(value, kept[seed][step][name]), name
            stored = float(losses.sel(seed=seed, step=step))
            assert objective().value(model) == pytest.approx(stored, rel=1e-6)


def test_load_weights__takes_dims_by_name_and_the_precision_of_the_model(run_path: Path) -> None:
    run = hx.open(run_path)
    turned = run.map_over_datasets(
        lambda node: node.transpose("in", ..., "out", "step", missing_dims="ignore") if node.dims else node
    )
    model, other = rec.load_weights(net(), run, 2, 0), rec.load_weights(net().double(), turned, 2, 0)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert two.dtype == torch.float64
        assert torch.equal(one.double(), two)


def test_over_records__measures_every_record_in_a_copy(run_path: Path) -> None:
    run, model, data = hx.open(run_path), net(), objective()
    before = [p.detach().clone() for p in model.parameters()]
    found = rec.over_records(run, model, data.value)
    assert found.dims == ("seed", "step")
    expected = run["metrics/train_loss"]
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
    assert np.isnan(found.sel(seed=1, step=6)), "seed 1 was stopped before"
    assert np.isfinite(found.sel(seed=0, step=6))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_over_records__stacks_labelled_results(run_path: Path) -> None:
    data = objective()
    found = rec.over_records(
        run_path, net(), lambda model: rec.landscape.sharpness(model, data, 0.1), steps=[0, 4], seeds=[1]
    )
    assert isinstance(found, xr.Dataset)
    assert dict(found.sizes) == {"seed": 1, "step": 2}
    alone = rec.landscape.sharpness(rec.load_weights(net(), run_path, 4, 1), data, 0.1)
    assert float(found.sam_sharpness.sel(seed=1, step=4)) == float(alone.sam_sharpness)
    assert found.sam_sharpness.attrs == alone.sam_sharpness.attrs
    modified = rec.over_records(
        run_path, net(), lambda model: rec.landscape.modified_loss(model, data, 0.2), seeds=[0]
    )
    assert isinstance(modified, xr.DataArray)
    assert modified.name == "modified_loss"
    assert modified.dims == ("seed", "step")
    weights = rec.over_records(
        run_path,
        net(),
        lambda model: xr.DataArray(model.get_parameter("3.bias").detach().numpy().copy(), dims="out"),
    )
    np.testing.assert_array_equal(weights.values, hx.open(run_path)["weights/3.bias/weight"].values)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            {"step": 3, "seed": 0},
            ValueError,
            r"no record of step 3; of its 4 records the nearest: \[0, 2, 4, 6\]",
        ),
        ({"step": 6, "seed": 1}, ValueError, "seed 1 has no record of step 6"),
        ({"step": 2}, ValueError, r"seed=None: give one of the seeds of the run, \[0, 1\]"),
        ({"step": 2, "seed": 7}, ValueError, "seed=7"),
        ({"step": 2, "seed": 0, "group": "weight"}, KeyError, "no group 'weight', only"),
    ],
)
def test_record__that_is_not_there_is_refused(
    run_path: Path, call: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rec.load_weights(net(), run_path, **call)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            nn.Sequential(nn.Conv1d(1, 2, 3)),
            ValueError,
            "2 parameters that the model lacks, first '3.weight'",
        ),
        (
            nn.Sequential(*net(), nn.Linear(3, 3)),
            KeyError,
            "lacks 2 of the model's 6 parameters, first '4.weight'",
        ),
        (
            nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
            ValueError,
            r"'3.weight' has shape \(3, 9\) in the model but \(3, 8\) in the run",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), *list(net())[1:]),
            ValueError,
            "has dims .*'kh', 'kw'.* in the model",
        ),
    ],
)
def test_model__of_another_architecture_is_refused(
    run_path: Path, model: nn.Module, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rec.load_weights(model, run_path, 0, 0)


def test_model__with_buffers_asks_whether_they_are_right(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3))

    model = build()
    train(tmp_path / "run.zarr", 0, model=model)
    with pytest.raises(ValueError, match=r"1\.running_mean, 1\.running_var.*keep_buffers=True"):
        rec.load_weights(build(), tmp_path / "run.zarr", 6, 0)
    rebuilt = build()
    rebuilt.load_state_dict({**rebuilt.state_dict(), **dict(model.named_buffers())})
    rec.load_weights(rebuilt, tmp_path / "run.zarr", 6, 0, keep_buffers=True)
    assert objective().value(rebuilt) == objective().value(model)


def test_sketched_weights__cannot_be_had_back(tmp_path: Path) -> None:
    train(tmp_path / "run.zarr", 0, probe=rec.Weights(sketch=16))
    with pytest.raises(ValueError, match="recorded as a sketch"):
        rec.load_weights(net(), tmp_path / "run.zarr", 0, 0)


def test_over_records__without_a_record_says_so(run_path: Path) -> None:
    with pytest.raises(ValueError, match="no record to measure"):
        rec.over_records(run_path, net(), lambda model: 0.0, seeds=[])
