"""The schedule matrix against the reference's scheduler, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pusa_fast.sampling.schedule import Schedule, lift, sigma_grid

MULTIPLIERS = [k * 5 / 100 for k in range(21)]


class ReferenceScheduler:
    """FlowMatchSchedulerPusaV2V written out as spec 2.1 to 2.3 has it, one frame at a time, `dtype`
    throughout."""

    def __init__(self, steps: int, shift: float, dtype: torch.dtype = torch.float32) -> None:
        sigma_min, sigma_max, denoising_strength = 0.0, 1.0, 1.0
        start = sigma_min + (sigma_max - sigma_min) * denoising_strength
        s = torch.linspace(start, sigma_min, steps + 1, dtype=dtype)[:-1]
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = self.sigmas * 1000

    def levels(self, timestep: Tensor, multiplier: float) -> tuple[Tensor, Tensor, Tensor]:
        """(sigma before, sigma after, timestep fed to the network) of one frame at the generation
        timestep `timestep`."""
        index = int(torch.argmin((self.timesteps - timestep).abs()))
        sigma = self.sigmas[index]
        after = self.sigmas[index + 1] if index + 1 < len(self.timesteps) else torch.zeros_like(sigma)
        network = torch.trunc(timestep * multiplier)
        if network == 0:
            return torch.zeros_like(sigma), torch.zeros_like(sigma), network
        return sigma * multiplier, after * multiplier, network


@pytest.mark.parametrize("steps", range(1, 51))
def test_reference_sigmas_and_truncated_timesteps(steps: int) -> None:
    reference = ReferenceScheduler(steps, 5.0)
    schedule = lift(sigma_grid(steps, 5.0), MULTIPLIERS)
    assert torch.equal(schedule.global_sigmas, torch.cat([reference.sigmas, torch.zeros(1)]))
    deltas = schedule.deltas()
    for step, timestep in enumerate(reference.timesteps):
        for frame, multiplier in enumerate(MULTIPLIERS):
            before, after, network = reference.levels(timestep, multiplier)
            assert schedule.timesteps[step, frame] == network, (step, multiplier)
            assert deltas[step, frame] == after - before, (step, multiplier)


@pytest.mark.parametrize("steps", [1, 4, 10, 30])
@pytest.mark.parametrize("shift", [1, 3, 5, 8])
def test_recorded_sigmas_and_timesteps(golden: Callable[[str], dict[str, Tensor]], steps: int, shift: int) -> None:
    recorded = golden("schedule")
    sigmas = sigma_grid(steps, shift)
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 0
    assert torch.equal(sigmas[:-1], recorded[f"infer.steps{steps}.shift{shift}.sigmas"])
    assert torch.equal(
        lift(sigmas, [1.0], "exact").timesteps[:, 0], recorded[f"infer.steps{steps}.shift{shift}.timesteps"]
    )


def test_float64_would_see_other_timesteps() -> None:
    """Without these differences the tests above could not tell in which precision the schedule was
    computed."""
    different, product = set(), set()
    for steps in range(1, 51):
        single, double = (ReferenceScheduler(steps, 5.0, dtype).timesteps for dtype in (torch.float32, torch.float64))
        ours = lift(sigma_grid(steps, 5.0), MULTIPLIERS).timesteps
        for step in range(steps):
            for frame, multiplier in enumerate(MULTIPLIERS):
                level = int(ours[step, frame])
                different.add((level, math.trunc(double[step].item() * multiplier)))
                product.add((level, math.trunc(single[step].item() * multiplier)))
    assert {(500, 499), (499, 500)} & different, "float64 throughout"
    assert (500, 499) in product, "float64 for the last product alone"


def test_condition_frames() -> None:
    schedule = lift(sigma_grid(10, 5.0), [0.0, 0.1, 1.0])
    assert schedule.sigmas[:, 0].count_nonzero() == 0 and schedule.timesteps[:, 0].count_nonzero() == 0
    assert schedule.timesteps[6].tolist() == [0, 76, 769]
    assert torch.equal(schedule.sigmas[:, 2], schedule.global_sigmas)
    assert schedule.sigmas[-1].count_nonzero() == 0
    assert (schedule.deltas()[:, 1:] < 0).all()


def test_condition_frame_freezes_where_its_timestep_truncates_to_zero() -> None:
    schedule = lift(sigma_grid(30, 5.0), [0.003, 1.0])
    frozen = schedule.timesteps[:, 0] == 0
    assert 0 < frozen.sum() < 30
    assert (schedule.deltas()[:, 0] == 0).tolist() == frozen.tolist()


def test_generated_frame_never_freezes() -> None:
    schedule = lift(sigma_grid(20, 0.0001), [1.0])
    assert (schedule.timesteps == 0).any() and (schedule.deltas() < 0).all() and schedule.sigmas[-1] == 0


def test_exact_keeps_the_true_levels() -> None:
    schedule = lift(sigma_grid(30, 5.0), [0.0, 0.001, 0.35, 1.0], "exact")
    assert torch.equal(schedule.timesteps, 1000 * schedule.sigmas[:-1])
    assert schedule.timesteps[5, 2] != schedule.timesteps[5, 2].trunc()
    assert schedule.sigmas[-1].count_nonzero() == 0


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4", None])
def test_steps_are_checked(steps: object) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number"):
        sigma_grid(steps, 5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [0, -3.0, math.nan, math.inf, "5", True])
def test_shift_is_checked(shift: object) -> None:
    with pytest.raises(ValueError, match="shift must be a positive number"):
        sigma_grid(4, shift)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [-0.01, 1.01, math.nan, math.inf, "0.2", None, True])
def test_multipliers_are_checked(noise: object) -> None:
    with pytest.raises(ValueError, match="noise must be a number from 0"):
        lift(sigma_grid(4, 5.0), [0.0, noise])  # type: ignore[list-item]


def test_numpy_numbers_are_numbers() -> None:
    assert torch.equal(sigma_grid(np.int64(4), np.float64(5)), sigma_grid(4, 5.0))  # type: ignore[arg-type]
    assert lift(sigma_grid(4, 5.0), [np.float32(0.5)]).sigmas[0, 0] == 0.5  # type: ignore[list-item]


def test_compat_is_checked() -> None:
    with pytest.raises(ValueError, match="unknown compat 'ref': choose one of reference, exact"):
        lift(sigma_grid(4, 5.0), [1.0], "ref")


def test_shapes_of_a_schedule_made_by_hand_are_checked() -> None:
    diagonal = Schedule(torch.ones(3), torch.rand(3, 5), torch.rand(2, 5))  # a rolling window: its last row is not 0
    assert (diagonal.steps, diagonal.latent_frames) == (2, 5)
    with pytest.raises(ValueError, match=r"a schedule needs .* got \[3\], \[3, 5\], \[3, 5\]"):
        Schedule(torch.ones(3), torch.rand(3, 5), torch.rand(3, 5))
