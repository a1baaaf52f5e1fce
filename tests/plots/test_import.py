from __future__ import annotations

import subprocess
import sys


def run_python(statements: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", statements], capture_output=True, text=True, check=False)


def test_importing_the_builders__loads_no_backend() -> None:
    result = run_python(
        "import sys, holoviews as hv, hild_xr.plots\n"
        "print(sorted({'bokeh', 'matplotlib', 'panel', 'plotly', 'hvplot', 'torch'} & set(sys.modules)))\n"
        "print(hv.Store.renderers)"
    )
    assert result.stdout.split() == ["[]", "{}"], result.stderr


def test_importing_one_style__loads_one_backend() -> None:
    result = run_python("import holoviews as hv, hild_xr.plots.style_matplotlib\nprint(*hv.Store.renderers)")
    assert result.stdout.split() == ["matplotlib"], result.stderr


def test_without_holoviews__the_message_names_the_extra() -> None:
    result = run_python("import sys\nsys.modules['holoviews'] = None\nimport hild_xr.plots")
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == 'ImportError: hild_xr.plots needs holoviews: pip install "hild-xr[plot]"'
