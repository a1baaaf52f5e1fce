"""The report of a reproduction: one HTML file that works offline, and the same figures as files.

Plots come from the builders of :mod:`hild_xr.plots`, without options; the page
draws them with bokeh, the files with matplotlib. Importing this module needs
neither: they are loaded when something is written.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from hild_xr.claims import COLUMNS, Claim

FORMATS = ("png", "pdf", "svg")
"""Formats of :func:`save_figures`: for slides, papers and further editing."""

DOTS_PER_INCH = 200

_TEMPLATE = "templates/report.html.j2"


@dataclass(frozen=True)
class Figure:
    """A plot with its words.

    Parameters
    ----------
    plot
        What a builder of :mod:`hild_xr.plots` returned.
    title
        What the figure shows; gives the name of its files too.
    caption
        How to read it: axes, lines, bands, parameters.
    alt
        What it shows, for readers who do not see it; by default the title and
        the caption.

    Raises
    ------
    ValueError
        If the title is empty.

    Examples
    --------
    >>> Figure(None, "Outliers leave the bulk (H)", "Eigenvalues of one block.").name
    'outliers-leave-the-bulk-h'
    """

    plot: Any
    title: str
    caption: str
    alt: str = ""

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError("expected a figure with a title, came an empty one")
        if not self.alt:
            object.__setattr__(self, "alt", f"{self.title}. {self.caption}".strip())

    @property
    def name(self) -> str:
        """The title as the name of a file: lower-case ASCII letters, digits and hyphens."""
        plain = unicodedata.normalize("NFKD", self.title).encode("ascii", "ignore").decode().lower()
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "figure"


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    introduction: str,
    claims: Sequence[Claim],
    figures: Sequence[Figure],
    provenance: Mapping[str, object],
) -> Path:
    """Write the report as one HTML file that needs no network.

    Scripts, styles and data are in the file; its content security policy
    forbids the browser to load anything else. The file is complete or not
    there: it takes its name when it has been written.

    Parameters
    ----------
    path
        Of the file; its folder is created, an old report is replaced.
    title
        Heading of the page.
    introduction
        Plain text, paragraphs separated by empty lines.
    claims
        Rows of the table of claims; none leaves the table out.
    figures
        Figures in order.
    provenance
        What made the numbers: configuration, versions, store, command line.
        Mappings are nested tables, other values their text; a list of words
        called ``command_line`` is put together.

    Returns
    -------
    pathlib.Path
        The path.

    Raises
    ------
    ImportError
        If a plotting package is missing.
    TypeError
        If a figure's plot is none of a builder's.

    Examples
    --------
    >>> from hild_xr.claims import at_least
    >>> import holoviews as hv
    >>> path = write_report(
    ...     "report.html",
    ...     title="k-GMM",
    ...     introduction="Weights align with the outlier eigenspace.",
    ...     claims=[Claim("the weights are aligned", 0.97, at_least(0.95))],
    ...     figures=[Figure(hv.Curve([1, 2]), "Alignment", "Against the step.")],
    ...     provenance={"store": "runs/kgmm.zarr"},
    ... )
    >>> "1 of 1 claims hold" in path.read_text(encoding="utf-8")
    True
    """
    _require("holoviews", "bokeh", "jinja2")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    scripts, plots = _as_html([figure.plot for figure in figures])
    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("hild_xr").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = strict.from_string(template).render(
        title=title,
        introduction=[text for part in re.split(r"\n\s*\n", introduction) if (text := part.strip())],
        columns=COLUMNS,
        claims=[claim.as_row() for claim in claims],
        holding=sum(claim.holds for claim in claims),
        scripts=Markup(scripts),
        figures=[
            {"title": figure.title, "caption": figure.caption, "alt": figure.alt, "plot": Markup(plot)}
            for figure, plot in zip(figures, plots, strict=True)
        ],
        provenance=_readable(provenance),
        version=version("hild-xr"),
    )
    return _write_at_once(Path(path), page.encode("utf-8"))


def save_figures(
    figures: Sequence[Figure], folder: str | os.PathLike[str], formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write the figures for papers and slides, in the look of matplotlib.

    Text stays text: TrueType fonts in PDF, text elements in SVG. The same
    figure gives the same bytes.

    Parameters
    ----------
    figures
        Figures in order; files are named by number and title.
    folder
        Is created; files of the same names are replaced.
    formats
        Names of formats that matplotlib writes.

    Returns
    -------
    list of pathlib.Path
        The files, figure by figure.

    Raises
    ------
    ImportError
        If a plotting package is missing.
    ValueError
        If matplotlib does not write a format.

    Examples
    --------
    >>> import holoviews as hv
    >>> figure = Figure(hv.Curve([1, 2]), "Alignment", "Against the step.")
    >>> [path.name for path in save_figures([figure], "figures", formats=["svg"])]
    ['01-alignment.svg']
    """
    _require("holoviews", "bokeh", "matplotlib")
    written = []
    for number, figure in enumerate(figures, start=1):
        for form, content in _as_files(figure, formats).items():
            written.append(_write_at_once(Path(folder) / f"{number:02d}-{figure.name}.{form}", content))
    return written


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(
                f'hild_xr.report needs {package}: pip install "hild-xr[plot]"', name=package
            ) from error


def _as_html(plots: Sequence[Any]) -> tuple[str, list[str]]:
    """Return the scripts for the head of the page and one placeholder for each plot."""
    if not plots:
        return "", []
    from bokeh.embed import components
    from bokeh.models import Toolbar
    from bokeh.resources import Resources

    from hild_xr.plots import style_bokeh

    models = [style_bokeh.render(plot) for plot in plots]
    for model in models:
        for toolbar in model.select({"type": Toolbar}):
            toolbar.update(logo=None)
    script, placeholders = components(models)
    # The core alone: widgets, tables, MathJax and WebGL would be three times as much. And its text alone:
    # render_js() would add the files that panel, which HoloViews may have loaded, fetches from a server.
    library = Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw
    return "\n".join([*(f"<script>\n{text}\n</script>" for text in library), script]), list(placeholders)


def _as_files(figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    import matplotlib as mpl

    from hild_xr.plots import style_matplotlib

    contents = {}
    drawn = style_matplotlib.render(figure.plot)
    with mpl.rc_context(style_matplotlib.RC):
        supported = drawn.canvas.get_supported_filetypes()
        for form in formats:
            if form not in supported:
                raise ValueError(f"expected formats out of {', '.join(sorted(supported))}, came {form!r}")
            buffer = BytesIO()
            undated = {"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else None
            drawn.savefig(buffer, format=form, dpi=DOTS_PER_INCH, bbox_inches="tight", metadata=undated)
            contents[form] = buffer.getvalue()
    return contents


def _readable(entry: Any) -> Any:
    """Return the entry with command lines, at any depth, as they were typed."""
    if not isinstance(entry, Mapping):
        return entry
    words = entry.get("command_line")
    typed = {} if isinstance(words, str) or not words else {"command_line": shlex.join(map(str, words))}
    return {name: _readable(inner) for name, inner in {**entry, **typed}.items()}


def _write_at_once(path: Path, content: bytes) -> Path:
    """Write under another name first, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
