"""Probes of fixed inputs: which modules, which inputs, and that training does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.probes.probe_set import ProbeSet, captured, module_values, select_modules


class NoisyNet(nn.Module):
    """Dropout draws random numbers, BatchNorm moves buffers, an activation works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop, self.act = nn.Dropout(0.3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop(self.act(self.norm(self.fc1(x)))))
        return out


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


def all_probes(inputs: Tensor) -> list[rec.Probe]:
    return [
        rec.Features(inputs, batch_size=7),
        rec.Features(inputs, side="input", group="layer_inputs"),
        rec.Outputs(inputs, transform=nn.Softmax(1)),
        rec.ConjugateKernel(inputs, modules=["act"]),
        rec.TangentKernel(inputs),
        rec.AGOP(inputs),
    ]


def train(path: Path | None, *, steps: int = 12, stop_at: int | None = None, resume: Any = None) -> Any:
    """Train and record; returns the losses, and what a checkpoint would hold."""
    torch.manual_seed(0)
    x, y = data()
    model = NoisyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        torch.set_rng_state(resume["rng"])
        start = resume["step"]
    losses = []

    def loop() -> None:
        for _ in range(start, steps if stop_at is None else stop_at):
            batch = torch.randint(len(x), (8,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    if path is None:
        loop()
    else:
        with rec.Recorder(
            path,
            model,
            optimizer,
            probes=all_probes(x[:10]),
            schedule=rec.every(3, total_steps=steps),
            resume=resume is not None,
            start_step=start if resume is not None else None,
        ):
            loop()
    state = {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
        "step": stop_at,
        "flags": [module.training for module in model.modules()],
    }
    return losses, state


def same(one: Any, other: Any) -> None:
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert torch.equal(one["rng"], other["rng"])
    assert one["flags"] == other["flags"]


def test_recording__leaves_training_bit_identical(tmp_path: Path) -> None:
    plain, plain_state = train(None)
    losses, state = train(tmp_path / "run.zarr")
    assert losses == plain
    same(state, plain_state)
    run = hx.open(tmp_path / "run.zarr")
    assert run["features"].sizes["step"] == 5
    for probe in ("features", "layer_inputs", "outputs", "conjugate_kernel", "tangent_kernel", "agop"):
        for node in run[probe].subtree:
            for name, array in node.to_dataset(inherit=False).data_vars.items():
                assert np.isfinite(array.values).all(), f"{node.path}/{name}"
    assert hx.validate(tmp_path / "run.zarr").ok


def test_resumed_run__is_bit_identical(tmp_path: Path) -> None:
    train(tmp_path / "whole.zarr")
    _, checkpoint = train(tmp_path / "resumed.zarr", stop_at=7)
    train(tmp_path / "resumed.zarr", resume=checkpoint)
    whole, resumed = hx.open(tmp_path / "whole.zarr"), hx.open(tmp_path / "resumed.zarr")
    compared = 0
    for node in whole.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            if name != "committed":
                other = resumed[node.path][name].values
                np.testing.assert_array_equal(other, array.values, err_msg=f"{node.path}/{name}")
                compared += 1
    assert compared == 3 + 3 + 1 + 1 + 1 + 2


def test_measuring__leaves_gradients_and_hooks_alone() -> None:
    model, (x, _) = NoisyNet(), data()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for probe in all_probes(x):
        probe.plan(model, None, None)
        with torch.no_grad(), torch.inference_mode():
            probe.record(rec.Snapshot(model, None, None, 0))
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters() if p.grad is not None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks__are_taken_off_when_the_model_fails() -> None:
    model = NoisyNet()
    with pytest.raises(RuntimeError, match="shapes"), captured(model, ["fc1"], "output"):
        model(torch.zeros(2, 5))
    assert not model.fc1._forward_hooks


def test_modules__by_default_are_those_with_parameters_and_a_row_for_each_sample() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.whole = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.once(x)))
            out: Tensor = x * self.whole(x.mean(0, keepdim=True))
            return out

    probe_set = ProbeSet(data()[0])
    model = Net()
    inputs = probe_set.data(model, None)
    assert list(select_modules(model, inputs, None, "output")) == ["once"]
    for name, words in (("twice", "float32"), ("never", "no call"), ("whole", r"\(1, 1\)")):
        with pytest.raises(ValueError, match=f"module '{name}' must be called once.*{words}"):
            select_modules(model, inputs, [name], "output")


