from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.store import (
    MissingRecordsWarning,
    PlanMismatchError,
    RecordsExistError,
    StoreWriteError,
    WriterBusyError,
)


class NoisyNet(nn.Module):
    """Dropout draws random numbers and BatchNorm updates buffers: recording must disturb neither."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.drop(self.norm(self.fc1(x)).relu()))
        return out


def _data(samples: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


def _objective() -> rec.Objective:
    return rec.Objective(F.cross_entropy, *_data(), l2=0.01)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], None] = lambda: None
) -> list[float]:
    x, y = _data()
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after()
    return losses


def _start(
    seed: int = 0, build: Callable[[], nn.Module] = NoisyNet
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = build()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _all_probes() -> list[rec.Probe]:
    return [
        rec.Metrics(test=_objective()),
        rec.Weights(),
        rec.Hessian(k=2, layers=["fc1.weight", "fc2.weight"], matrix_up_to=30),
        rec.GMatrix(k=2, blocks="rows"),
        rec.Hessian(k=2, blocks="model"),
    ]


def test_recording__leaves_training_bit_identical(tmp_path: Path) -> None:
    plain_model, plain_optimizer = _start()
    plain_losses = _train(plain_model, plain_optimizer, 200)
    plain_rng = torch.get_rng_state()

    model, optimizer = _start()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=_objective(),
        probes=_all_probes(),
        schedule=rec.every(10, total_steps=200),
    ):
        losses = _train(model, optimizer, 200)

    assert losses == plain_losses
    for (name, recorded), plain in zip(
        model.state_dict().items(), plain_model.state_dict().values(), strict=True
    ):
        assert torch.equal(recorded, plain), name
    for recorded, plain in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert recorded.grad is not None
        assert plain.grad is not None
        assert torch.equal(recorded.grad, plain.grad)
    assert torch.equal(torch.get_rng_state(), plain_rng)
    assert all(module.training for module in model.modules())
    assert hx.open(tmp_path / "run.zarr")["hessian"].sizes["step"] == 21


def test_records__hold_the_state_after_the_named_step(tmp_path: Path) -> None:
    model, optimizer = _start()
    kept = {0: copy.deepcopy(model.state_dict())}
    steps = iter(range(1, 21))

    def keep() -> None:
        kept[next(steps)] = copy.deepcopy(model.state_dict())

    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=_objective(),
        probes=[rec.Weights(schedule=rec.every(5, total_steps=20)), rec.Metrics()],
        schedule=rec.at([0, 3, 20]),
    ):
        _train(model, optimizer, 20, keep)

    run = hx.open(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run["weights/step"].values, [0, 5, 10, 15, 20])
    np.testing.assert_array_equal(run["metrics/step"].values, [0, 3, 20])
    for i, step in enumerate(run["weights/step"].values):
        for name in ("fc1.weight", "norm.bias"):
            stored = run[f"weights/{name}/weight"].isel(seed=0, step=i).values
            np.testing.assert_array_equal(stored, kept[int(step)][name].numpy())
    for step in (0, 3, 20):
        model.load_state_dict(kept[step])
        found = run["metrics"].to_dataset().sel(seed=0, step=step).load()
        assert found["train_loss"].item() == pytest.approx(_objective().value(model), rel=1e-6)
        x, y = _data()
        expected = (model.eval()(x).argmax(1) == y).double().mean().item()
        assert found["accuracy"].item() == pytest.approx(expected)
        assert found["learning_rate"].item() == 0.05


def test_spectra__are_those_of_the_dense_matrix_of_the_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = _data()
    objective = rec.Objective(F.cross_entropy, x.double(), y, l2=0.05)
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=objective,
        probes=[
            rec.Hessian(k=3, tol=1e-8, matrix_up_to=30),
            rec.Hessian(k=3, blocks="rows", tol=1e-8),
            rec.GMatrix(k=3, blocks="model", tol=1e-8),
        ],
        schedule=rec.at([0]),
    ):
        pass
    run = hx.open(tmp_path / "run.zarr")

    def loss(flat: torch.Tensor) -> torch.Tensor:
        first, second = flat[:24].reshape(4, 6), flat[24:].reshape(3, 4)
        penalty: torch.Tensor = 0.025 * flat.square().sum()
        data: torch.Tensor = F.cross_entropy(torch.tanh(x.double() @ first.T) @ second.T, y)
        total: torch.Tensor = data + penalty
        return total

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    dense = torch.func.hessian(loss)(flat).numpy()

    matrix = run["hessian/0.weight/matrix"].isel(seed=0, step=0).values
    np.testing.assert_allclose(matrix, dense[:24, :24], atol=1e-10)
    for layer, block in (("0.weight", dense[:24, :24]), ("2.weight", dense[24:, 24:])):
        values, vectors = np.linalg.eigh(block)
        top = np.argsort(-np.abs(values))[:3]
        stored = run["hessian"].to_dataset().sel(layer=layer).isel(seed=0, step=0)
        np.testing.assert_allclose(stored["eigenvalues"].values, values[top], rtol=1e-5)
        assert stored["converged"].values.all()
        basis = run[f"hessian/{layer}/eigenvectors"].isel(seed=0, step=0).values.reshape(3, -1)
        cosines = np.linalg.svd(basis @ vectors[:, top], compute_uv=False)
        np.testing.assert_allclose(cosines, 1, atol=1e-8)
    rows = run["hessian_rows/2.weight/eigenvalues"].isel(seed=0, step=0).values
    for c in range(3):
        block = dense[24 + 4 * c : 28 + 4 * c, 24 + 4 * c : 28 + 4 * c]
        values = np.linalg.eigvalsh(block)
        np.testing.assert_allclose(rows[c], values[np.argsort(-np.abs(values))[:3]], rtol=1e-5)

    def sample_gradient(xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        def single(flat: torch.Tensor) -> torch.Tensor:
            first, second = flat[:24].reshape(4, 6), flat[24:].reshape(3, 4)
            return F.cross_entropy(torch.tanh(xs @ first.T) @ second.T, ys)

        gradient: torch.Tensor = torch.func.grad(single)(flat)
        return gradient

    gradients = torch.stack([sample_gradient(a.double(), b) for a, b in zip(x, y, strict=True)]).numpy()
    expected = np.linalg.eigvalsh(gradients.T @ gradients / len(gradients))[::-1][:3]
    found = run["gmatrix_model/eigenvalues"].isel(seed=0, step=0, layer=0).values
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    flat_vectors = run["gmatrix_model/model/eigenvectors"]
    assert flat_vectors.dims == ("seed", "step", "eig", "param")
    assert flat_vectors.attrs["layers"] == ["0.weight", "2.weight"]
    assert flat_vectors.attrs["layer_shapes"] == [[4, 6], [3, 4]]


def test_group_attributes__say_what_was_measured(tmp_path: Path) -> None:
    model, optimizer = _start()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        objective=_objective(),
        probes=_all_probes(),
        schedule=rec.at([0]),
        config={"width": 8},
    ):
        pass
    run = hx.open(tmp_path / "run.zarr")
    assert run.attrs["config"] == {"width": 8}
    assert run.attrs["provenance"]["device"] == "cpu"
    assert run["hessian"].attrs["regularizer"] == 0.01
    assert run["hessian"].attrs["samples"] == 40
    assert run["gmatrix_rows"].attrs["regularizer"] == 0.0
    assert run["gmatrix_rows"].attrs["matrix"] == "gmatrix"
    assert run["gmatrix_rows/fc1.weight/eigenvectors"].dims == ("seed", "step", "out", "eig", "in")
    assert run["gmatrix_rows/fc1.weight/eigenvectors"].attrs["vector_dims"] == ["in"]


def test_seeds__share_a_store(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        model, optimizer = _start(seed)
        with rec.Recorder(
            tmp_path / "run.zarr",
            model,
            optimizer,
            objective=_objective(),
            probes=[rec.Weights(), rec.Hessian(k=1)],
            schedule=rec.every(5, total_steps=10),
            seed=seed,
            seeds=range(3),
        ):
            _train(model, optimizer, 10)
    run = hx.open(tmp_path / "run.zarr")
    assert run["weights"].sizes["seed"] == 3
    assert bool((run["hessian"]["committed"] == 1).all())
    final = run["weights/fc1.weight/weight"].isel(step=-1).values
    assert not np.array_equal(final[0], final[1])


def test_step__counts_for_loops_without_an_optimizer_object(tmp_path: Path) -> None:
    model, _ = _start()
    with rec.Recorder(
        tmp_path / "run.zarr", model, probes=[rec.Weights()], schedule=rec.at([0, 2])
    ) as recorder:
        for value in (1.0, 2.0, 3.0):
            with torch.no_grad():
                model.get_parameter("fc2.bias").fill_(value)
            recorder.step()
    stored = hx.open(tmp_path / "run.zarr")["weights/fc2.bias/weight"]
    assert stored.isel(seed=0, step=1).values.tolist() == [2.0, 2.0, 2.0]


def _interrupted(path: Path, at: int | None) -> None:
    """Train for 60 steps; interrupt at a step, and resume from the checkpoint of step 30."""
    schedule = rec.every(4, total_steps=60)

    def recorder(
        model: nn.Module, optimizer: torch.optim.Optimizer, resume: bool, start: int
    ) -> rec.Recorder:
        return rec.Recorder(
            path,
            model,
            optimizer,
            objective=_objective(),
            probes=_all_probes(),
            schedule=schedule,
            resume=resume,
            start_step=start,
        )

    model, optimizer = _start()
    if at is None:
        with recorder(model, optimizer, False, 0):
            _train(model, optimizer, 60)
        return
    with recorder(model, optimizer, False, 0):
        _train(model, optimizer, 30)
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        _train(model, optimizer, at - 30)
    model, optimizer = _start(seed=99)
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    torch.set_rng_state(checkpoint[2])
    with recorder(model, optimizer, True, 30):
        _train(model, optimizer, 30)


@pytest.mark.parametrize("at", [32, 45, 59])
def test_resume__gives_the_numbers_of_an_uninterrupted_run(tmp_path: Path, at: int) -> None:
    _interrupted(tmp_path / "whole.zarr", None)
    _interrupted(tmp_path / "resumed.zarr", at)
    whole, resumed = hx.open(tmp_path / "whole.zarr"), hx.open(tmp_path / "resumed.zarr")
    for node in whole.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            other = resumed[node.path][name]
            if name == "committed":
                attempts = other.values[0]
                np.testing.assert_array_equal(attempts, [1] * 8 + [2] * 8)
            else:
                np.testing.assert_array_equal(other.values, array.values, err_msg=f"{node.path}/{name}")


def test_exception_in_training__keeps_what_is_complete(tmp_path: Path) -> None:
    model, optimizer = _start()
    recorder = rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[rec.Weights()],
        schedule=rec.every(1, total_steps=100),
    )
    with pytest.raises(KeyboardInterrupt), recorder:
        _train(model, optimizer, 7)
        raise KeyboardInterrupt
    assert hx.open(tmp_path / "run.zarr")["weights"].sizes["step"] == 8
    _train(model, optimizer, 1)
    assert recorder.current_step == 7, "the hook is gone"


def test_nan_loss__is_marked_and_training_goes_on(tmp_path: Path) -> None:
    model, optimizer = _start()
    with (
        pytest.warns(rec.NonFiniteRecordWarning, match="step 4: .*training goes on") as warned,
        rec.Recorder(
            tmp_path / "run.zarr",
            model,
            optimizer,
            objective=_objective(),
            probes=_all_probes(),
            schedule=rec.every(2, total_steps=8),
        ) as recorder,
    ):
        _train(model, optimizer, 3)
        with torch.no_grad():
            model.get_parameter("fc2.bias").fill_(torch.nan)
        _train(model, optimizer, 5)
    assert len(warned) == 1
    assert recorder.current_step == 8
    run = hx.open(tmp_path / "run.zarr")
    hessian = run["hessian"].to_dataset().isel(seed=0).load()
    assert (hessian["committed"] == 1).all(), "a record of NaN is a record"
    assert np.isfinite(hessian["eigenvalues"].sel(step=slice(0, 2))).all()
    assert np.isnan(hessian["eigenvalues"].sel(step=slice(4, None))).all()
    assert not hessian["converged"].sel(step=slice(4, None)).any()
    assert np.isnan(run["metrics/train_loss"].isel(seed=0).sel(step=[4, 6, 8])).all()
    assert np.isnan(run["metrics/accuracy"].isel(seed=0).sel(step=[4, 6, 8])).all()
    assert np.isfinite(run["metrics/train_loss"].isel(seed=0).sel(step=[0, 2])).all()
    assert np.isnan(run["weights/fc2.bias/weight"].isel(seed=0, step=2)).all()


def _recorder(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **changes: object
) -> rec.Recorder:
    settings: dict[str, object] = {
        "objective": _objective(),
        "probes": [rec.Weights(), rec.Hessian(k=2, layers=["fc1.weight"])],
        "schedule": rec.every(5, total_steps=10),
    }
    return rec.Recorder(path, model, optimizer, **{**settings, **changes})


def test_existing_store_of_another_plan__is_refused_with_the_differences(tmp_path: Path) -> None:
    model, optimizer = _start()
    with _recorder(tmp_path / "run.zarr", model, optimizer):
        _train(model, optimizer, 10)
    other = _recorder(
        tmp_path / "run.zarr", model, optimizer, schedule=rec.every(2, total_steps=10), config={"a": 1}
    )
    with pytest.raises(PlanMismatchError) as caught, other:
        pass
    assert any(line.startswith("config/a") for line in caught.value.differences)
    assert any(line.startswith("probes/hessian/steps") for line in caught.value.differences)
    assert hx.open(tmp_path / "run.zarr")["hessian"].sizes["step"] == 3


def test_second_run_of_a_seed__is_refused_and_nothing_lost(tmp_path: Path) -> None:
    model, optimizer = _start()
    with _recorder(tmp_path / "run.zarr", model, optimizer):
        _train(model, optimizer, 10)
        with pytest.raises(WriterBusyError), _recorder(tmp_path / "run.zarr", model, optimizer):
            pass
    with (
        pytest.raises(RecordsExistError, match="resume=True"),
        _recorder(tmp_path / "run.zarr", model, optimizer),
    ):
        pass
    assert hx.open(tmp_path / "run.zarr")["hessian"].sizes["step"] == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"probes": [rec.Hessian(k=2, layers=["fc1.wieght"])]},
            (KeyError, ValueError),
            "did you mean 'fc1.weight'",
        ),
        (
            {"probes": [rec.Weights(layers=["fc3.weight"])]},
            (KeyError, ValueError),
            "did you mean 'fc2.weight'",
        ),
        ({"probes": [rec.Hessian(k=9)]}, ValueError, r"norm\.weight \(8\).*fc2\.bias \(3\)"),
        ({"probes": [rec.Hessian(k=0)]}, ValueError, "at least 1"),
        ({"objective": None}, ValueError, r"probes \['hessian'\] need an objective"),
        ({"probes": [rec.Weights(), rec.Weights()]}, ValueError, "same group"),
        ({"seed": 5, "seeds": [0, 1]}, ValueError, "seed 5 is not one of the planned seeds"),
    ],
)
def test_settings_that_do_not_fit__are_refused_before_a_store_is_made(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    model, optimizer = _start()
    with pytest.raises(error, match=message), _recorder(tmp_path / "run.zarr", model, optimizer, **changes):
        pass
    assert not (tmp_path / "run.zarr").exists()
    _train(model, optimizer, 1)


def test_objective_of_another_device__names_both(tmp_path: Path) -> None:
    model, optimizer = _start()
    x, y = _data()
    objective = rec.Objective(F.cross_entropy, x.to("meta"), y.to("meta"))
    with (
        pytest.raises(ValueError, match=r"lie on meta but the model on cpu"),
        _recorder(tmp_path / "run.zarr", model, optimizer, objective=objective),
    ):
        pass


def test_objective_of_another_length__names_both() -> None:
    x, y = _data()
    with pytest.raises(ValueError, match=r"40 .* 39"):
        rec.Objective(F.cross_entropy, x, y[:-1])


def test_full_disk__stops_with_the_cause_and_keeps_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hild_xr.store import raw

    model, optimizer = _start()
    write = raw._write_file
    full = False

    def write_until_full(path: Path, parts: raw.Parts) -> None:
        if full and "eigenvectors/c" in path.as_posix():
            raise OSError(28, "No space left on device")
        write(path, parts)

    monkeypatch.setattr(raw, "_write_file", write_until_full)
    with (
        pytest.raises(StoreWriteError, match=r"No space left on device.*up to step 5\) is safe.*resume=True"),
        _recorder(tmp_path / "run.zarr", model, optimizer) as recorder,
    ):
        _train(model, optimizer, 5)
        recorder.flush()
        full = True
        _train(model, optimizer, 5)
    run = hx.open(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run["hessian/step"].values, [0, 5])
    np.testing.assert_array_equal(run["weights/step"].values, [0, 5, 10])


def test_estimate__is_the_planned_size_and_writes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = _start()
    recorder = _recorder(tmp_path / "run.zarr", model, optimizer, seeds=(0, 1))
    estimate = recorder.estimate()
    assert estimate.records == 6
    tensors = sum(p.numel() for p in model.parameters()) * 4
    spectrum = 2 * (4 + 4 + 1) + 4 + 4 + 4 + 2 * 48 * 4
    assert estimate.nbytes == 2 * 3 * (tensors + spectrum)
    assert not (tmp_path / "run.zarr").exists()
    with caplog.at_level(logging.INFO, logger="hild_xr"), recorder:
        pass
    assert "6 records for this seed, about" in caplog.text
    assert "0.0 MB for all seeds" in caplog.text


def test_progress__counts_records_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = _start()
    with _recorder(tmp_path / "run.zarr", model, optimizer, progress=True):
        _train(model, optimizer, 10)
    shown = capsys.readouterr()
    assert "6/6" in shown.err
    assert shown.out == ""


def test_recorder__outside_its_block_says_so(tmp_path: Path) -> None:
    model, optimizer = _start()
    with pytest.raises(RuntimeError, match="inside its with block"):
        _recorder(tmp_path / "run.zarr", model, optimizer).step()


def test_relative_path__means_the_folder_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _start()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with _recorder(Path("run.zarr"), model, optimizer):
        monkeypatch.chdir(tmp_path / "elsewhere")
        _train(model, optimizer, 10)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert hx.open(tmp_path / "run.zarr")["hessian"].sizes["step"] == 3


def test_store_deleted_during_training__is_an_error(tmp_path: Path) -> None:
    model, optimizer = _start()
    with (
        pytest.raises(StoreWriteError, match="deleted or moved"),
        _recorder(tmp_path / "run.zarr", model, optimizer),
    ):
        _train(model, optimizer, 5)
        shutil.rmtree(tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_recorder__is_for_one_stretch_of_training(tmp_path: Path) -> None:
    model, optimizer = _start()
    recorder = _recorder(tmp_path / "run.zarr", model, optimizer)
    with recorder:
        _train(model, optimizer, 10)
    with pytest.raises(RuntimeError, match="make a new Recorder"), recorder:
        pass
    with pytest.raises(RuntimeError, match="inside its with block"):
        recorder.flush()
    assert hx.open(tmp_path / "run.zarr")["hessian"].sizes["step"] == 3


def test_resume__asks_for_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    model, optimizer = _start()
    with pytest.raises(ValueError, match="start_step"):
        _recorder(tmp_path / "run.zarr", model, optimizer, resume=True)


def test_resume__after_a_lost_tail_says_what_is_missing(tmp_path: Path) -> None:
    model, optimizer = _start()
    with _recorder(tmp_path / "run.zarr", model, optimizer):
        pass
    recorder = _recorder(tmp_path / "run.zarr", model, optimizer, resume=True, start_step=10)
    with pytest.warns(MissingRecordsWarning, match=r"2 of the 3 records|1 of the 2 records"), recorder:
        pass
    run = hx.open(tmp_path / "run.zarr")
    np.testing.assert_array_equal(run["hessian/committed"].values, [[1, 0, 2]])
    assert np.isnan(run["hessian/eigenvalues"].isel(step=1)).all()


def test_wrapped_model__is_recorded_under_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 3))
    model = nn.DataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = [rec.Weights(), rec.Hessian(k=2), rec.Hessian(k=2, blocks="rows")]
    with _recorder(tmp_path / "run.zarr", model, optimizer, probes=probes):
        _train(model, optimizer, 10)
    run = hx.open(tmp_path / "run.zarr")
    assert list(run["weights"].children) == ["0.weight", "0.bias"]
    assert list(run["hessian"]["layer"].values) == ["0.weight", "0.bias"]


def test_names_that_differ_only_in_case__need_two_probes(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("Q", nn.Linear(6, 4))
    model.add_module("q", nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    together = _recorder(tmp_path / "run.zarr", model, optimizer, probes=[rec.Hessian(k=2, blocks="rows")])
    with pytest.raises(ValueError, match=r"differ only in upper and lower case.*two probes"), together:
        pass
    apart = [
        rec.Hessian(k=2, blocks="rows", layers=["Q.weight"], group="hessian_rows_a"),
        rec.Hessian(k=2, blocks="rows", layers=["q.weight"], group="hessian_rows_b"),
    ]
    with _recorder(tmp_path / "run.zarr", model, optimizer, probes=apart):
        _train(model, optimizer, 10)
    run = hx.open(tmp_path / "run.zarr")
    assert np.isfinite(run["hessian_rows_a/Q.weight/eigenvalues"].values).all()
    assert np.isfinite(run["hessian_rows_b/q.weight/eigenvalues"].values).all()


def test_layer_frozen_during_training__is_missing_from_then_on(tmp_path: Path) -> None:
    model, optimizer = _start()
    probes = [
        rec.Hessian(k=2, layers=["fc1.weight", "fc2.weight"]),
        rec.GMatrix(k=2, blocks="rows", layers=["fc1.weight", "fc2.weight"]),
        rec.Hessian(k=2, blocks="model"),
    ]
    with _recorder(tmp_path / "run.zarr", model, optimizer, probes=probes):
        _train(model, optimizer, 5)
        model.get_parameter("fc1.weight").requires_grad_(False)
        _train(model, optimizer, 5)
    run = hx.open(tmp_path / "run.zarr")
    last = run["hessian"].to_dataset().isel(seed=0, step=-1).load()
    assert np.isnan(last["eigenvalues"].sel(layer="fc1.weight")).all()
    assert not last["converged"].sel(layer="fc1.weight").any()
    assert last["n_matvec"].sel(layer="fc1.weight") == -1
    assert np.isfinite(last["eigenvalues"].sel(layer="fc2.weight")).all()
    assert np.isnan(run["hessian/fc1.weight/eigenvectors"].isel(step=-1)).all()
    assert np.isnan(run["gmatrix_rows/fc1.weight/eigenvalues"].isel(step=-1)).all()
    assert np.isfinite(run["gmatrix_rows/fc2.weight/eigenvalues"]).all()
    assert np.isnan(run["hessian_model/eigenvalues"].isel(step=-1)).all()
    assert np.isfinite(run["hessian"]["eigenvalues"].isel(step=1)).all()


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (nn.Identity(), F.binary_cross_entropy_with_logits),
        (nn.Sigmoid(), F.binary_cross_entropy),
        (nn.Identity(), nn.BCEWithLogitsLoss()),
    ],
)
def test_binary_accuracy__follows_the_loss(
    tmp_path: Path, last: nn.Module, loss: Callable[..., torch.Tensor]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = (x[:, :1] > 0.5).float()
    model = nn.Sequential(nn.Linear(6, 1), last)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6)[:1] * 10)
        model[0].bias.fill_(-5.0)
    objective = rec.Objective(loss, x, y)
    with rec.Recorder(
        tmp_path / "run.zarr", model, objective=objective, probes=[rec.Metrics()], schedule=rec.at([0])
    ):
        pass
    assert hx.open(tmp_path / "run.zarr")["metrics/accuracy"].values.item() == 1.0


def test_first_forward_that_fills_a_buffer__is_left_to_training(tmp_path: Path) -> None:
    class Centred(nn.Module):
        mean: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)
            self.register_buffer("mean", None)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.mean is None:
                self.mean = inputs.mean(0).detach()
                self.register_buffer("seen", torch.ones(1), persistent=False)
            outputs: torch.Tensor = self.fc(inputs - self.mean)
            return outputs

    model, optimizer = _start(build=Centred)
    with _recorder(tmp_path / "run.zarr", model, optimizer, probes=[rec.Metrics(), rec.Hessian(k=1)]):
        assert dict(model.named_buffers()) == {}
        assert "mean" in model._buffers


def test_objective__keeps_its_own_copy_of_the_data() -> None:
    x, y = _data()
    model, _ = _start()
    objective = rec.Objective(F.cross_entropy, x, y)
    before = objective.value(model)
    x.mul_(3.0)
    y.zero_()
    assert objective.value(model) == before
