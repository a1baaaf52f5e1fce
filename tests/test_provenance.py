from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hild_xr.provenance import provenance


def test_provenance__is_json_and_names_versions() -> None:
    found = json.loads(json.dumps(provenance(device="cpu")))
    assert found["versions"]["numpy"] == np.__version__
    assert found["device"] == "cpu"
    assert found["created"].endswith("+00:00")


def test_provenance__names_the_commit_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "git_commit" not in provenance()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "one"],
    ):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert provenance()["git_commit"] == head
    assert provenance()["git_dirty"] is False
    (tmp_path / "train.py").write_text("lr = 1")
    subprocess.run(["git", "add", "train.py"], check=True)
    assert provenance()["git_dirty"] is True