def test_embedding__has_no_input_to_record_but_an_output() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    inputs = ProbeSet(torch.randint(5, (8, 3))).data(model, None)
    assert list(select_modules(model, inputs, None, "output")) == ["0", "2"]
    assert list(select_modules(model, inputs, None, "input")) == ["2"]
    with pytest.raises(ValueError, match="int64"):
        select_modules(model, inputs, ["0"], "input")


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        (["fc3"], KeyError, "no module 'fc3' in the model; did you mean 'fc2'"),
        (["fc1", "fc1"], ValueError, "none twice"),
        ([], ValueError, "at least one"),
        ([""], ValueError, "Outputs"),
        ("fc1", TypeError, r"write \['fc1'\]"),
    ],
)
def test_modules__that_cannot_be_are_refused(modules: Any, error: type[Exception], words: str) -> None:
    for probe in (rec.Features(data()[0], modules=modules), rec.ConjugateKernel(data()[0], modules=modules)):
        with pytest.raises(error, match=words):
            probe.plan(NoisyNet(), None, None)


def test_side__that_is_unknown_is_refused() -> None:
    side: Any = "inputs"
    with pytest.raises(ValueError, match="'output', 'input'; got 'inputs'"):
        rec.Features(data()[0], side=side).plan(NoisyNet(), None, None)


