"""XOR-GMM: both layers align with outlier eigenspaces; the second's tells optimal from sub-optimal."""

from __future__ import annotations

from collections.abc import Callable
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
from hild_xr.claims import Claim, at_least, at_most, between, equals
from hild_xr.reproduce.findings import Findings, array_at, data_part, highest, lowest, principal

if TYPE_CHECKING:
    from hild_xr.report import Figure

FIRST, SECOND = "first.weight", "second.weight"
ROWS = ("in",)
LEADING = 2
"""Outliers of a first-layer block: the directions mu and nu."""
DEAD = 0.1
"""Neurons below this fraction of the largest norm are left out: their direction means nothing."""
ACCURACY = {4: between(0.99, 1.0), 3: between(0.72, 0.78), 2: between(0.55, 0.70)}
"""Accuracy by the number of centres covered: an uncovered quarter is lost, or left to chance."""

CoveredCentres = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]
"""Maps W (..., K, d) and v (..., 1, K) to the number of centres that some neuron responds to."""


def findings(
    run: xr.DataTree, wide: xr.DataTree, span: NDArray[np.float64], covered_centres: CoveredCentres
) -> Findings:
    """Measure the recorded XOR runs and put the claims beside the numbers.

    Parameters
    ----------
    run
        The run with few neurons, whose seeds start on different numbers of centres.
    wide
        The run with many neurons from the Gaussian start.
    span
        mu and nu, shape (2, dimension).
    covered_centres
        The problem's rule of how many centres the weights cover.

    Returns
    -------
    Findings
        Claims and figures.
    """
    measured = measure(run, span, covered_centres).load()
    emergence = measure_second_layer(wide, 4).load()
    config, wide_config = run.attrs["config"], wide.attrs["config"]
    introduction = (
        "A two-layer ReLU network learns XOR of four Gaussians +-mu, +-nu in dimension "
        f"{config['dimension']} by online SGD over {config['steps']} samples "
        f"(noise 1/{config['snr']:g}, beta = {config['beta']:g}). The "
        f"{config['hidden']} neurons start on 4, 3 or 2 of the four centres, so that optimal and sub-optimal "
        f"classifiers can be compared. A second network with {wide_config['hidden']} neurons in dimension "
        f"{wide_config['dimension']} starts at random. For each hidden neuron the block of its weights "
        "W_i, and the whole block of the second layer v, were taken of the empirical Hessian H and of "
        "the G-matrix G."
    )
    return Findings(
        "XOR-GMM: outlier eigenspaces of both layers, optimal and sub-optimal",
        introduction,
        claims(measured, emergence),
        figures(run, wide, measured, emergence),
    )


def measure(run: xr.DataTree, span: NDArray[np.float64], covered_centres: CoveredCentres) -> xr.Dataset:
    """Compute alignments of both layers, gaps and outlier counts for every seed and step.

    Returns
    -------
    xarray.Dataset
        Dims (seed, step) and ``out`` for what belongs to a hidden neuron.
    """
    first, second = array_at(run, f"weights/{FIRST}/weight"), array_at(run, f"weights/{SECOND}/weight")
    directions = xr.DataArray(span, dims=("centre", "in"))
    covered = xr.DataArray(covered_centres(first.values, second.values), dims=("seed", "step"))
    found: dict[str, xr.DataArray] = {
        "span": alignment(first, directions, vector_dims=ROWS, number_dim="centre", min_norm=DEAD),
        "covered": covered,
        "accuracy": array_at(run, "metrics/accuracy"),
    }
    for matrix in ("hessian", "gmatrix"):
        regularizer = run[f"{matrix}_rows"].attrs["regularizer"]
        leading = principal(array_at(run, f"{matrix}_rows/{FIRST}/eigenvectors"), LEADING)
        spectrum = outliers(
            array_at(run, f"{matrix}_rows/{FIRST}/eigenvalues"),
            method="gap",
            k=LEADING,
            regularizer=regularizer,
        )
        alive = found["span"].notnull()
        found[matrix] = alignment(first, leading, vector_dims=ROWS, min_norm=DEAD)
        found[f"{matrix}_span"] = subspace_alignment(
            leading, directions, vector_dims=ROWS, number_dim=("eig", "centre")
        ).where(alive)
        found[f"{matrix}_gap"] = spectrum["gap_ratio"].where(alive)
        found[f"{matrix}_count"] = _second_layer_count(run, matrix)
        found[f"{matrix}_second"] = _second_layer_alignment(run, matrix, covered.isel(step=-1))
    return xr.Dataset(found)


