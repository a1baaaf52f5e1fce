from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import MemoryStore

from hild_xr.store import NotAStoreError, PlanMismatchError, create, stored_plan
from hild_xr.testing import spectrum_plan


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
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr, "consolidate_metadata", full)
    with pytest.raises(OSError, match="No space left"):
        create(tmp_path / "run.zarr", spectrum_plan())
    assert list(tmp_path.iterdir()) == []


def _create_at_once(path: Path, width: int, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        create(path, spectrum_plan(columns=width))
        results.put(width)  # type: ignore[attr-defined]
    except PlanMismatchError:
        results.put(-width)  # type: ignore[attr-defined]


def test_create__by_processes_that_start_together_ends_with_one_plan(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for trial in range(5):
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
