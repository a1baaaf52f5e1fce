"""The pages under docs: code that needs no cluster runs, all of it parses, links lead somewhere."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import xarray as xr

from hild_xr.analysis.named import ENTRY_POINT_GROUP, NamedAnalysis
from hild_xr.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CLUSTERS = (ROOT / "docs/analysis_on_clusters.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages__have_python_that_parses_and_links_that_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code in blocks(text, "python"):
        ast.parse(code)
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)\)", text):
        assert (page.parent / target).exists(), target


def test_cluster_page__names_options_that_the_command_has() -> None:
    from typer.main import get_command

    command = get_command(app).commands["analyze"]  # type: ignore[attr-defined]  # a group of commands
    options = {option for parameter in command.params for option in parameter.opts}
    lines = [line for line in CLUSTERS.splitlines() if "hild-xr analyze" in line or line.startswith("| part")]
    named = {word for line in lines for word in re.findall(r"(?<!\S)`?(--[a-z]+)", line)}
    assert named >= {"--what", "--out", "--scheduler", "--seed", "--layer"}
    assert named <= options


def test_cluster_page__adds_an_analysis_that_works() -> None:
    (toml,) = blocks(CLUSTERS, "toml")
    ((name, value),) = tomllib.loads(toml)["project"]["entry-points"][ENTRY_POINT_GROUP].items()
    code = blocks(CLUSTERS, "python")[-1]
    namespace: dict[str, object] = {}
    exec(compile(code, "analysis_on_clusters.md", "exec"), namespace)
    analysis = namespace[value.partition(":")[2]]
    assert isinstance(analysis, NamedAnalysis)
    assert analysis.name == name
    loss = xr.Dataset({"train_loss": ("step", [4.0, 1.0])})
    assert analysis(xr.DataTree.from_dict({"/metrics": loss}))["loss_drop"].item() == 3.0
