"""Noise levels, noising and target of frame-aware flow matching."""

from __future__ import annotations

import torch

from pusa_fast.training import fafm


def test_levels_are_independent_per_frame_or_shared_by_the_clip() -> None:
    draw = torch.Generator().manual_seed(0)
    levels = fafm.draw_levels(2000, 5, 3.0, draw)
    assert levels.shape == (2000, 5) and levels.min() >= 0 and levels.max() < 1
    assert torch.corrcoef(levels.T).fill_diagonal_(0).abs().max() < 0.1
    shared = fafm.draw_levels(100, 5, 3.0, draw, synchronous=True)
    assert torch.equal(shared, shared[:, :1].expand(-1, 5))


def test_levels_follow_the_shift() -> None:
    """The median of the uniform draw, 1/2, becomes shift / (shift + 1)."""
    levels = fafm.draw_levels(4000, 5, 3.0, torch.Generator().manual_seed(0))
    assert abs(float(levels.median()) - 0.75) < 0.01


def test_each_frame_is_noised_at_its_own_level_and_the_target_is_the_slope() -> None:
    clean, noise = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    sigma = torch.rand(2, 4)
    noised = fafm.add_noise(clean, noise, sigma)
    for b in range(2):
        for f in range(4):
            s = sigma[b, f]
            torch.testing.assert_close(noised[b, :, f], (1 - s) * clean[b, :, f] + s * noise[b, :, f])
    slope = (fafm.add_noise(clean, noise, sigma + 0.25) - noised) / 0.25
    torch.testing.assert_close(slope, noise - clean, atol=1e-5, rtol=1e-5)
    assert fafm.fafm_loss(noise - clean, clean, noise) == 0
    assert fafm.fafm_loss(clean, clean, noise) > 0
