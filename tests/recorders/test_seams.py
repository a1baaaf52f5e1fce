"""Where training loops differ, the records do not: each seam trains for real, with and without a recorder.

Compiled models use the backend ``aot_eager``, which traces forward and backward as ``inductor`` does and
generates no code: the first use of ``inductor`` compiles C++ for 16 s on the machine of the tests.

The truth is the run without: a copy of the model after each update. The recorded run must end in the same
bits, its weights must be those copies, and its Hessian that of the copy, taken by brute force.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec

UPDATES = 6
RECORDED = (0, 1, 2, 4, 6)

After = Callable[[], None]


@dataclass
class Training:
    """A model, what the recorder is given to count updates, and the loop that trains."""

    model: nn.Module
    optimizer: Any
    loop: Callable[[After], None]
    """Trains, and calls its argument after each real update of the weights."""
    layers: tuple[str, ...] = ("0.weight",)
    """Whose Hessian is recorded."""
    updates: list[int] = field(default_factory=list)
    """What the loop wants to tell the test."""


def _data(samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _objective(model: nn.Module) -> rec.Objective:
    x, y = _data()
    return rec.Objective(F.cross_entropy, x.to(next(model.parameters()).dtype), y)


def _batch_loss(model: nn.Module, samples: int = 8) -> torch.Tensor:
    """Take the loss of a batch drawn from torch's own generator: a recorder that draws is found out."""
    x, y = _data()
    batch = torch.randint(len(x), (samples,))
    return F.cross_entropy(model(x[batch].to(next(model.parameters()).dtype)), y[batch])


def _simple_loop(model: nn.Module, optimizer: torch.optim.Optimizer, after: After) -> None:
    for _ in range(UPDATES):
        optimizer.zero_grad()
        _batch_loss(model).backward()
        optimizer.step()
        after()


def _simple(model: nn.Module, **changes: object) -> Training:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.3, momentum=0.9)
    return Training(model, optimizer, functools.partial(_simple_loop, model, optimizer), **changes)


def plain_loop() -> Training:
    return _simple(_network())


def adamw() -> Training:
    model = _network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return Training(model, optimizer, functools.partial(_simple_loop, model, optimizer))


def gradient_accumulation() -> Training:
    """Three batches an update: updates are counted, batches are not."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def loop(after: After) -> None:
        for batch in range(3 * UPDATES):
            (_batch_loss(model) / 3).backward()
            if batch % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                after()

    return Training(model, optimizer, loop)


def amp_with_a_skipped_step() -> Training:
    """An infinite gradient makes GradScaler skip the update; what did not happen has no number."""
    model = _network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def loop(after: After) -> None:
        for iteration in range(UPDATES + 1):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = _batch_loss(model)
            scaler.scale(loss).backward()
            before = copy.deepcopy(model.state_dict())
            if iteration == 2:
                model.get_parameter("0.weight").grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            if iteration == 2:
                assert _same(before, model.state_dict()), "the scaler skipped"
            else:
                after()

    return Training(model, optimizer, loop)


def lbfgs() -> Training:
    """One step of L-BFGS evaluates its closure several times and is one update."""
    model = _network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    training = Training(model, optimizer, lambda after: None)

    def closure() -> torch.Tensor:
        training.updates.append(1)
        optimizer.zero_grad()
        x, y = _data()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def loop(after: After) -> None:
        for _ in range(UPDATES):
            optimizer.step(closure)
            after()
        assert len(training.updates) > 2 * UPDATES, "several evaluations an update"

    training.loop = loop
    return training


def closure() -> Training:
    """Lightning and others hand forward and backward to the optimizer as a closure."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _batch_loss(model)
        loss.backward()
        return loss

    def loop(after: After) -> None:
        for _ in range(UPDATES):
            optimizer.step(evaluate)
            after()

    return Training(model, optimizer, loop)


def several_parameter_groups() -> Training:
    model = _network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [model[2].weight], "lr": 0.1, "weight_decay": 0.1},
        {"params": [model[2].bias], "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups)
    return Training(model, optimizer, functools.partial(_simple_loop, model, optimizer))


def two_optimizers() -> Training:
    """One for each half of the model, both step in an iteration: the last one closes it."""
    model = _network()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.5),
        torch.optim.Adam(model[2].parameters(), lr=0.05),
    ]

    def loop(after: After) -> None:
        for _ in range(UPDATES):
            for optimizer in optimizers:
                optimizer.zero_grad()
            _batch_loss(model).backward()
            for optimizer in optimizers:
                optimizer.step()
            after()

    return Training(model, optimizers, loop)


