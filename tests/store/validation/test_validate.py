"""What a validation finds, and that it finds nothing in a sound run.

Faults are planted into files: one bit, one byte less, one file less, or a number that no eigensolver returns.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shutil
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, ZipStore

import hild_xr as hx
from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import (
    MissingRecordsWarning,
    NotAStoreError,
    RunWriter,
    StoreError,
    ValidationReport,
    create,
    validate,
)
from hild_xr.store.backends import written_whole
from hild_xr.store.fingerprint import FINGERPRINT, seal_store
from hild_xr.store.root import CREATING
from hild_xr.testing import random_record, spectrum_plan
from hild_xr.variables import SCHEMA_VERSION

ARCHIVE = Path(__file__).parents[1] / "data" / "run-schema-1.0.zip"
STEPS = tuple(range(0, 200, 2))  # 100 steps: two blocks


def write(
    target: Any, plan: RunPlan, seed: int, steps: tuple[int, ...], *, attempt: int = 1, **more: Any
) -> None:
    with RunWriter(target, plan, seed, **more) as writer:
        for step in steps:
            for probe, contents in plan.probes.items():
                if step in contents.steps:
                    record = random_record(plan, probe, seed=seed, step=step, attempt=attempt)
                    writer.write(probe, step, record)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run of two seeds: one finished after a resume, one that stopped in the first block."""
    plan, path = spectrum_plan(steps=STEPS, seeds=(3, 5)), tmp_path_factory.mktemp("sound") / "run.zarr"
    write(path, plan, 3, STEPS[:80])
    write(path, plan, 3, STEPS[31:], attempt=2, resume_at=STEPS[30])
    write(path, plan, 5, STEPS[:40])
    return path


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run.zarr"))


def files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file())


def key(run: Path, file: Path) -> str:
    return file.relative_to(run).as_posix()


def assert_found(report: ValidationReport, damaged: str) -> None:
    """An error names the damaged key, and all errors lie there or follow from it."""
    assert not report.ok, damaged
    # the root holds the copies of all metadata: damage there may show as a node that differs from its copy
    places = [finding.place for finding in report.errors]
    assert damaged in places, (damaged, report)


def marker(run: Path, probe: str) -> zarr.Array[Any]:
    return written_whole(zarr.open_array(run / probe / "committed", mode="r+"))


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("weighted_by", ["bytes", "files"])
def test_bit_flips__60_of_60_are_found_where_they_are(run: Path, weighted_by: str) -> None:
    draw, held, found = random.Random(60), files(run), 0
    sizes = [file.stat().st_size for file in held]
    for _ in range(60):
        file = draw.choices(held, sizes if weighted_by == "bytes" else None)[0]
        before = file.read_bytes()
        bit = draw.randrange(8 * len(before))
        flip(file, bit)
        assert_found(validate(run), key(run, file))
        found += 1
        file.write_bytes(before)
    assert found == 60
    assert validate(run).ok


def test_bit_flips__in_what_only_the_fingerprint_covers_are_found(tmp_path: Path) -> None:
    plan, path = spectrum_plan(seeds=(0,)), tmp_path / "run.zarr"
    create(path, plan, root_attrs={"provenance": {"device": "cpu", "time": 1.5}})
    whole = (path / "zarr.json").read_bytes()
    assert whole.index(FINGERPRINT.encode()) > whole.index(b'"provenance"')
    for offset in range(whole.index(b'"provenance"'), whole.index(b'"node_type"'), 5):
        for bit in range(8):
            flip(path / "zarr.json", 8 * offset + bit)
            report = validate(path)
            changed = (path / "zarr.json").read_bytes()
            (path / "zarr.json").write_bytes(whole)
            if _parsed(changed) == _parsed(whole):
                continue
            assert_found(report, "zarr.json")