def measure_second_layer(run: xr.DataTree, rank: int) -> xr.Dataset:
    """Compute alignment of v with the ``rank`` leading eigenvectors of its block, and the outlier counts.

    Returns
    -------
    xarray.Dataset
        Lazy; dims (seed, step).
    """
    second = array_at(run, f"weights/{SECOND}/weight")
    found: dict[str, xr.DataArray] = {}
    for matrix in ("hessian", "gmatrix"):
        leading = principal(array_at(run, f"{matrix}/{SECOND}/eigenvectors"), rank)
        found[matrix] = alignment(second, leading)
        found[f"{matrix}_count"] = _second_layer_count(run, matrix)
    return xr.Dataset(found)


def claims(measured: xr.Dataset, emergence: xr.Dataset) -> list[Claim]:
    """Put the theory's claims beside the numbers; the worst neuron and seed count."""
    end = measured.isel(step=-1)
    alive = {name: end[name].stack(at=("seed", "out")).dropna("at") for name in _PER_NEURON}
    found = [
        Claim("first layer: W_i lies in the span of mu and nu", lowest(alive["span"]), at_least(0.99)),
        Claim(
            "first layer: W_i lies in E_2 of its own Hessian block", lowest(alive["hessian"]), at_least(0.99)
        ),
        Claim(
            "first layer: W_i lies in E_2 of its own G-matrix block", lowest(alive["gmatrix"]), at_least(0.99)
        ),
        Claim(
            "first layer: E_2 of the Hessian block is the span of mu and nu",
            lowest(alive["hessian_span"]),
            at_least(0.998),
        ),
        Claim(
            "first layer: two outliers in the Hessian block, gap ratio",
            lowest(alive["hessian_gap"]),
            at_least(20),
        ),
        Claim(
            "first layer: two outliers in the G-matrix block, gap ratio",
            lowest(alive["gmatrix_gap"]),
            at_least(20),
        ),
    ]
    for matrix, name in (("hessian", "Hessian"), ("gmatrix", "G-matrix")):
        wrong = int((end[f"{matrix}_count"] != end["covered"]).sum())
        found += [
            Claim(
                f"second layer: as many {name} outliers as centres covered; seeds that differ",
                wrong,
                equals(0),
            ),
            Claim(
                f"second layer: v lies in the outlier eigenspace of its {name} block",
                lowest(end[f"{matrix}_second"]),
                at_least(0.999),
            ),
        ]
    for covered in sorted(set(end["covered"].values.tolist()), reverse=True):
        accuracy = end["accuracy"].where(end["covered"] == covered, drop=True)
        name = "optimal: all 4 centres covered" if covered == 4 else f"sub-optimal: {covered} centres covered"
        criterion = ACCURACY.get(covered, at_most(0.6))
        found += [
            Claim(f"{name}; smallest accuracy", lowest(accuracy), criterion),
            Claim(f"{name}; largest accuracy", highest(accuracy), criterion),
        ]
    return found + _emergence_claims(emergence)


_PER_NEURON = ("span", "hessian", "gmatrix", "hessian_span", "gmatrix_span", "hessian_gap", "gmatrix_gap")


def _emergence_claims(emergence: xr.Dataset) -> list[Claim]:
    start, end = emergence.isel(step=0), emergence.isel(step=-1)
    return [
        Claim(
            "many neurons, start: v is not aligned with E_4 of its Hessian block",
            highest(start["hessian"]),
            at_most(0.6),
        ),
        Claim(
            "many neurons, end: v lies in E_4 of its Hessian block", lowest(end["hessian"]), at_least(0.99)
        ),
        Claim(
            "many neurons, start: no separated 4-dimensional space, fewest outliers",
            lowest(start["hessian_count"]),
            at_least(8),
        ),
        Claim(
            "many neurons, end: four outliers have emerged, fewest", lowest(end["hessian_count"]), equals(4)
        ),
        Claim(
            "many neurons, end: four outliers have emerged, most", highest(end["hessian_count"]), equals(4)
        ),
    ]


