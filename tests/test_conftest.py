"""What the other tests rely on: the browser fixture, one thread each, examples that leave nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_pytest(conftest: Path, folder: Path, *options: str, **environment: str) -> str:
    shutil.copyfile(conftest, folder / "conftest.py")
    outside = {name: value for name, value in os.environ.items() if name not in ("CI", "HILD_XR_CHROMIUM")}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            folder,
            *options,
            folder,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env=outside | environment,
        check=False,
    ).stdout


def run_a_browser_test(folder: Path, **environment: str) -> str:
    (folder / "test_page.py").write_text("def test_page(chromium_path): print('browser at', chromium_path)")
    return run_pytest(ROOT / "tests" / "conftest.py", folder, **{"PATH": str(folder), **environment})


def test_chromium_path__skips_with_a_reason_where_there_is_no_browser(tmp_path: Path) -> None:
    output = run_a_browser_test(tmp_path)
    assert "1 skipped" in output
    assert "install Debian's package chromium" in output


def test_chromium_path__fails_in_ci_where_there_is_no_browser(tmp_path: Path) -> None:
    output = run_a_browser_test(tmp_path, CI="true")
    assert "1 error" in output
    assert "install Debian's package chromium" in output


def test_chromium_path__takes_the_browser_that_is_named(tmp_path: Path) -> None:
    output = run_a_browser_test(tmp_path, HILD_XR_CHROMIUM=sys.executable)
    assert f"browser at {sys.executable}" in output


def test_chromium_path__does_not_replace_a_named_browser_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "chromium").symlink_to(sys.executable)
    output = run_a_browser_test(tmp_path, HILD_XR_CHROMIUM=str(tmp_path / "gone"))
    assert "1 skipped" in output
    assert f"HILD_XR_CHROMIUM={tmp_path / 'gone'}" in output


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"])
def test_every_test_and_its_children_compute_on_one_thread(variable: str) -> None:
    assert os.environ[variable] == "1"


def test_docstring_example__leaves_no_file_in_the_working_directory(tmp_path: Path) -> None:
    example = ">>> from pathlib import Path\n>>> Path('litter').write_text('x')\n1\n"
    (tmp_path / "module.py").write_text(f'"""A module.\n\n{example}"""\n')
    output = run_pytest(ROOT / "conftest.py", tmp_path, "--doctest-modules")
    assert "1 passed" in output
    assert not (tmp_path / "litter").exists()