def _parsed(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def test_bit_flip_that_changes_no_value__is_no_finding(run: Path) -> None:
    file = run / "metrics" / "train_loss" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"shape": [\n', b'"shape":  [\n'))
    assert validate(run).findings == ()


def test_every_chunk__is_missed_when_it_is_deleted(run: Path) -> None:
    chunks = [file for file in files(run) if file.name != "zarr.json"]
    assert len(chunks) > 30
    for chunk in chunks:
        content = chunk.read_bytes()
        chunk.unlink()
        assert_found(validate(run), key(run, chunk))
        chunk.write_bytes(content)


@pytest.mark.parametrize("kept", [0, -1])
def test_every_file__is_missed_when_it_is_truncated(run: Path, kept: int) -> None:
    for file in files(run):
        content = file.read_bytes()
        file.write_bytes(content[:kept])
        assert_found(validate(run), key(run, file))
        file.write_bytes(content)


def test_every_metadata_file__is_missed_when_it_is_deleted(run: Path) -> None:
    for file in files(run):
        if file.name == "zarr.json":
            content = file.read_bytes()
            file.unlink()
            assert_found(validate(run), key(run, file))
            file.write_bytes(content)


def test_zeroed_chunk__is_found(run: Path) -> None:
    chunk = run / "metrics/train_loss/c/0/0"
    for size in (4, chunk.stat().st_size):
        chunk.write_bytes(bytes(size))
        assert_found(validate(run), key(run, chunk))


def test_many_damaged_chunks__are_one_finding_with_their_number_seed_and_steps(run: Path) -> None:
    for block in (0, 1):
        flip(run / f"metrics/train_loss/c/0/{block}", 77)
    (finding,) = validate(run).errors
    assert finding.place == "metrics/train_loss/c/0/0"
    assert "checksum" in finding.what
    assert "and 1 more chunks" in finding.what
    assert (finding.seed, finding.steps) == (3, (0, 198))


def test_chunk_of_a_large_record__is_named_alone(tmp_path: Path) -> None:
    plan = spectrum_plan(steps=(0, 1), seeds=(0,), rows=3, columns=700_000)  # 8.4 MB a record: two chunks
    write(tmp_path / "run.zarr", plan, 0, (0, 1))
    chunk = tmp_path / "run.zarr/weights/fc.weight/weight/c/0/1/1/0"
    flip(chunk, 10_000)
    (finding,) = validate(tmp_path / "run.zarr").errors
    assert finding.place == "weights/fc.weight/weight/c/0/1/1/0"
    assert finding.steps == (1, 1)


def test_uncommitted_chunk__is_checksummed_too(run: Path) -> None:
    marker(run, "metrics")[1] = 0
    assert validate(run).ok
    flip(run / "metrics/train_loss/c/1/0", 5)
    assert_found(validate(run), "metrics/train_loss/c/1/0")


# ---------------------------------------------------------------------------- metadata


def edit_root(run: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    root = json.loads((run / "zarr.json").read_bytes())
    change(root)
    (run / "zarr.json").write_text(json.dumps(root))
    if seal:
        seal_store(zarr.storage.LocalStore(run))


def edit_node(run: Path, path: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a node's metadata consistently: its own, its copy, and the fingerprint."""
    own = json.loads((run / path / "zarr.json").read_bytes())
    change(own)
    (run / path / "zarr.json").write_text(json.dumps(own))
    edit_root(run, lambda root: change(root["consolidated_metadata"]["metadata"][path]))


def grow(node: dict[str, Any]) -> None:
    node["shape"][1] += 1


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("hessian/eigenvalues", grow, r"shape is \(2, 101, 1, 2\); planned is \(2, 100, 1, 2\)"),
        ("metrics/train_loss", lambda node: node.update(data_type="float32"), "dtype is float32"),
        ("metrics/train_loss", lambda node: node.update(fill_value=0.0), "fill value is 0.0; planned is nan"),
        ("metrics/committed", lambda node: node.update(dimension_names=["step", "seed"]), "dims is"),
        ("hessian/layer", lambda node: node.update(dimension_names=["name"]), "dims is"),
        ("hessian/fc.weight/eigenvectors", lambda node: node["attributes"].pop("vector_dims"), "vector_dims"),
        (
            "metrics/train_loss",
            lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=[2, 64]),
            "spans 2 seeds",
        ),
        (
            "metrics/committed",
            lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=[1, 50]),
            "several chunks",
        ),
        ("weights/fc.weight", lambda node: node.update(node_type="array"), "is not a group"),
        ("metrics/train_loss", lambda node: node.update(data_type="nonsense"), "do not describe an array"),
        ("metrics/train_loss", lambda node: node.pop("shape"), "do not describe an array"),
    ],
)
def test_metadata__are_held_against_the_plan(run: Path, path: str, change: Any, message: str) -> None:
    edit_node(run, path, change)
    report = validate(run)
    said = [str(finding) for finding in report.errors if finding.place == path]
    assert len([text for text in said if re.search(message, text)]) == 1, report


def test_block_length__is_a_version_s_own_choice(tmp_path: Path) -> None:
    path, plan = tmp_path / "run.zarr", spectrum_plan(steps=STEPS, seeds=(0,))
    create(path, plan)
    for array in ("metrics/train_loss", "hessian/converged"):
        grid = {
            "name": "regular",
            "configuration": {"chunk_shape": [1, 7, *[1, 2][: 2 * ("hessian" in array)]]},
        }
        edit_node(path, array, lambda node, grid=grid: node.update(chunk_grid=grid))  # type: ignore[misc]
    write(path, plan, 0, STEPS)
    assert validate(path).findings == ()
    chunk = path / "metrics/train_loss/c/0/13"
    chunk.unlink()
    assert_found(validate(path), key(path, chunk))


def test_metadata_spelled_by_another_version_of_zarr__are_as_planned(run: Path) -> None:
    def respell(node: dict[str, Any]) -> None:
        node["codecs"] = [
            {**codec, "configuration": codec.get("configuration", {})} for codec in node["codecs"]
        ]
        node.pop("storage_transformers")
        node["chunk_key_encoding"] = {"name": "default"}

    edit_node(run, "hessian/eigenvalues", respell)
    assert validate(run).findings == ()


def test_array_without_checksums__is_noted(run: Path) -> None:
    (run / "metrics/train_loss/c/0/0").unlink()
    edit_node(run, "metrics/train_loss", lambda node: node["codecs"].pop())
    assert [f.place for f in validate(run).notes if "no checksum" in f.what] == ["metrics/train_loss"]


@pytest.mark.parametrize("attribute", ["config", "schema_version", "provenance"])
def test_changed_root_attribute__is_found_by_the_fingerprint(tmp_path: Path, attribute: str) -> None:
    path = tmp_path / "run.zarr"
    create(path, spectrum_plan(), root_attrs={"provenance": {"device": "cpu"}})
    edit_root(path, lambda root: root["attributes"].update({attribute: "changed"}), seal=False)
    assert_found(validate(path), "zarr.json")


def test_root_sealed_anew__is_sound_if_its_attributes_agree(run: Path) -> None:
    edit_root(run, lambda root: root["attributes"].update(licence="CC-BY-4.0"))
    assert validate(run).ok
    edit_root(run, lambda root: root["attributes"].update(config={"learning_rate": 9}))
    assert [f.what for f in validate(run).errors] == ["the attribute config differs from the plan's"]


def test_unknown_schema__is_an_error(run: Path) -> None:
    edit_root(run, lambda root: root["attributes"].update(schema_version="7.0"))
    (finding,) = validate(run).findings
    assert "schema version 7.0 is not known" in finding.what


def test_run_without_consolidated_metadata__is_an_error(run: Path) -> None:
    edit_root(run, lambda root: root.pop("consolidated_metadata"))
    assert [f.what for f in validate(run).errors] == ["holds no consolidated metadata"]


def test_run_that_is_being_created__is_an_error() -> None:
    store = MemoryStore()
    document = {"attributes": {"schema_version": SCHEMA_VERSION, "plan": {}}}
    zarr.create_group(store, attributes={CREATING: document})
    (finding,) = validate(store).errors
    assert "being created" in finding.what


def test_damaged_copy_in_the_root__leads_to_the_node_s_own_metadata(run: Path) -> None:
    def damage(root: dict[str, Any]) -> None:
        root["consolidated_metadata"]["metadata"]["metrics/train_loss"]["data_type"] = "float16"

    edit_root(run, damage, seal=False)
    assert {f.place for f in validate(run).errors} == {"zarr.json", "metrics/train_loss/zarr.json"}


def test_stray_keys__are_noted(run: Path) -> None:
    (run / "metrics/train_loss/c/0/0.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half")
    (run / "metrics/train_loss/c/0/9").write_bytes(b"outside")
    (run / "notes.txt").write_text("mine")
    report = validate(run)
    assert report.ok
    said = {finding.place: finding.what for finding in report.notes}
    assert "writer that was killed" in said.pop(
        "metrics/train_loss/c/0/0.0123456789abcdef0123456789abcdef.partial"
    )
    assert said == {"metrics/train_loss/c/0/9": "is not part of the plan, and 1 more keys with it"}


def test_leases_in_an_object_store__are_no_finding() -> None:
    store, plan = MemoryStore(), spectrum_plan(seeds=(0,))
    writer = RunWriter(store, plan, 0)
    assert validate(store).findings == ()
    writer.close()


# ---------------------------------------------------------------------------- coordinates and markers


@pytest.mark.parametrize(
    ("path", "values"),
    [("metrics/step", 1), ("hessian/eig", 7), ("weights/seed", 0), ("hessian/layer", "fc2")],
)
def test_coordinate__is_compared_with_the_plan(run: Path, path: str, values: Any) -> None:
    array = zarr.open_array(run / path, mode="r+")
    array[0] = values
    if path == "metrics/step":
        array[0] = 1
    assert_found(validate(run), f"{path}/c/0")


def test_lost_coordinate__is_missed_although_it_reads_as_planned(tmp_path: Path) -> None:
    create(tmp_path / "run.zarr", spectrum_plan(steps=(0,), seeds=(0,)))
    (tmp_path / "run.zarr/metrics/step/c/0").unlink()  # zarr reads it as 0
    assert_found(validate(tmp_path / "run.zarr"), "metrics/step/c/0")


def edit_marker(run: Path, attempts: list[int]) -> None:
    row = np.zeros(len(STEPS), dtype=np.uint16)
    row[: len(attempts)] = attempts
    marker(run, "metrics")[0] = row


def test_attempts__do_not_fall(run: Path) -> None:
    edit_marker(run, [1, 1, 2, 1])
    (finding,) = validate(run).errors
    assert finding.place == "metrics/committed/c/0/0"
    assert "attempt 1 follows attempt 2" in finding.what
    assert finding.steps == (4, 6)


def test_gap_in_the_marker__is_a_note(run: Path) -> None:
    edit_marker(run, [1, 0, 0, 2, 3])
    (finding,) = validate(run).findings
    assert (finding.severity, finding.steps) == ("note", (2, 4))
    assert finding.what.startswith("2 records")


def test_marker_over_chunks_that_were_never_written__is_an_error(run: Path) -> None:
    marker(run, "hessian")[1] = 1
    places = {finding.place for finding in validate(run).errors}
    assert places == {
        f"hessian/{array}"
        for array in (
            "converged/c/1/1/0/0",
            "eigenvalues/c/1/1/0/0",
            "n_matvec/c/1/1/0",
            "fc.weight/eigenvectors/c/1/1/0/0/0",
        )
    }


# ---------------------------------------------------------------------------- numbers


def numbers_plan(which: str = "magnitude", dtype: str = "float32") -> RunPlan:
    """One probe with a layer, one with a block for each row."""
    pair = {"number_dim": "eig", "vector_dims": ["in"]}
    rows = {
        "eigenvalues": ArrayPlan(variable="eigenvalues", dims=("out", "eig"), shape=(2, 3), dtype=dtype),
        "converged": ArrayPlan(variable="converged", dims=("out", "eig"), shape=(2, 3), dtype="bool"),
        "trace": ArrayPlan(variable="trace", dims=("out",), shape=(2,), dtype=dtype),
        "eigenvectors": ArrayPlan(
            variable="eigenvectors", dims=("out", "eig", "in"), shape=(2, 3, 5), dtype=dtype, attrs=pair
        ),
    }
    own = {
        "eigenvalues": ArrayPlan(variable="eigenvalues", dims=("layer", "eig"), shape=(2, 3), dtype=dtype),
        "residuals": ArrayPlan(variable="residuals", dims=("layer", "eig"), shape=(2, 3), dtype=dtype),
        "converged": ArrayPlan(variable="converged", dims=("layer", "eig"), shape=(2, 3), dtype="bool"),
    }
    vectors = ArrayPlan(variable="eigenvectors", dims=("eig", "in"), shape=(3, 5), dtype=dtype, attrs=pair)
    coords = {
        "layer": CoordPlan(dim="layer", values=("a", "b")),
        "eig": CoordPlan(dim="eig", values=(0, 1, 2)),
    }
    layers = {name: NodePlan(arrays={"eigenvectors": vectors}) for name in ("a", "b")}
    nodes = {
        "rows": {"fc": NodePlan(arrays=rows)},
        "layers": {"": NodePlan(arrays=own, coords=coords), **layers},
        "weights": {
            "fc": NodePlan(arrays={"weight": ArrayPlan(variable="weight", dims=("in",), shape=(5,))})
        },
    }
    steps = (0, 1, 2, 3)
    probes = {
        name: ProbePlan(steps=steps, nodes=contents, attrs={"which": which})
        for name, contents in nodes.items()
    }
    return RunPlan(seeds=(0,), probes=probes)


def sound_record(plan: RunPlan, probe: str, step: int) -> dict[str, dict[str, Any]]:
    record = {n: dict(a) for n, a in random_record(plan, probe, seed=0, step=step).items()}
    for arrays in record.values():
        for name in arrays.keys() & {"converged"}:
            arrays[name] = np.ones_like(arrays[name])
    return record


def planted(
    fault: Callable[[dict[str, Any]], object], probe: str, node: str, *, plan: RunPlan | None = None
) -> ValidationReport:
    """Validate a run whose record at step 2 has a fault."""
    plan, store = plan or numbers_plan(), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        for step in (0, 1, 2):
            for name in plan.probes:
                record = sound_record(plan, name, step)
                if (name, step) == (probe, 2):
                    fault(record[node])
                writer.write(name, step, record)
    return validate(store)


def put(name: str, where: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][where] = value

    return change


def nothing(arrays: dict[str, Any]) -> None:
    del arrays


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest", "both"])
def test_sound_numbers__are_no_finding(which: str, dtype: str) -> None:
    assert planted(nothing, "rows", "fc", plan=numbers_plan(which, dtype)).findings == ()


FLAGGED, INFINITE = "flagged converged is not finite in 1 of 3", "infinity in 1 of 3"
UNSORTED, SKEWED = "out of order in 1 of 3", "eigenvectors are not orthonormal in 1 of 3 records: V V"


@pytest.mark.parametrize(
    ("probe", "node", "array", "where", "value", "message"),
    [
        ("rows", "fc", "eigenvalues", (1, 1), np.nan, FLAGGED),
        ("rows", "fc", "eigenvectors", (1, 2, 4), np.nan, FLAGGED),
        ("layers", "", "eigenvalues", (1, 0), np.nan, FLAGGED),
        ("layers", "", "residuals", (1, 0), np.inf, FLAGGED),
        ("layers", "b", "eigenvectors", (1, 0), np.nan, FLAGGED),
        ("layers", "", "eigenvalues", (0, 0), np.inf, INFINITE),
        ("rows", "fc", "trace", 0, np.inf, INFINITE),
        ("rows", "fc", "eigenvalues", (1, 0), -0.001, UNSORTED),
        ("layers", "", "eigenvalues", (1, 2), -100, UNSORTED),
        ("rows", "fc", "eigenvectors", (1, 2), 0, SKEWED),
        ("layers", "a", "eigenvectors", (0, 0), 1.3, SKEWED),
    ],
)
def test_impossible_number__is_an_error_with_its_place(
    probe: str, node: str, array: str, where: Any, value: float, message: str
) -> None:
    report = planted(put(array, where, value), probe, node)
    found = {finding.what: finding for finding in report.errors}
    (said,) = [what for what in found if message in what]
    assert found[said].place == "/".join(part for part in (probe, node, array) if part)
    assert (found[said].seed, found[said].steps) == (0, (2, 2))


def test_swapped_eigenvectors__of_one_row_are_two_copies_and_an_error() -> None:
    def copy_one(arrays: dict[str, Any]) -> None:
        arrays["eigenvectors"][0, 1] = arrays["eigenvectors"][0, 0]

    (finding,) = planted(copy_one, "rows", "fc").errors
    assert "differs from the identity by 1" in finding.what


def test_order__is_the_one_that_the_group_names() -> None:
    ascending = [[1.0, 2.0, 3.0], [-3.0, -2.0, 1.0]]
    in_turn = [[3.0, 1.0, 2.0], [1.0, -3.0, -2.0]]
    for values, orders in ((ascending, {"smallest"}), (in_turn, {"both"})):
        for which in ("smallest", "largest", "magnitude", "both"):
            report = planted(put("eigenvalues", ..., values), "layers", "", plan=numbers_plan(which))
            assert any(UNSORTED in f.what for f in report.errors) == (which not in orders), which


def test_nan_between_two_eigenvalues__hides_no_disorder() -> None:
    def plant(arrays: dict[str, Any]) -> None:
        arrays["eigenvalues"][0] = [1.0, np.nan, 5.0]
        arrays["converged"][0, 1] = False

    assert any(UNSORTED in f.what for f in planted(plant, "layers", "").errors)


def test_unconverged_pair__may_be_nan_or_skewed_which_is_noted() -> None:
    def unconverged(arrays: dict[str, Any], pair: Any) -> None:
        arrays["converged"][1, 2] = False
        arrays["eigenvectors"][1, 2] = pair

    report = planted(lambda arrays: unconverged(arrays, 0.0), "rows", "fc")
    assert report.ok
    assert [f.what for f in report.notes if "did not converge" in f.what]
    report = planted(lambda arrays: unconverged(arrays, np.nan), "rows", "fc")
    assert [f.severity for f in report.findings] == ["note"]


def test_unconverged_copy_of_a_converged_vector__is_only_noted() -> None:
    def copied(arrays: dict[str, Any]) -> None:
        arrays["converged"][1, 2] = False
        arrays["eigenvectors"][1, 2] = arrays["eigenvectors"][1, 0]

    assert [f.severity for f in planted(copied, "rows", "fc").findings] == ["note"]


def test_flags__are_those_of_the_layer_and_of_the_step(tmp_path: Path) -> None:
    plan, path = numbers_plan(), tmp_path / "run.zarr"
    create(path, plan)
    grid = {
        "name": "regular",
        "configuration": {"chunk_shape": [1, 1, 3, 5]},
    }  # shorter blocks than the flags'
    edit_node(path, "layers/b/eigenvectors", lambda node: node.update(chunk_grid=grid))
    with RunWriter(path, plan, 0) as writer:
        for step in (0, 1, 2):
            record = sound_record(plan, "layers", step)
            if step == 2:
                record[""]["converged"][1] = False
                record["b"]["eigenvectors"][...] = np.nan
            writer.write("layers", step, record)
    assert [(f.severity, f.steps) for f in validate(path).findings] == [("note", (2, 2))]


@pytest.mark.parametrize(("dtype", "passes"), [("float16", True), ("float32", False), ("float64", False)])
def test_orthonormality__allows_for_the_rounding_of_the_stored_dtype(dtype: str, passes: bool) -> None:
    def scale(arrays: dict[str, Any]) -> None:
        arrays["eigenvectors"] = (1.003 * arrays["eigenvectors"].astype(float)).astype(dtype)

    assert planted(scale, "rows", "fc", plan=numbers_plan(dtype=dtype)).ok == passes


def test_diverged_training__is_one_note_for_each_probe_with_its_first_step() -> None:
    plan, store = numbers_plan(), MemoryStore()
    with RunWriter(store, plan, 0) as writer:
        for step in (0, 1, 2, 3):
            for name, probe in plan.probes.items():
                record = sound_record(plan, name, step)
                if step > 1:
                    for node, label, array in probe.arrays():
                        record[node][label] = array.missing()
                    if name == "weights":
                        record["fc"]["weight"] = np.full(5, -np.inf)
                writer.write(name, step, record)
    report = validate(store)
    assert report.ok
    assert [(f.place, f.steps) for f in report.notes] == [(name, (2, 3)) for name in plan.probes]
    assert "NaN in 2 of 4 records, in 4 arrays" in report.notes[1].what


def test_trace__is_nan_where_it_was_not_computed() -> None:
    assert planted(put("trace", ..., np.nan), "rows", "fc").findings == ()


def test_numbers_that_cannot_be_judged__are_noted() -> None:
    plan = numbers_plan("random")
    report = planted(nothing, "rows", "fc", plan=plan)
    assert {f.place for f in report.notes} == set(plan.probes)
    assert all("is not one of magnitude, largest, smallest, both" in f.what for f in report.notes)


def test_withdrawn_records__are_not_judged(run: Path) -> None:
    values = zarr.open_array(run / "hessian/eigenvalues", mode="r+")
    values[1, 39, 0] = [1.0, 2.0]
    assert not validate(run).ok
    marker(run, "hessian")[1, 39] = 0
    assert validate(run).ok


@pytest.mark.parametrize("probe", ["metrics", "weights", "hessian"])
def test_random_record__follows_from_its_place_and_differs_between_attempts(probe: str) -> None:
    def drawn(**place: int) -> list[Any]:
        record = random_record(spectrum_plan(), probe, **{"seed": 0, "step": 5, **place})
        return [array.tolist() for arrays in record.values() for array in arrays.values()]

    assert drawn() == drawn()
    assert drawn() != drawn(attempt=2)
    assert drawn() != drawn(seed=1)
    assert drawn() != drawn(step=6)


def test_random_record__refuses_more_vectors_than_dimensions() -> None:
    with pytest.raises(ValueError, match="no 2 orthonormal vectors in 1 dimensions"):
        random_record(spectrum_plan(rows=1, columns=1), "hessian", seed=0, step=0)


# ---------------------------------------------------------------------------- sound runs


@st.composite
def plans(draw: st.DrawFn) -> RunPlan:
    steps = tuple(sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=90))))
    seeds = tuple(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))
    return spectrum_plan(
        steps=steps, seeds=seeds, rows=draw(st.integers(1, 3)), columns=draw(st.sampled_from([2, 5, 9000]))
    )


