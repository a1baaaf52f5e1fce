"""Analyses by name; other packages are real distributions, installed into a folder on the path."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import xarray as xr

from hild_xr.analysis import whole_run
from hild_xr.analysis.named import (
    OWN_ANALYSES,
    AnalysisError,
    BrokenAnalysisError,
    NamedAnalysis,
    NotRecordedError,
    UnknownAnalysisError,
    find_analysis,
    list_analyses,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Install = Callable[[str, Mapping[str, str], str], None]

LOSS = xr.Dataset({"train_loss": ("step", [4.0, 1.0])}, {"step": [0, 10]})
RUN = xr.DataTree.from_dict({"/metrics": LOSS})

GOOD = """
from hild_xr.analysis.named import NamedAnalysis

def loss_drop(run, *, factor=1.0):
    loss = run["metrics/train_loss"]
    return (factor * (loss.isel(step=0) - loss.isel(step=-1))).to_dataset(name="loss_drop")

LOSS_DROP = NamedAnalysis(
    "loss_drop", "Loss at the start less that at the end.", loss_drop,
    {"metrics/train_loss": "rec.Metrics()"},
)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of one module, with entry points, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, entry_points: Mapping[str, str], code: str) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{point} = {value}\n" for point, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[hild_xr.analyses]\n{lines}")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_plugin__is_found_and_called_like_an_analysis_of_this_package(install: Install) -> None:
    install("loss-tools", {"loss_drop": "loss_tools:LOSS_DROP"}, GOOD)
    analysis = find_analysis("loss_drop")
    assert analysis.distribution == "loss-tools 1.2"
    assert analysis.options == {"factor": 1.0}
    assert analysis(RUN, factor=2.0)["loss_drop"].item() == 6.0
    assert list_analyses()["loss_drop"] == analysis
    with pytest.raises(
        UnknownAnalysisError, match=r"did you mean 'loss_drop'\? There are: angles, .*loss_drop"
    ):
        find_analysis("los_drop")


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("bad_tools:X", "import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("bad_tools:X", "def broken(:", "SyntaxError"),
        (
            "bad_tools:X",
            "raise OSError('no licence\\nfile')",
            "OSError: no licence file; update or uninstall it",
        ),
        ("bad_tools:X", "Y = 1", "AttributeError"),
        (
            "bad_tools:X",
            "def X(run): ...",
            r"expected a \S+NamedAnalysis at 'bad_tools:X', came function",
        ),
        ("bad_tools:LOSS_DROP", GOOD, "its entry point has another name than itself, 'loss_drop'"),
    ],
)
def test_broken_plugin__is_named_with_its_distribution_and_disturbs_no_other(
    install: Install, value: str, code: str, said: str
) -> None:
    install("bad-tools", {"bad": value}, code)
    install("loss-tools", {"loss_drop": "loss_tools:LOSS_DROP"}, GOOD)
    with pytest.raises(BrokenAnalysisError, match=f"'bad' of the distribution bad-tools 1.2.*{said}"):
        find_analysis("bad")
    listed = list_analyses()
    assert isinstance(listed["bad"], BrokenAnalysisError)
    assert {name for name, found in listed.items() if isinstance(found, NamedAnalysis)} == {
        *OWN_ANALYSES,
        "loss_drop",
    }
    assert find_analysis("angles") is OWN_ANALYSES["angles"]


def test_plugin__that_takes_a_name_of_this_package_is_reported_and_not_used(install: Install) -> None:
    install("loss-tools", {"angles": "loss_tools:LOSS_DROP"}, GOOD)
    assert find_analysis("angles").distribution == "hild-xr"
    assert "the name is taken by hild-xr" in str(list_analyses()["angles of loss-tools 1.2"])


