from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.adapters.lightning import RecorderCallback

STEPS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # torch's own, of how lightning takes a data loader apart
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (32,), generator=generator)


def objective() -> rec.Objective:
    return rec.Objective(F.cross_entropy, *data())


class Classifier(pl.LightningModule):
    """Dropout draws from torch's generator in each step: a recorder that draws is found out."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3)).double()
        self.fails_at = fails_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        if self.fails_at is not None and self.global_step >= self.fails_at:
            raise ValueError("training failed")
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class TwoOptimizers(Classifier):
    """Manual optimisation of both halves: Lightning's global_step counts two for each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[3]
        return [torch.optim.SGD(first.parameters(), lr=0.3), torch.optim.Adam(last.parameters(), lr=0.02)]


class KeepStates(pl.Callback):
    """What the weights are after each update, told by Lightning and not by a recorder."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            self.states.append(copy.deepcopy(pl_module.state_dict()))


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    iterations: int = STEPS,
    **options: object,
) -> pl.Trainer:
    torch.manual_seed(7)
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=iterations // 4,
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer


def build(kind: type[Classifier] = Classifier, **arguments: object) -> Classifier:
    torch.manual_seed(3)
    return kind(**arguments)


def callback(path: Path, **changes: object) -> RecorderCallback:
    settings: dict[str, object] = {
        "probes": [rec.Weights(), rec.Hessian(k=2, layers=["net.3.weight"], tol=1e-8), rec.Metrics()],
        "schedule": rec.every(2, total_steps=STEPS),
        "objective": objective(),
    }
    return RecorderCallback(path, **{**settings, **changes})


def assert_weights(run: xr.DataTree, states: list[dict[str, torch.Tensor]]) -> None:
    for i, step in enumerate(run["weights/step"].values):
        for name in ("net.0.weight", "net.3.bias"):
            stored = run[f"weights/{name}/weight"].isel(seed=0, step=i).values
            np.testing.assert_array_equal(stored, states[step][name].numpy(), err_msg=f"{name}, step {step}")


def dense_eigenvalues(state: dict[str, torch.Tensor]) -> np.ndarray:
    x, y = data()
    module = build().eval()
    module.load_state_dict(state)
    module.requires_grad_(False)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(module, {"net.3.weight": flat.reshape(3, 4)}, (x,))
        return F.cross_entropy(outputs, y)

    values = np.linalg.eigvalsh(torch.func.hessian(loss)(state["net.3.weight"].reshape(-1)).numpy())
    return values[np.argsort(-np.abs(values))]


def test_callback__records_the_true_states_and_leaves_training_bit_identical(tmp_path: Path) -> None:
    plain, truth = build(), KeepStates()
    fit(plain, truth)
    generator_state = torch.get_rng_state()
    recorded = build()
    fit(recorded, callback(tmp_path / "run.zarr"))
    assert torch.equal(torch.get_rng_state(), generator_state)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], tensor)
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/step"], [0, 2, 4, 6, 8])
    assert_weights(run, truth.states)
    for step in (0, 8):
        found = run["hessian/eigenvalues"].sel(seed=0, step=step).values[0]
        np.testing.assert_allclose(found, dense_eigenvalues(truth.states[step])[:2], rtol=1e-7)
    assert list(run["metrics/learning_rate"].values[0]) == [0.3] * 5


def test_accumulated_gradients__count_updates(tmp_path: Path) -> None:
    truth = KeepStates()
    schedule = rec.every(1, total_steps=4)
    fit(
        build(),
        truth,
        callback(tmp_path / "run.zarr", schedule=schedule, probes=[rec.Weights()]),
        accumulate_grad_batches=2,
    )
    run = hx.open(tmp_path / "run.zarr").load()
    assert len(truth.states) == 5
    assert (run["weights/committed"] == 1).all()
    assert_weights(run, truth.states)


class SaveAt(pl.Callback):
    def __init__(self, path: Path, iteration: int) -> None:
        self.path, self.iteration, self.seen = path, iteration, 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.iteration // 4:
            trainer.save_checkpoint(self.path)


def same_but_for_the_attempt(one: xr.DataTree, other: xr.DataTree) -> None:
    for node in one.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            if name != "committed":
                np.testing.assert_array_equal(other[node.path][name].values, array.values, err_msg=name)


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning keeps no state of the random generators in a checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", lambda self, x: self.net[3](self.net[1](self.net[0](x))))
        yield


@pytest.mark.usefixtures("without_dropout")
def test_resume_after_an_exception__gives_the_records_of_an_uninterrupted_run(tmp_path: Path) -> None:
    fit(build(), callback(tmp_path / "whole.zarr"))
    with pytest.raises(ValueError, match="training failed"):
        fit(build(fails_at=7), callback(tmp_path / "run.zarr"), SaveAt(tmp_path / "half.ckpt", 4))
    interrupted = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(interrupted["weights/step"], [0, 2, 4, 6])
    fit(build(), callback(tmp_path / "run.zarr"), ckpt_path=tmp_path / "half.ckpt")
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/committed"], [[1, 1, 1, 2, 2]])
    same_but_for_the_attempt(hx.open(tmp_path / "whole.zarr").load(), run)


def test_checkpoint__commits_the_records_that_it_can_be_gone_on_from(tmp_path: Path) -> None:
    """A process that is killed after its checkpoint loses none of the records before it."""
    seen: list[int] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            seen.append(int((hx.open(tmp_path / "run.zarr")["weights/committed"] > 0).sum()))

    fit(build(), callback(tmp_path / "run.zarr"), Look())
    assert seen == [3, 5]


@pytest.mark.usefixtures("without_dropout")
def test_two_optimizers__are_counted_by_the_last_also_after_a_checkpoint(tmp_path: Path) -> None:
    truth = KeepStates()
    whole = fit(build(TwoOptimizers), truth, callback(tmp_path / "whole.zarr"))
    assert whole.global_step == 2 * STEPS
    assert_weights(hx.open(tmp_path / "whole.zarr").load(), truth.states)

    fit(
        build(TwoOptimizers), callback(tmp_path / "run.zarr"), SaveAt(tmp_path / "half.ckpt", 4), iterations=4
    )
    fit(build(TwoOptimizers), callback(tmp_path / "run.zarr"), ckpt_path=tmp_path / "half.ckpt")
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/committed"], [[1, 1, 1, 2, 2]])
    assert_weights(run, truth.states)


@pytest.mark.usefixtures("without_dropout")
def test_checkpoint_without_a_count__needs_the_step_if_it_is_not_known(tmp_path: Path) -> None:
    fit(build(TwoOptimizers), SaveAt(tmp_path / "two.ckpt", 4), iterations=4)
    with pytest.raises(ValueError, match=r"global_step=8, .* 2 optimizers .* start_step="):
        fit(build(TwoOptimizers), callback(tmp_path / "two.zarr"), ckpt_path=tmp_path / "two.ckpt")
    late = rec.at([4, 6, 8])
    told = callback(tmp_path / "two.zarr", start_step=4, schedule=late)
    fit(build(TwoOptimizers), told, ckpt_path=tmp_path / "two.ckpt")
    assert (hx.open(tmp_path / "two.zarr")["weights/committed"] == 1).all()

    fit(build(), SaveAt(tmp_path / "one.ckpt", 4), iterations=4)
    fit(build(), callback(tmp_path / "one.zarr", schedule=late), ckpt_path=tmp_path / "one.ckpt")
    assert (hx.open(tmp_path / "one.zarr")["weights/committed"] == 1).all()


def test_late_parts__are_made_of_the_module_when_training_starts(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[object]:
            return DataLoader(TensorDataset(*data()), batch_size=8)

    late = callback(
        tmp_path / "run.zarr",
        module=lambda module: module.net,
        objective=lambda module: rec.Objective(
            F.cross_entropy, *module.trainer.datamodule.train_dataloader().dataset.tensors
        ),
        probes=lambda module: [rec.Weights(layers=[name for name, _ in module.net.named_parameters()])],
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[late],
    )
    trainer.fit(build(), datamodule=Data())
    run = hx.open(tmp_path / "run.zarr")
    assert list(run["weights"].children) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_two_stores__are_recorded_by_two_callbacks(tmp_path: Path) -> None:
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    checkpoint = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(build(), *(callback(path, probes=[rec.Weights()]) for path in paths), checkpoint)
    assert all((hx.open(path)["weights/committed"] == 1).all() for path in paths)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    counts = [state for key, state in kept.items() if key.startswith("RecorderCallback")]
    assert counts == [{"current_step": STEPS}] * 2


def test_unknown_optimizer__is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer=1 .* returned 1 optimizers"):
        fit(build(), callback(tmp_path / "run.zarr", optimizer=1))


def test_callback__takes_its_start_from_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="resume is not an option here"):
        callback(tmp_path / "run.zarr", resume=True)


def test_ddp__records_from_rank_zero_what_one_process_records(
    tmp_path: Path,
    one_process: xr.DataTree,
    run_two_ranks: Callable[..., subprocess.CompletedProcess[str]],
    assert_same_records: Callable[[xr.DataTree, xr.DataTree], None],
) -> None:
    done = run_two_ranks("lightning_ddp", tmp_path, warn="default")
    assert done.returncode == 0, done.stderr
    assert_same_records(hx.open(tmp_path / "run.zarr").load(), one_process)