def two_optimizers_at_two_paces() -> Training:
    """The first half is updated twice as often; the recorder is given the one whose updates are to count."""
    model = _network()
    often = torch.optim.SGD(model[0].parameters(), lr=0.2)
    seldom = torch.optim.SGD(model[2].parameters(), lr=0.2)

    def loop(after: After) -> None:
        for iteration in range(2 * UPDATES):
            for optimizer in (often, seldom):
                optimizer.zero_grad()
            _batch_loss(model).backward()
            often.step()
            if iteration % 2:
                seldom.step()
                after()

    return Training(model, seldom, loop)


def compiled_by_torch_compile() -> Training:
    model = torch.compile(_network(), backend="aot_eager")
    return _simple(model)


def compiled_in_place() -> Training:
    model = _network()
    model.compile(backend="aot_eager")
    return _simple(model)


def compiled_forward() -> Training:
    model: Any = _network()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return _simple(model)


class Tied(nn.Module):
    """Encoder and decoder share a matrix, as the embedding and the head of a language model do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(5, 3, bias=False), nn.Linear(3, 5)
        self.decoder = nn.Linear(5, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.decoder(torch.tanh(self.middle(torch.tanh(self.encoder(x)))))
        return out


def tied_weights() -> Training:
    return _simple(Tied().double(), layers=("encoder.weight", "middle.weight"))


def frozen_parameters() -> Training:
    model = _network()
    model[0].requires_grad_(False)
    return _simple(model, layers=("2.weight",))


def buffers_and_dropout() -> Training:
    """BatchNorm moves its statistics and dropout draws: a record must do neither."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 3))
    return _simple(model.double(), layers=("0.weight", "1.weight"))


def step_wrapped_on_the_instance() -> Training:
    """As schedulers, accelerate and profilers do it: ``optimizer.step`` is another function."""
    training = _simple(_network())
    optimizer = training.optimizer
    inner = optimizer.step

    @functools.wraps(inner)
    def step(*args: object, **kwargs: object) -> object:
        training.updates.append(1)
        return inner(*args, **kwargs)

    setattr(optimizer, "step", step)  # noqa: B010
    return training


def wrapper_that_is_no_optimizer() -> Training:
    """Sharpness-aware minimisation: two steps of the inner optimizer make one update, so the loop counts."""
    model = _network()
    inner = torch.optim.SGD(model.parameters(), lr=0.2)

    def loop(after: After) -> None:
        for _ in range(UPDATES):
            start = [parameter.detach().clone() for parameter in model.parameters()]
            for sign in (-0.1, 1.0):
                inner.zero_grad()
                _batch_loss(model).backward()
                if sign > 0:
                    with torch.no_grad():
                        for parameter, value in zip(model.parameters(), start, strict=True):
                            parameter.copy_(value)
                else:
                    for parameter in model.parameters():
                        parameter.grad.mul_(sign)
                inner.step()
            after()

    return Training(model, None, loop)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _plain(model: nn.Module) -> nn.Module:
    """Look inside torch.compile, and take a copy that runs without it."""
    inner = getattr(model, "_orig_mod", model)
    fresh = copy.copy(inner)
    fresh.__dict__ = {
        name: value
        for name, value in inner.__dict__.items()
        if name not in ("forward", "_compiled_call_impl")
    }
    return copy.deepcopy(fresh)