@pytest.mark.parametrize(
    "make",
    [rec.Features, rec.Outputs, rec.ConjugateKernel, rec.TangentKernel, rec.AGOP],
)
def test_inputs__that_cannot_be_are_refused_at_once(make: Callable[..., rec.Probe]) -> None:
    with pytest.raises(TypeError, match="got ndarray"):
        make(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no samples"):
        make(torch.zeros(0, 6))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make(torch.zeros(3, 6), batch_size=0)
    with pytest.raises(ValueError, match=r"batch_size is for inputs of the probe's own"):
        make(batch_size=2)
    with pytest.raises(ValueError, match=r"inputs hold 2 and 3 samples"):
        make((torch.zeros(3, 6), torch.zeros(2, 6)))
    with pytest.raises(ValueError, match="lie on meta but the model on cpu"):
        make(torch.zeros(3, 6, device="meta")).plan(NoisyNet(), None, None)


@pytest.mark.parametrize(
    "make", [rec.Features, rec.Outputs, rec.ConjugateKernel, rec.TangentKernel, rec.AGOP]
)
def test_inputs__are_the_objectives_where_none_are_given(
    tmp_path: Path, make: Callable[..., rec.Probe]
) -> None:
    x, y = data()
    model, probe, own = NoisyNet(), make(), make(x)
    assert probe.needs_objective
    assert not own.needs_objective
    with pytest.raises(ValueError, match="need an objective"):
        rec.Recorder(tmp_path / "run.zarr", model, probes=[probe], schedule=rec.at([0])).plan()
    objective = rec.Objective(F.cross_entropy, x, y, batch_size=5)
    probe.plan(model, None, objective)
    own.plan(model, None, None)
    found = probe.record(rec.Snapshot(model, None, objective, 0))
    expected = own.record(rec.Snapshot(model, None, None, 0))
    for node, arrays in expected.items():
        for name, value in arrays.items():
            np.testing.assert_allclose(np.asarray(found[node][name]), np.asarray(value), rtol=2e-5, atol=1e-6)


def test_inputs__are_copied() -> None:
    x, _ = data()
    model = NoisyNet()
    probe = rec.Outputs(x)
    probe.plan(model, None, None)
    before = np.asarray(probe.record(rec.Snapshot(model, None, None, 0))[""]["outputs"]).copy()
    x.zero_()
    after = np.asarray(probe.record(rec.Snapshot(model, None, None, 0))[""]["outputs"]).copy()
    np.testing.assert_array_equal(after, before)


def test_inputs__of_several_tensors_and_of_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            out: Tensor = self.fc(input=left - right)
            return out

    model, left, right = Net(), torch.randn(5, 2), torch.randn(5, 2)
    expected = model(left, right).detach()
    for inputs in ((left, right), {"right": right, "left": left}):
        given = ProbeSet(inputs, batch_size=2).data(model, None)
        torch.testing.assert_close(module_values(model, given, ["fc"], "output")["fc"], expected)
        torch.testing.assert_close(module_values(model, given, ["fc"], "input")["fc"], left - right)


def test_labels__stand_in_the_group(tmp_path: Path) -> None:
    x, y = data()
    probes = [
        rec.Features(x, labels=y),
        rec.Outputs(x, labels=y.tolist()),
        rec.TangentKernel(x[:5], labels=y[:5]),
    ]
    with rec.Recorder(tmp_path / "run.zarr", NoisyNet(), probes=probes, schedule=rec.at([0])):
        pass
    assert hx.validate(tmp_path / "run.zarr").ok
    run = hx.open(tmp_path / "run.zarr")
    assert "label" not in run["features/fc1"].data_vars
    for group, n in (("features", 24), ("outputs", 24), ("tangent_kernel", 5)):
        label = run[f"{group}/label"]
        assert label.dims == ("sample",)
        np.testing.assert_array_equal(label.values, y[:n].numpy())


def test_labels__that_do_not_fit_are_refused() -> None:
    x, y = data()
    with pytest.raises(TypeError, match=r"one integer for each sample; got torch\.float32"):
        rec.Features(x, labels=y.float())
    with pytest.raises(ValueError, match="one label for each sample: 23 for 24"):
        rec.Features(x, labels=y[:-1]).plan(NoisyNet(), None, None)


def test_diverged_model__is_recorded_as_it_is_and_training_goes_on(tmp_path: Path) -> None:
    x, _ = data()
    model = NoisyNet()
    with rec.Recorder(
        tmp_path / "run.zarr", model, probes=all_probes(x), schedule=rec.every(1, total_steps=1)
    ) as recorder:
        with torch.no_grad():
            model.fc2.bias.fill_(torch.nan)
            model.fc2.weight.fill_(torch.inf)
        recorder.step()
    run = hx.open(tmp_path / "run.zarr")
    assert np.isfinite(run["features/fc1/activations"].values).all()
    assert np.isnan(run["features/fc2/activations"].values[0, 1]).all()
    assert np.isnan(run["outputs/outputs"].values[0, 1]).all()
    assert np.isfinite(run["tangent_kernel/tangent_kernel"].values[0, 0]).all()
    assert not np.isfinite(run["tangent_kernel/tangent_kernel"].values[0, 1]).any()
    assert not np.isfinite(run["agop/fc1.weight/agop"].values[0, 1]).any()


def test_ensemble__records_each_member_as_a_run_of_its_own_would(tmp_path: Path) -> None:
    x, _ = data()
    models = [nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    probes = [rec.Features(x), rec.AGOP(x)]
    with rec.EnsembleRecorder(
        tmp_path / "both.zarr",
        models[0],
        parameters,
        buffers,
        probes=probes,
        schedule=rec.at([0]),
        seeds=range(2),
    ):
        pass
    both = hx.open(tmp_path / "both.zarr")
    for seed, model in enumerate(models):
        with rec.Recorder(tmp_path / f"{seed}.zarr", model, probes=probes, schedule=rec.at([0]), seed=seed):
            pass
        alone = hx.open(tmp_path / f"{seed}.zarr")
        for path in ("features/2/activations", "agop/0.weight/agop"):
            np.testing.assert_array_equal(both[path].sel(seed=seed).values, alone[path].sel(seed=seed).values)


@settings(max_examples=15)
@given(st.permutations(range(9)), st.integers(1, 10))
def test_order_of_samples__and_batches_do_not_matter(order: list[int], batch_size: int) -> None:
    torch.manual_seed(0)
    model, x = NoisyNet().double(), data(9)[0].double()
    for probe, permuted in zip(
        all_probes(x),
        [
            rec.Features(x[order], batch_size=batch_size),
            rec.Features(x[order], side="input", batch_size=batch_size),
            rec.Outputs(x[order], transform=nn.Softmax(1), batch_size=batch_size),
            rec.ConjugateKernel(x[order], modules=["act"], batch_size=batch_size),
            rec.TangentKernel(x[order], batch_size=batch_size),
            rec.AGOP(x[order], batch_size=batch_size),
        ],
        strict=True,
    ):
        plans = [p.plan(model, None, None) for p in (probe, permuted)]
        found = [p.record(rec.Snapshot(model, None, None, 0)) for p in (probe, permuted)]
        for node, planned in plans[0].items():
            for name, array in planned.arrays.items():
                expected = np.asarray(found[0][node][name])
                for axis, dim in enumerate(array.dims):
                    if dim in ("sample", "sample_"):
                        expected = expected.take(order, axis=axis)
                np.testing.assert_allclose(
                    np.asarray(found[1][node][name]), expected, rtol=1e-9, atol=1e-12, err_msg=name
                )