@settings(max_examples=25)
@given(plans(), st.data())
def test_sound_run__has_no_finding_however_far_it_got(plan: RunPlan, data: st.DataObject) -> None:
    store = MemoryStore()
    create(store, plan)
    for seed in plan.seeds:
        steps = plan.probes["metrics"].steps
        written = data.draw(st.integers(0, len(steps)))
        write(store, plan, seed, steps[:written])
        if written:
            kept = data.draw(st.integers(1, written))
            more = data.draw(st.integers(kept, len(steps)))
            write(store, plan, seed, steps[kept:more], attempt=2, resume_at=steps[kept - 1])
    report = validate(store)
    assert report.findings == ()
    assert report.arrays == 17


def test_resume_over_lost_records__is_a_note() -> None:
    plan, store = spectrum_plan(seeds=(0,)), MemoryStore()
    write(store, plan, 0, (0, 1))
    with pytest.warns(MissingRecordsWarning):
        write(store, plan, 0, (5, 10), attempt=2, resume_at=5)
    report = validate(store)
    assert report.ok
    assert {(f.place, f.steps) for f in report.notes} == {
        (f"{name}/committed/c/0/0", (2, 2)) for name in plan.probes
    }


def _record(path: Path, plan: RunPlan, started: Any) -> None:
    with RunWriter(path, plan, 0) as writer:
        for step in plan.probes["metrics"].steps:
            for probe in plan.probes:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step))
            if step % 3 == 0:
                writer.flush()
            started.set()


