"""The loop: Euler steps, guidance, callbacks, the two experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.sampling.sampler import BATCH_TOKENS, ExpertPair, guidance_mode, sample
from pusa_fast.sampling.schedule import Schedule, lift, sigma_grid
from pusa_fast.testing import relative_error

CONFIG = DiTConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
)


@dataclass
class Fake:
    """Its velocity is `context mean + timestep / 1000`, per frame; it records its calls."""

    config: Any = None
    device: Any = "cpu"
    dtype: Any = torch.float32

    def __post_init__(self) -> None:
        self.prepared: list[tuple[Tensor, Tensor]] = []
        self.steps: list[tuple[int, int]] = []

    def prepare(
        self, timesteps: Tensor, contexts: Tensor, global_sigmas: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.prepared.append((timesteps, contexts))
        return timesteps, contexts.mean((1, 2))

    def denoise(self, x: Tensor, step: int, state: tuple[Tensor, Tensor]) -> Tensor:
        timesteps, means = state
        self.steps.append((step, x.shape[0]))
        assert means.shape[0] == x.shape[0]
        return means.view(-1, 1, 1, 1, 1) + timesteps[step].view(1, 1, -1, 1, 1) / 1000 + torch.zeros_like(x)


def latents(frames: int = 3) -> Tensor:
    return torch.randn(1, 4, frames, 4, 6)


def context(value: float, length: int = 5) -> Tensor:
    return torch.full((1, length, 8), value)


def tiny_dit() -> WanDiT:
    torch.manual_seed(1)
    dit = WanDiT(CONFIG)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)  # official initialisation starts at velocity 0
    return dit


def test_euler_steps_over_the_matrix() -> None:
    x, schedule = latents(), lift(sigma_grid(4, 5.0), [0.0, 0.4, 1.0])
    expected = x.double()
    for step in range(4):
        v = 0.5 + schedule.timesteps[step].double() / 1000
        delta = schedule.sigmas[step + 1].double() - schedule.sigmas[step].double()
        expected = expected + (v * delta).view(1, 1, -1, 1, 1)
    out = sample(Fake(), x, schedule, context(0.5))
    torch.testing.assert_close(out, expected.float())
    assert torch.equal(out[:, :, 0], x[:, :, 0])


def test_frozen_frames_survive_any_velocity() -> None:
    """A frame whose column does not change keeps its bits even where the network gives nan."""

    class Broken(Fake):
        def denoise(self, x: Tensor, step: int, state: Any) -> Tensor:
            return torch.full_like(x, float("nan"))

    x = latents()
    x[0, 0, 1, 0, :2] = torch.tensor([-0.0, 1e-42])
    out = sample(Broken(), x, lift(sigma_grid(4, 5.0), [1.0, 0.0, 1.0]), context(0.5))
    assert torch.equal(out[:, :, 1].contiguous().view(torch.int32), x[:, :, 1].contiguous().view(torch.int32))
    assert out[:, :, 0].isnan().all()


@pytest.mark.parametrize("mode", ["two-pass", "batch"])
def test_guidance_is_negative_plus_scale_times_difference(mode: str) -> None:
    fake, x, schedule = Fake(), latents(), lift(sigma_grid(5, 3.0), [0.3, 1.0, 1.0])
    out = sample(fake, x, schedule, context(0.9), context(0.2), 3.0, mode=mode)
    torch.testing.assert_close(out, sample(Fake(), x, schedule, context(0.2 + 3.0 * 0.7)))
    batches = [batch for _, batch in fake.steps]
    assert batches == ([2] * 5 if mode == "batch" else [1] * 10)
    assert len(fake.prepared) == (1 if mode == "batch" else 2)


def test_scale_one_ignores_the_negative() -> None:
    fake, x, schedule = Fake(), latents(), lift(sigma_grid(3, 5.0), [1.0] * 3)
    out = sample(fake, x, schedule, context(0.9), context(0.2), 1.0)
    assert torch.equal(out, sample(Fake(), x, schedule, context(0.9))) and len(fake.steps) == 3


@pytest.mark.parametrize(
    ("guidance", "tokens", "lengths", "mode"),
    [
        (1.0, 10, (5, 5), "off"),
        (3.0, 10, (5, None), "off"),
        (3.0, BATCH_TOKENS - 1, (5, 5), "batch"),
        (3.0, BATCH_TOKENS, (5, 5), "two-pass"),
        (3.0, 10, (5, 6), "two-pass"),
    ],
)
def test_guidance_mode(guidance: float, tokens: int, lengths: tuple[int, int | None], mode: str) -> None:
    negative = None if lengths[1] is None else context(0.0, lengths[1])
    assert guidance_mode(guidance, tokens, context(0.0, lengths[0]), negative) == mode


def test_batch_and_two_passes_agree_on_a_transformer() -> None:
    dit, x, schedule = tiny_dit(), latents(), lift(sigma_grid(4, 5.0), [0.0, 0.5, 1.0])
    texts = torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    both = [sample(dit, x, schedule, *texts, 4.0, mode=mode) for mode in ("batch", "two-pass")]
    assert relative_error(*both) < 1e-5
    assert relative_error(both[0], sample(dit, x, schedule, texts[0])) > 1e-3
    other_length = sample(dit, x, schedule, texts[0], torch.randn(1, 3, 8), 4.0)
    assert other_length.shape == x.shape and not other_length.requires_grad


def test_callback_sees_every_step_and_can_stop() -> None:
    fake, x, schedule = Fake(), latents(), lift(sigma_grid(4, 5.0), [1.0] * 3)
    seen: list[tuple[int, int]] = []
    out: list[Tensor] = []

    def watch(step: int, steps: int, now: Tensor) -> None:
        seen.append((step, steps))
        out.append(now.clone())

    result = sample(fake, x, schedule, context(0.5), callback=watch)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and torch.equal(out[-1], result)

    def stop(step: int, steps: int, now: Tensor) -> None:
        if step == 2:
            raise KeyboardInterrupt

    fake = Fake()
    with pytest.raises(KeyboardInterrupt):
        sample(fake, x, schedule, context(0.5), callback=stop)
    assert len(fake.steps) == 2


def test_latents_are_float32_whatever_comes_in() -> None:
    out = sample(tiny_dit().bfloat16(), latents().double(), lift(sigma_grid(2, 5.0), [1.0] * 3), torch.randn(1, 7, 8))
    assert out.dtype == torch.float32


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait, or whose result's size depends on data."""

    waiting = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.strip("_").startswith(tuple(word.strip("_") for word in self.waiting)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["off", "two-pass", "batch"])
