from __future__ import annotations

import pytest
import torch

from hild_xr.recorders.problems.streams import Purpose, stream


def _numbers(purpose: Purpose, *key: int) -> torch.Tensor:
    return torch.rand(4, generator=stream(purpose, *key))


def test_stream__gives_the_same_numbers_for_the_same_name() -> None:
    assert torch.equal(_numbers(Purpose.TRAIN, 3, 7), _numbers(Purpose.TRAIN, 3, 7))


def test_stream__differs_in_purpose_seed_and_block() -> None:
    names = [(Purpose.TRAIN, 3, 7), (Purpose.TEST, 3, 7), (Purpose.TRAIN, 4, 7), (Purpose.TRAIN, 3, 8)]
    rows = {tuple(_numbers(*name).tolist()) for name in names}
    assert len(rows) == len(names)


def test_stream__leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _numbers(Purpose.START, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_stream__refuses_a_seed_that_names_nothing(seed: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed must be an integer of at least 0"):
        stream(Purpose.START, seed)
