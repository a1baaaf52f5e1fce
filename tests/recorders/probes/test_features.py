"""Recorded activations against a forward pass written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hild_xr as hx
from hild_xr import recorders as rec


class Net(nn.Module):
    """The ReLU is no module, and works in place on the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu_(self.fc1(x)))
        return out


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.conv(x)).relu().flatten(1))
        return out


def recorded(probe: rec.Probe, model: nn.Module) -> dict[str, np.ndarray]:
    probe.plan(model, None, None)
    values = probe.record(rec.Snapshot(model, None, None, 0))
    return {node: np.asarray(arrays["activations"]) for node, arrays in values.items()}


@pytest.mark.parametrize("batch_size", [None, 1, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features__are_those_of_the_forward_pass_by_hand(batch_size: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net().to(dtype), torch.randn(20, 6, dtype=dtype)
    first = x @ model.fc1.weight.T + model.fc1.bias
    last = first.clamp(min=0) @ model.fc2.weight.T + model.fc2.bias
    found = recorded(rec.Features(x, batch_size=batch_size), model)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(found["fc1"], first.detach().numpy(), **tolerance)
    np.testing.assert_allclose(found["fc2"], last.detach().numpy(), **tolerance)
    assert found["fc1"].min() < 0, "before the activation that works in place"
    inputs = recorded(rec.Features(x, side="input", batch_size=batch_size), model)
    np.testing.assert_array_equal(inputs["fc1"], x.numpy())
    np.testing.assert_allclose(inputs["fc2"], first.detach().clamp(min=0).numpy(), **tolerance)


def test_features__of_a_convolution_are_flattened_and_come_back_by_their_shape() -> None:
    torch.manual_seed(0)
    model, x = ConvNet().double(), torch.randn(5, 2, 5, 5, dtype=torch.float64)
    array = rec.Features(x).plan(model, None, None)["conv"].arrays["activations"]
    assert array.dims == ("sample", "unit")
    assert array.shape == (5, 27)
    assert array.attrs == {"side": "output", "unit_shape": [3, 3, 3]}
    found = recorded(rec.Features(x, modules=["conv"]), model)["conv"].reshape(5, 3, 3, 3)
    by_hand = np.einsum(
        "mcyxij,ocij->moyx",
        np.lib.stride_tricks.sliding_window_view(x.numpy(), (3, 3), axis=(2, 3)),
        model.conv.weight.detach().numpy(),
    )
    by_hand += model.conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(found, by_hand, rtol=1e-12, atol=1e-13)


def test_features__are_taken_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(5, 2, 5, 5)
    model(torch.randn(50, 2, 5, 5) + 3)  # moves the running statistics
    found = recorded(rec.Features(x, modules=["norm"]), model)["norm"]
    assert model.training
    model.eval()
    expected = model.norm(model.conv(x)).flatten(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_features__of_every_step_are_stored_with_their_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(20, 6), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [model.fc1(x).detach().numpy()]
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[rec.Features(x, modules=["fc1"], schedule=rec.every(2, total_steps=4))],
        schedule=rec.at([0]),
    ):
        for step in range(1, 5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 2 == 0:
                expected.append(model.fc1(x).detach().numpy())
    run = hx.open(tmp_path / "run.zarr")
    found = run["features/fc1/activations"]
    assert found.dims == ("seed", "step", "sample", "unit")
    assert list(found["step"].values) == [0, 2, 4]
    assert found.attrs["long_name"] == "activation"
    assert run["features"].attrs["side"] == "output"
    np.testing.assert_allclose(found.values[0], np.stack(expected), rtol=1e-6, atol=1e-6)


def test_features__of_half_precision_models_keep_their_precision() -> None:
    model, x = Net().to(torch.bfloat16), torch.randn(4, 6).to(torch.bfloat16)
    probe = rec.Features(x, modules=["fc1"])
    assert probe.plan(model, None, None)["fc1"].arrays["activations"].dtype == "float32"
    half = rec.Features(x.half(), modules=["fc1"]).plan(model.half(), None, None)
    assert half["fc1"].arrays["activations"].dtype == "float16"
