from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from hild_xr import plots
from hild_xr.claims import COLUMNS, Claim, at_least, equals
from hild_xr.report import Figure, save_figures, write_report
from hild_xr.variables import attrs

HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> & \"quoted\" ' {{ 7*7 }}"
)

CLAIMS = [
    Claim("the weights lie in the outlier eigenspace", 0.966, at_least(0.95)),
    Claim("the block has k outliers", 2, equals(4)),
    Claim("what could not be measured", math.nan, at_least(0)),
]


@pytest.fixture
def figures() -> list[Figure]:
    steps = np.array([0, 1, 10, 100])
    curve = 1 - np.exp(-steps / 10)
    rho = xr.DataArray(
        np.stack([curve, 0.9 * curve]),
        dims=("seed", "step"),
        coords={"step": steps},
        attrs=attrs("alignment"),
    )
    overlap = xr.DataArray(np.stack([curve, 0 * curve], axis=1), dims=("step", "eig"), coords={"step": steps})
    return [
        Figure(
            plots.alignment_curves({"E_k(H)": rho}, 0.1),
            "Alignment with E_k(H)",
            "Median and range over seeds.",
        ),
        Figure(
            plots.overlap_map(overlap), "Overlap", "Leading eigenvector on top.", alt="A bright first row."
        ),
        Figure(
            plots.side_by_side({name: plots.overlap_map(overlap) for name in ("optimal", "sub-optimal")}),
            "Overlap",
            "Two runs.",
        ),
    ]


def arguments(**more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "title": "k-GMM",
        "introduction": "First paragraph.\n\nSecond paragraph.",
        "claims": CLAIMS,
        "figures": [],
        "provenance": {"store": "runs/kgmm.zarr"},
    }
    return given | more


class Page(HTMLParser):
    """Elements, texts and everything an HTML page could fetch."""

    LOADS = ("src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href")
    VOID = ("meta", "link", "img", "br", "hr", "input", "path")

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert self.tags == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1] if self.tags else "", data.strip()))

    def inside(self, tag: str) -> list[str]:
        return [text for at, text in self.texts if at == tag]

    def fetched(self) -> list[str]:
        values = [
            value or "" for _, found in self.attributes for name, value in found.items() if name in self.LOADS
        ]
        styles = [text for tag, text in self.texts if tag == "style"]
        return values + re.findall(r"@import[^;]*|url\([^)]*\)", "\n".join(styles))


# ---------------------------------------------------------------------------- the page


def test_write_report__fetches_nothing(tmp_path: Path, figures: list[Figure]) -> None:
    page = Page(write_report(tmp_path / "report.html", **arguments(figures=figures)))
    assert all(value.startswith(("#", "data:")) for value in page.fetched()), page.fetched()
    policies = [found["content"] for tag, found in page.attributes if "http-equiv" in found]
    assert len(policies) == 1
    assert (policies[0] or "").startswith("default-src 'none';")
    assert "http:" not in (policies[0] or "")


def test_write_report__does_not_pick_up_what_panel_adds_to_bokeh(
    tmp_path: Path, figures: list[Figure]
) -> None:
    pytest.importorskip("panel")
    page = Page(write_report(tmp_path / "report.html", **arguments(figures=figures)))
    assert [found for tag, found in page.attributes if tag == "script" and "src" in found] == []
    assert "es-module-shims" not in page.text


def test_write_report__shows_every_claim_with_its_verdict_in_words(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "report.html", **arguments()))
    cells = [text for tag, text in page.texts if tag in ("th", "td", "span")]
    expected = [*COLUMNS, *(cell for claim in CLAIMS for cell in claim.as_row())]
    assert cells[: len(expected)] == expected
    assert page.inside("caption") == ["1 of 3 claims hold."]
    verdicts = [found["class"] for tag, found in page.attributes if tag == "span"]
    assert verdicts == ["verdict yes", "verdict no", "verdict no"]


def test_write_report__tables_and_figures_are_marked_up_for_those_who_do_not_see_them(
    tmp_path: Path, figures: list[Figure]
) -> None:
    page = Page(write_report(tmp_path / "report.html", **arguments(figures=figures)))
    assert ("html", {"lang": "en"}) in page.attributes
    assert len(page.inside("h1")) == 1
    assert page.inside("h2") == ["Claims", "Figures", "Provenance"]
    scopes = [found["scope"] for tag, found in page.attributes if tag == "th"]
    assert scopes == ["col"] * len(COLUMNS) + ["row"] * len(CLAIMS) + ["row"]
    alternatives = [found["aria-label"] for _, found in page.attributes if found.get("role") == "img"]
    assert alternatives == [figure.alt for figure in figures]
    identifiers = [found["id"] for _, found in page.attributes if "id" in found]
    assert len(set(identifiers)) == len(identifiers)
    named = {found["aria-labelledby"] for _, found in page.attributes if "aria-labelledby" in found}
    links = {(found["href"] or "")[1:] for tag, found in page.attributes if tag == "a"}
    assert named | links <= set(identifiers)