def test_killed_and_live_runs__have_no_error(tmp_path: Path) -> None:
    context, draw = multiprocessing.get_context("spawn"), random.Random(0)
    plan = spectrum_plan(steps=tuple(range(100_000)), seeds=(0,), columns=300)
    for trial in range(3):
        path, started = tmp_path / f"run{trial}.zarr", context.Event()
        writer = context.Process(target=_record, args=(path, plan, started))
        writer.start()
        assert started.wait(30)
        time.sleep(draw.uniform(0.05, 0.3))
        live = validate(path)  # while it writes
        writer.kill()
        writer.join()
        assert live.errors == (), live
        report = validate(path)
        assert report.errors == (), report
        assert int((hx.open(path)["metrics/committed"].values > 0).sum()) > 0


class _ChangesWhenListed(MemoryStore):
    """A writer commits more right after the keys were listed."""

    later: MemoryStore

    async def list(self) -> AsyncIterator[str]:
        for listed in list(self._store_dict):
            yield listed
        self._store_dict.update(self.later._store_dict)


def test_records_committed_after_the_listing__are_not_missed() -> None:
    plan, early = spectrum_plan(steps=STEPS, seeds=(0,)), MemoryStore()
    write(early, plan, 0, STEPS[:64])
    store = _ChangesWhenListed(dict(early._store_dict))
    store.later = MemoryStore(dict(early._store_dict))
    write(store.later, plan, 0, STEPS[64:], attempt=2, resume_at=STEPS[63])
    assert validate(store).findings == ()
    assert validate(store).chunks > 0
    assert validate(store).findings == ()


