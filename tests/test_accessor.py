from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import hild_xr.accessor  # noqa: F401  # registers .hild
from hild_xr import analysis
from hild_xr.accessor import HildAccessor
from hild_xr.store import RunWriter, open_run
from hild_xr.testing import random_record, spectrum_plan


def run() -> xr.DataTree:
    rng = np.random.default_rng(0)
    coords = {"seed": [0], "step": [0, 5, 9]}
    vectors = np.swapaxes(np.linalg.qr(rng.standard_normal((1, 3, 12, 2)))[0], -1, -2).reshape(1, 3, 2, 3, 4)
    layer = {"vector_dims": ["out", "in"], "number_dim": "eig"}
    dims = ("seed", "step", "eig", "out", "in")
    nodes = {
        "weights/fc.weight": {"weight": (("seed", "step", "out", "in"), rng.standard_normal((1, 3, 3, 4)))},
        "hessian": {"eigenvalues": (("seed", "step", "layer", "eig"), rng.exponential(size=(1, 3, 1, 2)))},
        "hessian/fc.weight": {"eigenvectors": (dims, vectors, layer)},
        "gmatrix/fc.weight": {"eigenvectors": (dims, np.roll(vectors, 1, axis=1), layer)},
    }
    return xr.DataTree.from_dict({path: xr.Dataset(node, coords=coords) for path, node in nodes.items()})


TREE = run()
WEIGHT = TREE["weights/fc.weight"]
H, G = TREE["hessian/fc.weight"], TREE["gmatrix/fc.weight"]
LAMBDA = TREE["hessian"]


def same(found: object, expected: xr.DataArray | xr.Dataset) -> bool:
    return isinstance(found, type(expected)) and expected.identical(found)


@pytest.mark.parametrize("kind", ["DataTree", "Dataset", "DataArray"])
def test_methods__give_what_the_functions_give(kind: str) -> None:
    def view(node: xr.DataTree, name: str) -> Any:
        return {"DataTree": node, "Dataset": node.to_dataset(), "DataArray": node[name]}[kind]

    w, u, v = view(WEIGHT, "weight"), view(H, "eigenvectors"), view(G, "eigenvectors")
    lam = view(LAMBDA, "eigenvalues")
    U, V, eigenvalues = H["eigenvectors"], G["eigenvectors"], LAMBDA["eigenvalues"]
    assert same(u.hild.principal_angles(v), analysis.principal_angles(U, V))
    assert same(u.hild.subspace_overlap(v), analysis.subspace_overlap(U, V))
    assert same(u.hild.subspace_alignment(v), analysis.subspace_alignment(U, V))
    assert same(u.hild.pairwise_angles(dim="step"), analysis.pairwise_angles(U))
    assert same(u.hild.angles_to_reference(5), analysis.angles_to_reference(U, 5))
    assert same(
        w.hild.alignment(u, vector_dims=["out", "in"]),
        analysis.alignment(WEIGHT["weight"], U, vector_dims=["out", "in"]),
    )
    assert same(lam.hild.outliers(method="relative"), analysis.outliers(eigenvalues, method="relative"))
    assert same(lam.hild.rank(rtol=0.1), analysis.rank(eigenvalues, rtol=0.1))


def test_methods__have_the_names_of_public_functions() -> None:
    methods = {name for name, _ in inspect.getmembers(HildAccessor, inspect.isfunction) if name[0] != "_"}
    assert methods - {"refresh"} <= set(analysis.__all__)
    assert len(methods) == 10


def test_methods__name_the_nodes_that_have_the_variable() -> None:
    nodes = r"\['/hessian/fc.weight', '/gmatrix/fc.weight'\]"
    with pytest.raises(
        KeyError, match=rf"expected a variable 'eigenvectors', came \[\]; take one of.*{nodes}"
    ):
        TREE.hild.pairwise_angles()
    with pytest.raises(KeyError, match=r"came \['weight'\]; pass the DataArray itself"):
        WEIGHT.to_dataset().hild.outliers()


def test_refresh__shows_what_was_committed_since() -> None:
    store, plan = MemoryStore(), spectrum_plan()
    with RunWriter(store, plan, 0) as writer:
        tree = open_run(store)
        writer.write("metrics", 0, random_record(plan, "metrics", seed=0, step=0))
    assert tree.hild.refresh()["metrics"].sizes["step"] == 1


def test_refresh__of_data_that_do_not_know_their_run_says_to_open_it() -> None:
    with pytest.raises(ValueError, match=r"Open the run again with hx.open\(path\)"):
        TREE.hild.refresh()
    with pytest.raises(TypeError, match=r"a DataArray does not know its run.*hx.open\(path\)"):
        WEIGHT["weight"].hild.refresh()


def test_import__loads_no_analysis_until_a_method_is_called() -> None:
    code = """
import sys, xarray as xr, hild_xr.accessor
assert "hild_xr.analysis" not in sys.modules
assert int(xr.DataArray([9.0, 1.0], dims="eig").hild.outliers().outlier_count) == 1
assert "hild_xr.analysis" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
