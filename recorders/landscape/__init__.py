"""The loss around and between models: connectivity, sharpness, backward error.

Functions of models, in training or rebuilt from stored weights by
:func:`~hild_xr.recorders.load_weights`; :func:`~hild_xr.recorders.over_records` takes one over all
records of a run. Results are labelled. None of them changes the model.
"""

from hild_xr.recorders.landscape.backward_error import discretization_error, modified_loss
from hild_xr.recorders.landscape.connectivity import fit_bend, linear_connectivity, mode_connectivity
from hild_xr.recorders.landscape.sharpest_point import sharpness

__all__ = [
    "discretization_error",
    "fit_bend",
    "linear_connectivity",
    "mode_connectivity",
    "modified_loss",
    "sharpness",
]
