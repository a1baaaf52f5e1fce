from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from pydantic import JsonValue
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from hild_xr.plan import ArrayPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import NotAStoreError, PlanMismatchError, StoreError, create, open_run, stored_plan
from hild_xr.testing import spectrum_plan
from hild_xr.variables import SCHEMA_VERSION


def test_create__makes_every_array_at_its_final_shape_with_true_coordinates(tmp_path: Path) -> None:
    plan = spectrum_plan(steps=(0, 10, 30), seeds=(7, 3))
    create(tmp_path / "run.zarr", plan, root_attrs={"provenance": {"device": "cpu"}})
    root = zarr.open_group(tmp_path / "run.zarr", mode="r")
    vectors = root["hessian/fc.weight/eigenvectors"]
    assert isinstance(vectors, zarr.Array)
    assert vectors.shape == (2, 3, 2, 3, 4)
    assert vectors.chunks == (1, 3, 2, 3, 4)
    assert vectors.nchunks_initialized == 0
    np.testing.assert_array_equal(root["hessian/step"][:], [0, 10, 30])
    np.testing.assert_array_equal(root["hessian/seed"][:], [7, 3])
    assert root.attrs["provenance"] == {"device": "cpu"}
    assert stored_plan(tmp_path / "run.zarr") == plan


def test_create__checksums_every_data_chunk(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    arrays = [a for _, a in zarr.open_group(tmp_path / "run.zarr", mode="r").members(max_depth=None)]
    assert len(arrays) > 10
    for array in arrays:
        if isinstance(array, zarr.Array):
            assert [type(codec).__name__ for codec in array.compressors] == ["Crc32cCodec"], array.path


def test_create__splits_large_records_into_chunks_of_megabytes() -> None:
    store = MemoryStore()
    create(store, spectrum_plan(rows=4000, columns=1000))
    weight = zarr.open_group(store, mode="r")["weights/fc.weight/weight"]
    assert isinstance(weight, zarr.Array)
    assert weight.chunks == (1, 1, 2000, 1000)


def test_create__accepts_a_store_with_the_same_plan_and_leaves_it_alone(tmp_path: Path) -> None:
    plan = spectrum_plan()
    create(tmp_path / "run.zarr", plan, root_attrs={"provenance": 1})
    create(tmp_path / "run.zarr", plan, root_attrs={"provenance": 2})
    assert zarr.open_group(tmp_path / "run.zarr", mode="r").attrs["provenance"] == 1


def test_create__refuses_another_plan_and_lists_the_differences(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(PlanMismatchError, match="nothing was written") as caught:
        create(tmp_path / "run.zarr", spectrum_plan(seeds=(0, 1, 2), columns=5))
    assert "seeds: (0, 1, 2) asked for, (0, 1) in the store" in caught.value.differences
    assert any("weights/nodes/fc.weight/arrays/weight/shape" in line for line in caught.value.differences)
    assert before == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))


def test_create__never_touches_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    zarr.create_group(tmp_path / "foreign.zarr", attributes={"a": 1})
    for name in ("thesis", "file", "foreign.zarr"):
        with pytest.raises(NotAStoreError):
            create(tmp_path / name, spectrum_plan())
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_create__that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes
    written: list[Path] = []

    def full(path: Path, content: bytes) -> int:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        create(tmp_path / "run.zarr", spectrum_plan())
    assert len(written) == 5
    assert list(tmp_path.iterdir()) == []


def test_create__sweeps_what_killed_creators_left_an_hour_ago(tmp_path: Path) -> None:
    def leave(name: str, seconds: float) -> Path:
        scratch = tmp_path / name
        (scratch / "metrics").mkdir(parents=True)
        (scratch / "metrics" / "zarr.json").write_text("{")
        os.utime(scratch, times=(time.time() - seconds,) * 2)
        return scratch

    dead = leave(".run[1].zarr.dead.creating", 3700)
    alive = leave(".run[1].zarr.alive.creating", 3500)
    other = leave(".run1.zarr.other.creating", 3700)
    create(tmp_path / "run[1].zarr", spectrum_plan())
    assert not dead.exists()
    assert alive.exists(), "its creator may live on another host"
    assert other.exists(), "it belongs to another run"
    dead = leave(".run[1].zarr.dead.creating", 3700)
    create(tmp_path / "run[1].zarr", spectrum_plan())
    assert not dead.exists(), "also where the store has been there for long"


