from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

import hild_xr as hx
from hild_xr import analysis
from hild_xr.analysis.named import AnalysisError, NamedAnalysis, NotRecordedError, UnknownAnalysisError
from hild_xr.analyze import _new_folder, analyze
from hild_xr.store import DamagedRecordError, NotAStoreError, RunWriter, UnusableTargetError
from hild_xr.testing import random_record, spectrum_plan

ALL = ["angles", "angles_to_reference", "consecutive_angles", "alignment", "outliers", "rank"]
PLAN = spectrum_plan(steps=tuple(range(9)))


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds; the second one lacks the last three records."""
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    for seed, n in ((0, 9), (1, 6)):
        with RunWriter(path, PLAN, seed) as writer:
            for step in range(n):
                for probe in PLAN.probes:
                    writer.write(probe, step, random_record(PLAN, probe, seed=seed, step=step))
    return path


def test_results__are_stored_as_they_are_computed(run_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    returned = analyze(run_path, ALL, out)
    opened = xr.open_datatree(out, engine="zarr")
    assert list(returned.children) == sorted(ALL)
    xr.testing.assert_identical(returned.load(), opened.load())
    lazy = analyze(run_path, ALL)
    for node in lazy.subtree:
        stored = opened[node.path].to_dataset()
        xr.testing.assert_identical(stored.drop_attrs(deep=False), node.to_dataset().drop_attrs(deep=False))


def test_results__are_those_of_the_functions(run_path: Path, tmp_path: Path) -> None:
    found = analyze(
        run_path, "outliers", tmp_path / "results.zarr", options={"outliers": {"method": "relative"}}
    )
    run = hx.open(run_path)
    expected = analysis.outliers(run["hessian/eigenvalues"], method="relative")
    xr.testing.assert_identical(found["outliers/hessian"].to_dataset().compute(), expected.compute())
    assert (found["outliers/hessian/outlier_count"].sel(seed=1, step=[6, 7, 8]) == -1).all()


def test_results__without_out_are_lazy(run_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        found = analyze(hx.open(run_path), ALL)
    assert all(array.chunks for node in found.subtree for array in node.data_vars.values())


def test_results__say_what_they_were_made_from(run_path: Path, tmp_path: Path) -> None:
    options = {"angles": {"k": 1}}
    found = analyze(run_path, "angles, outliers,angles", tmp_path / "a.zarr", options=options)
    said = found.attrs
    assert said["hild_xr_analyses"] == {"angles": {"k": 1}, "outliers": {}}
    assert said["source"] == str(run_path)
    assert said["source_metadata_sha256"] == hx.open(run_path).attrs["metadata_sha256"]
    assert said["provenance"]["versions"]["hild-xr"] == version("hild-xr")
    assert said["provenance"]["command_line"]
    assert found["angles/hessian/fc.weight/principal_angles"].attrs["units"] == "rad"
    again = analyze(run_path, "angles", tmp_path / "b.zarr")
    assert again.attrs["source_committed_sha256"] == said["source_committed_sha256"]


def test_fingerprint_of_the_source__changes_with_what_is_committed(tmp_path: Path) -> None:
    seen = []
    with RunWriter(tmp_path / "run.zarr", PLAN, 0) as writer:
        for step in range(2):
            writer.write("hessian", step, random_record(PLAN, "hessian", seed=0, step=step))
            writer.flush()
            seen.append(analyze(tmp_path / "run.zarr", "outliers").attrs["source_committed_sha256"])
    assert seen[0] != seen[1]


def test_selection__of_seeds_and_layers(run_path: Path, tmp_path: Path) -> None:
    found = analyze(run_path, "angles,outliers", tmp_path / "a.zarr", seeds=[1], layers=["fc.*"])
    assert found["angles/hessian/fc.weight"]["seed"].values.tolist() == [1]
    whole = analyze(run_path, "angles,outliers")
    expected = whole["outliers/hessian"].to_dataset().sel(seed=[1])
    xr.testing.assert_identical(found["outliers/hessian"].to_dataset().compute(), expected.compute())
    assert (found.attrs["seeds"], found.attrs["layers"]) == ([1], ["fc.*"])
    assert not whole.attrs.keys() & {"seeds", "layers"}
    with pytest.raises(AnalysisError, match=r"expected seeds of the run, came \[5\]"):
        analyze(run_path, "angles", seeds=[5])
    with pytest.raises(AnalysisError, match="expected layers of the run, came 'conv1'"):
        analyze(run_path, "angles", layers=["conv1"])


def test_uneven_chunks__are_stored(run_path: Path, tmp_path: Path) -> None:
    run = hx.open(run_path)
    for i, steps in enumerate([(2, 4, 3), (1, 4, 4), (4, 4, 1), (3, 6)]):
        tree = run.chunk(seed=1, step=steps)
        assert tree["hessian/eigenvalues"].chunksizes["step"] == steps
        found = analyze(tree, "outliers,angles", tmp_path / f"{i}.zarr")
        xr.testing.assert_identical(
            found["outliers/hessian"].to_dataset().compute(),
            analyze(tree, "outliers")["outliers/hessian"].to_dataset().compute(),
        )


def test_out__is_not_replaced_unless_asked_for(run_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    analyze(run_path, "outliers", out)
    with pytest.raises(FileExistsError, match=r"results.zarr exists; choose another path, or overwrite it"):
        analyze(run_path, "rank", out)
    analyze(run_path, "rank", out, overwrite=True)
    assert list(xr.open_datatree(out, engine="zarr").children) == ["rank"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.zarr"]


@pytest.mark.parametrize("what", ["run", "folder", "file", "other zarr"])
def test_out__that_holds_something_else_is_never_replaced(run_path: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out.zarr"
    if what == "run":
        shutil.copytree(run_path, out)
    elif what == "folder":
        (out / "thesis").mkdir(parents=True)
    elif what == "file":
        out.write_text("thesis")
    else:
        zarr.create_group(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotAStoreError, match="holds no results of an analysis and is not overwritten"):
        analyze(run_path, "rank", out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_out__is_a_local_folder(run_path: Path) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(UnusableTargetError, match="results are written into a local folder"):
        analyze(run_path, "rank", "memory://results.zarr")


def test_failure__leaves_nothing_behind_and_the_old_result_in_place(run_path: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "run.zarr", tmp_path / "results.zarr"
    shutil.copytree(run_path, damaged)
    analyze(damaged, "rank", out)
    (damaged / "hessian/eigenvalues/c/0/0/0/0").write_bytes(b"")
    with pytest.raises(DamagedRecordError):
        analyze(damaged, "outliers", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.zarr", "run.zarr"]
    assert list(xr.open_datatree(out, engine="zarr").children) == ["rank"]


def test_old_result__comes_back_if_the_new_one_cannot_get_its_name(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "results.zarr", Path.rename
    analyze(run_path, "rank", out)

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".analyzing":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        analyze(run_path, "outliers", out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["results.zarr"]
    assert list(xr.open_datatree(out, engine="zarr").children) == ["rank"]


def test_old_result__that_cannot_come_back_is_not_deleted(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "results.zarr", Path.rename
    analyze(run_path, "rank", out)

    def fail(self: Path, target: Path) -> Path:
        if self.suffix in {".analyzing", ".replaced"}:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        analyze(run_path, "outliers", out, overwrite=True)
    (old,) = tmp_path.iterdir()
    assert old.suffix == ".replaced"
    assert list(xr.open_datatree(old, engine="zarr").children) == ["rank"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_analyses_with_one_out__end_with_the_first_and_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out, rename = tmp_path / "results.zarr", Path.rename

    def another_is_faster(self: Path, target: Path) -> Path:
        if self.suffix == ".analyzing":
            zarr.create_group(out)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", another_is_faster)
    with (
        pytest.raises(FileExistsError, match="was written by another analysis at the same time"),
        _new_folder(out, overwrite=overwrite) as scratch,
    ):
        scratch.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["results.zarr"]


def test_out__that_was_written_during_the_analysis_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    with (
        pytest.raises(FileExistsError, match="choose another path"),
        _new_folder(out, overwrite=False) as new,
    ):
        new.mkdir()
        out.mkdir()
    with pytest.raises(NotAStoreError, match="holds no results"), _new_folder(out, overwrite=True) as new:
        new.mkdir()
    assert list(tmp_path.rglob("*")) == [out]


def test_out__inside_the_run_is_refused(run_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    shutil.copytree(run_path, run)
    (tmp_path / "link").symlink_to(run)
    before = sorted(run.rglob("*"))
    for out in (run / "results.zarr", run / "hessian/a/b", tmp_path / "link/results.zarr"):
        with pytest.raises(UnusableTargetError, match=r"lies inside the store .*; choose a path outside"):
            analyze(run, "rank", out)
    assert sorted(run.rglob("*")) == before


def test_failure_of_a_lazy_analysis__names_it(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    def lazy(run: xr.DataTree) -> xr.Dataset:
        loss = run["metrics/train_loss"]
        return loss.copy(data=loss.data.map_blocks(fail, dtype=float)).to_dataset(name="loss")

    late = NamedAnalysis("late", "Fails late.", lazy, distribution="late-tools 1.2")
    monkeypatch.setattr("hild_xr.analyze.find_analysis", lambda name: late)
    with pytest.raises(ZeroDivisionError) as raised:
        analyze(run_path, "late", tmp_path / "results.zarr")
    assert raised.value.__notes__ == ["while computing 'late' of the distribution late-tools 1.2"]


def test_analysis_of_chosen_layers__that_lack_what_it_needs_says_that_they_were_chosen(
    run_path: Path,
) -> None:
    run = hx.open(run_path)
    run["hessian/other"] = xr.Dataset()
    with pytest.raises(NotRecordedError, match=r"only the layers \['other'\] were taken, as asked for"):
        analyze(run, "alignment", layers=["other"])


def test_wrong_names__are_refused_before_the_run_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UnknownAnalysisError, match="did you mean 'rank'"):
        analyze(tmp_path / "absent.zarr", "outliers,ranks")
    with pytest.raises(AnalysisError, match="expected at least one analysis, came none"):
        analyze(tmp_path / "absent.zarr", " , ")
    with pytest.raises(AnalysisError, match=r"options of \['rank'\] were given, but only \['angles'\]"):
        analyze(tmp_path / "absent.zarr", ["angles"], options={"rank": {}})
    with pytest.raises(FileNotFoundError):
        analyze(tmp_path / "absent.zarr", "rank")


def test_analysis__that_the_run_has_no_records_for_writes_nothing(run_path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotRecordedError, match=r"'gradient' is recorded by rec.Gradient\(\)"):
        analyze(run_path, "rank,projection", tmp_path / "results.zarr")
    assert list(tmp_path.iterdir()) == []


def test_progress__counts_all_tasks(
    run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analyze(run_path, "outliers", tmp_path / "a.zarr")
    assert capsys.readouterr().err == ""
    analyze(run_path, "outliers", tmp_path / "b.zarr", progress=True)
    last = capsys.readouterr().err.rpartition("analyzing: ")[2]
    assert last.startswith("100%")
    done, total = last.partition("| ")[2].partition(" ")[0].split("/")
    assert done == total
    assert int(done) > 4


def test_results__are_plain_zarr_with_labels(run_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    analyze(run_path, "outliers", out)
    stored = json.loads((out / "outliers/hessian/outlier_count/zarr.json").read_text())
    assert stored["zarr_format"] == 3
    assert stored["dimension_names"] == ["seed", "step", "layer"]
    group = zarr.open_group(out, mode="r")
    np.testing.assert_array_equal(group["outliers/hessian/step"][:], np.arange(9))
