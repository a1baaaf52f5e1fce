"""k-GMM: every class vector x^c aligns with the outlier eigenspaces of its own block of H and G."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hild_xr.analysis import (
    alignment,
    outliers,
    pairwise_angles,
    random_alignment_baseline,
    subspace_alignment,
)
from hild_xr.claims import Claim, at_least, at_most, between
from hild_xr.reproduce.findings import Findings, array_at, data_part, highest, lowest, principal

if TYPE_CHECKING:
    from hild_xr.report import Figure

LAYER = "linear.weight"
ROWS = ("in",)


def findings(run: xr.DataTree, centres: NDArray[np.float64]) -> Findings:
    """Measure a recorded k-GMM run and put the claims beside the numbers.

    Parameters
    ----------
    run
        The run as ``hild_xr.open`` gives it, with the groups ``weights``,
        ``hessian_rows`` and ``gmatrix_rows``.
    centres
        Class means, shape (classes, dimension).

    Returns
    -------
    Findings
        Claims and figures.
    """
    measured = measure(run, centres).load()
    config = run.attrs["config"]
    introduction = (
        f"Softmax regression on a mixture of {config['classes']} Gaussians in dimension "
        f"{config['dimension']} with noise 1/{config['snr']:g} in each coordinate, regulariser "
        f"beta = {config['beta']:g}, online SGD with step size {config['c_delta']:g}/d over "
        f"{config['steps']} samples. For each class c the block of "
        "its vector x^c was taken of the empirical Hessian H and of the G-matrix G on fresh samples."
    )
    return Findings(
        "k-GMM: SGD aligns with the outlier eigenspaces of its own blocks",
        introduction,
        claims(measured, k=len(centres)),
        figures(run, measured, k=len(centres)),
    )


def measure(run: xr.DataTree, centres: NDArray[np.float64]) -> xr.Dataset:
    """Compute alignments, subspace alignments and gaps for every seed, step and class.

    Returns
    -------
    xarray.Dataset
        Lazy; dims (seed, step, out).
    """
    k = len(centres)
    weight = array_at(run, f"weights/{LAYER}/weight")
    means = xr.DataArray(centres, dims=("centre", "in"))
    found: dict[str, xr.DataArray] = {
        "means": alignment(weight, means, vector_dims=ROWS, number_dim="centre"),
    }
    for matrix in ("hessian", "gmatrix"):
        vectors = array_at(run, f"{matrix}_rows/{LAYER}/eigenvectors")
        spectrum = outliers(
            array_at(run, f"{matrix}_rows/{LAYER}/eigenvalues"),
            method="gap",
            k=k,
            regularizer=run[f"{matrix}_rows"].attrs["regularizer"],
        )
        found[matrix] = alignment(weight, principal(vectors, k), vector_dims=ROWS)
        found[f"{matrix}_span"] = subspace_alignment(
            principal(vectors, k), means, vector_dims=ROWS, number_dim=("eig", "centre")
        )
        found[f"{matrix}_gap"] = spectrum["gap_ratio"]
    top = array_at(run, f"hessian_rows/{LAYER}/eigenvectors").isel(eig=0)
    own_mean = xr.DataArray(centres, dims=("out", "in"))
    found["top"] = alignment(weight, top.expand_dims("eig"), vector_dims=ROWS, number_dim="eig")
    found["top_is_mean"] = alignment(top, own_mean.expand_dims("eig"), vector_dims=ROWS, number_dim="eig")
    return xr.Dataset(found)


def claims(measured: xr.Dataset, k: int) -> list[Claim]:
    """Put the theory's claims beside the numbers; the worst class and seed count."""
    start, end = measured.isel(step=0), measured.isel(step=-1)
    return [
        Claim(
            f"at the start x^c is not aligned with E_{k} of its Hessian block",
            highest(start["hessian"]),
            at_most(0.23),
        ),
        Claim(
            f"after training x^c lies in E_{k} of its own Hessian block",
            lowest(end["hessian"]),
            at_least(0.95),
        ),
        Claim(
            f"after training x^c lies in E_{k} of its own G-matrix block",
            lowest(end["gmatrix"]),
            at_least(0.94),
        ),
        Claim(
            f"E_{k} of the Hessian block is the span of the class means",
            lowest(end["hessian_span"]),
            at_least(0.995),
        ),
        Claim(
            f"E_{k} of the G-matrix block is the span of the class means",
            lowest(end["gmatrix_span"]),
            at_least(0.99),
        ),
        Claim(
            f"the Hessian block has {k} outliers: gap ratio behind the last",
            lowest(end["hessian_gap"]),
            at_least(6),
        ),
        Claim(
            f"the G-matrix block has {k} outliers: gap ratio behind the last",
            lowest(end["gmatrix_gap"]),
            at_least(3),
        ),
        Claim(
            "orthogonal means: the top eigenvector of block c is the mean of class c",
            lowest(end["top_is_mean"]),
            at_least(0.98),
        ),
        Claim(
            "x^c is aligned with that top eigenvector, but not fully: smallest",
            lowest(end["top"]),
            between(0.65, 0.85),
        ),
        Claim(
            "x^c is aligned with that top eigenvector, but not fully: largest",
            highest(end["top"]),
            between(0.65, 0.85),
        ),
    ]


