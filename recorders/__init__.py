"""Recorders turn a torch training run into labelled records.

They write what they measure through :mod:`hild_xr.store` and never import
:mod:`hild_xr.analysis`. The curvature kernels in
:mod:`hild_xr.recorders.curvature` are plain torch and know no store.
"""

if __name__ != "hild_xr.recorders":
    raise ImportError("import hild_xr.recorders, not recorders: this folder is a part of the hild_xr package")

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError('hild_xr.recorders needs torch: pip install "hild-xr[torch]"') from error

from hild_xr.recorders import curvature, landscape, problems
from hild_xr.recorders.curvature import NonFiniteCurvatureError
from hild_xr.recorders.ensemble import EnsembleRecorder
from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes import (
    AGOP,
    ConjugateKernel,
    Density,
    Diagonal,
    Features,
    Fisher,
    FrobeniusNorm,
    GaussNewton,
    GMatrix,
    Gradient,
    Hessian,
    Metrics,
    OutOfRangeWarning,
    Outputs,
    Probe,
    Snapshot,
    TangentKernel,
    Trace,
    Weights,
)
from hild_xr.recorders.projected_gradient import project_gradient
from hild_xr.recorders.rebuilt import load_weights, over_records
from hild_xr.recorders.recorder import Estimate, NonFiniteRecordWarning, Recorder
from hild_xr.recorders.schedule import Schedule, at, every, log_spaced, log_then_linear
from hild_xr.sketch import JohnsonLindenstrauss

__all__ = [
    "AGOP",
    "ConjugateKernel",
    "Density",
    "Diagonal",
    "EnsembleRecorder",
    "Estimate",
    "Features",
    "Fisher",
    "FrobeniusNorm",
    "GMatrix",
    "GaussNewton",
    "Gradient",
    "Hessian",
    "JohnsonLindenstrauss",
    "Metrics",
    "NonFiniteCurvatureError",
    "NonFiniteRecordWarning",
    "Objective",
    "OutOfRangeWarning",
    "Outputs",
    "Probe",
    "Recorder",
    "Schedule",
    "Snapshot",
    "TangentKernel",
    "Trace",
    "Weights",
    "at",
    "curvature",
    "every",
    "landscape",
    "load_weights",
    "log_spaced",
    "log_then_linear",
    "over_records",
    "problems",
    "project_gradient",
]
