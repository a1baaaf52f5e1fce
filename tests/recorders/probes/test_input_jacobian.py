"""Average gradient outer products against explicit Jacobians, and the neural feature ansatz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.recorders.problems import Digits


def recorded(probe: rec.Probe, model: nn.Module) -> dict[str, Any]:
    probe.plan(model, None, None)
    values = probe.record(rec.Snapshot(model, None, None, 0))
    return {node: np.asarray(arrays["agop"]) for node, arrays in values.items()}


def outer(jacobians: Tensor) -> Any:
    """Mean of J^T J over samples, J of shape (samples, outputs, inputs)."""
    return (torch.einsum("mci,mcj->ij", jacobians, jacobians) / len(jacobians)).detach().numpy()


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("inplace", [False, True])
def test_agop__is_that_of_explicit_jacobians_of_every_layer(batch_size: int | None, inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    found = recorded(rec.AGOP(x, batch_size=batch_size), model)
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    h = x
    for at in (0, 2, 4):
        rest = nn.Sequential(*list(model.children())[at:])
        np.testing.assert_allclose(
            found[f"{at}.weight"], outer(vmap(jacrev(rest))(h)), rtol=1e-10, atol=1e-14
        )
        h = nn.Sequential(*list(model.children())[at : at + 2])(h).detach()


def test_agop__of_a_convolution_is_that_of_its_patches() -> None:
    torch.manual_seed(0)
    conv, fc = nn.Conv2d(2, 3, (2, 3), stride=2, padding=1), nn.Linear(27, 4)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), fc).double()
    x = torch.randn(5, 2, 5, 6, dtype=torch.float64)
    places = conv(x).shape[2:]
    fc.weight = nn.Parameter(torch.randn(4, 3 * places.numel(), dtype=torch.float64))
    fc.in_features = 3 * places.numel()
    patches = F.unfold(x, (2, 3), stride=2, padding=1).mT  # (samples, places, in * kh * kw)

    def of_patches(patch: Tensor) -> Tensor:
        z = patch @ conv.weight.flatten(1).T + conv.bias
        out: Tensor = fc(torch.tanh(z.mT.reshape(1, -1)))[0]
        return out

    jacobians = vmap(jacrev(of_patches))(patches)  # (samples, outputs, places, in * kh * kw)
    expected = outer(jacobians.movedim(2, 1).flatten(0, 1)) * places.numel()
    array = rec.AGOP(x).plan(model, None, None)["0.weight"].arrays["agop"]
    assert array.dims == ("in", "kh", "kw", "in_", "kh_", "kw_")
    assert array.attrs["vector_dims"] == list(array.dims)
    found = recorded(rec.AGOP(x), model)["0.weight"]
    assert found.shape == array.shape == (2, 2, 3, 2, 2, 3)
    np.testing.assert_allclose(found.reshape(12, 12), expected, rtol=1e-10, atol=1e-14)


def test_agop__of_a_layer_over_tokens_sums_over_them() -> None:
    torch.manual_seed(0)
    embed, head = nn.Linear(4, 5), nn.Linear(5, 2)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = embed, head

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.embed(x)).sum(1))
            return out

    model, x = Tokens().double(), torch.randn(6, 3, 4, dtype=torch.float64)
    jacobians = vmap(jacrev(lambda one: model(one[None])[0]))(x)  # (samples, outputs, tokens, in)
    expected = outer(jacobians.movedim(2, 1).flatten(0, 1)) * 3
    np.testing.assert_allclose(recorded(rec.AGOP(x), model)["embed.weight"], expected, rtol=1e-10)


def test_agop__is_taken_through_the_layer_only() -> None:
    torch.manual_seed(0)

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.fc(x)
            return out

    model, x = Skip().double(), torch.randn(6, 3, dtype=torch.float64)
    W = model.fc.weight.detach().numpy()
    np.testing.assert_allclose(recorded(rec.AGOP(x), model)["fc.weight"], W.T @ W, rtol=1e-12)


def test_agop__of_frozen_and_reparametrised_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), weight_norm(nn.Linear(5, 2))).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    expected = outer(vmap(jacrev(model))(x))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    found = recorded(rec.AGOP(x), model)
    np.testing.assert_allclose(found["0.weight"], expected, rtol=1e-10)
    W = model[2].weight.detach().numpy()
    np.testing.assert_allclose(found["2.weight"], W.T @ W, rtol=1e-12)


def cosine(a: Any, b: Any) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_neural_feature_ansatz__is_exact_for_one_linear_layer_trained_from_zero(tmp_path: Path) -> None:
    # item 29 of the catalogue: J = W, so W^T W and the AGOP are the same matrix
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(40, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        probes=[rec.AGOP(x), rec.Weights()],
        schedule=rec.every(10, total_steps=50),
    ):
        for _ in range(50):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    run = hx.open(tmp_path / "run.zarr")
    agop, weight = run["agop/weight/agop"].isel(seed=0), run["weights/weight/weight"].isel(seed=0)
    assert agop.dims == ("step", "in", "in_")
    assert (agop.isel(step=0) == 0).all()
    for step in agop["step"].values[1:]:
        W = weight.sel(step=step).values
        assert cosine(W.T @ W, agop.sel(step=step).values) == pytest.approx(1, abs=1e-12)


def test_neural_feature_ansatz__emerges_when_digits_are_learnt() -> None:
    pytest.importorskip("sklearn")
    problem = Digits(hidden=32)
    model = problem.model(seed=0)
    probe = rec.AGOP(layers=["fc1.weight"])
    objective = problem.objective("train")
    probe.plan(model, None, objective)

    def alignment() -> float:
        W = model.get_parameter("fc1.weight").detach().numpy()
        values = probe.record(rec.Snapshot(model, None, objective, 0))["fc1.weight"]["agop"]
        return cosine(W.T @ W, np.asarray(values))

    before = alignment()
    problem.train(model, problem.optimizer(model), steps=1000, seed=0)
    assert before < 0.85
    assert alignment() > 0.95


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        (["0.wieght"], KeyError, "no weight '0.wieght' in the model; did you mean '0.weight'"),
        (["0.bias"], ValueError, "'0.bias' is not the weight of a linear layer"),
        (["1.weight"], ValueError, "groups=1; the AGOP can be recorded for: 0.weight, 4.weight"),
        (["0.weight", "0.weight"], ValueError, "none twice"),
        ([], ValueError, "at least one"),
        ("0.weight", TypeError, r"write \['0.weight'\]"),
    ],
)
def test_layers__that_cannot_be_are_refused(layers: Any, error: type[Exception], words: str) -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 3, groups=2), nn.LayerNorm(5), nn.Flatten(), nn.Linear(20, 2)
    )
    x = torch.randn(4, 2, 7)
    with pytest.raises(error, match=words):
        rec.AGOP(x, layers=layers).plan(model, None, None)
    assert list(rec.AGOP(x).plan(model, None, None)) == ["0.weight", "4.weight"]


def test_layer__that_is_not_used_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    with pytest.raises(ValueError, match=r"layers \['spare.weight'\] are not called"):
        rec.AGOP(torch.randn(4, 3), layers=["used.weight", "spare.weight"]).plan(Net(), None, None)
    assert list(rec.AGOP(torch.randn(4, 3)).plan(Net(), None, None)) == ["used.weight"]


def test_layer__that_a_batch_does_not_call_adds_nothing_there() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, chosen = x.new_zeros(len(x), 2), x[:, 0] > 0
            if chosen.any():
                out = out.index_put((chosen,), self.right(x[chosen]))
            if not chosen.all():
                out = out.index_put((~chosen,), self.left(x[~chosen]))
            return out

    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(12, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, *[-1.0] * 9])
    W = model.right.weight.detach().numpy()
    probe = rec.AGOP(x, batch_size=3)
    np.testing.assert_allclose(recorded(probe, model)["right.weight"], W.T @ W * 2 / 12, rtol=1e-12)


def test_model__that_couples_samples_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"single sample|other samples"):
        rec.AGOP(torch.randn(8, 3)).plan(model, None, None)
