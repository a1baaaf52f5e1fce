"""Recorded outputs against the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hild_xr as hx
from hild_xr import recorders as rec


@dataclass
class Structure:
    logits: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Structure:
        return Structure(self.fc(x))


def recorded(probe: rec.Probe, model: nn.Module) -> Any:
    probe.plan(model, None, None)
    return np.asarray(probe.record(rec.Snapshot(model, None, None, 0))[""]["outputs"])


def test_outputs__are_those_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), torch.randn(20, 6)
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        probes=[rec.Outputs(x, batch_size=8), rec.Outputs(x, transform=nn.Softmax(1), group="probabilities")],
        schedule=rec.at([0]),
    ):
        pass
    run = hx.open(tmp_path / "run.zarr")
    logits, probabilities = run["outputs/outputs"], run["probabilities/outputs"]
    assert logits.dims == ("seed", "step", "sample", "class_")
    assert logits.attrs["transform"] is None
    assert probabilities.attrs["transform"] == "Softmax"
    exact = x.numpy() @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy()
    np.testing.assert_allclose(logits.values[0, 0], exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum("class_"), 1, rtol=1e-6)
    weights = np.exp(exact)
    np.testing.assert_allclose(probabilities.values[0, 0], weights / weights.sum(1, keepdims=True), rtol=1e-5)


def test_outputs__of_one_number_a_sample_have_the_dim_sample_only() -> None:
    model, x = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), torch.randn(20, 6)
    array = rec.Outputs(x).plan(model, None, None)[""].arrays["outputs"]
    assert (array.dims, array.shape) == (("sample",), (20,))
    assert recorded(rec.Outputs(x, batch_size=3), model).shape == (20,)


def test_transform__takes_the_tensor_out_of_a_structure() -> None:
    model, x = Structured(), torch.randn(20, 6)
    with pytest.raises(TypeError, match="got Structure: give transform="):
        rec.Outputs(x).plan(model, None, None)
    found = recorded(rec.Outputs(x, transform=lambda out: out.logits), model)
    np.testing.assert_allclose(found, model.fc(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_transform__is_named_in_the_attrs() -> None:
    x = torch.randn(4, 6)
    names = []
    for transform in (torch.sigmoid, nn.Softmax(1), partial(torch.softmax, dim=1)):
        plan = rec.Outputs(x, transform=transform).plan(nn.Linear(6, 3), None, None)
        names.append(plan[""].arrays["outputs"].attrs["transform"])
    assert names == ["sigmoid", "Softmax", "partial"]


@pytest.mark.parametrize(
    ("transform", "error", "words"),
    [
        (lambda out: out.argmax(1), TypeError, "got torch.int64"),
        (lambda out: out.mean(0), ValueError, r"shape \(2,\)"),
        (lambda out: out[:, :, None], ValueError, r"shape \(3, 2, 1\)"),
    ],
)
def test_outputs__that_are_no_rows_of_numbers_are_refused(
    transform: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rec.Outputs(torch.randn(9, 6), transform=transform).plan(nn.Linear(6, 2), None, None)
