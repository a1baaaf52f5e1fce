"""Cases in which a plausible curvature code gives wrong numbers without a word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature, MatrixKind, lanczos_eigenpairs
from hild_xr.recorders.objective import Objective


class TwoHeads(nn.Module):
    """Routes each sample to one of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.h0, self.h1 = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        on = x[:, 0] > 0
        out = x.new_zeros(len(x), 3)
        out[on], out[~on] = self.h1(x[on]), self.h0(x[~on])
        return out


class Sorting(nn.Module):
    """Sorts the batch before its first layer and puts it back behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 1].argsort()
        out: Tensor = self.second(torch.tanh(self.first(x[order]))[order.argsort()])
        return out


def _exact(model: nn.Module, x: Tensor, y: Tensor, matrix: MatrixKind) -> Tensor:
    """Dense matrix over all parameters, sample by sample."""
    parameters = list(model.parameters())
    flat_gradients, hessian = [], torch.zeros(())
    for m in range(len(x)):
        loss = F.cross_entropy(model(x[m : m + 1]), y[m : m + 1])
        gradients = torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([g.reshape(-1) for g in gradients])
        flat_gradients.append(flat.detach())
        rows = [
            torch.autograd.grad(
                entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if entry.requires_grad
            else [torch.zeros_like(p) for p in parameters]
            for entry in flat
        ]
        hessian = hessian + torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows]) / len(x)
    stacked = torch.stack(flat_gradients)
    return stacked.T @ stacked / len(x) if matrix == "gmatrix" else hessian


@pytest.mark.filterwarnings("ignore:torch.func.vmap does not support this model")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("matrix", ["hessian", "gmatrix"])
@pytest.mark.parametrize("build", [TwoHeads, Sorting])
def test_layers_that_see_other_rows__give_the_exact_matrix(
    build: type[nn.Module], matrix: MatrixKind, order: int
) -> None:
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(12, 5, dtype=torch.float64)
    x = x[x[:, 0].argsort(descending=order > 0)]
    y = torch.randint(0, 3, (12,))
    dense = _exact(model, x, y, matrix)
    with Curvature(model, Objective(F.cross_entropy, x, y)) as curvature:
        whole = curvature.eigenpairs(3, matrix=matrix, blocks="model")["model"]
        rows = curvature.eigenpairs(1, matrix=matrix, blocks="rows")
    top = torch.linalg.eigvalsh(dense).abs().sort(descending=True).values[:3]
    torch.testing.assert_close(whole.eigenvalues.abs(), top, rtol=1e-5, atol=1e-12)
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            width = parameter.shape[1]
            for c in range(parameter.shape[0]):
                block = dense[
                    start + c * width : start + (c + 1) * width, start + c * width : start + (c + 1) * width
                ]
                largest = torch.linalg.eigvalsh(block).abs().max()
                torch.testing.assert_close(rows[name].eigenvalues[c, 0].abs(), largest, rtol=1e-6, atol=1e-12)
        start += parameter.numel()


def test_samples_routed_past_a_layer_unseen_by_the_check__are_an_error_with_a_way_out() -> None:
    class Routed(nn.Linear):
        """Not plain: the general method is taken."""

    torch.manual_seed(0)
    model = TwoHeads()
    x = torch.randn(1000, 5)
    x[:, 0] = x[:, 0].abs()
    x[3, 0] = -1.0  # one sample of a thousand, which a check of a few cannot meet
    y = torch.zeros(1000, dtype=torch.long)
    objective = Objective(F.cross_entropy, x, y)
    assert 3 not in objective.some_samples().tolist()
    with (
        pytest.raises(ValueError, match=r"'h1' sees only some of the samples.*subclass"),
        Curvature(model, objective),
    ):
        pass
    model.h0, model.h1 = Routed(5, 3), Routed(5, 3)
    with Curvature(model, objective) as curvature:
        rows = curvature.eigenpairs(1, matrix="hessian", blocks="rows", layers=["h1.weight"])["h1.weight"]
    hessian = torch.func.hessian(
        lambda w: F.cross_entropy(torch.func.functional_call(model, {"h1.weight": w}, (x,)), y)
    )(model.h1.weight.detach())
    for c in range(3):
        largest = torch.linalg.eigvalsh(hessian[c, :, c]).abs().max()
        torch.testing.assert_close(rows.eigenvalues[c, 0].abs().float(), largest, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("outlier", [1e2, 1e3, 1e4, 1e5])
def test_pairs_beside_a_huge_outlier__are_right_or_not_flagged(outlier: float) -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    spectrum = np.r_[outlier, 1.0, 0.9, 0.8, 0.7, 0.6, rng.random(294) * 0.1]
    matrix = torch.tensor((basis * spectrum) @ basis.T, dtype=torch.float32)
    matrix = (matrix + matrix.T) / 2
    pairs = lanczos_eigenpairs(lambda vectors, _: vectors @ matrix, 300, 6)
    exact = torch.linalg.eigvalsh(matrix.double())
    for value, converged in zip(pairs.eigenvalues[0], pairs.converged[0], strict=True):
        nearest = exact[(exact - value).abs().argmin()]
        # by Weyl: the distance to the spectrum is at most the residual that the flag promises
        promised = 1e-3 * max(abs(float(value)), 1e-3 * outlier)
        assert not converged or abs(float(nearest - value)) <= promised
    if outlier <= 1e4:
        assert bool(pairs.converged.all())
        torch.testing.assert_close(
            pairs.eigenvalues[0, 1:], torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6]).double(), rtol=0.01, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_bulk_below_the_outliers__keeps_the_basis_orthogonal_over_many_restarts(
    dtype: torch.dtype,
) -> None:
    """With one lax Gram-Schmidt pass the Ritz values came out 50 times the largest eigenvalue."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    spectrum = np.r_[1.82e-2, 5.5e-3, 5.2e-3, np.linspace(1.06e-3, 1e-4, 197)]
    matrix = torch.tensor((basis * spectrum) @ basis.T, dtype=dtype)
    pairs = lanczos_eigenpairs(lambda vectors, _: vectors @ matrix, 200, 10, tol=1e-3, dtype=dtype)
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues[0].numpy(), spectrum[:10], rtol=2e-3)
    vectors = pairs.eigenvectors[0].double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(10).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", ["layer", "rows", "model"])
def test_layer_whose_gradient_is_zero__has_a_zero_spectrum(blocks: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.zeros_(model[2].weight)
    x, y = torch.randn(500, 64), torch.randint(0, 10, (500,))
    with Curvature(model, Objective(F.cross_entropy, x, y)) as curvature:
        spectra = curvature.eigenpairs(5, matrix="gmatrix", blocks=blocks)
    for label, found in spectra.items():
        assert bool(found.eigenvalues.isfinite().all()), label
        gram = found.eigenvectors.flatten(len(found.block.batch_shape) + 1)
        gram = gram @ gram.mT
        torch.testing.assert_close(gram, torch.eye(5).expand_as(gram), atol=1e-4, rtol=0)
        if label == "0.weight":
            assert float(found.eigenvalues.abs().max()) == 0.0
            assert bool(found.converged.all())
