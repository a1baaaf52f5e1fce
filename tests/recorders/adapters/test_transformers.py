from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.adapters.distributed import RankZeroRecorder
from hild_xr.recorders.adapters.transformers import RecorderCallback

STEPS = 6


def tokens(samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (samples, 6), generator=generator)
    return ids, (ids[:, 0] > 9).long()


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(tokens()[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, labels = tokens()
        return {"input_ids": ids[index], "attention_mask": torch.ones(6).long(), "labels": labels[index]}


def bert(**changes: object) -> BertForSequenceClassification:
    """A real model of Transformers, small, with dropout and with fused attention."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=2,
        **{"attn_implementation": "sdpa", **changes},
    )
    return BertForSequenceClassification(config).double()


def gpt2() -> GPT2LMHeadModel:
    """Its head is its embedding: tied weights."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).double()


def objective() -> rec.Objective:
    ids, labels = tokens()
    return rec.Objective(
        lambda output, target: F.cross_entropy(output.logits, target),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels,
    )


LAYER = "bert.encoder.layer.0.attention.self.query.weight"


def callback(path: Path, **changes: object) -> RecorderCallback:
    settings: dict[str, object] = {
        "probes": [
            rec.Weights(layers=[LAYER, "classifier.bias"]),
            rec.Hessian(k=2, layers=[LAYER], tol=1e-8),
            rec.Metrics(),
        ],
        "schedule": rec.every(2, total_steps=STEPS),
        "objective": objective(),
    }
    return RecorderCallback(path, **{**settings, **changes})


class KeepStates(TrainerCallback):
    """What the weights are after each update, told by the Trainer and not by a recorder."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_end(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.states.append(copy.deepcopy(kwargs["model"].state_dict()))


class FailAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ValueError("training failed")


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model, arguments, train_dataset=Sentences(), callbacks=list(callbacks))


def assert_weights(run: xr.DataTree, states: list[dict[str, torch.Tensor]]) -> None:
    for i, step in enumerate(run["weights/step"].values):
        for name in run["weights"].children:
            stored = run[f"weights/{name}/weight"].isel(seed=0, step=i).values
            np.testing.assert_array_equal(stored, states[step][name].numpy(), err_msg=f"{name}, step {step}")


def dense_eigenvalues(state: dict[str, torch.Tensor]) -> np.ndarray:
    """By brute force, through the eager attention of the same model."""
    model = bert(attn_implementation="eager").train(False)
    model.load_state_dict(state)
    ids, labels = tokens()

    def loss(flat: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = torch.func.functional_call(model, {LAYER: flat.reshape(8, 8)}, (), inputs)
        return F.cross_entropy(output.logits, labels)

    matrix = torch.autograd.functional.hessian(loss, state[LAYER].reshape(-1))
    values = np.linalg.eigvalsh(matrix.numpy())
    return values[np.argsort(-np.abs(values))]


def test_callback__records_the_true_states_and_leaves_training_bit_identical(tmp_path: Path) -> None:
    plain, truth = bert(), KeepStates()
    trainer(plain, tmp_path / "plain", truth).train()
    generator_state = torch.get_rng_state()
    recorded = bert()
    trainer(recorded, tmp_path / "recorded", callback(tmp_path / "run.zarr")).train()
    assert torch.equal(torch.get_rng_state(), generator_state)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], tensor)
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/step"], [0, 2, 4, 6])
    assert_weights(run, truth.states)
    for step in (0, 6):
        found = run["hessian/eigenvalues"].sel(seed=0, step=step).values[0]
        expected = dense_eigenvalues(truth.states[step])
        np.testing.assert_allclose(found, expected[:2], rtol=1e-6, atol=1e-6 * abs(expected[0]))
    # the Trainer's schedule moves the rate after the update that used it
    rates = run["metrics/learning_rate"].values[0]
    np.testing.assert_allclose(rates, [0.05, 0.05 * 5 / 6, 0.05 * 3 / 6, 0.05 * 1 / 6])


def test_accumulated_gradients__count_updates(tmp_path: Path) -> None:
    truth = KeepStates()
    recorder = callback(tmp_path / "run.zarr", probes=[rec.Weights()])
    trainer(bert(), tmp_path, truth, recorder, gradient_accumulation_steps=2).train()
    assert len(truth.states) == STEPS + 1
    run = hx.open(tmp_path / "run.zarr").load()
    assert (run["weights/committed"] == 1).all()
    assert_weights(run, truth.states)


def same_but_for_the_attempt(one: xr.DataTree, other: xr.DataTree) -> None:
    for node in one.subtree:
        for name, array in node.to_dataset(inherit=False).data_vars.items():
            if name != "committed":
                np.testing.assert_array_equal(other[node.path][name].values, array.values, err_msg=name)


def test_resume_after_an_exception__gives_the_records_of_an_uninterrupted_run(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(bert(), tmp_path / "whole", callback(tmp_path / "whole.zarr"), **saving).train()
    with pytest.raises(ValueError, match="training failed"), callback(tmp_path / "run.zarr") as recorder:
        trainer(bert(), tmp_path / "half", recorder, FailAt(5), **saving).train()
    interrupted = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(interrupted["weights/step"], [0, 2, 4])

    again = trainer(bert(), tmp_path / "half", callback(tmp_path / "run.zarr"), **saving)
    again.train(resume_from_checkpoint=True)
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/committed"], [[1, 1, 2, 2]])
    same_but_for_the_attempt(hx.open(tmp_path / "whole.zarr").load(), run)


class SkipOnce(TrainerCallback):
    """Do what mixed precision does when it finds an infinite gradient: leave an update out."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        inner, calls = optimizer.step, []

        def step(*arguments: object) -> object:
            calls.append(1)
            return None if len(calls) == 2 else inner(*arguments)

        optimizer.step = step


def test_skipped_update__is_not_counted_also_after_a_checkpoint(tmp_path: Path) -> None:
    """The Trainer counts it in global_step: at its step 3 there are two updates behind the weights."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    truth = KeepStates()
    first = callback(tmp_path / "run.zarr", probes=[rec.Weights()])
    with pytest.raises(ValueError, match="training failed"), first:
        trainer(bert(), tmp_path / "half", first, SkipOnce(), truth, FailAt(3), **saving).train()
    again = callback(tmp_path / "run.zarr", probes=[rec.Weights()])
    trainer(bert(), tmp_path / "half", again, truth, **saving).train(resume_from_checkpoint=True)
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/step"], [0, 2, 4])
    # begin, 1, skipped, 3 | begin again, 4, 5, 6
    updates = [truth.states[i] for i in (0, 1, 3, 5, 6, 7)]
    assert_weights(run, updates)


def test_checkpoint__finds_the_records_before_it_committed(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            seen.append(int((hx.open(tmp_path / "run.zarr")["weights/committed"] > 0).sum()))

    recorder = callback(tmp_path / "run.zarr", probes=[rec.Weights()])
    # Look runs first, when the checkpoint is on the disk: the records were committed before it
    trainer(bert(), tmp_path, Look(), recorder, save_strategy="steps", save_steps=2).train()
    assert seen == [2, 3, 4]


def test_language_model__has_tied_weights_and_a_loss_of_shifted_tokens(tmp_path: Path) -> None:
    class Texts(Sentences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = tokens()[0][index]
            return {"input_ids": ids, "labels": ids}

    def next_token_loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model, ids = gpt2(), tokens()[0]
    made = []

    def late(given: nn.Module) -> rec.Objective:
        made.append(given)
        return rec.Objective(next_token_loss, {"input_ids": ids}, ids)

    recorder = callback(
        tmp_path / "run.zarr",
        objective=late,
        probes=[
            rec.Weights(),
            rec.Hessian(k=2, layers=["transformer.h.0.ln_1.weight"], tol=1e-8),
            rec.Metrics(),
        ],
    )
    training = trainer(model, tmp_path, recorder)
    training.train_dataset = Texts()
    training.train()
    assert made == [model]
    run = hx.open(tmp_path / "run.zarr").load()
    assert "transformer.wte.weight" in run["weights"].children
    assert "lm_head.weight" not in run["weights"].children
    with torch.no_grad():
        own_loss = model.train(False)(input_ids=ids, labels=ids).loss.item()
    assert run["metrics/train_loss"].values[0, -1] == pytest.approx(own_loss)

    def loss(gain: torch.Tensor) -> torch.Tensor:
        weights = {"transformer.h.0.ln_1.weight": gain}
        model.set_attn_implementation("eager")
        output = torch.func.functional_call(model, weights, (), {"input_ids": ids, "labels": ids})
        value: torch.Tensor = output.loss
        return value

    gain = model.get_parameter("transformer.h.0.ln_1.weight").detach()
    values = np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, gain).numpy())
    expected = values[np.argsort(-np.abs(values))][:2]
    found = run["hessian/eigenvalues"].values[0, -1, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * abs(expected[0]))


def test_accelerated_optimizer__is_looked_through(tmp_path: Path) -> None:
    """In a loop of one's own with accelerate: its wrapper has no hooks."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    plain = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    probes = [rec.Weights(), rec.Metrics()]
    with RankZeroRecorder(
        tmp_path / "run.zarr", model, optimizer, probes=probes, schedule=rec.at([0, 2])
    ) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(4, 3)).square().mean())
            optimizer.step()
    assert recorder.current_step == 2
    run = hx.open(tmp_path / "run.zarr").load()
    np.testing.assert_array_equal(run["weights/weight/weight"].values[0, 1], plain.weight.detach().numpy())
    assert not np.array_equal(*run["weights/weight/weight"].values[0])


def test_callback__takes_its_start_from_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="start_step is not an option here"):
        callback(tmp_path / "run.zarr", start_step=3)


def test_ddp__records_from_rank_zero_what_one_process_records(
    tmp_path: Path, one_process: xr.DataTree, run_two_ranks: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_two_ranks("trainer_ddp", tmp_path, warn="default")
    assert done.returncode == 0, done.stderr
    run = hx.open(tmp_path / "run.zarr").load()
    assert (run["weights/committed"] == 1).all()
    for layer in one_process["weights"].children:
        found, expected = run[f"weights/net.{layer}/weight"], one_process[f"weights/{layer}/weight"]
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-8)
    found, expected = run["hessian/eigenvalues"], one_process["hessian/eigenvalues"]
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-8)
