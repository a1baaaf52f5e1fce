"""Probe of Gauss-Newton spectra: leading eigenpairs, block by block."""

from __future__ import annotations

from hild_xr.recorders.probes.spectrum import Spectrum


class GaussNewton(Spectrum):
    r"""Record the leading eigenpairs of the generalized Gauss-Newton matrix, block by block.

    :math:`\frac1M\sum_m J_m^T \frac{\partial^2\ell_m}{\partial f^2} J_m + \beta I`,
    with :math:`J_m` the derivative of the outputs :math:`f(x_m)` by the parameters (Schraudolph 2002,
    "Fast curvature matrix-vector products for second-order gradient descent"): the Hessian
    without the curvature of the network itself, positive semi-definite if the loss is convex in the outputs.

    Parameters
    ----------
    k, blocks, layers, which, tol, max_matvec, max_seconds, dense_up_to, matrix_up_to
    cold_every, sketch, schedule, group
        As for :class:`~hild_xr.recorders.Hessian`; groups are ``/ggn``, ``/ggn_rows`` and so on.
    include_regularizer
        Whether the l2 term adds :math:`\beta I`, by default it does.

    Raises
    ------
    ValueError, TypeError
        As for :class:`~hild_xr.recorders.Hessian`; a ValueError at the first record too, if the
        model does not return one tensor.

    Examples
    --------
    >>> GaussNewton(k=10).group, GaussNewton(k=2, blocks="rows").group
    ('ggn', 'ggn_rows')
    """

    matrix = "ggn"