def test_write_report__titles_and_captions_stand_in_order(tmp_path: Path, figures: list[Figure]) -> None:
    page = Page(write_report(tmp_path / "report.html", **arguments(figures=figures)))
    assert page.inside("h3") == [f"Figure {n}. {figure.title}" for n, figure in enumerate(figures, start=1)]
    assert page.inside("figcaption") == [figure.caption for figure in figures]
    assert page.inside("p")[:2] == ["First paragraph.", "Second paragraph."]


def test_write_report__escapes_what_it_is_given(tmp_path: Path) -> None:
    steps = xr.DataArray([0.1, 0.2], dims="step", coords={"step": [0, 1]})
    given = arguments(
        title=HOSTILE,
        introduction=HOSTILE,
        claims=[Claim(HOSTILE, 1, at_least(0))],
        figures=[Figure(plots.alignment_curves({HOSTILE: steps}, label=HOSTILE), HOSTILE, HOSTILE)],
        provenance={HOSTILE: {HOSTILE: HOSTILE}, "command_line": ["hild-xr", HOSTILE]},
    )
    page = Page(write_report(tmp_path / "report.html", **given))
    assert [tag for tag, _ in page.attributes if tag in ("img", "iframe", "object", "embed")] == []
    assert not any(name.startswith("on") for _, found in page.attributes for name in found)
    assert len([tag for tag, _ in page.attributes if tag == "script"]) == 3, "library, its log level, figures"
    for tag in ("title", "h1", "figcaption"):
        assert page.inside(tag) == [HOSTILE]
    assert "49" not in page.inside("h1")[0]


def test_write_report__shows_provenance_with_all_it_holds(tmp_path: Path) -> None:
    provenance = {
        "command_line": ["hild-xr", "reproduce", "kgmm", "--out", "my runs"],
        "versions": {"numpy": "2.4.6", "torch": "2.13.0+cpu"},
        "digits_softmax.zarr": {"command_line": ["hild-xr", "a b"]},
        "config": {"dimension": 200, "schedule": {"kind": "log_then_linear"}, "beta": None},
        "git_commit": "0123abc",
        "seeds": [0, 1, 2],
        "store": Path("runs/kgmm.zarr"),
    }
    page = Page(write_report(tmp_path / "report.html", **arguments(claims=[], provenance=provenance)))
    assert page.inside("th") == [
        *("command_line", "versions", "numpy", "torch", "digits_softmax.zarr", "command_line"),
        *("config", "dimension", "schedule", "kind", "beta", "git_commit", "seeds", "store"),
    ]
    assert page.inside("code") == [
        "hild-xr reproduce kgmm --out 'my runs'",
        *("2.4.6", "2.13.0+cpu", "hild-xr 'a b'"),
        *("200", "log_then_linear", "None", "0123abc", "0", "1", "2", "runs/kgmm.zarr"),
    ]


def test_write_report__leaves_out_what_there_is_nothing_of(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "report.html", **arguments(claims=[])))
    assert page.inside("h2") == ["Provenance"]
    assert [tag for tag, _ in page.attributes if tag == "script"] == []


def test_write_report__is_of_a_reasonable_size(tmp_path: Path) -> None:
    steps = np.arange(1000)
    rho = xr.DataArray(np.full((10, 1000), 0.5), dims=("seed", "step"), coords={"step": steps})
    angles = xr.DataArray(
        np.zeros((1000, 1000)),
        dims=("step", "step_"),
        coords={"step": steps, "step_": steps},
        attrs={"units": "rad"},
    )
    counts = xr.DataArray(np.ones((10, 1000)), dims=("seed", "step"), coords={"step": steps})
    drawn = [
        plots.alignment_curves(dict.fromkeys("abcd", rho)),
        plots.angle_map(angles),
        plots.outlier_counts(counts),
    ]
    path = write_report(tmp_path / "report.html", **arguments(figures=[Figure(p, "t", "c") for p in drawn]))
    assert 1_000_000 < path.stat().st_size < 4_000_000


