"""Scenarios for two processes: ``python two_ranks.py SCENARIO FOLDER`` forks both ranks and waits for them.

A program of its own, because a process that has run a backward pass cannot fork ranks, and starting each rank
anew would import torch twice. The ranks find each other through a file, so that no port is needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from hild_xr import recorders as rec
from hild_xr.recorders.adapters.distributed import FullyShardedRecorder, RankZeroRecorder
from hild_xr.recorders.probes.base import NodeValues

WORLD = 2
STEPS = 6


def network() -> nn.Sequential:
    """Rows that do not divide by the number of ranks, and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].bias.requires_grad_(False)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (40,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def settings() -> dict[str, object]:
    return {
        "objective": rec.Objective(F.cross_entropy, *data()),
        "probes": [
            rec.Weights(),
            rec.Hessian(k=3, layers=["0.weight", "4.weight"], tol=1e-8),
            rec.GMatrix(k=2, layers=["4.weight"], tol=1e-8),
            rec.Hessian(k=2, blocks="model", tol=1e-8, schedule=rec.at([2, 4])),
            rec.Metrics(schedule=rec.every(3, total_steps=STEPS)),
        ],
        "schedule": rec.every(2, total_steps=STEPS),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world: int = 1) -> None:
    """Train on this rank's samples; the ranks together see what one process sees."""
    x, y = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()


def ddp(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model)
    with RankZeroRecorder(folder / "run.zarr", model, optimizer, **settings()) as recorder:
        train(model, optimizer, rank, WORLD)
        recorder.flush()
    assert recorder.current_step == STEPS


def sharded_network() -> nn.Module:
    model = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    sharded: dict[str, Any] = dict(model.named_parameters())
    return {name: parameter.full_tensor().detach() for name, parameter in sharded.items()}


def fsdp(rank: int, folder: Path) -> None:
    plain = sharded_network()
    train(plain, optimizer_of(plain), rank, WORLD)

    model = sharded_network()
    optimizer = optimizer_of(model)
    random_state = torch.get_rng_state()
    with FullyShardedRecorder(
        folder / "run.zarr", model, optimizer, replica=_random_replica, **settings()
    ) as recorder:
        train(model, optimizer, rank, WORLD)
    assert recorder.current_step == STEPS
    assert torch.equal(torch.get_rng_state(), random_state), "making the replica draws no number of training"
    expected, found = whole(plain), whole(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected), "training is bit-identical"


def _random_replica() -> nn.Module:
    assert dist.get_rank() == 0, "only rank 0 needs the memory"
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model.double()


class SlowProbe(rec.Weights):
    """Takes longer than the training's process group would wait."""

    def record(self, snapshot: rec.Snapshot) -> NodeValues:
        if snapshot.step:
            time.sleep(5.0)
        return super().record(snapshot)


def slow_record(rank: int, folder: Path) -> None:
    """Let the ranks wait longer for a record than the two seconds that training waits."""
    _slow(rank, folder, RankZeroRecorder)


def slow_record_alone(rank: int, folder: Path) -> None:
    """Let a plain recorder on rank 0 keep the other ranks waiting in their all-reduce."""
    _slow(rank, folder, rec.Recorder if rank == 0 else None)


def _slow(rank: int, folder: Path, recorder: Callable[..., rec.Recorder | RankZeroRecorder] | None) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    dist.barrier()
    model = DistributedDataParallel(network(), process_group=group)
    optimizer = optimizer_of(model)
    if recorder is None:
        train(model, optimizer, rank, WORLD)
        return
    with recorder(folder / "run.zarr", model, optimizer, probes=[SlowProbe()], schedule=rec.at([0, 2])):
        train(model, optimizer, rank, WORLD)


class FailingProbe(rec.Weights):
    def record(self, snapshot: rec.Snapshot) -> NodeValues:
        if snapshot.step == 2:
            raise OSError("the disk is full")
        return super().record(snapshot)


def errors(rank: int, folder: Path) -> None:
    """Note what each rank is told when rank 0 cannot record: at a step, and at the start."""
    told = []
    for _ in range(2):  # the second time the seed has records already
        model = DistributedDataParallel(network())
        optimizer = optimizer_of(model)
        recorder = RankZeroRecorder(
            folder / "run.zarr", model, optimizer, probes=[FailingProbe()], schedule=rec.at([0, 2])
        )
        try:
            with recorder:
                train(model, optimizer, rank, WORLD)
        except Exception as error:  # noqa: BLE001
            told.append([type(error).__name__, str(error), recorder.current_step])
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def sharded_errors(rank: int, folder: Path) -> None:
    """Note what each rank is told of a sharded model that cannot be recorded as asked."""
    model = sharded_network()
    optimizer = optimizer_of(model)
    told = {}
    attempts: dict[str, Callable[[], object]] = {
        "plain": lambda: rec.Recorder(folder / "run.zarr", model, optimizer, **settings()).start(),
        "rank zero": lambda: RankZeroRecorder(folder / "run.zarr", model, optimizer, **settings()).start(),
        "sharded replica": lambda: FullyShardedRecorder(
            folder / "run.zarr", model, optimizer, replica=model, **settings()
        ).start(),
        "other replica": lambda: FullyShardedRecorder(
            folder / "run.zarr", model, optimizer, replica=nn.Sequential(nn.Linear(6, 5)), **settings()
        ).start(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:  # noqa: BLE001
            told[name] = [type(error).__name__, str(error)]
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def lightning_ddp(rank: int, folder: Path) -> None:
    """Train by Lightning's DDP; the callback is made on both ranks."""
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from hild_xr.recorders.adapters.lightning import RecorderCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(x)
            return out

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.net)

    x, y = data()
    half = TensorDataset(x[rank::WORLD], y[rank::WORLD])

    def network_of(module: Any) -> Any:
        return module.net

    recorder = RecorderCallback(folder / "run.zarr", module=network_of, **settings())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment()),
        max_epochs=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[recorder],
    )
    trainer.fit(Module(), DataLoader(half, batch_size=len(half)))
    assert recorder.state_dict() == {"current_step": STEPS}


