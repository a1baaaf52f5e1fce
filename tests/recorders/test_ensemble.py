from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.probes.base import NodeValues
from hild_xr.store import RecordsExistError

SEEDS = (3, 1, 4)
STEPS = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.norm(self.fc1(x)).tanh())
        return out


def _data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 5, generator=generator), torch.randint(3, (30,), generator=generator)


def _models() -> list[nn.Module]:
    models: list[nn.Module] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(Net().double())
    for model in models:
        x = _data()[0].double()
        model(x)  # running statistics that differ between the members
        model.eval()
    return models


def _probes() -> list[rec.Probe]:
    return [rec.Metrics(), rec.Weights(), rec.Hessian(k=2), rec.GMatrix(k=2, blocks="rows")]


def _objective(seed: int = 0) -> rec.Objective:
    x, y = _data(seed)
    return rec.Objective(F.cross_entropy, x.double(), y)


def _settings() -> dict[str, Any]:
    return {"probes": _probes(), "schedule": rec.every(4, total_steps=STEPS), "seeds": SEEDS}


Stack = dict[str, torch.Tensor]


def _train(parameters: Stack, buffers: Stack, model: nn.Module, sgd: torch.optim.Optimizer) -> None:
    x, y = _data()

    def loss(p: Stack, b: Stack) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, (p, b), (x.double(),)), y)

    for _ in range(STEPS):
        sgd.zero_grad()
        torch.vmap(loss)(parameters, buffers).sum().backward()
        sgd.step()


def _record_one_by_one(path: Path, models: list[nn.Module]) -> None:
    x, y = _data()
    for seed, model in zip(SEEDS, models, strict=True):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        with rec.Recorder(path, model, sgd, objective=_objective(), seed=seed, **_settings()):
            for _ in range(STEPS):
                sgd.zero_grad()
                F.cross_entropy(model(x.double()), y).backward()
                sgd.step()


@pytest.mark.parametrize("template", ["a member", "meta"])
def test_ensemble__records_what_single_runs_of_its_seeds_record(tmp_path: Path, template: str) -> None:
    models = _models()
    parameters, buffers = stack_module_state(models)
    model = copy.deepcopy(models[0])
    sgd = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.5)
    with rec.EnsembleRecorder(
        tmp_path / "ensemble.zarr",
        model.to("meta") if template == "meta" else model,
        parameters,
        buffers,
        sgd,
        objective=_objective(),
        **_settings(),
    ) as recorder:
        _train(parameters, buffers, copy.deepcopy(models[0]), sgd)
    assert recorder.current_step == STEPS
    _record_one_by_one(tmp_path / "single.zarr", models)
    ensemble, single = hx.open(tmp_path / "ensemble.zarr"), hx.open(tmp_path / "single.zarr")
    np.testing.assert_array_equal(ensemble["weights/seed"], SEEDS)
    for path in (
        "metrics/train_loss",
        "metrics/learning_rate",
        "weights/fc1.weight/weight",
        "weights/norm.bias/weight",
        "hessian/eigenvalues",
        "gmatrix_rows/fc2.weight/eigenvalues",
    ):
        xr.testing.assert_allclose(ensemble[path].load(), single[path].load(), rtol=1e-7, atol=1e-10)
    assert float(abs(ensemble["weights/fc1.weight"].weight.diff("seed")).min()) > 0


def test_new_stacks__are_taken_at_each_step(tmp_path: Path) -> None:
    models = [nn.Linear(2, 1, bias=False) for _ in SEEDS]
    parameters, _ = stack_module_state(models)
    history = [parameters["weight"].detach().clone()]
    with rec.EnsembleRecorder(
        tmp_path / "run.zarr", models[0], parameters,
        probes=[rec.Weights()], schedule=rec.every(1, total_steps=3), seeds=SEEDS,
    ) as recorder:  # fmt: skip
        for _ in range(3):
            parameters = {name: 0.5 * stack for name, stack in parameters.items()}
            recorder.step(parameters)
            history.append(parameters["weight"].detach().clone())
    stored = hx.open(tmp_path / "run.zarr")["weights/weight"].weight.values
    np.testing.assert_array_equal(stored, torch.stack(history, 1).numpy())


def test_objectives__may_differ_between_members(tmp_path: Path) -> None:
    models = _models()
    parameters, buffers = stack_module_state(models)
    objectives = [_objective(seed) for seed in SEEDS]
    with rec.EnsembleRecorder(
        tmp_path / "run.zarr", models[0], parameters, buffers,
        objective=objectives, probes=[rec.Metrics()], schedule=rec.at([0]), seeds=SEEDS,
    ):  # fmt: skip
        pass
    stored = hx.open(tmp_path / "run.zarr")["metrics/train_loss"].values[:, 0]
    np.testing.assert_allclose(
        stored, [o.value(m) for o, m in zip(objectives, models, strict=True)], rtol=1e-12
    )