# ---------------------------------------------------------------------------- writing


def test_write_report__makes_the_folder_and_replaces_an_old_report(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "report.html"
    for title in ("first", "second"):
        assert write_report(str(path), **arguments(title=title)) == path
    assert Page(path).inside("h1") == ["second"]
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_write_report__keeps_the_old_report_if_the_new_one_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(tmp_path / "report.html", **arguments(title="old"))

    def full(_: Path, content: bytes) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, **arguments(title="new"))
    with pytest.raises(TypeError, match="from a builder"):
        write_report(path, **arguments(figures=[Figure("no plot", "t", "c")]))
    monkeypatch.undo()
    assert Page(path).inside("h1") == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_write_report__is_readable_for_whom_other_files_are(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", **arguments())
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("jinja2", "write_report('r.html', title='', introduction='', claims=[], figures=[], provenance={})"),
        ("bokeh", "write_report('r.html', title='', introduction='', claims=[], figures=[], provenance={})"),
        ("holoviews", "save_figures([], 'figures')"),
        ("matplotlib", "save_figures([], 'figures')"),
    ],
)
def test_without_a_plotting_package__the_message_names_the_extra(
    tmp_path: Path, package: str, call: str
) -> None:
    script = f"import sys; sys.modules[{package!r}] = None\nfrom hild_xr.report import *\n{call}"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == f'ImportError: hild_xr.report needs {package}: pip install "hild-xr[plot]"'
    assert list(tmp_path.iterdir()) == []


def test_importing_the_report__loads_no_plotting_library() -> None:
    script = (
        "import sys, hild_xr.report\n"
        "print({'holoviews', 'bokeh', 'matplotlib', 'jinja2', 'xarray', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "set()", result.stderr


# ---------------------------------------------------------------------------- figures as files


def test_figure__has_words_and_a_name_for_files() -> None:
    figure = Figure(None, "Overlap of x^c with E_k(H), λ = 10", "Class 0.")
    assert figure.alt == "Overlap of x^c with E_k(H), λ = 10. Class 0."
    assert figure.name == "overlap-of-x-c-with-e-k-h-10"
    assert Figure(None, "λ", "").name == "figure"
    assert len(Figure(None, "word " * 50, "").name) <= 60
    with pytest.raises(ValueError, match="a title"):
        Figure(None, " ", "caption")


def test_save_figures__writes_each_format_of_each_figure(tmp_path: Path, figures: list[Figure]) -> None:
    paths = save_figures(figures, tmp_path / "figures")
    names = ["01-alignment-with-e-k-h", "02-overlap", "03-overlap"]
    assert [path.name for path in paths] == [
        f"{name}.{form}" for name in names for form in ("png", "pdf", "svg")
    ]
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for path in paths:
        assert path.read_bytes().startswith(starts[path.suffix])
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())


def test_save_figures__keeps_text_as_text(tmp_path: Path, figures: list[Figure]) -> None:
    svg, pdf = save_figures(figures[:1], tmp_path, formats=["svg", "pdf"])
    drawing = svg.read_text(encoding="utf-8")
    for words in ("training step", "alignment", "E_k(H)", "random subspace"):
        assert re.search(rf"<text[^>]*>{re.escape(words)}</text>", drawing), words
    document = pdf.read_bytes()
    assert b"/CIDFontType2" in document, "TrueType"
    assert b"/Type3" not in document


def test_save_figures__is_reproducible(tmp_path: Path, figures: list[Figure]) -> None:
    once = save_figures(figures, tmp_path / "once")
    again = save_figures(figures, tmp_path / "again")
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_save_figures__names_the_formats_there_are(tmp_path: Path, figures: list[Figure]) -> None:
    with pytest.raises(ValueError, match=r"formats out of .*pdf.*, came 'docx'"):
        save_figures(figures[:1], tmp_path, formats=["docx"])
    assert list(tmp_path.iterdir()) == []


def test_both_faces__can_be_drawn_from_the_same_plots(tmp_path: Path, figures: list[Figure]) -> None:
    before = hv.Store.current_backend
    write_report(tmp_path / "report.html", **arguments(figures=figures))
    first = save_figures(figures, tmp_path / "first", formats=["svg"])
    write_report(tmp_path / "report.html", **arguments(figures=figures))
    second = save_figures(figures, tmp_path / "second", formats=["svg"])
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert hv.Store.current_backend == before
