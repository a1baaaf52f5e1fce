"""One distribution out of three folders: what is listed, what is built, what can be imported from it.

``recorders/`` and ``analysis/`` stand in the root and are imported as ``hild_xr.recorders`` and
``hild_xr.analysis``. Installs know that from the mapping in pyproject.toml; tools that read folders know
it from two relative links. Everything is built twice here: with the links, and as git checks them out on
systems that have none, as text files.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"hild_xr": "hild_xr", "hild_xr.recorders": "recorders", "hild_xr.analysis": "analysis"}
DISTRIBUTIONS = packages_distributions()
LINKS = {ROOT / "hild_xr" / name: f"../{name}" for name in ("recorders", "analysis")}


def files_of(package: str) -> list[PurePosixPath]:
    """List the files of a package, relative to its folder."""
    folder = ROOT / FOLDERS[package]
    found = (path for path in folder.rglob("*") if path.is_file() and path not in LINKS)
    return sorted(
        PurePosixPath(path.relative_to(folder)) for path in found if path.parent.name != "__pycache__"
    )


SOURCES = {f"{folder}/{file}" for package, folder in FOLDERS.items() for file in files_of(package)}
INSTALLED = {f"{package.replace('.', '/')}/{file}" for package in FOLDERS for file in files_of(package)}
MODULES = sorted(
    file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for file in INSTALLED
    if file.endswith(".py")
)


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def requirement_lines(file: Path) -> list[str]:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_every_folder_with_modules_is_a_package_and_is_listed() -> None:
    folders = {str(PurePosixPath(file).parent) for file in INSTALLED if file.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= INSTALLED
    assert {folder.replace("/", ".") for folder in folders} == set(
        PYPROJECT["tool"]["setuptools"]["packages"]
    )


def test_the_mapping_names_the_three_folders() -> None:
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS


@pytest.mark.parametrize(("link", "target"), LINKS.items(), ids=["recorders", "analysis"])
def test_links__are_relative_and_point_to_the_root_folders(link: Path, target: str) -> None:
    assert (str(link.readlink()) if link.is_symlink() else link.read_text(encoding="utf-8")) == target


@pytest.mark.parametrize("name", ["recorders", "analysis"])
def test_root_folders__cannot_be_imported_by_their_short_name(name: str) -> None:
    result = run_python("-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert f"hild_xr.{name}" in last_line


@pytest.mark.skipif(not all(map(Path.is_symlink, LINKS)), reason="this checkout has no symbolic links")
def test_mypy__reads_every_module_through_the_links() -> None:
    ask = "from mypy.main import process_options; print(*(file.module for file in process_options([])[0]))"
    result = run_python("-c", ask, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert sorted(name for name in result.stdout.split() if name.split(".")[0] == "hild_xr") == MODULES


class Built(NamedTuple):
    """The two files of one release."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module", params=["links", "text files"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build a copy of the checkout, the wheel out of the sdist, with nothing fetched."""
    source = tmp_path_factory.mktemp("source")
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    for file in SOURCES | tests | {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)
    for link, target in LINKS.items():
        copy = source / link.relative_to(ROOT)
        if request.param == "links":
            copy.symlink_to(target)
        else:
            copy.write_text(target, encoding="utf-8")
    result = run_python("-m", "build", "--no-isolation", str(source), cwd=source)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return Built(sdist, wheel)


def test_wheel__holds_the_package_folders_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == INSTALLED
    assert "hild_xr/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist__holds_every_source_file_and_no_test(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= SOURCES | {"pyproject.toml", "README.md", "LICENSE"}
    assert [name for name in names if name.startswith("tests") or "/test_" in name] == []


def test_wheel__imports_every_module_from_where_it_was_installed(built: Built, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site))
    installed = run_python(*install, str(built.wheel), cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    import_all = (
        "from importlib import import_module\n"
        f"for name in {MODULES}:\n"
        "    print(name, import_module(name).__file__)"
    )
    result = run_python("-c", import_all, cwd=tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    places = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert sorted(places) == MODULES
    assert [name for name, place in places.items() if not Path(place).is_relative_to(site)] == []


def third_party_imports(source: str) -> set[str]:
    """Return the top-level names a module imports anywhere, less ours and the standard library's."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"hild_xr"}


@pytest.mark.parametrize("source", sorted(file for file in SOURCES if file.endswith(".py")))
def test_declared__is_every_package_that_a_module_imports(source: str) -> None:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"]]
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in ("bench", "dev") and (extra != "test" or source == "hild_xr/testing.py"):
            lines += requirements
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    imported = {
        name: {canonicalize_name(distribution) for distribution in DISTRIBUTIONS[name]}
        for name in third_party_imports((ROOT / source).read_text(encoding="utf-8"))
    }
    assert [name for name, brought_by in imported.items() if not brought_by & declared] == []


def test_extra_all__brings_every_extra_that_adds_a_feature() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(extras) - {"all", "bench", "test", "dev"}


def test_constraints__pin_every_package_that_is_asked_for() -> None:
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    asked += [line for extra in project["optional-dependencies"].values() for line in extra]
    asked += [line for file in (ROOT / "requirements").glob("*.txt") for line in requirement_lines(file)]
    pins = [Requirement(line) for line in requirement_lines(ROOT / "constraints.txt")]
    assert [str(pin) for pin in pins if [part.operator for part in pin.specifier] != ["=="]] == []
    names = {canonicalize_name(Requirement(line).name) for line in asked} - {"hild-xr"}
    assert names - {canonicalize_name(pin.name) for pin in pins} == set()
