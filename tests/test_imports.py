"""Imports run one way, importing the package costs little, and optional packages stay optional.

The arrows are read off the source with :mod:`ast`: an import inside a function or under ``TYPE_CHECKING``
counts as well, because it is knowledge of the other part all the same.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"hild_xr": "hild_xr", "hild_xr.recorders": "recorders", "hild_xr.analysis": "analysis"}

# Each part of the house, with the parts it may import. A part is a module or a package with all it holds.
LABELS = ("hild_xr.variables", "hild_xr.plan", "hild_xr.provenance")
STORES = (*LABELS, "hild_xr.store", "hild_xr.sweep", "hild_xr.share")
MATHS = ("hild_xr.analysis", "hild_xr.variables")
SHOWN = ("hild_xr.plots", "hild_xr.accessor", "hild_xr.claims")
FACES = (*STORES, *MATHS, *SHOWN, "hild_xr.analyze", "hild_xr.sketch", "hild_xr")
TRAINING = ("hild_xr.recorders", "torch")  # outside recorders: only once a function is called
PARTS = {
    "hild_xr.variables": (),
    "hild_xr.provenance": (),
    "hild_xr.plan": ("hild_xr.variables",),
    "hild_xr.store": LABELS,
    "hild_xr.sweep": (*LABELS, "hild_xr.store"),
    "hild_xr.share": (*LABELS, "hild_xr.store", "hild_xr.sweep"),
    "hild_xr.sketch": ("hild_xr.variables",),
    "hild_xr.recorders": (*LABELS, "hild_xr.recorders.curvature", "hild_xr.sketch", "hild_xr.store", "torch"),
    "hild_xr.recorders.curvature": ("hild_xr.recorders", "torch"),  # kernels: neither labels nor a store
    "hild_xr.analysis": ("hild_xr.variables",),
    "hild_xr.plots": MATHS,
    "hild_xr.analyze": (*LABELS, *MATHS, "hild_xr.store"),
    "hild_xr.forwarding": (),
    "hild_xr.accessor": (*MATHS, "hild_xr.analyze", "hild_xr.forwarding", "hild_xr.plots", "hild_xr.store"),
    "hild_xr.claims": (),
    "hild_xr": (*STORES, *MATHS, "hild_xr.accessor", "hild_xr.recorders", "hild_xr.sketch"),
    "hild_xr.testing": FACES,
    "hild_xr.report": FACES,
    "hild_xr.dashboard": FACES,
    "hild_xr.reproduce": (*FACES, *TRAINING, "hild_xr.report"),
    "hild_xr.cli": (*FACES, *TRAINING, "hild_xr.report", "hild_xr.dashboard", "hild_xr.reproduce"),
}

NOT_AT_IMPORT = ("torch", "distributed", "holoviews", "panel", "bokeh", "matplotlib")
FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate")
OTHERS = ("jinja2", "sklearn", "rocrate", "s3fs", "obstore", "icechunk", "hmmlearn")
OPTIONAL = (*NOT_AT_IMPORT, *FRAMEWORKS, *OTHERS)
NEED_AN_EXTRA = (
    "hild_xr.recorders",
    "hild_xr.recorders.curvature",
    "hild_xr.plots",
    "hild_xr.report",
    "hild_xr.dashboard",
)


def module_name(package: str, file: Path) -> str:
    return ".".join([package, *file.with_suffix("").parts]).removesuffix(".__init__")


# rglob does not follow the two links in hild_xr: their folders are walked by themselves.
MODULES = {
    module_name(package, path.relative_to(ROOT / folder)): path
    for package, folder in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
}


def part_of(name: str) -> str:
    """Return the part that a module, or a name imported from one, belongs to."""
    return max((part for part in PARTS if f"{name}.".startswith(f"{part}.")), key=len)


class Import(NamedTuple):
    """One imported name, and whether loading the module leaves the import to a call or a type checker."""

    name: str
    line: int
    waits: bool


def imports_of(node: ast.AST, *, waits: bool = False) -> list[Import]:
    """List all imports below a node; ``from a import b`` counts as ``a.b``."""
    if isinstance(node, ast.Import):
        return [Import(alias.name, node.lineno, waits) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [Import(f"{node.module}.{alias.name}", node.lineno, waits) for alias in node.names]
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        waits = True
    waits = waits or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return [found for child in ast.iter_child_nodes(node) for found in imports_of(child, waits=waits)]


def broken_arrows(module: str, source: str) -> list[str]:
    """List the imports of a module that its place in the house does not allow."""
    part = part_of(module)
    broken = []
    for found in imports_of(ast.parse(source)):
        top = found.name.partition(".")[0]
        target = part_of(found.name) if top == "hild_xr" else top
        allowed = target == part or target in PARTS[part] or top not in ("hild_xr", "torch")
        if target in ("hild_xr.recorders", "torch") and not part.startswith("hild_xr.recorders"):
            allowed = allowed and found.waits
        if not allowed:
            broken.append(f"line {found.line}: {module} must not import {found.name} here")
    return broken


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows__run_one_way(module: str) -> None:
    assert broken_arrows(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_arrows__every_module_has_its_place() -> None:
    assert [name for name in MODULES if part_of(name) == "hild_xr" and name != "hild_xr"] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hild_xr.analysis.angles", "import torch"),
        ("hild_xr.analysis.angles", "def f():\n    from torch import nn"),
        ("hild_xr.analysis.angles", "from hild_xr.recorders import schedule"),
        ("hild_xr.analysis.angles", "from hild_xr import recorders"),
        ("hild_xr.analysis.angles", "from hild_xr.plan import RunPlan"),
        ("hild_xr.analysis.angles", "from hild_xr import open"),
        ("hild_xr.plots.spectra", "if TYPE_CHECKING:\n    import torch.nn"),
        ("hild_xr.plots.spectra", "import hild_xr.store.reader"),
        ("hild_xr.recorders.probes.hessian", "from hild_xr.analysis.subspaces.angles import angles"),
        ("hild_xr.recorders.recorder", "class A:\n    def f(self):\n        import hild_xr.plots"),
        ("hild_xr.recorders.curvature.engine", "from hild_xr.variables import DIM_EIG"),
        ("hild_xr.recorders.curvature.engine", "def f():\n    from hild_xr.store import open_run"),
        ("hild_xr.store.reader", "from hild_xr.recorders.schedule import every"),
        ("hild_xr.variables", "from hild_xr.plan import RunPlan"),
        ("hild_xr", "from hild_xr import recorders"),
        ("hild_xr.cli", "import torch"),
        ("hild_xr.cli", "from hild_xr import recorders"),
        ("hild_xr.reproduce", "import hild_xr.cli"),
        ("hild_xr.report", "def f():\n    import torch"),
        ("hild_xr", "def f():\n    import torch"),
    ],
)
def test_arrows__a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(broken_arrows(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "hild_xr.analysis.angles",
            "from hild_xr.analysis.subspaces.alignment import alignment\nimport numpy",
        ),
        ("hild_xr.plots.spectra", "from hild_xr.analysis import angles"),
        ("hild_xr.recorders.recorder", "import torch\nfrom hild_xr.store import RunWriter"),
        ("hild_xr.recorders.curvature.engine", "import torch\nfrom hild_xr.recorders import objective"),
        ("hild_xr.cli", "def reproduce():\n    import torch\n    from hild_xr import recorders"),
        ("hild_xr.cli", "from hild_xr.report import write\nimport hild_xr as hx"),
    ],
)
def test_arrows__an_allowed_import_passes(module: str, source: str) -> None:
    assert broken_arrows(module, source) == []


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def loaded_by(*arguments: str) -> set[str]:
    """Run Python and return the top-level packages it imported."""
    result = run_python("-X", "importtime", *arguments)
    lines = result.stderr.splitlines()
    timed = [line for line in lines if line.startswith("import time:")]
    assert result.returncode == 0, "\n".join(line for line in lines if line not in timed)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}


def test_import_hild_xr__loads_neither_torch_nor_a_plotting_library() -> None:
    loaded = loaded_by("-c", "import hild_xr")
    assert "hild_xr" in loaded
    assert loaded & set(NOT_AT_IMPORT) == set()


def hild_xr_script() -> str:
    return str(Path(sys.executable).with_name("hild-xr"))


def test_help__loads_neither_torch_nor_a_plotting_library() -> None:
    loaded = loaded_by(hild_xr_script(), "--help")
    assert "hild_xr" in loaded
    assert loaded & set(NOT_AT_IMPORT) == set()


def test_help__answers_within_half_a_second() -> None:
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([hild_xr_script(), "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time: the answer on a quiet machine, however busy this one is
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "reproduce" in result.stdout
    assert best < 0.5


def without(packages: tuple[str, ...], then: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a Python where importing these packages fails."""
    return run_python("-c", f"import sys\nsys.modules.update(dict.fromkeys({packages}))\n{then}")


def test_core__imports_without_any_optional_package() -> None:
    core = sorted(name for name in MODULES if part_of(name) not in NEED_AN_EXTRA)
    result = without(
        OPTIONAL, f"from importlib import import_module\nfor name in {core}: import_module(name)"
    )
    assert result.returncode == 0, result.stderr


def test_recorders__without_torch_name_the_extra_that_brings_it() -> None:
    result = without(("torch",), "import hild_xr.recorders")
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert "Error: " in last_line
    assert "hild-xr[torch]" in last_line


def test_recorders__load_no_training_framework() -> None:
    pytest.importorskip("torch")
    loaded = loaded_by("-c", "import hild_xr.recorders.adapters.distributed")
    assert "torch" in loaded
    assert loaded & set(FRAMEWORKS) == set()


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_adapter__without_its_framework_names_the_extra_that_brings_it(framework: str) -> None:
    pytest.importorskip("torch")
    result = without((framework,), f"import hild_xr.recorders.adapters.{framework}")
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert f"hild-xr[{framework}]" in last_line