def test_no_step_waits_for_the_device(mode: str) -> None:
    """Between the end of the first step and that of the last nothing reads a value back."""
    marks: list[int] = []
    with Waits() as waits:
        schedule = lift(sigma_grid(4, 5.0), [0.0, 0.5, 1.0])
        texts = (torch.randn(1, 7, 8), torch.randn(1, 7, 8))
        sample(
            tiny_dit(), latents(), schedule, *texts, 4.0, mode=mode, callback=lambda *_: marks.append(len(waits.found))
        )
        assert marks[0] == marks[-1], waits.found[marks[0] : marks[-1]]
        torch.ones(1).item()
    assert waits.found[-1] == "_local_scalar_dense", "the counter does see them"


@pytest.mark.parametrize(("steps", "high"), [(4, 2), (10, 5), (20, 9), (30, 13), (1, 1)])
def test_experts_change_at_the_boundary(steps: int, high: int) -> None:
    pair = ExpertPair(Fake(), Fake())
    sample(pair, latents(), lift(sigma_grid(steps, 5.0), [0.0, 0.2, 1.0]), context(0.5))
    assert [step for step, _ in pair.high.steps] == list(range(high))
    assert [step for step, _ in pair.low.steps] == list(range(steps - high))
    assert sum(t.shape[0] for fake in (pair.high, pair.low) for t, _ in fake.prepared) == steps


def test_a_step_on_the_boundary_is_the_high_experts() -> None:
    schedule = lift(sigma_grid(2, 7.0), [1.0] * 3)
    assert schedule.global_sigmas.tolist() == [1.0, 0.875, 0.0]
    assert ExpertPair(Fake(), Fake()).prepare(schedule.timesteps, context(0.5), schedule.global_sigmas)[0] == 2


def test_experts_follow_the_global_level_not_the_frames() -> None:
    """All frames are conditions: the largest timestep, 200, is far below the boundary."""
    pair = ExpertPair(Fake(), Fake())
    sample(pair, latents(), lift(sigma_grid(4, 5.0), [0.2] * 3), context(0.5))
    assert len(pair.high.steps) == 2 and len(pair.low.steps) == 2
    alone = pair.prepare(lift(sigma_grid(4, 5.0), [0.2] * 3).timesteps, context(0.5))
    assert alone[0] == 0, "without global levels the timesteps decide"


def test_experts_give_what_one_model_gives() -> None:
    dit, x, schedule = tiny_dit(), latents(), lift(sigma_grid(10, 5.0), [0.0, 0.5, 1.0])
    texts = torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    pair = ExpertPair(dit, dit)
    assert pair.config is CONFIG and pair.device == dit.device
    assert torch.equal(sample(pair, x, schedule, *texts, 4.0), sample(dit, x, schedule, *texts, 4.0))


def test_a_rolling_window_needs_only_its_matrix() -> None:
    levels = torch.linspace(1, 0, 5)[:, None] * 0.5 + torch.linspace(0, 0.5, 3)
    schedule = Schedule(torch.linspace(1, 0, 5), levels, 1000 * levels[:-1])
    out = sample(Fake(), torch.zeros(1, 4, 3, 4, 6), schedule, context(0.0))
    expected = (levels.diff(dim=0) * levels[:-1]).sum(0)
    torch.testing.assert_close(out[0, 0, :, 0, 0], expected)