class Repeated(Dataset[dict[str, torch.Tensor]]):
    """All samples, once for each step; the Trainer itself deals them out to the ranks."""

    def __len__(self) -> int:
        return STEPS * len(data()[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = data()
        return {"x": x[index % len(x)], "labels": y[index % len(x)]}


class WithLoss(nn.Module):
    """Called as the Trainer calls a model: with keywords, for a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_ddp(rank: int, folder: Path) -> None:
    """Train by the Trainer of Transformers on both ranks, in the order of the data."""
    from transformers import Trainer, TrainingArguments

    from hild_xr.recorders.adapters.transformers import RecorderCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    model: nn.Module = WithLoss()
    x, y = data()
    optimizer = optimizer_of(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=len(x) // WORLD,
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    assert arguments.world_size == WORLD
    recorder = RecorderCallback(
        folder / "run.zarr",
        probes=[rec.Weights(), rec.Hessian(k=3, layers=["net.0.weight", "net.4.weight"], tol=1e-8)],
        schedule=rec.every(2, total_steps=STEPS),
        objective=rec.Objective(lambda out, _: out["loss"], {"x": x, "labels": y}, y),
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    training = InOrder(
        model, arguments, train_dataset=Repeated(), callbacks=[recorder], optimizers=(optimizer, constant)
    )
    training.train()


def _rank(rank: int, scenario: str, folder: str) -> None:
    torch.set_num_threads(1)
    # what torchrun sets; the address is not used, since the process group is there already
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    scenarios = [
        ddp,
        fsdp,
        slow_record,
        slow_record_alone,
        errors,
        sharded_errors,
        lightning_ddp,
        trainer_ddp,
    ]
    run = next(function for function in scenarios if function.__name__ == scenario)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    run(rank, Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(_rank, args=tuple(sys.argv[1:]), nprocs=WORLD, start_method="fork")