def figures(run: xr.DataTree, measured: xr.Dataset, k: int) -> list[Figure]:
    """Draw the figures of the report."""
    from hild_xr import plots
    from hild_xr.report import Figure

    dimension = run[f"weights/{LAYER}"].sizes["in"]
    baseline = float(random_alignment_baseline(k, dimension))
    pick = {"seed": 0, "out": 0}
    drawn = []
    for matrix, name in (("hessian", "Hessian"), ("gmatrix", "G-matrix")):
        eigenvalues = data_part(
            array_at(run, f"{matrix}_rows/{LAYER}/eigenvalues").isel(pick),
            run[f"{matrix}_rows"].attrs["regularizer"],
        )
        drawn.append(
            Figure(
                plots.spectrum(eigenvalues, outlier_count=k, log_x=True, log_y=True),
                f"Eigenvalues of the {name} block of class 0",
                f"The {k} leading eigenvalues stand apart from the next ones, the band (first seed).",
            )
        )
    drawn.append(
        Figure(
            plots.alignment_curves(
                {
                    f"E_{k}(H)": measured["hessian"],
                    f"E_{k}(G)": measured["gmatrix"],
                    "span of the means": measured["means"],
                    "top eigenvector of H": measured["top"],
                },
                baseline=baseline,
                log_x=True,
            ),
            "Alignment of x^c with the outlier eigenspaces",
            "Median over seeds and classes, band from the smallest to the largest. A random "
            f"subspace of the same dimension gives sqrt({k}/{dimension}) = {baseline:.3f}.",
        )
    )
    eigenvectors = principal(array_at(run, f"hessian_rows/{LAYER}/eigenvectors").isel(pick), k)
    angles = pairwise_angles(eigenvectors).isel(angle=-1).load()
    drawn.append(
        Figure(
            plots.angle_map(angles, log_x=True),
            f"Largest principal angle between E_{k}(H) at two steps",
            "Class 0 of the first seed. At this signal-to-noise ratio the outlier eigenspace is the span of "
            "the means from the start and hardly turns: it is the weight that moves into it.",
        )
    )
    every_eigenvector = array_at(run, f"hessian_rows/{LAYER}/eigenvectors").expand_dims("single")
    weight = array_at(run, f"weights/{LAYER}/weight")
    overlap = alignment(weight, every_eigenvector, vector_dims=ROWS, number_dim="single")
    drawn.append(
        Figure(
            plots.overlap_map(overlap.isel(pick).load(), log_x=True),
            "Overlap of x^c with each eigenvector of its Hessian block",
            "Class 0 of the first seed: the weight moves into the outlier eigenvectors.",
        )
    )
    return drawn
