from __future__ import annotations

import importlib
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
from hild_xr.forwarding import ANY, FORWARDED, NOT_FORWARDED
from hild_xr.store import RunWriter, open_run
from hild_xr.testing import random_record, spectrum_plan
from hild_xr.variables import VARIABLES


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


def test_methods__forward_to_every_public_function_or_say_why_not() -> None:
    public = {*analysis.__all__, *analysis.features.__all__}
    assert sorted(public - FORWARDED.keys() - NOT_FORWARDED.keys()) == []
    assert sorted((FORWARDED.keys() | NOT_FORWARDED.keys()) - public) == []
    assert not FORWARDED.keys() & NOT_FORWARDED.keys()
    methods = {name for name, _ in inspect.getmembers(HildAccessor, inspect.isfunction) if name[0] != "_"}
    assert methods - {"refresh", "analyze"} == FORWARDED.keys()


@pytest.mark.parametrize("name", FORWARDED)
def test_methods__hand_over_declared_variables_to_arguments_that_are_there(name: str) -> None:
    takes = FORWARDED[name]
    function = getattr(importlib.import_module(takes.module), name)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    handed = (*takes.own, *takes.others)
    arrays = [p for p in parameters if "DataArray" in str(p.annotation) or p.annotation == "Layers"]
    assert parameters[: len(handed)] == arrays[: len(handed)]
    names = {variable for taken in handed for variable in taken.strip("/").split("|")} - {"", ANY}
    assert names <= VARIABLES.keys()


def test_methods__take_several_variables_of_one_node_or_one_by_one() -> None:
    rng = np.random.default_rng(0)
    node = xr.Dataset(
        {
            "quadrature_nodes": (("step", "probe", "node"), rng.standard_normal((3, 2, 5))),
            "quadrature_weights": (("step", "probe", "node"), np.full((3, 2, 5), 0.2)),
        }
    )
    nodes, weights = node["quadrature_nodes"], node["quadrature_weights"]
    expected = analysis.spectral_distribution(nodes, weights, [0.0, 1.0])
    assert same(node.hild.spectral_distribution([0.0, 1.0]), expected)
    assert same(nodes.hild.spectral_distribution(weights, [0.0, 1.0]), expected)
    assert same(nodes.hild.spectral_distribution(node, [0.0, 1.0]), expected)


def test_methods__take_what_the_group_holds_of_the_layer() -> None:
    run = TREE.copy()
    run["hessian"].dataset = run["hessian"].to_dataset().assign_coords(layer=["fc.weight"])
    eigenvalues = run["hessian/eigenvalues"].sel(layer="fc.weight", drop=True)
    node = run["hessian/fc.weight"]
    assert same(node.hild.track(), analysis.track(eigenvalues, H["eigenvectors"]))
    assert same(node.hild.outliers(), analysis.outliers(eigenvalues))
    run["hessian"].dataset = run["hessian"].to_dataset().assign_coords(layer=["fc2.weight"])
    with pytest.raises(KeyError, match="expected a variable 'eigenvalues'"):
        run["hessian/fc.weight"].hild.track()


def test_methods__take_the_first_variable_that_is_there() -> None:
    values = np.exp(np.linspace(0, 5, 50))
    node = xr.Dataset({"singular_values": ("eig", values)})
    assert same(node.hild.tail_index(dim="eig"), analysis.tail_index(node["singular_values"], dim="eig"))
    with pytest.raises(KeyError, match="expected a variable 'eigenvalues' or 'singular_values'"):
        WEIGHT.hild.tail_index()


def test_methods__take_all_layers_of_a_node_or_one() -> None:
    rng = np.random.default_rng(0)
    labels = xr.DataArray([0, 0, 1, 1], dims="sample")
    layer = xr.Dataset({"activations": (("sample", "unit"), rng.standard_normal((4, 3)))})
    tree = xr.DataTree.from_dict({"/fc1": layer, "/fc2": 2 * layer})
    separation = analysis.features.separation
    assert same(tree.hild.separation(labels), separation(tree, labels))
    assert tree.hild.separation(labels).sizes["layer"] == 2
    one = separation(layer["activations"], labels)
    assert same(tree["fc1"].hild.separation(labels), one)
    assert same(layer.hild.separation(labels), one)


def test_methods__have_a_docstring_that_leads_to_the_function() -> None:
    assert "hild_xr.analysis.alignment" in str(HildAccessor.alignment.__doc__)  # type: ignore[attr-defined]
    assert HildAccessor.alignment.__name__ == "alignment"  # type: ignore[attr-defined]


def test_analyze__is_the_function_of_the_run() -> None:
    results = TREE.hild.analyze("outliers", options={"outliers": {"method": "relative"}})
    expected = analysis.outliers(LAMBDA["eigenvalues"], method="relative")
    xr.testing.assert_identical(results["outliers/hessian"].to_dataset(), expected)
    with pytest.raises(TypeError, match="a DataArray is no run"):
        WEIGHT["weight"].hild.analyze("outliers")


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