def test_recording__leaves_the_stacks_and_the_template_alone(tmp_path: Path) -> None:
    models = _models()
    before = copy.deepcopy(models[0].state_dict())
    parameters, buffers = stack_module_state(models)
    stacks = {name: stack.detach().clone() for name, stack in (parameters | buffers).items()}
    with rec.EnsembleRecorder(
        tmp_path / "run.zarr", models[0], parameters, buffers,
        objective=_objective(), **_settings(),
    ) as recorder:  # fmt: skip
        for _ in range(STEPS):
            recorder.step()
    for name, stack in (parameters | buffers).items():
        assert torch.equal(stack, stacks[name])
        assert stack.grad is None
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_resume__goes_on_for_all_members(tmp_path: Path) -> None:
    models = [nn.Linear(2, 1) for _ in SEEDS]
    parameters, _ = stack_module_state(models)

    def record(steps: int, **options: Any) -> None:
        with rec.EnsembleRecorder(
            tmp_path / "run.zarr", models[0], parameters,
            probes=[rec.Weights()], schedule=rec.every(1, total_steps=9), seeds=SEEDS, **options,
        ) as recorder:  # fmt: skip
            for _ in range(steps):
                recorder.step()

    record(4)
    with pytest.raises(RecordsExistError):
        record(5)
    record(5, resume=True, start_step=4)
    assert bool((hx.open(tmp_path / "run.zarr")["weights/committed"].values == [1] * 5 + [2] * 5).all())


def test_member_that_cannot_start__leaves_no_record_of_the_others(tmp_path: Path) -> None:
    models = [nn.Linear(2, 1) for _ in SEEDS]
    parameters, _ = stack_module_state(models)
    settings: dict[str, Any] = {
        "probes": [rec.Weights()],
        "schedule": rec.every(1, total_steps=9),
        "seeds": SEEDS,
    }
    with rec.Recorder(tmp_path / "run.zarr", models[2], seed=SEEDS[2], **settings):
        pass
    with pytest.raises(RecordsExistError, match=f"seed {SEEDS[2]}"):
        rec.EnsembleRecorder(tmp_path / "run.zarr", models[0], parameters, **settings).start()
    np.testing.assert_array_equal(
        hx.open(tmp_path / "run.zarr")["weights/committed"].values > 0, [[False], [False], [True]]
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"seeds": (0, 1)},
            r"parameter 'fc1.bias' of 2 stacked members: expected shape \(2, 6\), got \(3, 6\)",
        ),
        ({"buffers": None}, r"buffer 'norm.num_batches_tracked' .* got None"),
        ({"objective": [_objective()]}, "one objective a member: 1 for 3 seeds"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_stacks_that_do_not_fit__are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    models = _models()
    parameters, buffers = stack_module_state(models)
    settings: dict[str, Any] = {"buffers": buffers, "objective": _objective()} | _settings() | change
    with pytest.raises(ValueError, match=says):
        rec.EnsembleRecorder(tmp_path / "run.zarr", models[0], parameters, **settings)
    assert list(tmp_path.iterdir()) == []


class InterruptedOnce(rec.Weights):
    """Ctrl-C while the second member of one step is measured."""

    calls = 0

    def record(self, snapshot: rec.Snapshot) -> NodeValues:
        type(self).calls += 1
        if type(self).calls == 3 + 3 + 2:
            raise KeyboardInterrupt
        return super().record(snapshot)


def test_interrupted_step__leaves_every_label_of_every_member_right(tmp_path: Path) -> None:
    models = [nn.Linear(2, 1, bias=False) for _ in SEEDS]
    parameters, _ = stack_module_state(models)
    history = [parameters["weight"].detach().clone()]
    with rec.EnsembleRecorder(
        tmp_path / "run.zarr", models[0], parameters,
        probes=[InterruptedOnce()], schedule=rec.every(2, total_steps=8), seeds=SEEDS,
    ) as recorder:  # fmt: skip
        for _ in range(8):
            with torch.no_grad():
                parameters["weight"].mul_(0.5)
            history.append(parameters["weight"].detach().clone())
            with contextlib.suppress(KeyboardInterrupt):
                recorder.step()
    run = hx.open(tmp_path / "run.zarr")["weights"]
    assert (run["committed"].values > 0).tolist() == [[True] * 5, [True, True, False, True, True], [True] * 5]
    expected = torch.stack(history[::2], 1).numpy()
    stored = run["weight/weight"].values
    np.testing.assert_array_equal(stored[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(stored[1, [0, 1, 3, 4]], expected[1, [0, 1, 3, 4]])


def test_start_that_fails__leaves_no_member_started(tmp_path: Path) -> None:
    models = [nn.Linear(2, 1) for _ in SEEDS]
    parameters, _ = stack_module_state(models)
    for _ in range(2):  # a lease that was not given back would be noticed the second time
        with pytest.raises(AttributeError):
            rec.EnsembleRecorder(
                tmp_path / "run.zarr", models[0], parameters, optimizer=object(),
                probes=[rec.Weights()], schedule=rec.every(1, total_steps=9), seeds=SEEDS,
            ).start()  # fmt: skip
