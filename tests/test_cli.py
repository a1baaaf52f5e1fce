from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner

from hild_xr import __version__, cli
from hild_xr.store import RunWriter
from hild_xr.testing import random_record, spectrum_plan

runner = CliRunner()


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    plan, path = spectrum_plan(seeds=(0, 1)), tmp_path / "run.zarr"
    with RunWriter(path, plan, 0, root_attrs={"provenance": {"device": "cpu"}}) as writer:
        for step in (0, 1):
            writer.write("metrics", step, random_record(plan, "metrics", seed=0, step=step))
    return path


def test_help__names_every_command() -> None:
    shown = runner.invoke(cli.app, ["--help"]).output
    assert "reproduce" in shown
    assert "info" in shown
    assert "analyze" in shown


def test_version__is_the_package_s() -> None:
    assert runner.invoke(cli.app, ["--version"]).output.strip() == f"hild-xr {__version__}"


def test_info__says_what_a_run_holds(run_path: Path) -> None:
    shown = runner.invoke(cli.app, ["info", str(run_path)])
    assert shown.exit_code == 0
    assert "/metrics: 2 of 10 records, steps 0 to 10" in shown.output
    assert "/hessian: 0 of 10 records, steps 0 to 10; layers: fc.weight" in shown.output
    assert "learning_rate 0.1" in shown.output


def test_info__as_json_is_for_programs(run_path: Path) -> None:
    held = json.loads(runner.invoke(cli.app, ["info", str(run_path), "--json"]).output)
    assert held["seeds"] == [0, 1]
    assert held["probes"]["metrics"]["committed"] == 2
    assert held["provenance"] == {"device": "cpu"}


def test_info__takes_a_url(run_path: Path) -> None:
    assert runner.invoke(cli.app, ["info", run_path.as_uri()]).output == (
        runner.invoke(cli.app, ["info", str(run_path)]).output
    )
    assert "2 of 10 records" in runner.invoke(cli.app, ["info", f"file:{run_path}"]).output


