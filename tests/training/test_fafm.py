"""The training objective against the reference's recorded one, and its weightings by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pusa_fast.training import fafm

Golden = Callable[[str], dict[str, Tensor]]
ULP = torch.finfo(torch.float32).eps


@pytest.fixture
def recorded(golden: Golden) -> dict[str, Tensor]:
    tensors = golden("schedule")
    return {key.removeprefix("train."): t for key, t in tensors.items() if key.startswith("train.")}


def test_the_grid_is_the_reference_s(recorded: dict[str, Tensor]) -> None:
    sigmas, timesteps, weights = fafm.training_grid()
    assert torch.equal(sigmas, recorded["sigmas"]) and torch.equal(timesteps, recorded["timesteps"])
    # A weight is the small difference of two exponentials times about 5: their last bits, which
    # torch leaves to the CPU, show.
    torch.testing.assert_close(weights, recorded["weights"], rtol=0, atol=5 * ULP)
    assert weights[0] == 0 and float(weights.mean()) == pytest.approx(1)


def test_grids_of_other_shifts_and_lengths() -> None:
    for shift, steps in ((3.0, 1000), (1.0, 50)):
        sigmas, timesteps, weights = fafm.training_grid(shift, steps)
        assert sigmas.shape == timesteps.shape == weights.shape == (steps,)
        assert sigmas[0] == 1 and sigmas[-1] > 0 and float(weights.mean()) == pytest.approx(1)
    for bad in ({"shift": 0.0}, {"steps": 1001}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fafm.training_grid(**bad)  # type: ignore[arg-type]


def test_weights_of_any_level(recorded: dict[str, Tensor]) -> None:
    """On the grid those of the grid, between its points between them, 0 at both ends."""
    sigmas, _, weights = fafm.training_grid()
    torch.testing.assert_close(fafm.level_weights(sigmas), weights, rtol=2 * ULP, atol=0)
    torch.testing.assert_close(fafm.level_weights(recorded["sigmas"]), recorded["weights"], rtol=0, atol=5 * ULP)
    ends = fafm.level_weights(torch.tensor([[0.0, 1.0]]))
    assert ends.dtype == torch.float32 and ends.tolist() == [[0.0, 0.0]]
    middle = fafm.level_weights((sigmas[300:301] + sigmas[301:302]) / 2)
    assert weights[300] < middle < weights[301]
    assert fafm.level_weights(torch.tensor([0.5], dtype=torch.bfloat16)).item() == pytest.approx(2.08, abs=0.01)
    torch.testing.assert_close(fafm.level_weights(fafm.training_grid(3.0)[0], 3.0), fafm.training_grid(3.0)[2])
    with pytest.raises(ValueError, match="shift must be a positive number"):
        fafm.level_weights(sigmas, -1.0)


def test_no_level_weighs_less_than_nothing() -> None:
    """Continuous levels reach below the grid's last one, and rounding may take them past 1."""
    assert (fafm.level_weights(torch.linspace(0, 1, 10_001)) >= 0).all()
    assert fafm.level_weights(torch.tensor([1 + 1e-5])) == 0


def test_weightings_by_hand() -> None:
    sigma = torch.tensor([[0.5, 1.0], [0.25, 0.25]])
    w = fafm.level_weights(sigma)
    rows = {name: weigh(sigma, 5.0) for name, weigh in fafm.WEIGHTINGS.items()}
    assert torch.equal(rows["per_frame"], w) and torch.equal(rows["uniform"], torch.ones(2, 2))
    torch.testing.assert_close(rows["reference"], torch.stack([w[0].mean().expand(2), w[1]]))
    assert not torch.equal(rows["per_frame"][0], rows["reference"][0])
    with pytest.raises(ValueError, match="unknown weighting 'mean': choose one of reference, per_frame, uniform"):
        fafm.loss(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), sigma[:1, :1], "mean")


def test_noising_is_the_reference_s(recorded: dict[str, Tensor], ops_backend: str) -> None:
    sigma = recorded["sigmas"][recorded["ids"]]
    x_t, timestep, target = fafm.noised(recorded["x0"], recorded["noise"], sigma)
    torch.testing.assert_close(x_t, recorded["noisy"], rtol=ULP, atol=ULP)
    assert torch.equal(target, recorded["target"])
    assert torch.equal(timestep, recorded["timesteps"][recorded["ids"]]) and timestep.dtype == torch.float32
    assert fafm.noised(recorded["x0"], recorded["noise"], sigma, torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_loss_is_the_reference_s(recorded: dict[str, Tensor], ops_backend: str) -> None:
    """Mean squared error over everything, times the mean weight of the frames; its derivative."""
    sigma = recorded["sigmas"][recorded["ids"]]
    velocity = (recorded["noise"] * 0.3).requires_grad_()
    expected = torch.nn.functional.mse_loss(velocity, recorded["target"]) * recorded["weight"].mean()
    loss, frame_errors = fafm.loss(velocity, recorded["target"], sigma)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, velocity)[0] for value in (loss, expected)))
    torch.testing.assert_close(frame_errors, (velocity - recorded["target"]).square().mean((1, 3, 4)).detach())


def test_a_clip_s_weight_is_its_own() -> None:
    """The reference trains one clip at a time: in a batch, the loss is the mean of theirs."""
    velocity, target = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    sigma = torch.tensor([[0.5, 0.9], [0.1, 0.95]])
    for weighting in fafm.WEIGHTINGS:
        together, _ = fafm.loss(velocity, target, sigma, weighting)
        apart = [fafm.loss(velocity[i : i + 1], target[i : i + 1], sigma[i : i + 1], weighting)[0] for i in range(2)]
        torch.testing.assert_close(together, torch.stack(apart).mean())


def test_the_target_is_the_slope_of_the_noising() -> None:
    clean, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.rand(2, 4) / 2
    before, _, target = fafm.noised(clean, noise, sigma)
    slope = (fafm.noised(clean, noise, sigma + 0.25)[0] - before) / 0.25
    torch.testing.assert_close(slope, target, atol=1e-5, rtol=1e-5)
    assert fafm.loss(target, target, sigma)[0] == 0
