"""The command that runs the experiments end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hild_xr import cli
from hild_xr.claims import Claim
from hild_xr.recorders import at, experiments

runner = CliRunner()


def test_reproduce__exits_with_1_if_a_claim_fails_and_still_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiments.kgmm()
    untrained = replace(whole, steps=20, schedule=at([0, 1, 20]))
    monkeypatch.setattr(experiments, "kgmm", lambda: untrained)
    done = runner.invoke(
        cli.app, ["reproduce", "kgmm", "--out", str(tmp_path), "--seeds", "1", "--json", "-q"]
    )
    assert done.exit_code == 1, done.output
    table = json.loads(done.stdout)
    assert table["all_hold"] is False
    assert {claim["holds"] for claim in table["claims"]} == {True, False}
    assert Path(table["report"]).read_text().startswith("<!DOCTYPE html>")
    assert [Claim.from_dict(claim).to_dict() for claim in table["claims"]] == table["claims"]
    assert json.loads((tmp_path / "kgmm.json").read_text()) == table
    again = runner.invoke(cli.app, ["reproduce", "kgmm", "--out", str(tmp_path), "--seeds", "1", "-q"])
    assert again.exit_code == 1
    assert "claim of the theory" in again.stdout
    assert " no " in again.stdout


def test_reproduce__of_other_settings_in_one_folder_lists_the_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = replace(experiments.kgmm(), steps=2, schedule=at([0, 1, 2]))
    monkeypatch.setattr(experiments, "kgmm", lambda: untrained)
    runner.invoke(cli.app, ["reproduce", "kgmm", "--out", str(tmp_path), "--seeds", "1", "-q"])
    monkeypatch.setattr(
        "sys.argv", ["hild-xr", "reproduce", "kgmm", "--out", str(tmp_path), "--seeds", "2", "-q"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "seeds: (0, 1) asked for, (0,) in the store" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.parametrize(("experiment", "seeds"), [("kgmm", 1), ("xor", 3), ("digits", 1)])
def test_reproduce__holds_every_claim(experiment: str, seeds: int, tmp_path: Path) -> None:
    arguments = ["reproduce", experiment, "--out", str(tmp_path), "--seeds", str(seeds), "-q"]
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert f"{experiment}.html" in done.output
    table = json.loads((tmp_path / f"{experiment}.json").read_text())
    assert table["all_hold"]
    assert len(table["claims"]) >= 10
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/c/*") if path.is_file()}
    assert stamps
    again = runner.invoke(cli.app, [*arguments, "--json"])
    assert json.loads(again.stdout)["claims"] == table["claims"]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, (
        "what is recorded is not trained again"
    )
