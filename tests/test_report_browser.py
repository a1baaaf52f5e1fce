"""The report in a real browser: everything is drawn, nothing is fetched, nothing complains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import BrowserContext, Page, sync_playwright

from hild_xr import plots
from hild_xr.claims import COLUMNS, Claim, at_least, equals
from hild_xr.report import Figure, write_report
from hild_xr.variables import attrs

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Bokeh draws into canvases inside shadow roots. A panel is a frame's first layer once it is painted with
# many colours; canvases of legends and empty overlays are others.
PAINTED_PANELS = """() => [...document.querySelectorAll('.plot')].map(plot => {
    const canvases = [];
    const walk = root => root.querySelectorAll('*').forEach(element => {
        if (element.tagName === 'CANVAS') canvases.push(element);
        if (element.shadowRoot) walk(element.shadowRoot);
    });
    walk(plot);
    const colours = canvas => {
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const found = new Set();
        for (let at = 0; at < pixels.length; at += 4)
            found.add(pixels[at] << 16 | pixels[at + 1] << 8 | pixels[at + 2]);
        return found.size;
    };
    return canvases.filter(canvas => canvas.width > 100 && colours(canvas) > 50).length;
})"""

PICTURE = "canvas => canvas.toDataURL()"

CLAIMS = [
    Claim("weights lie in E_k(H) <b>for every class</b>", 0.966, at_least(0.95)),
    Claim("the block has k outliers", 3, equals(4)),
    Claim("not measured", math.nan, at_least(0)),
]
HOSTILE = "</script><script>window.broken = true</script>"


def every_kind_of_figure() -> tuple[list[Figure], list[int]]:
    """Return a figure of each builder, and how many panels each has."""
    steps = np.array([0, 1, 2, 5, 10, 20, 50, *range(100, 1001, 100)])
    growth = 1 - np.exp(-steps / 100)
    seeds = 1 + 0.05 * np.arange(3)[:, None]
    coords = {"seed": [0, 1, 2], "step": steps}

    def over_seeds(values: Any, name: str) -> xr.DataArray:
        return xr.DataArray(values, dims=("seed", "step"), coords=coords, attrs=attrs(name), name=name)

    levels = np.concatenate(
        [0.02 + 0.03 * growth[:, None] * [2.0, 1.0], 0.01 * np.ones((len(steps), 4))], axis=1
    )
    eigenvalues = xr.DataArray(
        levels * seeds[..., None], dims=("seed", "step", "eig"), coords=coords, attrs=attrs("eigenvalues")
    )
    rho = over_seeds(0.9 * growth * seeds / 1.1, "alignment")
    counts = over_seeds(np.where(steps > 5, 2, 0) * np.ones((3, 1), dtype=int), "outlier_count")
    overlap = (eigenvalues / eigenvalues.max()).isel(seed=0)
    angles = xr.DataArray(
        np.abs(growth[:, None] - growth), dims=("step", "step_"), coords={"step": steps, "step_": steps}
    ).assign_attrs(attrs("principal_angles"))
    metrics = xr.Dataset(
        {
            "train_loss": over_seeds(2 - growth * seeds, "train_loss"),
            "accuracy": over_seeds(0.9 * growth * seeds, "accuracy"),
        }
    )
    drawn: dict[str, tuple[Any, int]] = {
        "Spectrum": (plots.spectrum(eigenvalues, counts, label="class 0"), 1),
        "Spectrum on logarithmic axes": (plots.spectrum(eigenvalues, 2, log_x=True, log_y=True), 1),
        "Alignment": (plots.alignment_curves({"E_k(H)": rho, HOSTILE: 0.5 * rho}, baseline=0.1), 1),
        "Angles": (plots.angle_map(angles), 1),
        "Overlap": (plots.overlap_map(overlap), 1),
        "Overlaps": (plots.side_by_side({f"class {c}": plots.overlap_map(overlap) for c in range(3)}), 3),
        "Outliers": (plots.outlier_counts({"optimal": counts, "sub-optimal": counts - 1}, 2), 2),
        HOSTILE: (plots.metric_curves(metrics, log_x=True, log_y=True), 2),
    }
    caption = "Lines are medians, bands reach from the smallest to the largest value over seeds."
    return [Figure(plot, title, caption) for title, (plot, _) in drawn.items()], [
        n for _, n in drawn.values()
    ]


@dataclass
class Visit:
    """A page in the browser and what it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def wait_for_panels(self, expected: list[int]) -> None:
        self.page.wait_for_function(
            f"want => ({PAINTED_PANELS})().join() === want", arg=",".join(map(str, expected))
        )


Open = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    figures, panels = every_kind_of_figure()
    path = write_report(
        tmp_path_factory.mktemp("report") / "kgmm.html",
        title="k-GMM: SGD aligns with emerging outlier eigenspaces",
        introduction="Online SGD on a Gaussian mixture.\n\nThe claims are those of arXiv:2310.03010.",
        claims=CLAIMS,
        figures=figures,
        provenance={
            "store": "runs/kgmm.zarr",
            "config": {"dimension": 200},
            "command_line": ["hild-xr", "demo"],
        },
    )
    return path, panels


