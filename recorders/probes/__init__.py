"""Probes: what is recorded. One quantity a module, one group of the store a probe."""

from hild_xr.recorders.probes.base import Probe, Snapshot
from hild_xr.recorders.probes.density import Density
from hild_xr.recorders.probes.estimates import Diagonal, FrobeniusNorm, Trace
from hild_xr.recorders.probes.features import Features
from hild_xr.recorders.probes.fisher import Fisher
from hild_xr.recorders.probes.gauss_newton import GaussNewton
from hild_xr.recorders.probes.gradients import Gradient
from hild_xr.recorders.probes.input_jacobian import AGOP
from hild_xr.recorders.probes.kernels import ConjugateKernel, TangentKernel
from hild_xr.recorders.probes.metrics import Metrics
from hild_xr.recorders.probes.outputs import Outputs
from hild_xr.recorders.probes.spectrum import GMatrix, Hessian
from hild_xr.recorders.probes.weights import OutOfRangeWarning, Weights

__all__ = [
    "AGOP",
    "ConjugateKernel",
    "Density",
    "Diagonal",
    "Features",
    "Fisher",
    "FrobeniusNorm",
    "GMatrix",
    "GaussNewton",
    "Gradient",
    "Hessian",
    "Metrics",
    "OutOfRangeWarning",
    "Outputs",
    "Probe",
    "Snapshot",
    "TangentKernel",
    "Trace",
    "Weights",
]
