"""A k-GMM trajectory in closed form, with the shapes, labels and attributes that analysis returns.

Orthonormal means, x^c = m(t) mu_c + noise of norm q: the alignment with the span of the means is
m / sqrt(m^2 + q^2). The block of the Hessian has k outliers above a bulk of n - k eigenvalues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr

from hild_xr import plots
from hild_xr.variables import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Labelled = Callable[..., xr.DataArray]

SEEDS, CLASSES, EIGENVALUES = 3, 4, 10
STEPS = np.array([0, 1, 2, 5, 10, 20, 50, *range(100, 1001, 100)])
TIME = STEPS / 100


@pytest.fixture(scope="session")
def steps() -> NDArray[np.int64]:
    return STEPS


@pytest.fixture(scope="session")
def labelled() -> Labelled:
    """Return a function that labels values of a registered variable with the steps of the trajectory."""

    def label(values: Any, dims: tuple[str, ...], name: str) -> xr.DataArray:
        coords: dict[str, Any] = {
            "step": ("step", STEPS, {"long_name": "step", "units": "1"}),
            "time": ("step", TIME, {"long_name": "time", "units": "1"}),
        }
        values = np.asarray(values)
        sizes = dict(zip(dims, values.shape, strict=True))
        coords |= {dim: np.arange(size) for dim, size in sizes.items() if dim != "step"}
        return xr.DataArray(values, dims=dims, coords=coords, name=name, attrs=attrs(name))

    return label


@pytest.fixture(scope="session")
def eigenvalues(labelled: Labelled) -> xr.DataArray:
    """Spectrum of one block, of dims (seed, step, eig); the first CLASSES leave a bulk that shrinks."""
    growth = 1 - np.exp(-TIME)
    bulk = 0.02 * np.linspace(1.0, 0.4, EIGENVALUES - CLASSES) * (1 - 0.5 * growth)[:, None]
    outliers = 0.02 + 0.03 * growth[:, None] * np.array([2.0, 1.0, 0.9, 0.8])
    seeds = 1 + 0.05 * np.arange(SEEDS)[:, None, None]
    spectrum = np.concatenate([outliers, bulk], axis=1) * seeds
    return labelled(-np.sort(-spectrum, axis=-1), ("seed", "step", "eig"), "eigenvalues")


@pytest.fixture(scope="session")
def outlier_count(labelled: Labelled) -> xr.DataArray:
    """Number of outliers, of dims (seed, step): none up to step 5, then all; one record is unknown."""
    counts = np.where(STEPS > 5, CLASSES, 0) * np.ones((SEEDS, 1), dtype=int)
    counts[1, 3] = -1
    return labelled(counts, ("seed", "step"), "outlier_count")


@pytest.fixture(scope="session")
def bulk_edge(labelled: Labelled) -> xr.DataArray:
    return labelled(0.022 - 0.01 * (1 - np.exp(-TIME)), ("step",), "bulk_edge")


@pytest.fixture(scope="session")
def alignment(labelled: Labelled) -> xr.DataArray:
    """Alignment with the span of the means, of dims (seed, out, step)."""
    m = 1.2 * (1 - np.exp(-TIME)) * (1 + 0.02 * np.arange(SEEDS)[:, None, None])
    q = 0.3 + 0.01 * np.arange(CLASSES)[:, None]
    return labelled(m / np.sqrt(m**2 + q**2), ("seed", "out", "step"), "alignment")


@pytest.fixture(scope="session")
def overlap(labelled: Labelled) -> xr.DataArray:
    """Overlap of one weight vector with each eigenvector, of dims (step, eig) and either sign."""
    m = 1 - np.exp(-TIME)
    signs = np.where(STEPS % 3 == 0, -1, 1)
    values = np.stack([0.9 * m * signs, *([0.05 * (1 + m)] * (EIGENVALUES - 1))], axis=1)
    return labelled(values, ("step", "eig"), "alignment")


@pytest.fixture(scope="session")
def angles() -> xr.DataArray:
    """Largest principal angle between the eigenspaces of each pair of steps, in rad."""
    direction = np.arctan(TIME)
    return xr.DataArray(
        np.abs(direction[:, None] - direction),
        dims=("step", "step_"),
        coords={"step": STEPS, "step_": STEPS},
        attrs=attrs("principal_angles"),
    )


@pytest.fixture(scope="session")
def metrics(labelled: Labelled) -> xr.Dataset:
    """Losses and accuracies over seeds, with the marker that a recorded group has beside them."""
    seeds = 1 + 0.1 * np.arange(SEEDS)[:, None]
    loss, accuracy = 0.2 + np.exp(-TIME) * seeds, 0.97 - 0.7 * np.exp(-TIME) * seeds / 1.2
    dims = ("seed", "step")
    return xr.Dataset(
        {
            "train_loss": labelled(loss, dims, "train_loss"),
            "test_loss": labelled(loss + 0.1, dims, "test_loss"),
            "accuracy": labelled(accuracy, dims, "accuracy"),
            "learning_rate": labelled(np.full(loss.shape, 0.01), dims, "learning_rate"),
            "committed": labelled(np.ones(loss.shape, dtype=np.uint16), dims, "committed"),
        }
    )


@pytest.fixture(scope="session")
def drawings(
    eigenvalues: xr.DataArray,
    outlier_count: xr.DataArray,
    bulk_edge: xr.DataArray,
    alignment: xr.DataArray,
    overlap: xr.DataArray,
    angles: xr.DataArray,
    metrics: xr.Dataset,
) -> dict[str, Any]:
    """One plot of each builder and of each kind of axis."""
    subspaces = {"E_k(H)": alignment, "span of the means": 0.9 * alignment}
    return {
        "spectrum": plots.spectrum(eigenvalues, outlier_count, bulk_edge, label="class 0"),
        "spectrum, logarithmic": plots.spectrum(eigenvalues, outlier_count, log_x=True, log_y=True),
        "spectrum, one seed": plots.spectrum(eigenvalues.isel(seed=0), outlier_count.isel(seed=0)),
        "alignment": plots.alignment_curves(subspaces, 0.141),
        "alignment against time": plots.alignment_curves(subspaces, 0.141, x="time"),
        "alignment, logarithmic": plots.alignment_curves(subspaces, 0.141, log_x=True),
        "angles": plots.angle_map(angles),
        "angles, logarithmic": plots.angle_map(angles, log_x=True),
        "overlap": plots.overlap_map(overlap, label="class 0"),
        "overlap, logarithmic": plots.overlap_map(overlap, log_x=True),
        "overlaps": plots.side_by_side({f"class {c}": plots.overlap_map(overlap) for c in range(3)}),
        "one seed's counts": plots.outlier_counts(outlier_count.isel(seed=0), 4),
        "counts": plots.outlier_counts({"optimal": outlier_count, "sub-optimal": outlier_count - 1}, 4),
        "metrics": plots.metric_curves(metrics, log_x=True, log_y=True),
    }
