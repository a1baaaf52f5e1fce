"""Every code block of the README runs, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]


def test_readme__has_only_blocks_that_are_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert len(PYTHON) >= 4


def test_readme__python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), namespace)
    rho = namespace["rho"]
    assert isinstance(rho, dict)
    final = float(rho["E_10(H)"].isel(step=-1).mean().compute())
    assert final > 0.7, "the figure's claim: hidden neurons align with their own blocks"
    assert (tmp_path / "figures" / "01-alignment.png").stat().st_size > 10_000


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_readme__make_targets_exist(line: str) -> None:
    words = shlex.split(line)
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_readme__commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for line in SHELL if line.startswith("hild-xr ")]
    assert len(commands) == len([line for line in SHELL if not line.startswith("make ")])
    for line in commands:
        # one seed in place of four: CI checks the commands, tests/test_cli.py the claims
        words = shlex.split(line.replace("--seeds 4", "--seeds 1"))
        words[0] = str(Path(sys.executable).parent / words[0])
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!https?://)[^)#]+)\)", README))
def test_readme__links_to_files_that_exist(target: str) -> None:
    assert (ROOT / target).is_file()