class _ResumedWhileRead(MemoryStore):
    """A writer withdraws all records and replaces their chunks as soon as one is read."""

    async def get(self, key: str, *arguments: Any, **options: Any) -> Buffer | None:
        if key.startswith("hessian/eigenvalues/c/"):
            for name in ("committed/c/0/0", "eigenvalues/c/0/0/0/0"):
                chunk = self._store_dict[f"hessian/{name}"].to_bytes()
                zeros = bytes(len(chunk) - 4)
                checksum = google_crc32c.value(zeros).to_bytes(4, "little")
                self._store_dict[f"hessian/{name}"] = default_buffer_prototype().buffer.from_bytes(
                    zeros + checksum
                )
            self._store_dict.pop("hessian/fc.weight/eigenvectors/c/0/0/0/0/0", None)
        return await super().get(key, *arguments, **options)


def test_seed_resumed_meanwhile__asks_for_another_validation() -> None:
    plan, store = spectrum_plan(seeds=(0,)), _ResumedWhileRead()
    write(store, plan, 0, (0, 1, 2))
    report = validate(store)
    assert report.ok
    assert [(f.place, f.advice) for f in report.notes] == [("hessian/committed/c/0/0", "validate again")]


def test_archive_of_the_first_version__has_a_note_instead_of_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.unpack_archive(ARCHIVE, path)
    report = validate(path)
    assert "no fingerprint" in report.notes[0].what
    # its numbers were drawn at random and are no spectra; nothing else is wrong with it
    assert {f.place for f in report.errors} == {"hessian/eigenvalues", "hessian/fc.weight/eigenvectors"}
    flip(path / "metrics/train_loss/zarr.json", 8 * 13)
    assert_found(validate(path), "metrics/train_loss/zarr.json")