def _dense_spectra(model: nn.Module, layer: str) -> dict[str, np.ndarray]:
    """Eigenvalues of both matrices of a layer by brute force, the largest magnitude first."""
    x, y = _data()
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    start = model.get_parameter(layer).reshape(-1)

    def loss(flat: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = {layer: flat.reshape(model.get_parameter(layer).shape)}
        return F.cross_entropy(torch.func.functional_call(model, weight, (inputs,)), targets)

    hessian = torch.func.hessian(loss)(start, x, y)
    gradients = torch.stack([torch.func.grad(loss)(start, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    matrices = {"hessian": hessian, "gmatrix": gradients.T @ gradients / len(x)}
    values = {name: np.linalg.eigvalsh(matrix.numpy()) for name, matrix in matrices.items()}
    return {name: found[np.argsort(-np.abs(found))] for name, found in values.items()}


SEAMS: list[Callable[[], Training]] = [
    plain_loop,
    adamw,
    gradient_accumulation,
    amp_with_a_skipped_step,
    lbfgs,
    closure,
    several_parameter_groups,
    two_optimizers,
    two_optimizers_at_two_paces,
    compiled_by_torch_compile,
    compiled_in_place,
    compiled_forward,
    tied_weights,
    frozen_parameters,
    buffers_and_dropout,
    step_wrapped_on_the_instance,
    wrapper_that_is_no_optimizer,
]


@pytest.mark.parametrize("build", SEAMS, ids=lambda build: build.__name__)
def test_seam__records_the_true_states_and_leaves_training_bit_identical(
    tmp_path: Path, build: Callable[[], Training]
) -> None:
    torch.manual_seed(0)
    plain = build()
    truth = [_plain(plain.model)]
    plain.loop(lambda: truth.append(_plain(plain.model)))
    generator_state = torch.get_rng_state()

    torch.manual_seed(0)
    training = build()
    with rec.Recorder(
        tmp_path / "run.zarr",
        training.model,
        training.optimizer,
        objective=_objective(training.model),
        probes=[
            rec.Weights(),
            rec.Hessian(k=2, layers=training.layers, tol=1e-7),
            rec.GMatrix(k=2, layers=training.layers, tol=1e-7),
            rec.Metrics(),
        ],
        schedule=rec.at(RECORDED),
    ) as recorder:
        training.loop(lambda: None if training.optimizer else recorder.step())

    assert recorder.current_step == UPDATES == len(truth) - 1
    assert _same(training.model.state_dict(), plain.model.state_dict())
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert training.model.training
    run = hx.open(tmp_path / "run.zarr").load()
    assert list(run["weights"].children) == [name for name, _ in truth[0].named_parameters()]
    tolerance = 1e-6 if next(training.model.parameters()).dtype == torch.float64 else 1e-3
    for i, step in enumerate(RECORDED):
        for name, parameter in truth[step].named_parameters():
            stored = run[f"weights/{name}/weight"].isel(seed=0, step=i).values
            np.testing.assert_array_equal(stored, parameter.detach().numpy(), err_msg=f"{name}, step {step}")
        for layer in training.layers:
            for matrix, values in _dense_spectra(truth[step], layer).items():
                found = run[f"{matrix}/eigenvalues"].sel(seed=0, step=step, layer=layer).values
                np.testing.assert_allclose(found, values[:2], rtol=tolerance, atol=tolerance * abs(values[0]))
    assert bool(run["hessian/converged"].all())


def _states_of(training: Training) -> list[dict[str, torch.Tensor]]:
    states = [copy.deepcopy(training.model.state_dict())]
    training.loop(lambda: states.append(copy.deepcopy(training.model.state_dict())))
    return states


def test_seams__move_the_weights_at_every_update() -> None:
    """Else a recorder that is one update late would pass."""
    for build in SEAMS:
        torch.manual_seed(0)
        states = _states_of(build())
        assert not any(_same(a, b) for a, b in itertools.pairwise(states)), build.__name__


def test_learning_rate__is_the_one_that_made_the_step(tmp_path: Path) -> None:
    """The scheduler moves the rate after the update, so the record of step n holds what step n used."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    with rec.Recorder(
        tmp_path / "run.zarr", model, optimizer, probes=[rec.Metrics()], schedule=rec.at([0, 1, 2, 3])
    ):
        used = []
        for _ in range(3):
            optimizer.zero_grad()
            _batch_loss(model).backward()
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    rates = hx.open(tmp_path / "run.zarr")["metrics/learning_rate"].values[0]
    np.testing.assert_array_equal(rates, [0.4, *used])
    np.testing.assert_array_equal(used, [0.4, 0.2, 0.1])


def test_first_of_two_optimizers__would_record_an_iteration_half_done(tmp_path: Path) -> None:
    """Why the last one counts: at the first one's step the second half has not moved yet."""
    torch.manual_seed(0)
    training = two_optimizers()
    first, _ = training.optimizer
    start = copy.deepcopy(training.model.state_dict())
    with rec.Recorder(
        tmp_path / "run.zarr", training.model, first, probes=[rec.Weights()], schedule=rec.at([1])
    ):
        training.loop(lambda: None)
    run = hx.open(tmp_path / "run.zarr").isel(seed=0, step=0)
    np.testing.assert_array_equal(run["weights/2.weight/weight"].values, start["2.weight"].numpy())
    assert not np.array_equal(run["weights/0.weight/weight"].values, start["0.weight"].numpy())


def test_compiled_submodule__is_recorded_under_the_names_that_it_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _network()
    layer_0: Any = torch.compile(model[0], backend="aot_eager")
    model[0] = layer_0
    training = _simple(model)
    layer = "0._orig_mod.weight"
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        training.optimizer,
        objective=_objective(model),
        probes=[rec.Weights(), rec.Hessian(k=2, layers=[layer], tol=1e-7)],
        schedule=rec.at([UPDATES]),
    ):
        training.loop(lambda: None)
    whole = _network()
    whole.load_state_dict({n.replace("_orig_mod.", ""): t for n, t in model.state_dict().items()})
    found = hx.open(tmp_path / "run.zarr")["hessian/eigenvalues"].values.squeeze()
    np.testing.assert_allclose(found, _dense_spectra(whole, "0.weight")["hessian"][:2], rtol=1e-6)