def test_plugins__that_claim_one_name_are_both_named(install: Install) -> None:
    install("loss-tools", {"loss_drop": "loss_tools:LOSS_DROP"}, GOOD)
    install("more-tools", {"loss_drop": "more_tools:LOSS_DROP"}, GOOD)
    with pytest.raises(
        BrokenAnalysisError, match=r"claimed by .*(loss-tools 1.2, more|more-tools 1.2, loss)"
    ):
        find_analysis("loss_drop")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no luck')", "of the distribution bad-tools 1.2 failed: RuntimeError: no luck"),
        ("return run['absent']", "of the distribution bad-tools 1.2 failed: KeyError: "),
        ("return 3", "must return a Dataset or a DataTree, came int"),
    ],
)
def test_plugin__that_fails_is_named_with_its_distribution(install: Install, body: str, said: str) -> None:
    code = (
        "from hild_xr.analysis.named import NamedAnalysis\n"
        f"def bad(run):\n    {body}\n"
        "BAD = NamedAnalysis('bad', 'Fails.', bad)"
    )
    install("bad-tools", {"bad": "bad_tools:BAD"}, code)
    with pytest.raises(BrokenAnalysisError, match=said):
        find_analysis("bad")(RUN)


def test_missing_records__name_what_is_missing_and_what_records_it() -> None:
    with pytest.raises(NotRecordedError) as raised:
        find_analysis("alignment")(RUN)
    assert str(raised.value) == (
        "analysis 'alignment' needs 'weight', 'eigenvectors', which the run does not hold: 'weight' is "
        "recorded by rec.Weights(); 'eigenvectors' is recorded by rec.Hessian(k=...), rec.GMatrix(k=...) or "
        "another probe of eigenpairs. The groups of the run are metrics"
    )


@pytest.mark.parametrize("need", ["metrics", "metrics/train_loss", "train_loss"])
@pytest.mark.parametrize("other", ["metrics/accuracy", "weights", "weights/fc1/weight", "accuracy"])
def test_needs__are_groups_or_paths_or_variables(need: str, other: str) -> None:
    whole = NamedAnalysis("whole", "The run.", lambda run: run, {need: "rec.Metrics()"})
    assert whole(RUN) is RUN
    lacking = NamedAnalysis("whole", "The run.", lambda run: run, {need: "a", other: "rec.Other()"})
    with pytest.raises(
        NotRecordedError, match=rf"needs '{other}', .* '{other}' is recorded by rec.Other\(\)"
    ):
        lacking(RUN)


def test_nothing_to_work_on__says_why() -> None:
    run = RUN.copy()
    run["weights/fc1.bias"] = xr.Dataset({"weight": ("out", [1.0], {"vector_dims": ["out"]})})
    with pytest.raises(
        NotRecordedError, match=r"found nothing to work on in the run \(weights/fc1.bias: no matrix\)"
    ):
        find_analysis("rank")(run)
    with pytest.raises(NotRecordedError, match=r"'rank' found nothing to work on in the run$"):
        find_analysis("rank")(RUN)


def test_options__that_do_not_exist_are_refused_with_those_that_do() -> None:
    run = xr.DataTree.from_dict({"/hessian": xr.Dataset({"eigenvalues": ("eig", [3.0, 1.0])})})
    with pytest.raises(
        AnalysisError, match=r"'outliers' has no option 'methud'; it takes method, k, threshold"
    ):
        find_analysis("outliers")(run, methud="gap")
    with pytest.raises(AnalysisError, match=r"analysis 'outliers': expected method 'gap' .* came 'gapp'"):
        find_analysis("outliers")(run, method="gapp")


def test_a_bug_of_this_package__is_not_hidden() -> None:
    def bug(run: xr.DataTree) -> xr.DataTree:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        NamedAnalysis("bug", "A bug.", bug)(RUN)


def test_table__names_functions_of_this_package_by_their_own_names() -> None:
    for name, analysis in OWN_ANALYSES.items():
        assert analysis.function is getattr(whole_run, name)
        assert analysis.sentence.endswith(".")
        assert analysis.distribution == "hild-xr"