# ---------------------------------------------------------------------------- stores and reports


def test_zip__is_validated_without_unpacking(run: Path, tmp_path: Path) -> None:
    packed = tmp_path / "run.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in files(run):
            archive.write(file, key(run, file))
    store = ZipStore(packed, mode="r")
    assert validate(store).findings == ()
    offset = packed.read_bytes().index((run / "metrics/train_loss/c/0/0").read_bytes())
    store.close()
    flip(packed, 8 * (offset + 20))
    store = ZipStore(packed, mode="r")
    assert_found(validate(store), "metrics/train_loss/c/0/0")
    store.close()


def test_zip_with_flipped_bits__is_a_report_or_refused(run: Path, tmp_path: Path) -> None:
    packed, draw = tmp_path / "run.zip", random.Random(7)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files(run):
            archive.write(file, key(run, file))
    whole, verdicts = packed.read_bytes(), []
    headers = [match.start() for match in re.finditer(rb"PK\x01\x02", whole)]
    bits = [8 * (draw.choice(headers) + draw.choice([8, 9, 10])) + draw.randrange(8) for _ in range(15)]
    for bit in [*bits, *(draw.randrange(8 * len(whole)) for _ in range(25))]:
        flip(packed, bit)
        try:
            verdicts.append(validate(packed).ok)
        except NotAStoreError:
            verdicts.append(False)
        packed.write_bytes(whole)
    assert verdicts.count(False) > 25  # the others hit what means nothing, such as the time of an entry