@pytest.fixture(scope="module")
def open_page(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Return a function that opens a file in a fresh profile."""
    with sync_playwright() as playwright:

        @contextmanager
        def opened(path: Path, **options: Any) -> Iterator[Visit]:
            context: BrowserContext = playwright.chromium.launch_persistent_context(
                str(tmp_path_factory.mktemp("profile")),
                executable_path=chromium_path,
                headless=True,
                args=list(ARGUMENTS),
                **options,
            )
            try:
                visit = Visit(context.new_page())
                visit.page.set_default_timeout(60_000)
                context.on("request", lambda request: visit.requests.append(request.url))
                visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
                visit.page.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
                visit.page.on(
                    "console",
                    lambda message: (
                        visit.complaints.append(message.text)
                        if message.type in ("error", "warning")
                        else None
                    ),
                )
                visit.page.goto(path.as_uri())
                yield visit
            finally:
                context.close()

        yield opened


def test_report__draws_every_panel_and_fetches_nothing(
    report: tuple[Path, list[int]], open_page: Open, tmp_path: Path
) -> None:
    path, panels = report
    with open_page(path, viewport={"width": 1100, "height": 900}) as visit:
        visit.wait_for_panels(panels)
        assert visit.page.locator("figure").count() == len(panels)
        # a picture to look at, where CI or a person keeps temporary folders
        visit.page.screenshot(path=tmp_path / "report.png", full_page=True)
        assert visit.requests == [path.as_uri()]
        assert visit.complaints == []
        assert visit.page.evaluate("window.broken") is None


def test_report__claims_table_says_what_the_claims_say(
    report: tuple[Path, list[int]], open_page: Open
) -> None:
    with open_page(report[0]) as visit:
        table = visit.page.get_by_role("table").first
        rows = [row.locator("th, td").all_inner_texts() for row in table.get_by_role("row").all()]
        assert rows == [list(COLUMNS), *(list(claim.as_row()) for claim in CLAIMS)]
        assert table.locator("caption").inner_text() == "1 of 3 claims hold."
        colours = [
            cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
            for cell in visit.page.locator(".verdict").all()
        ]
        assert colours[0] != colours[1] == colours[2]


def test_report__tools_work_under_the_content_security_policy(
    report: tuple[Path, list[int]], open_page: Open
) -> None:
    path, panels = report
    with open_page(path, viewport={"width": 1100, "height": 900}) as visit:
        visit.wait_for_panels(panels)
        plot = visit.page.locator(".plot").nth(0)
        plot.scroll_into_view_if_needed()
        canvas = plot.locator(".bk-Canvas canvas").first
        box = canvas.bounding_box()
        assert box is not None
        tooltip = visit.page.locator(".bk-tooltip-content").first  # stands beside the plots, not in them
        for down in np.linspace(0.1, 0.9, 80):  # λ₁ passes somewhere on the way
            visit.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + down * box["height"])
            visit.page.wait_for_timeout(25)
            if tooltip.is_visible():
                break
        shown = tooltip.inner_text(timeout=1000)
        assert "λ₁" in shown
        assert "training step" in shown

        both = visit.page.locator(".plot").nth(6).locator(".bk-Canvas")
        canvases = [both.nth(panel).locator("canvas").first.element_handle() for panel in (0, 1)]
        before = [canvas.evaluate(PICTURE) for canvas in canvases]
        # muting a line mutes it in the panel beside too: a callback, which the policy has to let run
        visit.page.locator(".plot").nth(6).locator(".bk-Legend .bk-item").nth(1).click()
        visit.page.wait_for_function(
            f"([canvases, before]) => canvases.every((canvas, at) => ({PICTURE})(canvas) !== before[at])",
            arg=[canvases, before],
        )
        assert visit.requests == [path.as_uri()]
        assert visit.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report__text_stands_out_in_light_and_dark(
    report: tuple[Path, list[int]], open_page: Open, scheme: str
) -> None:
    read = """selector => {
        const rgb = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = colour => rgb(colour).map(c => c / 255)
            .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(selector);
        let behind = element;
        const fill = e => getComputedStyle(e).backgroundColor;
        while (behind.parentElement && fill(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        const both = [light(getComputedStyle(element).color), light(fill(behind))];
        const [dark, bright] = both.sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    }"""
    with open_page(report[0], color_scheme=scheme) as visit:
        for selector in ("h1", "p", "caption", "figcaption", "nav a", ".verdict.yes", ".verdict.no", "code"):
            assert visit.page.evaluate(read, selector) >= 4.5, f"{selector}: contrast of WCAG AA"
        frame = visit.page.locator(".plot").first.evaluate("plot => getComputedStyle(plot).backgroundColor")
        assert frame == "rgb(255, 255, 255)"


def test_report__does_not_widen_a_narrow_page(report: tuple[Path, list[int]], open_page: Open) -> None:
    path, panels = report
    with open_page(path, viewport={"width": 390, "height": 800}) as visit:
        visit.wait_for_panels(panels)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
