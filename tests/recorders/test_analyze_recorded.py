"""Every named analysis on a run as the recorder makes it: layers, rows, modules, the model, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.nn.functional import cross_entropy

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.analysis.named import OWN_ANALYSES
from hild_xr.recorders.problems import Digits


def test_every_analysis__works_on_a_recorded_run(tmp_path: Path) -> None:
    problem = Digits(hidden=8)
    model = problem.model(seed=0)
    optimizer = problem.optimizer(model)
    probes = [
        rec.Metrics(),
        rec.Weights(),
        rec.Gradient(),
        rec.Hessian(k=4),
        rec.GMatrix(k=4),
        rec.Hessian(k=3, blocks="rows", layers=["fc1.weight"]),
        rec.Hessian(k=3, blocks="module"),
        rec.Hessian(k=3, blocks="model"),
    ]
    objective = rec.Objective(cross_entropy, *problem.samples("train"))
    path, schedule = tmp_path / "run.zarr", rec.at([0, 3, 6])
    with rec.Recorder(path, model, optimizer, objective=objective, probes=probes, schedule=schedule):
        problem.train(model, optimizer, steps=6, seed=0)
    results = hx.open(path).hild.analyze(list(OWN_ANALYSES), tmp_path / "results.zarr")
    assert set(results.children) == OWN_ANALYSES.keys()
    biases = {f"weights/{layer}.bias": "no matrix" for layer in ("fc1", "fc2")}
    left_out = {name: node.attrs.get("left_out", {}) for name, node in results.children.items()}
    assert left_out == {name: biases if name == "rank" else {} for name in OWN_ANALYSES}
    for name in ("angles", "alignment", "projection"):
        blocks = {node.path.partition(name)[2] for node in results[name].leaves}
        assert {"/hessian/fc2.bias", "/hessian_rows/fc1.weight"} <= blocks
        assert {"/hessian_module/fc1", "/hessian_model/model"} <= blocks
    for path_of_array in (
        "alignment/hessian_module/fc1/alignment",
        "projection/hessian_model/model/chi",
        "overlap/hessian_gmatrix/fc1.weight/subspace_overlap",
    ):
        values = results[path_of_array].values
        assert np.isfinite(values).all()
        assert ((values > 0) & (values <= 1)).all()