def test_memory_store__says_the_same_as_the_folder(run: Path) -> None:
    buffer = default_buffer_prototype().buffer
    flip(run / "weights/fc.weight/weight/c/0/1/0/0", 9)
    store = MemoryStore({key(run, file): buffer.from_bytes(file.read_bytes()) for file in files(run)})
    assert validate(store).findings == validate(run).findings


def test_object_store__is_validated_in_place() -> None:
    obstore = pytest.importorskip("obstore")
    objects = obstore.store.MemoryStore()
    plan, store = spectrum_plan(seeds=(0,)), zarr.storage.ObjectStore(objects)
    write(store, plan, 0, (0, 1))
    assert validate(store).findings == ()
    objects.put("metrics/train_loss/c/0/0", b"")
    objects.delete("hessian/layer/c/0")
    objects.put("weights/seed/zarr.json", b"{}")
    assert {finding.place for finding in validate(store).errors} == {
        "metrics/train_loss/c/0/0",
        "hessian/layer/c/0",
        "weights/seed/zarr.json",
    }


def test_icechunk_repository_and_snapshot__are_validated() -> None:
    icechunk = pytest.importorskip("icechunk")
    plan, repository = spectrum_plan(seeds=(0,)), icechunk.Repository.create(icechunk.in_memory_storage())
    write(repository, plan, 0, (0, 1))
    for target in (repository, repository.readonly_session("main")):
        report = validate(target)
        assert report.findings == ()
        assert report.arrays == 17
    session = repository.writable_session("main")
    sync(session.store.delete("hessian/eigenvalues/c/0/0/0/0"))
    session.commit("lose a chunk")
    assert_found(validate(repository), "hessian/eigenvalues/c/0/0/0/0")


