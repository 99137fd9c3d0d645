"""Encoding what conditions need and noising it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast.sampling.conditioning import encode_conditions, initial_latents, initial_noise, to_frames, to_video
from pusa_fast.sampling.schedule import lift, sigma_grid
from pusa_fast.sampling.task import Condition, Plan, resolve


class FrameCounter:
    """An encoder whose latent i holds the sum of its chunk's first channel; remembers what it was
    given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any]] = []

    def encode(self, video: Tensor, tiling: Any = None) -> Tensor:
        self.calls.append((video.shape[2], tiling))
        red = video[:, :1, :, ::8, ::8].double()
        return torch.cat([red[:, :, :1], red[:, :, 1:].unflatten(2, (-1, 4)).sum(3)], dim=2)


def a_clip(frames: int, start: float = 0.0) -> Tensor:
    """[1,3,T,16,24] whose frame t is start + t."""
    return (start + torch.arange(frames, dtype=torch.float32)).view(1, 1, -1, 1, 1).expand(1, 3, frames, 16, 24)


def plan(*conditions: Condition, num_frames: int = 17) -> Plan:
    return resolve(conditions, num_frames, lambda media: media.shape[2] if isinstance(media, Tensor) else None, 4)


def encode(resolved: Plan, tiling: Any = None) -> tuple[dict[int, float], list[tuple[int, Any]]]:
    encoder = FrameCounter()
    clean = encode_conditions(
        resolved, encoder, lambda i: m if isinstance(m := resolved.media[i], Tensor) else a_clip(1, 100.0), tiling
    )
    assert all(z.shape == (1, 2, 3) and z.dtype == torch.float32 for z in clean.values())
    return {latent: z[0, 0, 0].item() for latent, z in clean.items()}, encoder.calls


def test_only_the_frames_that_are_needed() -> None:
    clean, calls = encode(plan(Condition(a_clip(17), [0, 2])))
    assert calls == [(9, None)] and clean == {0: 0, 2: 5 + 6 + 7 + 8}


def test_a_picture_is_encoded_alone_wherever_it_goes() -> None:
    clean, calls = encode(plan(Condition("a.png", [0, 3]), Condition("b.png", -1)), tiling="any")
    assert calls == [(1, "any"), (1, "any")] and clean == {0: 100, 3: 100, 4: 100}


def test_one_medium_is_encoded_once() -> None:
    clip = a_clip(17)
    clean, calls = encode(plan(Condition(clip, 0), Condition(clip, 3, 0.5), Condition(clip, 1, source=2)))
    assert calls == [(13, None)] and clean == {0: 0, 3: 9 + 10 + 11 + 12, 1: 5 + 6 + 7 + 8}


def test_transition_takes_the_second_clip_from_its_second_latent() -> None:
    """Its first 4K+1 frames are encoded alone; the last K latents of those are placed, never the
    first."""
    first, second = a_clip(9), a_clip(40, 1000.0)
    clean, calls = encode(plan(Condition(first, slice(0, 2)), Condition(second, slice(-2, None), source=slice(1, 3))))
    assert calls == [(5, None), (9, None)]
    assert clean == {0: 0, 1: 10, 3: 4000 + 1 + 2 + 3 + 4, 4: 4000 + 5 + 6 + 7 + 8}


def test_a_clip_that_ends_before_its_header_says_is_refused() -> None:
    resolved = resolve([Condition("clip.mp4", slice(0, 3))], 17, lambda media: 17, 4)
    with pytest.raises(ValueError, match=r"clip.mp4: 9 frames are needed, only 6 could be read"):
        encode_conditions(resolved, FrameCounter(), lambda _: a_clip(6))


def test_noise_is_the_generators() -> None:
    noise = initial_noise(40, (1, 16, 5, 8, 12))
    assert torch.equal(noise, torch.randn((1, 16, 5, 8, 12), generator=torch.Generator().manual_seed(40)))
    assert noise.dtype == torch.float32 and not torch.equal(noise, initial_noise(41, noise.shape))


@pytest.mark.parametrize("compat", ["reference", "exact"])
def test_each_condition_is_noised_once_with_its_own_slice(compat: str) -> None:
    resolved = plan(Condition("a", 0, 0.0), Condition("b", 2, 0.3), Condition("c", 4, 1.0))
    schedule = lift(sigma_grid(10, 5.0), resolved.multipliers, compat)
    noise = initial_noise(0, (1, 4, 5, 2, 3))
    clean = {latent: torch.randn(4, 2, 3) for latent in (0, 2, 4)}
    latents = initial_latents(noise, schedule, resolved.placements, clean)
    assert torch.equal(latents[0, :, 0], clean[0])
    torch.testing.assert_close(latents[0, :, 2], 0.7 * clean[2] + 0.3 * noise[0, :, 2])
    assert torch.equal(latents[0, :, [1, 3, 4]], noise[0, :, [1, 3, 4]])
    assert torch.equal(noise, initial_noise(0, noise.shape)), "the noise given must not change"


def test_a_clean_latent_is_copied_bit_for_bit() -> None:
    resolved = plan(Condition("a", 1))
    schedule = lift(sigma_grid(4, 5.0), resolved.multipliers)
    noise, z = (
        torch.full((1, 2, 5, 2, 2), float("inf")),
        torch.tensor([-0.0, 1e-40, 3.0, -7.5]).view(1, 2, 2).expand(2, 2, 2),
    )
    latents = initial_latents(noise, schedule, resolved.placements, {1: z})
    assert torch.equal(latents[0, :, 1].view(torch.int32), z.contiguous().view(torch.int32))


def test_pixels_there_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    video = to_video(frames, torch.device("cpu"))
    assert video.shape == (1, 3, 1, 16, 16) and video.min() == -1 and video.max() == 1
    assert torch.equal(to_frames(video, "exact"), frames)


def test_reference_frames_are_truncated_and_exact_ones_rounded() -> None:
    video = torch.tensor([-2.0, -1.0, -1 + 1.9 / 127.5, 0.999, 1.0, 2.0]).view(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    assert to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]
    assert to_frames(video, "exact")[0, 0, :, 0].tolist() == [0, 0, 2, 255, 255, 255]
    assert to_frames(video).is_contiguous() and to_frames(video).dtype == torch.uint8
