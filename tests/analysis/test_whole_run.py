from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from hild_xr import analysis
from hild_xr.analysis import whole_run
from hild_xr.analysis.named import OWN_ANALYSES
from hild_xr.variables import VARIABLES

SEEDS, STEPS, EVERY_SECOND = [0, 7], [0, 1, 5, 10], [0, 5, 10, 20]
LAYER = {"vector_dims": ["out", "in"], "number_dim": "eig"}
ROWS = {"vector_dims": ["in"], "number_dim": "eig"}
MODEL = {
    "vector_dims": ["param"],
    "number_dim": "eig",
    "layers": ["fc1.weight", "fc1.bias"],
    "layer_shapes": [[3, 4], [3]],
}


def recorded() -> xr.DataTree:
    """A run of two seeds: weights at other steps than spectra, of layers, rows and a module."""
    rng = np.random.default_rng(0)

    def array(
        dims: str, shape: tuple[int, ...], attrs: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        return ("seed", "step", *dims.split()), rng.standard_normal((2, 4, *shape)), attrs or {}

    def spectrum(matrix: str, blocks: str, beta: float = 0.0) -> dict[str, Any]:
        return {"matrix": matrix, "blocks": blocks, "regularizer": beta}

    weights = {"seed": SEEDS, "step": STEPS}
    spectra = {"seed": SEEDS, "step": EVERY_SECOND}
    own = {"layer": ["fc1.weight"], "eig": [0, 1, 2], **spectra}
    vectors = {"vector_dims": ["out", "in"]}
    nodes: dict[str, xr.Dataset] = {
        "metrics": xr.Dataset({"train_loss": array("", ())}, weights),
        "weights": xr.Dataset(coords=weights),
        "weights/fc1.weight": xr.Dataset({"weight": array("out in", (3, 4), vectors)}),
        "weights/fc1.bias": xr.Dataset({"weight": array("out", (3,), {"vector_dims": ["out"]})}),
        "gradients": xr.Dataset(coords=weights),
        "gradients/fc1.weight": xr.Dataset({"gradient": array("out in", (3, 4), vectors)}),
        "hessian": xr.Dataset(
            {"eigenvalues": array("layer eig", (1, 3))}, own, spectrum("hessian", "layer", 0.3)
        ),
        "hessian/fc1.weight": xr.Dataset({"eigenvectors": array("eig out in", (3, 3, 4), LAYER)}),
        "gmatrix": xr.Dataset({"eigenvalues": array("layer eig", (1, 3))}, own, spectrum("gmatrix", "layer")),
        "gmatrix/fc1.weight": xr.Dataset({"eigenvectors": array("eig out in", (3, 3, 4), LAYER)}),
        "hessian_rows": xr.Dataset(coords=spectra, attrs=spectrum("hessian", "rows", 0.3)),
        "hessian_rows/fc1.weight": xr.Dataset(
            {
                "eigenvalues": array("out eig", (3, 2)),
                "eigenvectors": array("out eig in", (3, 2, 4), ROWS),
            }
        ),
        "hessian_module": xr.Dataset(coords=spectra, attrs=spectrum("hessian", "module", 0.3)),
        "hessian_module/fc1": xr.Dataset({"eigenvectors": array("eig param", (2, 15), MODEL)}),
    }
    return xr.DataTree.from_dict(nodes)


RUN = recorded()
U, V = RUN["hessian/fc1.weight/eigenvectors"], RUN["gmatrix/fc1.weight/eigenvectors"]
WEIGHT = RUN["weights/fc1.weight/weight"]
ROW_VECTORS, MODULE = RUN["hessian_rows/fc1.weight/eigenvectors"], RUN["hessian_module/fc1/eigenvectors"]
COMMON = [0, 5, 10]


def leaves(tree: xr.DataTree) -> dict[str, list[str]]:
    return {node.path: sorted(map(str, node.data_vars)) for node in tree.subtree if node.data_vars}


def at_common(array: xr.DataArray) -> xr.DataArray:
    return array.sel(step=COMMON)


def test_angles__are_those_of_every_node_with_eigenvectors() -> None:
    found = whole_run.angles(RUN)
    assert leaves(found) == {
        "/hessian/fc1.weight": ["principal_angles"],
        "/gmatrix/fc1.weight": ["principal_angles"],
        "/hessian_rows/fc1.weight": ["principal_angles"],
        "/hessian_module/fc1": ["principal_angles"],
    }
    xr.testing.assert_identical(found["hessian/fc1.weight/principal_angles"], analysis.pairwise_angles(U))
    assert found["hessian_rows/fc1.weight"].attrs["blocks"] == "rows"


def test_k__takes_the_leading_eigenvectors_and_leaves_out_where_there_are_fewer() -> None:
    found = whole_run.angles(RUN, k=3)
    assert found.attrs["left_out"] == {
        "hessian_rows/fc1.weight": "2 eigenvectors recorded, k=3 asked for",
        "hessian_module/fc1": "2 eigenvectors recorded, k=3 asked for",
    }
    one = whole_run.angles(RUN, k=1)["hessian/fc1.weight/principal_angles"]
    xr.testing.assert_identical(one, analysis.pairwise_angles(U.isel(eig=slice(1))))
    with pytest.raises(ValueError, match="expected at least one eigenvector, came k=0"):
        whole_run.angles(RUN, k=0)


def test_angles_to_reference__are_to_the_first_step_or_the_one_given() -> None:
    first = whole_run.angles_to_reference(RUN)["gmatrix/fc1.weight/principal_angles"]
    xr.testing.assert_identical(first, analysis.angles_to_reference(V, 0))
    last = whole_run.angles_to_reference(RUN, reference=20)["gmatrix/fc1.weight/principal_angles"]
    xr.testing.assert_identical(last, analysis.angles_to_reference(V, 20))
    nothing = whole_run.angles_to_reference(RUN, reference=3)
    assert leaves(nothing) == {}
    assert nothing.attrs["left_out"]["hessian/fc1.weight"] == "no record at step 3"


def test_consecutive_angles__need_two_records() -> None:
    found = whole_run.consecutive_angles(RUN)["hessian/fc1.weight/principal_angles"]
    xr.testing.assert_identical(found, analysis.consecutive_angles(U))
    short = RUN.isel(step=[0], missing_dims="ignore")
    assert set(whole_run.consecutive_angles(short).attrs["left_out"].values()) == {"fewer than two records"}


def test_overlap__pairs_two_matrices_of_the_same_blocks() -> None:
    found = whole_run.overlap(RUN)
    assert leaves(found) == {"/hessian_gmatrix/fc1.weight": ["subspace_alignment", "subspace_overlap"]}
    node = found["hessian_gmatrix/fc1.weight"]
    xr.testing.assert_identical(node["subspace_overlap"], analysis.subspace_overlap(U, V))
    xr.testing.assert_identical(node["subspace_alignment"], analysis.subspace_alignment(U, V))


def test_alignment__is_at_the_steps_that_weights_and_eigenvectors_share() -> None:
    found = whole_run.alignment(RUN, k=2)
    weight = at_common(WEIGHT)
    expected = analysis.alignment(weight, at_common(U).isel(eig=slice(2)))
    xr.testing.assert_identical(found["hessian/fc1.weight/alignment"], expected)
    of_rows = analysis.alignment(weight, at_common(ROW_VECTORS), vector_dims=["in"])
    xr.testing.assert_identical(found["hessian_rows/fc1.weight/alignment"], of_rows)


def test_alignment__brings_weights_into_the_layout_of_blocks_of_several_tensors() -> None:
    found = whole_run.alignment(RUN)["hessian_module/fc1/alignment"]
    flat = analysis.flatten_like(RUN["weights"], MODULE)
    xr.testing.assert_identical(found, analysis.alignment(at_common(flat), at_common(MODULE)))


def test_projection__is_of_gradients_and_says_what_was_not_recorded() -> None:
    found = whole_run.projection(RUN)
    gradient = RUN["gradients/fc1.weight/gradient"]
    expected = analysis.projection(at_common(gradient), at_common(U))[["chi", "f_top"]]
    xr.testing.assert_identical(found["hessian/fc1.weight"].to_dataset().drop_attrs(deep=False), expected)
    assert found.attrs["left_out"] == {"hessian_module/fc1": "no gradient of ['fc1.bias']"}


def with_group(name: str, of: str, factor: float = 1.0, **attrs: Any) -> xr.DataTree:
    """RUN with a copy of a group under another name."""
    run = RUN.copy()
    copied = {path: node.to_dataset() * factor for path, node in RUN[of].subtree_with_keys}
    for path, dataset in copied.items():
        for variable in dataset.data_vars:
            dataset[variable].attrs = RUN[of][path][variable].attrs | attrs
    run[name] = xr.DataTree.from_dict(copied)
    return run


@pytest.mark.parametrize(
    ("analysis_of", "of", "variable"),
    [(whole_run.alignment, "weights", "weight"), (whole_run.projection, "gradients", "gradient")],
)
def test_vectors_of_several_groups__are_those_of_the_default_or_the_one_asked_for(
    analysis_of: Any, of: str, variable: str
) -> None:
    noise = np.random.default_rng(1).standard_normal((3, 4))
    run = with_group("ema", of)
    run[f"ema/fc1.weight/{variable}"] = run[f"ema/fc1.weight/{variable}"] + noise
    run[f"ema/fc1.weight/{variable}"].attrs = RUN[f"{of}/fc1.weight/{variable}"].attrs
    path = "hessian/fc1.weight"
    alone, chosen, asked = (
        analysis_of(RUN)[path],
        analysis_of(run)[path],
        analysis_of(run, **{of: "ema"})[path],
    )
    xr.testing.assert_identical(chosen.to_dataset(), alone.to_dataset())
    assert alone.attrs[of] == of
    assert asked.attrs[of] == "ema"
    assert not asked.equals(alone)
    renamed = run.copy()
    renamed["w16"] = renamed[of]
    del renamed[of]
    with pytest.raises(ValueError, match=rf"'fc1.weight' has its {variable} in the groups \['ema', 'w16'\]"):
        analysis_of(renamed)
    with pytest.raises(ValueError, match=rf"holds '{variable}', came 'emma'; there are \['{of}', 'ema'\]"):
        analysis_of(run, **{of: "emma"})


def test_alignment__takes_the_group_in_the_form_of_the_eigenvectors() -> None:
    run = with_group("sketched", "weights", sketch={"m": 5})
    xr.testing.assert_identical(whole_run.alignment(run), whole_run.alignment(RUN))
    of_sketch = whole_run.alignment(run, weights="sketched")
    assert set(of_sketch.attrs["left_out"].values()) == {"weight and eigenvectors are not sketched alike"}


def test_alignment__of_a_block_whose_layers_no_group_has_together_is_left_out() -> None:
    run = with_group("ema", "weights")
    del run["weights"]["fc1.bias"], run["ema"]["fc1.weight"]
    left_out = whole_run.alignment(run).attrs["left_out"]
    assert left_out == {"hessian_module/fc1": "no group has the weight of all of ['fc1.weight', 'fc1.bias']"}


def test_records_that_have_no_counterpart__are_counted_in_the_result() -> None:
    said = "3 of 4 steps of eigenvectors; the others have no weight"
    assert whole_run.alignment(RUN)["hessian/fc1.weight"].attrs["records"] == said
    same = RUN.sel(step=COMMON)
    assert "records" not in whole_run.alignment(same)["hessian/fc1.weight"].attrs
    run = RUN.copy()
    run["gmatrix"] = RUN["gmatrix"].sel(seed=[7], step=[0, 20])
    assert whole_run.overlap(run)["hessian_gmatrix/fc1.weight"].attrs["records"] == (
        "2 of 4 steps and 1 of 2 seeds of hessian; the others have no gmatrix"
    )
    run["hessian"] = RUN["hessian"].sel(step=[0, 5])
    assert whole_run.overlap(run)["hessian_gmatrix/fc1.weight"].attrs["records"] == (
        "1 of 2 steps and 1 of 2 seeds of hessian; the others have no gmatrix. "
        "1 of 2 steps of gmatrix; the others have no hessian"
    )


def test_records_of_different_seeds_only__are_left_out() -> None:
    run = RUN.copy()
    run["hessian"], run["gmatrix"] = RUN["hessian"].sel(seed=[0]), RUN["gmatrix"].sel(seed=[7])
    left_out = {"hessian_gmatrix/fc1.weight": "no seed of which both were recorded"}
    assert whole_run.overlap(run).attrs["left_out"] == left_out


def test_records_at_different_steps_only__are_left_out() -> None:
    shifted = RUN.copy()
    shifted["hessian"] = xr.DataTree.from_dict(
        {
            path: node.to_dataset().assign_coords(step=[2, 3, 4, 6])
            for path, node in RUN["hessian"].subtree_with_keys
        }
    )
    found = whole_run.alignment(shifted)
    assert found.attrs["left_out"] == {"hessian/fc1.weight": "no step at which both were recorded"}


def test_sketches__are_compared_only_with_equal_sketches() -> None:
    def sketched(matrix_seed: int) -> dict[str, Any]:
        return {"vector_dims": ["sketch"], "sketch": {"m": 5, "seed": matrix_seed}}

    rng = np.random.default_rng(1)
    coords = {"seed": [0], "step": [0, 1]}
    weight = xr.DataArray(rng.standard_normal((1, 2, 5)), coords, ("seed", "step", "sketch"))
    vectors = xr.DataArray(rng.standard_normal((1, 2, 2, 5)), coords, ("seed", "step", "eig", "sketch"))

    def run(weight_attrs: dict[str, Any], vector_attrs: dict[str, Any]) -> xr.DataTree:
        u = vectors.assign_attrs({**vector_attrs, "number_dim": "eig"})
        return xr.DataTree.from_dict(
            {
                "weights/a": weight.assign_attrs(weight_attrs).to_dataset(name="weight"),
                "hessian/a": u.to_dataset(name="eigenvectors"),
            }
        )

    alike = whole_run.alignment(run(sketched(1), sketched(1)))["hessian/a/alignment"]
    expected = analysis.alignment(weight, vectors, vector_dims="sketch", number_dim="eig")
    xr.testing.assert_allclose(alike, expected)
    left_out = {"hessian/a": "weight and eigenvectors are not sketched alike"}
    for other in (sketched(2), {"vector_dims": ["sketch"]}):
        assert whole_run.alignment(run(sketched(1), other)).attrs["left_out"] == left_out


def test_outliers__are_measured_from_the_regulariser_of_their_group() -> None:
    found = whole_run.outliers(RUN, method="relative", threshold=0.4)
    eigenvalues = RUN["hessian/eigenvalues"]
    expected = analysis.outliers(eigenvalues, method="relative", threshold=0.4, regularizer=0.3)
    xr.testing.assert_identical(found["hessian"].to_dataset().drop_attrs(deep=False), expected)
    assert leaves(found).keys() == {"/hessian", "/gmatrix", "/hessian_rows/fc1.weight"}
    beyond = whole_run.outliers(RUN, k=2)
    assert beyond.attrs["left_out"] == {
        "hessian_rows/fc1.weight": "2 eigenvalues recorded, k=2 needs one more"
    }


def test_tracks__take_the_eigenvalues_of_their_layer() -> None:
    found = whole_run.tracks(RUN, max_tracks=5)
    eigenvalues = RUN["hessian/eigenvalues"].sel(layer="fc1.weight", drop=True)
    expected = analysis.track(eigenvalues, U, max_tracks=5)
    xr.testing.assert_identical(found["hessian/fc1.weight"].to_dataset().drop_attrs(deep=False), expected)
    rows = analysis.track(RUN["hessian_rows/fc1.weight/eigenvalues"], ROW_VECTORS, max_tracks=5)
    xr.testing.assert_identical(found["hessian_rows/fc1.weight"].to_dataset().drop_attrs(deep=False), rows)
    assert found.attrs["left_out"] == {"hessian_module/fc1": "eigenvectors without eigenvalues"}


def test_rank__is_of_spectra_and_of_weight_matrices() -> None:
    found = whole_run.rank(RUN, rtol=0.1)
    assert found.attrs["left_out"] == {"weights/fc1.bias": "no matrix"}
    matrix = analysis.rank(WEIGHT, ("out", "in"), rtol=0.1)
    xr.testing.assert_identical(found["weights/fc1.weight"].to_dataset(), matrix)
    spectrum = analysis.rank(RUN["hessian/eigenvalues"], rtol=0.1, regularizer=0.3)
    xr.testing.assert_identical(found["hessian"].to_dataset().drop_attrs(deep=False), spectrum)
    assert not spectrum.equals(analysis.rank(RUN["hessian/eigenvalues"], rtol=0.1))


def test_rank__of_a_convolution_is_that_of_outputs_against_all_inputs() -> None:
    values = np.random.default_rng(0).standard_normal((1, 2, 4, 3, 2, 2))
    values[..., 3, :, :, :] = values[..., 0, :, :, :]
    dims = ["out", "in", "kh", "kw"]
    kernel = xr.DataArray(values, dims=("seed", "step", *dims), attrs={"vector_dims": dims})
    run = xr.DataTree.from_dict({"weights/conv": kernel.to_dataset(name="weight")})
    assert (whole_run.rank(run)["weights/conv/numerical_rank"] == 3).all()


@pytest.mark.parametrize("name", OWN_ANALYSES)
@pytest.mark.usefixtures("nothing_computes")
def test_every_analysis__is_lazy_and_carries_the_registry(name: str) -> None:
    found = OWN_ANALYSES[name](RUN.chunk(seed=1, step=2))
    for path, arrays in leaves(found).items():
        for variable in arrays:
            array = found[path][variable]
            assert array.chunks is not None, (path, variable)
            assert array.attrs.items() >= VARIABLES[variable].attrs().items()


@pytest.mark.parametrize("name", OWN_ANALYSES)
def test_every_analysis__gives_the_same_in_chunks(name: str) -> None:
    whole, chunked = OWN_ANALYSES[name](RUN), OWN_ANALYSES[name](RUN.chunk(seed=1, step=3))
    xr.testing.assert_allclose(chunked.compute(), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OWN_ANALYSES)
def test_every_analysis__of_a_run_without_records_is_empty_or_says_so(name: str) -> None:
    empty = RUN.isel(step=slice(0), missing_dims="ignore")
    found = OWN_ANALYSES[name].function(empty)
    for path, arrays in leaves(found).items():
        recorded = [found[path][variable] for variable in arrays if "step" in found[path][variable].dims]
        assert recorded
        assert all(array.size == 0 for array in recorded)
    assert leaves(found) or set(found.attrs["left_out"].values()) <= {"no record", "fewer than two records"}


def test_select_run__takes_seeds_and_layers_of_all_groups() -> None:
    found = whole_run.select_run(RUN, seeds=[7], layers=["*.weight"])
    assert [node.path for node in found.subtree if not node.children] == [
        "/metrics",
        "/hessian_module",
        "/weights/fc1.weight",
        "/gradients/fc1.weight",
        "/hessian/fc1.weight",
        "/gmatrix/fc1.weight",
        "/hessian_rows/fc1.weight",
    ]
    xr.testing.assert_identical(found["hessian/eigenvalues"], RUN["hessian/eigenvalues"].sel(seed=[7]))
    xr.testing.assert_identical(found["weights/fc1.weight/weight"], WEIGHT.sel(seed=[7]))
    assert found["hessian"].attrs == RUN["hessian"].attrs


def test_select_run__keeps_the_weights_that_a_block_is_made_of() -> None:
    found = whole_run.select_run(RUN, layers=["fc1"])
    assert [node.path for node in found.subtree if node.data_vars] == [
        "/metrics",
        "/hessian",
        "/gmatrix",
        "/weights/fc1.weight",
        "/weights/fc1.bias",
        "/gradients/fc1.weight",
        "/hessian_module/fc1",
    ]
    of_block, of_all = whole_run.alignment(found), whole_run.alignment(RUN)
    assert list(leaves(of_block)) == ["/hessian_module/fc1"]
    xr.testing.assert_identical(of_block["hessian_module/fc1"], of_all["hessian_module/fc1"])


def test_select_run__of_everything_is_the_run() -> None:
    xr.testing.assert_identical(whole_run.select_run(RUN), RUN)


def test_select_run__says_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"expected seeds of the run, came \[3\]; it has \[0, 7\]"):
        whole_run.select_run(RUN, seeds=[0, 3])
    with pytest.raises(ValueError, match=r"came 'fc2'; it has \['fc1.weight', 'fc1.bias', 'fc1'\]"):
        whole_run.select_run(RUN, layers=["fc2"])
