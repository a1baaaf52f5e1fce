"""Named streams of random numbers: one torch generator for each purpose, seed and block.

A stream is named by integers, not by how much was drawn before it. So a run
continued at step s draws the block that holds s and gets what an uninterrupted
run got, and a test set does not depend on how long training was.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from hild_xr.recorders.problems.checks import check_integer


class Purpose(IntEnum):
    """What the random numbers of a stream are for; different purposes never share numbers."""

    START = 0
    TRAIN = 1
    TEST = 2
    SPLIT = 3


def stream(purpose: Purpose, *key: int) -> torch.Generator:
    """Return a fresh CPU generator for the stream named by ``purpose`` and ``key``.

    torch's CPU generator uses 32 bits of its seed, so two of n streams coincide
    with probability about n^2 / 2^33: one in 90 for 10,000 streams.

    Parameters
    ----------
    purpose
        What the numbers are for.
    key
        Non-negative integers, for example the run's seed and the block's number.

    Returns
    -------
    torch.Generator
        A generator that gives the same numbers for the same name, always.

    Raises
    ------
    TypeError, ValueError
        If a part of the key is no integer or is negative.

    Examples
    --------
    >>> first = torch.rand(3, generator=stream(Purpose.TRAIN, 0, 7))
    >>> again = torch.rand(3, generator=stream(Purpose.TRAIN, 0, 7))
    >>> torch.equal(first, again)
    True
    """
    for part in key:
        check_integer("seed", part, minimum=0)
    seed = np.random.SeedSequence([int(purpose), *key]).generate_state(1)
    return torch.Generator().manual_seed(int(seed[0]))
