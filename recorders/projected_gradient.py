r"""Steps within the dominant space of the Hessian, or beside it.

M. Song, K. Ahn and C. Yun, "Does SGD really happen in tiny subspaces?", ICLR 2025, arXiv:2405.16002:
the gradient lies mostly in the space of the k leading Hessian eigenvectors, and yet training goes on
when that part is taken out of each step (Bulk-SGD), and stops when only that part is kept (Dom-SGD).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hild_xr.recorders.curvature.spectrum import BlockSpectrum

Part = Literal["dominant", "bulk"]
"""What is kept of a gradient: its projection :math:`P_k g`, or the rest :math:`g - P_k g`."""


@torch.no_grad()
def project_gradient(model: nn.Module, spectra: Mapping[str, BlockSpectrum], part: Part) -> None:
    r"""Replace the gradients by their part in the dominant space, or beside it (arXiv:2405.16002).

    Call it between ``loss.backward()`` and ``optimizer.step()``, with eigenvectors found at these weights
    or a few steps before: plain SGD then takes the step :math:`-\eta P_k g` (Dom-SGD) or
    :math:`-\eta(I - P_k)g` (Bulk-SGD). :func:`hild_xr.analysis.projection` measures the same parts of
    recorded gradients.

    Parameters
    ----------
    model
        The model; the ``grad`` of the blocks' parameters changes in place, nothing else.
    spectra
        Eigenpairs by label, from :meth:`~hild_xr.recorders.curvature.Curvature.eigenpairs`. Gradients
        of parameters in none of the blocks stay as they are.
    part
        ``"dominant"`` or ``"bulk"``.

    Raises
    ------
    ValueError
        If ``part`` is unknown, a pair has not converged, a parameter has no gradient, is not there, or is in
        two blocks. No gradient has changed then.

    Examples
    --------
    >>> from torch import nn
    >>> from hild_xr.recorders.curvature import Curvature
    >>> from hild_xr.recorders.objective import Objective
    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2, 1)
    >>> with Curvature(model, Objective(nn.functional.mse_loss, *data)) as curvature:
    ...     spectra = curvature.eigenpairs(1, blocks="model")
    >>> nn.functional.mse_loss(model(data[0]), data[1]).backward()
    >>> project_gradient(model, spectra, "bulk")
    >>> bool(model.weight.grad[0, 0].abs() < 1e-6), bool(model.weight.grad[0, 1].abs() > 1e-6)
    (True, True)
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(map(repr, get_args(Part)))}; got {part!r}")
    gradients = _gradients(model, spectra)
    for spectrum in spectra.values():
        block = spectrum.block
        pieces = [gradients[name] for name in block.parameters]
        rows = block.count
        gradient = torch.cat([piece.reshape(rows, -1) for piece in pieces], dim=1)[..., None]
        basis = spectrum.eigenvectors.reshape(rows, -1, gradient.shape[1]).to(gradient)
        dominant = (basis.mT @ (basis @ gradient))[..., 0]
        kept = dominant if part == "dominant" else gradient[..., 0] - dominant
        sizes = [piece.numel() // rows for piece in pieces]
        for piece, value in zip(pieces, kept.split(sizes, dim=1), strict=True):
            piece.copy_(value.reshape(piece.shape))


def _gradients(model: nn.Module, spectra: Mapping[str, BlockSpectrum]) -> dict[str, Tensor]:
    """Return the gradients of all blocks' parameters by name, once everything is checked."""
    parameters, found = dict(model.named_parameters()), dict[str, "Tensor"]()
    for label, spectrum in spectra.items():
        if not bool(spectrum.converged.all()):
            raise ValueError(
                f"not all eigenpairs of block {label!r} have converged, so theirs is not the dominant "
                "space: allow more products (max_matvec) or ask for fewer pairs"
            )
        for name in spectrum.block.parameters:
            gradient = parameters[name].grad if name in parameters else None
            if gradient is None:
                raise ValueError(
                    f"parameter {name!r} of block {label!r} has no gradient in this model: call it after "
                    "loss.backward(), with spectra of the same model"
                )
            if name in found:
                raise ValueError(f"parameter {name!r} is in two blocks; project each gradient once")
            found[name] = gradient
    return found
