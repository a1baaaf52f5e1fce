"""Handwritten digits: the alignment of the mixtures, on real data.

Real classes have no common noise level, so there is no gap behind the tenth
eigenvalue to claim; what is claimed is alignment with the block's own
eigenspace, against chance and against the block of another row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from hild_xr.analysis import alignment, pairwise_angles, random_alignment_baseline
from hild_xr.claims import Claim, at_least, at_most
from hild_xr.reproduce.findings import Findings, array_at, data_part, highest, lowest, principal

if TYPE_CHECKING:
    from hild_xr.report import Figure

CLASSES = 10
ROWS = ("in",)


def findings(softmax: xr.DataTree, network: xr.DataTree) -> Findings:
    """Measure the recorded digits runs and put the claims beside the numbers.

    Parameters
    ----------
    softmax
        The run of softmax regression.
    network
        The run of the 64-32-10 network.

    Returns
    -------
    Findings
        Claims and figures.
    """
    measured = {
        "softmax": measure(softmax, "linear.weight").load(),
        "fc1": measure(network, "fc1.weight").load(),
        "fc2": measure(network, "fc2.weight").load(),
    }
    accuracy = {name: array_at(run, "metrics/test_accuracy").load() for name, run in _named(softmax, network)}
    config = network.attrs["config"]
    introduction = (
        "scikit-learn's 8 x 8 digits, pixels centred, learnt by SGD with batch size 1: softmax regression "
        "(10 class vectors x^c) and a 64-32-10 ReLU network, both with regulariser "
        f"beta = {config['beta']:g} and learning rate {config['learning_rate']:g}. For each row of each "
        "weight matrix the block was taken of the Hessian H and of the G-matrix G on the training images."
    )
    return Findings(
        "Digits: the rows of the weights align with the leading eigenspaces of their own blocks",
        introduction,
        claims(measured, accuracy),
        figures(softmax, network, measured),
    )


def measure(run: xr.DataTree, layer: str) -> xr.Dataset:
    """Compute the alignment of each row with E_10 of its own blocks, and with the next row's block.

    Returns
    -------
    xarray.Dataset
        Lazy; dims (seed, step, out).
    """
    weight = array_at(run, f"weights/{layer}/weight")
    found: dict[str, xr.DataArray] = {}
    for matrix in ("hessian", "gmatrix"):
        leading = principal(array_at(run, f"{matrix}_rows/{layer}/eigenvectors"), CLASSES)
        found[matrix] = alignment(weight, leading, vector_dims=ROWS)
        found[f"{matrix}_other"] = alignment(weight, leading.roll(out=-1), vector_dims=ROWS)
    return xr.Dataset(found)


def claims(measured: dict[str, xr.Dataset], accuracy: dict[str, xr.DataArray]) -> list[Claim]:
    """Put the claims beside the numbers; the worst row counts, for the hidden layer the worst seed."""
    start = {name: found.isel(step=0) for name, found in measured.items()}
    end = {name: found.isel(step=-1) for name, found in measured.items()}
    final = {name: lowest(values.isel(step=-1)) for name, values in accuracy.items()}
    own, other = end["softmax"]["hessian"].mean("out"), end["softmax"]["hessian_other"].mean("out")
    hidden, next_hidden = end["fc1"]["hessian"].mean("out"), end["fc1"]["hessian_other"].mean("out")
    return [
        Claim("softmax: test accuracy", final["softmax"], at_least(0.90)),
        Claim(
            "softmax, start: mean alignment of x^c with E_10 of its Hessian block",
            float(start["softmax"]["hessian"].mean()),
            at_most(0.5),
        ),
        Claim(
            "softmax, end: x^c lies in E_10 of its own Hessian block",
            lowest(end["softmax"]["hessian"]),
            at_least(0.90),
        ),
        Claim(
            "softmax, end: x^c lies in E_10 of its own G-matrix block",
            lowest(end["softmax"]["gmatrix"]),
            at_least(0.88),
        ),
        Claim(
            "softmax, end: its own block aligns better than the next class's, by",
            lowest(own - other),
            at_least(0.08),
        ),
        Claim("network: test accuracy", final["network"], at_least(0.92)),
        Claim(
            "network, last layer, end: rows lie in E_10 of their own Hessian block",
            lowest(end["fc2"]["hessian"]),
            at_least(0.95),
        ),
        Claim(
            "network, last layer, end: rows lie in E_10 of their own G-matrix block",
            lowest(end["fc2"]["gmatrix"]),
            at_least(0.88),
        ),
        Claim(
            "network, hidden layer, start: mean alignment with E_10 of the Hessian block",
            highest(start["fc1"]["hessian"].mean("out")),
            at_most(0.45),
        ),
        Claim(
            "network, hidden layer, end: mean alignment with E_10 of the Hessian block",
            lowest(hidden),
            at_least(0.80),
        ),
        Claim(
            "network, hidden layer, end: own block aligns better than the next neuron's, by",
            lowest(hidden - next_hidden),
            at_least(0.02),
        ),
    ]


def figures(softmax: xr.DataTree, network: xr.DataTree, measured: dict[str, xr.Dataset]) -> list[Figure]:
    """Draw the figures of the report."""
    from hild_xr import plots
    from hild_xr.report import Figure

    pick = {"seed": 0, "out": 0}
    eigenvalues = data_part(
        array_at(softmax, "hessian_rows/linear.weight/eigenvalues").isel(pick),
        softmax["hessian_rows"].attrs["regularizer"],
    )
    leading = principal(array_at(softmax, "hessian_rows/linear.weight/eigenvectors").isel(pick), CLASSES)
    drawn = [
        *(_training(title, run) for title, run in _named(softmax, network)),
        Figure(
            plots.spectrum(eigenvalues, outlier_count=CLASSES, log_x=True, log_y=True),
            "Softmax regression: eigenvalues of the Hessian block of class 0",
            "The ten leading eigenvalues and the recorded beginning of the rest (first seed).",
        ),
        Figure(
            plots.angle_map(pairwise_angles(leading).isel(angle=-1).load(), log_x=True),
            "Softmax regression: largest principal angle between E_10(H) at two steps",
            "Class 0 of the first seed.",
        ),
    ]
    for name, title, inputs in (
        ("softmax", "Softmax regression: alignment of x^c", 64),
        ("fc2", "64-32-10 network: alignment of the last layer's rows", 32),
        ("fc1", "64-32-10 network: alignment of the hidden layer's rows", 64),
    ):
        found = measured[name]
        curves = {
            "E_10(H), own block": found["hessian"],
            "E_10(G), own block": found["gmatrix"],
            "E_10(H), next row's block": found["hessian_other"],
        }
        baseline = float(random_alignment_baseline(CLASSES, inputs))
        caption = (
            "Median and range over seeds and rows. "
            f"A random subspace gives sqrt(10/{inputs}) = {baseline:.3f}."
        )
        drawn.append(Figure(plots.alignment_curves(curves, baseline=baseline, log_x=True), title, caption))
    return drawn


def _training(title: str, run: xr.DataTree) -> Figure:
    from hild_xr import plots
    from hild_xr.report import Figure

    metrics = run["metrics"].to_dataset()[["train_loss", "test_loss", "accuracy", "test_accuracy"]].load()
    return Figure(
        plots.metric_curves(metrics, log_x=True), f"Training of the {title}", "Median and range over seeds."
    )


def _named(softmax: xr.DataTree, network: xr.DataTree) -> list[tuple[str, xr.DataTree]]:
    return [("softmax", softmax), ("network", network)]