def test_create__writes_the_same_files_into_a_folder_and_any_store(tmp_path: Path) -> None:
    store = MemoryStore()
    create(store, spectrum_plan(), root_attrs={"licence": "CC0"})
    create(tmp_path / "run.zarr", spectrum_plan(), root_attrs={"licence": "CC0"})
    root = tmp_path / "run.zarr"
    on_disk = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert on_disk == {key: value.to_bytes() for key, value in store._store_dict.items()}


def test_create__writes_the_metadata_that_zarr_reads_and_would_write(tmp_path: Path) -> None:
    plan = spectrum_plan()
    create(tmp_path / "run.zarr", plan)
    listed = zarr.open_group(tmp_path / "run.zarr", mode="r", use_consolidated=False)
    consolidated = zarr.open_group(tmp_path / "run.zarr", mode="r", use_consolidated=True)
    nodes = dict(listed.members(max_depth=None))
    assert len(nodes) > 20
    for path, node in consolidated.members(max_depth=None):
        assert node.attrs.asdict() == nodes[path].attrs.asdict(), path
        if isinstance(node, zarr.Array):
            assert node.metadata.to_dict() == nodes[path].metadata.to_dict(), path
    assert {path for path, _ in consolidated.members(max_depth=None)} == nodes.keys()
    before = json.loads((tmp_path / "run.zarr" / "zarr.json").read_bytes())["consolidated_metadata"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(tmp_path / "run.zarr")
    assert json.loads((tmp_path / "run.zarr" / "zarr.json").read_bytes())["consolidated_metadata"] == before


def test_create__of_a_thousand_layers_takes_seconds_at_most() -> None:
    weight = ArrayPlan(variable="weight", dims=("out", "in"), shape=(8, 8))
    nodes = {f"layer{i}.weight": NodePlan(arrays={"weight": weight}) for i in range(1000)}
    plan = RunPlan(seeds=(0,), probes={"weights": ProbePlan(steps=tuple(range(100)), nodes=nodes)})
    store = MemoryStore()
    began = time.process_time()
    create(store, plan)
    assert time.process_time() - began < 5  # about 1 s; through zarr's groups it took 11
    assert stored_plan(store) == plan


@pytest.mark.parametrize("target", ["folder", "memory"])
@pytest.mark.parametrize(
    ("attrs", "error"),
    [({"host": Path("/")}, TypeError), ({"loss": float("nan")}, ValueError), ({"loss": np.inf}, ValueError)],
)
def test_create__refuses_attributes_that_json_cannot_hold(
    target: str, attrs: dict[str, object], error: type[Exception], tmp_path: Path
) -> None:
    store = MemoryStore()
    with pytest.raises(error, match="attributes of a run are values of JSON"):
        create(store if target == "memory" else tmp_path / "run.zarr", spectrum_plan(), root_attrs=attrs)
    assert list(tmp_path.iterdir()) == []
    assert store._store_dict == {}


@pytest.mark.parametrize("config", [{"clip": float("nan")}, {"rates": [0.1, {"last": float("inf")}]}])
def test_plan__refuses_numbers_that_would_differ_from_themselves(config: dict[str, JsonValue]) -> None:
    with pytest.raises(
        ValueError, match=r"config/(clip|rates/1/last) is (nan|inf), which is no value of JSON"
    ):
        RunPlan(seeds=(0,), probes=spectrum_plan().probes, config=config)
    with pytest.raises(ValueError, match="not a valid JSON value"):
        RunPlan.model_validate({**spectrum_plan().model_dump(), "config": {"model": object()}})


def _create_at_once(path: Path, width: int, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        create(path, spectrum_plan(columns=width))
        results.put(width)  # type: ignore[attr-defined]
    except PlanMismatchError:
        results.put(-width)  # type: ignore[attr-defined]


def test_create__by_processes_that_start_together_ends_with_one_plan(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for trial in range(20):
        path, barrier, results = tmp_path / f"run{trial}.zarr", context.Barrier(4), context.Queue()
        workers = [
            context.Process(target=_create_at_once, args=(path, width, barrier, results))
            for width in (4, 4, 5, 5)
        ]
        for worker in workers:
            worker.start()
        outcomes = sorted(results.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join()
        winner = stored_plan(path).probes["weights"].nodes["fc.weight"].arrays["weight"].shape[1]
        loser = 9 - winner
        assert outcomes == sorted([winner, winner, -loser, -loser])
        assert [p.name for p in tmp_path.iterdir() if "creating" in p.name] == []


def test_store_metadata__is_plain_xarray(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")
    assert tree["hessian"].attrs == {}
    assert list(tree["hessian/eigenvalues"].dims) == ["seed", "step", "layer", "eig"]
    assert tree["hessian/fc.weight/eigenvectors"].attrs["units"] == "1"


def test_stored_plan__says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        stored_plan(tmp_path / "absent.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(NotAStoreError, match=r"xarray\.open_datatree"):
        stored_plan(tmp_path / "foreign.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError, match="not a Zarr group"):
        stored_plan(tmp_path / "empty")
    zarr.create_array(tmp_path / "array.zarr", shape=3, dtype="f4")
    with pytest.raises(NotAStoreError, match="not a Zarr group"):
        stored_plan(tmp_path / "array.zarr")
    with pytest.raises(FileNotFoundError, match="no run at memory"):
        stored_plan(MemoryStore())


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_stored_plan__names_a_root_that_is_torn(kept: int, tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    root = tmp_path / "run.zarr" / "zarr.json"
    root.write_bytes(root.read_bytes()[:kept])
    for read in (stored_plan, open_run, lambda path: create(path, spectrum_plan())):
        with pytest.raises(NotAStoreError, match=r"zarr\.json of .*run\.zarr is not valid JSON"):
            read(tmp_path / "run.zarr")


def _edit_root(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    root = json.loads((path / "zarr.json").read_bytes())
    edit(root["attributes"])
    (path / "zarr.json").write_text(json.dumps(root))


def test_stored_plan__refuses_a_newer_major_version(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    newer = f"{int(SCHEMA_VERSION.split('.')[0]) + 1}.0"
    _edit_root(tmp_path / "run.zarr", lambda attributes: attributes.update(schema_version=newer))
    for read in (stored_plan, open_run, lambda path: create(path, spectrum_plan())):
        with pytest.raises(StoreError, match=f"written by a newer hild-xr .schema {newer}; .* upgrade"):
            read(tmp_path / "run.zarr")


def test_stored_plan__opens_a_newer_minor_version_unless_it_holds_what_is_unknown(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    newer = f"{SCHEMA_VERSION.split('.')[0]}.99"
    _edit_root(tmp_path / "run.zarr", lambda attributes: attributes.update(schema_version=newer))
    assert stored_plan(tmp_path / "run.zarr") == spectrum_plan()
    _edit_root(tmp_path / "run.zarr", lambda attributes: attributes["plan"].update(teleports=True))
    with pytest.raises(StoreError, match="written by a newer hild-xr"):
        stored_plan(tmp_path / "run.zarr")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda attributes: attributes.update(schema_version="soon"), "schema version 'soon', which is none"),
        (lambda attributes: attributes["plan"].update(seeds=[]), "the plan in zarr.json of .* is damaged"),
        (lambda attributes: attributes.update(plan=3), "the plan in zarr.json of .* is damaged"),
    ],
)
def test_stored_plan__says_what_is_damaged(
    edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    create(tmp_path / "run.zarr", spectrum_plan())
    _edit_root(tmp_path / "run.zarr", edit)
    with pytest.raises(NotAStoreError, match=message):
        stored_plan(tmp_path / "run.zarr")