def _second_layer_count(run: xr.DataTree, matrix: str) -> xr.DataArray:
    spectrum = array_at(run, f"{matrix}/eigenvalues").sel(layer=SECOND, drop=True)
    return outliers(spectrum, method="relative", regularizer=run[matrix].attrs["regularizer"])[
        "outlier_count"
    ]


def _second_layer_alignment(run: xr.DataTree, matrix: str, rank: xr.DataArray) -> xr.DataArray:
    """Alignment of v with the eigenspace of as many outliers as the seed has at the end."""
    second, vectors = (
        array_at(run, f"weights/{SECOND}/weight"),
        array_at(run, f"{matrix}/{SECOND}/eigenvectors"),
    )
    per_seed = [
        alignment(second.isel(seed=[i]), principal(vectors.isel(seed=[i]), int(r)))
        for i, r in enumerate(rank.values)
    ]
    return xr.concat(per_seed, dim="seed", join="exact")


def figures(run: xr.DataTree, wide: xr.DataTree, measured: xr.Dataset, emergence: xr.Dataset) -> list[Figure]:
    """Draw the figures of the report."""
    from hild_xr import plots
    from hild_xr.report import Figure

    dimension, hidden = run[f"weights/{FIRST}"].sizes["in"], wide[f"weights/{SECOND}"].sizes["in"]
    pick = {"seed": 0, "out": 0}
    eigenvalues = data_part(
        array_at(run, f"hessian_rows/{FIRST}/eigenvalues").isel(pick),
        run["hessian_rows"].attrs["regularizer"],
    )
    leading = principal(array_at(wide, f"hessian/{SECOND}/eigenvectors").isel(seed=0), 4)
    angles = pairwise_angles(leading).isel(angle=-1).load()
    baseline = float(random_alignment_baseline(LEADING, dimension))
    wide_baseline = float(random_alignment_baseline(4, hidden))
    wide_spectrum = array_at(wide, "hessian/eigenvalues").sel(layer=SECOND).isel(seed=0).load()
    optimal = measured["covered"].isel(step=-1) == 4
    groups = {"optimal: 4 centres": optimal, "sub-optimal": ~optimal}
    counts = {
        title: measured["hessian_count"].isel(seed=np.flatnonzero(which))
        for title, which in groups.items()
        if which.any()
    }
    return [
        Figure(
            plots.spectrum(eigenvalues, outlier_count=LEADING, log_x=True, log_y=True),
            "First layer: eigenvalues of one neuron's Hessian block",
            "Two eigenvalues stand apart from the rest; the band holds the four that are recorded behind "
            "them (first seed, first neuron).",
        ),
        Figure(
            plots.alignment_curves(
                {
                    "E_2(H)": measured["hessian"],
                    "E_2(G)": measured["gmatrix"],
                    "span of mu and nu": measured["span"],
                },
                baseline=baseline,
                log_x=True,
            ),
            "First layer: alignment of W_i with the outlier eigenspaces",
            "Median and range over seeds and neurons; neurons below a tenth of the largest norm are left "
            "out. The start is planted with overlap 0.3. "
            f"A random plane gives sqrt(2/{dimension}) = {baseline:.3f}.",
        ),
        Figure(
            plots.outlier_counts(counts, log_x=True),
            "Second layer: number of Hessian outliers, optimal beside sub-optimal",
            "The block is 4 x 4. All four eigenvalues of an optimal classifier stay large; a sub-optimal one "
            "loses one for each centre that no neuron covers: its outlier eigenspace is rank deficient.",
        ),
        Figure(
            plots.spectrum(wide_spectrum, outlier_count=4, log_x=True),
            f"Second layer, {hidden} neurons: eigenvalues of the Hessian block",
            "From the Gaussian start there is no separated four-dimensional space; four outliers emerge.",
        ),
        Figure(
            plots.alignment_curves(
                {"E_4(H)": emergence["hessian"], "E_4(G)": emergence["gmatrix"]},
                baseline=wide_baseline,
                log_x=True,
            ),
            f"Second layer, {hidden} neurons: alignment of v with E_4",
            f"A random four-dimensional space gives sqrt(4/{hidden}) = {wide_baseline:.3f}.",
        ),
        Figure(
            plots.angle_map(angles, log_x=True),
            f"Second layer, {hidden} neurons: largest principal angle between E_4(H) at two steps",
            "First seed. The eigenspace turns while the outliers emerge and then stands still.",
        ),
    ]
