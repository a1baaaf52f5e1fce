from __future__ import annotations

import json
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    "arguments",
    [["info", "absent.zarr"], ["info", "."], ["validate", "absent.zarr"], ["validate", "."]],
)
def test_wrong_path__is_a_usage_error_in_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hild-xr", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hild-xr: ")
    assert "Traceback" not in shown.err


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