class _WithoutListing(MemoryStore):
    supports_listing = False


def test_store_that_cannot_list__is_refused() -> None:
    store = _WithoutListing()
    sync(store.set("zarr.json", default_buffer_prototype().buffer.from_bytes(b"{}")))
    with pytest.raises(StoreError, match="cannot list its keys"):
        validate(store)


def test_report__counts_what_was_read(run: Path) -> None:
    report = hx.validate(run)
    chunks = [file for file in files(run) if file.name != "zarr.json"]
    assert report.arrays == 17
    assert report.chunks == len(chunks)
    assert repr(report) == f"{run}: 17 arrays, {len(chunks)} chunks, 37.1 kB checked: sound"
    numeric = [file for file in chunks if "layer" not in key(run, file)]
    assert abs(report.nbytes - sum(file.stat().st_size - 4 for file in numeric)) < 32


def test_report__shows_errors_first_and_is_json(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    flip(run / "metrics/train_loss/c/1/0", 3)
    report = validate(run)
    assert [f.severity for f in report.findings] == ["error", "note"]
    lines = repr(report).splitlines()
    assert lines[0].startswith("error: metrics/train_loss/c/1/0 (seed 5, steps 0 to 126): cannot be read: ")
    assert lines[-1].endswith("checked: 1 error, 1 note")
    assert json.loads(json.dumps(report.to_dict()))["findings"][1]["place"] == "notes.txt"


def test_progress__is_shown_on_request(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate(run, progress=True)
    assert "validating: 100%" in capsys.readouterr().err
    validate(run)
    assert capsys.readouterr().err == ""


def test_what_is_no_run__raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        validate(tmp_path / "absent.zarr")
    with pytest.raises(NotAStoreError):
        validate(tmp_path)
    zarr.create_group(tmp_path / "other.zarr", attributes={"mine": 1})
    with pytest.raises(NotAStoreError, match="not written by hild-xr"):
        validate(tmp_path / "other.zarr")