@pytest.mark.parametrize("command", ["info", "validate"])
@pytest.mark.parametrize(
    "target",
    ["absent.zarr", ".", "run.zip", "file://host/run.zarr", "file:/absent.zarr", "s3:/bucket/run.zarr"],
)
def test_wrong_target__is_a_usage_error_in_one_line(
    command: str,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.zip").write_text("no zip")
    assert_refused([command, target], monkeypatch, capsys)


@pytest.mark.parametrize("command", ["info", "validate"])
@pytest.mark.parametrize(("target", "package"), [("foo://bar", "fsspec"), ("s3://", "obstore")])
def test_url_that_cannot_be_used__is_a_usage_error_in_one_line(
    command: str,
    target: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    assert f"cannot use '{target}'" in assert_refused([command, target], monkeypatch, capsys)


@pytest.mark.parametrize("command", ["info", "validate"])
def test_server_that_refuses__is_a_usage_error_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("obstore")

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}/run.zarr"
        told = assert_refused([command, address], monkeypatch, capsys)
        web.shutdown()
    assert "cannot be read: " in told
    assert address in told
    assert "403" in told


def test_bug__is_shown_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: object) -> None:
        raise ValueError(f"a bug that has to do with {target}")

    monkeypatch.setattr("hild_xr.store.summary.summarise", fail)
    monkeypatch.setattr("sys.argv", ["hild-xr", "info", "run.zarr"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("command", ["info", "validate"])
def test_command__on_an_array_in_a_run_says_that_it_is_no_run(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    told = assert_refused([command, str(run_path / "metrics/train_loss")], monkeypatch, capsys)
    assert "is not a Zarr group" in told


def assert_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr("sys.argv", ["hild-xr", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hild-xr: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_reproduce__refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert runner.invoke(cli.app, ["reproduce", "mnist", "--out", str(tmp_path)]).exit_code == 2
    assert runner.invoke(cli.app, ["reproduce", "xor"]).exit_code == 2
    assert runner.invoke(cli.app, ["reproduce", "xor", "--out", str(tmp_path), "--seeds", "0"]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_validate__of_a_sound_run_says_so_and_succeeds(run_path: Path) -> None:
    shown = runner.invoke(cli.app, ["validate", str(run_path)])
    assert shown.exit_code == 0
    assert shown.output.endswith(" checked: sound\n")


def test_validate__of_a_damaged_run_says_where_and_fails(run_path: Path) -> None:
    (run_path / "metrics/train_loss/c/0/0").write_bytes(b"")
    shown = runner.invoke(cli.app, ["validate", str(run_path)])
    assert shown.exit_code == 1
    first, last = shown.output.splitlines()
    assert first.startswith("error: metrics/train_loss/c/0/0 (seed 0, steps 0 to 10): cannot be read: ")
    assert last.endswith(" checked: 1 error")


def test_validate__as_json_is_for_programs(run_path: Path) -> None:
    (run_path / "metrics/train_loss/c/0/0").unlink()
    shown = runner.invoke(cli.app, ["validate", str(run_path), "--json"])
    assert shown.exit_code == 1
    told = json.loads(shown.output)
    assert told["ok"] is False
    assert [(finding["severity"], finding["place"]) for finding in told["findings"]] == [
        ("error", "metrics/train_loss/c/0/0")
    ]


@pytest.fixture
def spectra_path(tmp_path: Path) -> Path:
    plan, path = spectrum_plan(seeds=(0, 1)), tmp_path / "spectra.zarr"
    for seed in (0, 1):
        with RunWriter(path, plan, seed) as writer:
            for step in (0, 1, 2):
                for probe in plan.probes:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    return path


def test_analyze__writes_a_labelled_store_and_says_what_is_in_it(spectra_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    shown = runner.invoke(
        cli.app, ["analyze", str(spectra_path), "--what", "angles,outliers", "--out", str(out), "--quiet"]
    )
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines() == [
        "/outliers/hessian: bulk_edge, bulk_reached, gap_ratio, outlier_count",
        "/angles/hessian/fc.weight: principal_angles",
        f"results: {out}",
    ]
    opened = xr.open_datatree(out, engine="zarr")
    assert opened["angles/hessian/fc.weight/principal_angles"].dims == ("seed", "step", "step_", "angle")
    assert opened.attrs["source"] == str(spectra_path)


def test_analyze__as_json_is_for_programs(spectra_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.zarr"
    arguments = ["--what", "rank", "--option", "rank.rtol=0.5", "--seed", "1", "--layer", "fc.*", "--json"]
    shown = runner.invoke(cli.app, ["analyze", str(spectra_path), "--out", str(out), *arguments])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["out"] == str(out)
    assert told["left_out"] == {}
    assert told["results"]["/rank/weights/fc.weight"]["stable_rank"] == {"seed": 1, "step": 3}
    opened = xr.open_datatree(out, engine="zarr")
    assert opened["rank/hessian/numerical_rank"].attrs["rtol"] == 0.5
    assert opened.attrs["hild_xr_analyses"] == {"rank": {"rtol": 0.5}}


def test_analyze__takes_options_of_every_kind() -> None:
    found = cli._options(["a.k=3", "a.method=relative", "b.x=[1, 2]", "b.y=null", 'b.z="4"'])
    assert found == {"a": {"k": 3, "method": "relative"}, "b": {"x": [1, 2], "y": None, "z": "4"}}


def test_analyze__lists_what_there_is() -> None:
    shown = runner.invoke(cli.app, ["analyze", "--list"])
    assert shown.exit_code == 0
    assert "outliers: Number of outliers of every spectrum, " in shown.output
    listed = json.loads(runner.invoke(cli.app, ["analyze", "--list", "--json"]).output)
    assert listed["alignment"]["needs"]["weight"] == "rec.Weights()"
    assert listed["angles"] == {
        "sentence": "Principal angles between the eigenspaces of all pairs of steps.",
        "needs": {"eigenvectors": listed["alignment"]["needs"]["eigenvectors"]},
        "options": {"k": None},
        "distribution": "hild-xr",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--what", "ranks"], 2, "no analysis 'ranks'; did you mean 'rank'?"),
        (["--what", "angles", "--option", "angles.j=1"], 2, "has no option 'j'; it takes k"),
        (["--what", "angles", "--layer", "conv"], 2, "expected layers of the run, came 'conv'"),
        (["--what", "angles", "--seed", "4"], 2, "expected seeds of the run, came [4]"),
        (["--what", "rank,projection"], 1, "'gradient' is recorded by rec.Gradient()"),
        (["--what", "angles", "--option", "angles.k=3"], 1, "2 eigenvectors recorded, k=3 asked for"),
    ],
)
def test_analyze__that_cannot_be_done_writes_nothing_and_says_why_in_one_line(
    spectra_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    out = tmp_path / "results.zarr"
    monkeypatch.setattr("sys.argv", ["hild-xr", "analyze", str(spectra_path), "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not out.exists()


def test_analyze__replaces_results_only_if_asked_to(
    spectra_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["analyze", str(spectra_path), "--what", "rank", "--out", str(tmp_path / "a.zarr"), "--quiet"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert "a.zarr exists; choose another path" in assert_refused(arguments, monkeypatch, capsys)
    assert runner.invoke(cli.app, [*arguments, "--overwrite"]).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [[], ["run.zarr"], ["run.zarr", "--what", "rank"], ["--what", "rank", "--out", "a.zarr"]]
)
def test_analyze__without_run_or_what_or_out_is_a_usage_error(arguments: list[str]) -> None:
    shown = runner.invoke(cli.app, ["analyze", *arguments])
    assert shown.exit_code == 2
    assert "give a run, --what and --out" in shown.output


def test_analyze__option_that_cannot_be_read_is_a_usage_error(spectra_path: Path, tmp_path: Path) -> None:
    arguments = ["--what", "rank", "--out", str(tmp_path / "a.zarr"), "--option", "rtol=0.1"]
    shown = runner.invoke(cli.app, ["analyze", str(spectra_path), *arguments])
    assert shown.exit_code == 2
    assert "expected analysis.option=value, came 'rtol=0.1'" in " ".join(shown.output.split())


def test_analyze__takes_a_url_as_out_without_harm(
    spectra_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fsspec")
    arguments = ["analyze", str(spectra_path), "--what", "rank", "--out", "memory://bucket/x"]
    said = assert_refused(arguments, monkeypatch, capsys)
    assert "memory://bucket/x: results are written into a local folder" in said


def test_analyze__says_which_records_have_no_counterpart(tmp_path: Path) -> None:
    plan, path, out = spectrum_plan(steps=(0, 1, 2)), tmp_path / "run.zarr", tmp_path / "results.zarr"
    weights = plan.probes["weights"].model_copy(update={"steps": (0, 2)})
    plan = plan.model_copy(update={"probes": {**plan.probes, "weights": weights}})
    with RunWriter(path, plan, 0) as writer:
        for probe in ("weights", "hessian"):
            for step in plan.probes[probe].steps:
                writer.write(probe, step, random_record(plan, probe, seed=0, step=step))
    arguments = ["analyze", str(path), "--what", "alignment", "--out", str(out), "--quiet"]
    said = "2 of 3 steps of eigenvectors; the others have no weight"
    shown = runner.invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == f"/alignment/hessian/fc.weight: {said}\n"
    told = json.loads(runner.invoke(cli.app, [*arguments, "--overwrite", "--json"]).stdout)
    assert told["records"] == {"/alignment/hessian/fc.weight": said}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_analyze__that_is_stopped_by_a_signal_leaves_nothing_behind(
    spectra_path: Path, tmp_path: Path, name: str, code: int
) -> None:
    folder = tmp_path / "out"
    program = (
        # under nohup it would be ignored, and rightly stay so
        f"import signal; signal.signal(signal.{name}, signal.SIG_DFL)\n"
        "import time, pathlib, hild_xr.analyze, hild_xr.cli\n"
        "def write(result, scratch, *, progress):\n"
        "    scratch.mkdir()\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "hild_xr.analyze._write = write\n"
        "hild_xr.cli.main()"
    )
    arguments = ["analyze", str(spectra_path), "--what", "rank", "--out", str(folder / "a.zarr"), "-q"]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(list(folder.iterdir())) == 1
        os.kill(process.pid, getattr(signal, name))
        assert process.wait(30) == code
    assert list(folder.iterdir()) == []


def test_analyze__gives_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with cli._stopped_cleanly():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with cli._stopped_cleanly():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_analyze__of_no_run_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "analyze",
        str(tmp_path / "absent.zarr"),
        "--what",
        "rank",
        "--out",
        str(tmp_path / "a.zarr"),
    ]
    assert_refused(arguments, monkeypatch, capsys)
