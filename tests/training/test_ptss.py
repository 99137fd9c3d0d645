"""Noise levels of training clips: their statistics, their random numbers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast.training.fafm import training_grid
from pusa_fast.training.ptss import TimestepSampling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(sampling: TimestepSampling, count: int = 1000, frames: int = 5) -> Tensor:
    generator = seeded()
    return torch.stack([sampling.draw(frames, generator) for _ in range(count)])


def shared(levels: Tensor) -> Tensor:
    return (levels == levels[:, :1]).all(dim=1)


def test_by_default_each_frame_draws_from_the_reference_s_grid() -> None:
    levels = clips(TimestepSampling())
    assert levels.shape == (1000, 5) and levels.dtype == torch.float32
    grid = training_grid()[0]
    assert torch.isin(levels, grid).all() and len(levels.unique()) > 980  # 5000 draws miss about 7 of 1000
    assert torch.corrcoef(levels.T).fill_diagonal_(0).abs().max() < 0.12
    # docs/reference.md, 5.2
    assert abs(float(levels.median()) - 0.834) < 0.01 and abs(float((levels > 0.875).float().mean()) - 0.417) < 0.02


@pytest.mark.parametrize("levels", ["reference", "continuous"])
@pytest.mark.parametrize(("p_async", "low", "high"), [(0.0, 1.0, 1.0), (0.3, 0.65, 0.75), (1, 0.0, 0.01)])
def test_the_share_of_clips_with_one_level(p_async: float, low: float, high: float, levels: str) -> None:
    assert low <= float(shared(clips(TimestepSampling(p_async, levels=levels))).float().mean()) <= high


def test_a_shared_level_is_distributed_as_a_frame_s() -> None:
    levels = clips(TimestepSampling(0.0), count=3000)[:, 0]
    assert abs(float(levels.median()) - 0.834) < 0.012


def test_continuous_levels_follow_the_shift() -> None:
    """The median of a uniform draw, 1/2, becomes shift / (shift + 1); levels are on no grid."""
    levels = clips(TimestepSampling(levels="continuous", shift=3.0))
    assert abs(float(levels.median()) - 0.75) < 0.012 and levels.min() > 0 and levels.max() <= 1
    assert len(levels.unique()) > 4990
    assert torch.isin(clips(TimestepSampling(shift=3.0), 10), training_grid(3.0)[0]).all()


def test_a_clean_first_frame() -> None:
    for sampling in (TimestepSampling(first_frame_clean=True), TimestepSampling(0.0, True, "continuous")):
        levels = clips(sampling, 50)
        assert (levels[:, 0] == 0).all() and (levels[:, 1:] > 0).all()
    assert torch.equal(clips(TimestepSampling(0.0), 50)[:, 1:], clips(TimestepSampling(0.0, True), 50)[:, 1:])


def test_equal_seeds_give_equal_levels() -> None:
    sampling = TimestepSampling(0.5)
    assert torch.equal(sampling.draw(7, seeded(3)), sampling.draw(7, seeded(3)))
    assert not torch.equal(sampling.draw(7, seeded(3)), sampling.draw(7, seeded(4)))


@pytest.mark.parametrize("levels", ["reference", "continuous"])
def test_settings_do_not_change_what_is_drawn_next(levels: str) -> None:
    """Data that come later from the same generator stay the same when the recipe changes."""
    after = set()
    for p_async in (0.0, 0.5, 1.0):
        for clean in (False, True):
            generator = seeded()
            TimestepSampling(p_async, clean, levels).draw(5, generator)
            after.add(float(torch.rand((), generator=generator)))
    assert len(after) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_async": 1.5}, r"p_async must be a probability from 0 .* to 1 .*; got 1.5"),
        ({"p_async": float("nan")}, "got nan"),
        ({"p_async": "all"}, "got 'all'"),
        ({"p_async": True}, "got True"),
        ({"levels": "logit"}, "unknown levels 'logit': choose one of reference, continuous"),
        ({"shift": 0.0}, "shift must be a positive number .*; got 0.0"),
        ({"first_frame_clean": 1}, "first_frame_clean must be True or False; got 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepSampling(**settings)


def test_bad_clips_are_refused() -> None:
    for frames in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"frames must be a whole number of at least 1; got {frames}"):
            TimestepSampling().draw(frames, seeded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to learn in a clip of one latent frame: give longer clips"):
        TimestepSampling(first_frame_clean=True).draw(1, seeded())
    assert TimestepSampling().draw(1, seeded()).shape == (1,)
