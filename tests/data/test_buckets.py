"""The bucket of a clip, and which frames of it are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from films import frames_of
from pusa_fast import video
from pusa_fast.config import Geometry
from pusa_fast.data.buckets import Bucket, choose, parse_bucket, read_windows, window_starts

WAN = Geometry(spatial_factor=8, temporal_factor=4, patch=(1, 2, 2), channels=16, text_dim=4096, text_len=512)


def test_the_bucket_of_a_clip() -> None:
    wide, tall, long, big = (parse_bucket(text, WAN) for text in ("96x64x9", "64x96x9", "96x64x17", "192x128x9"))
    assert choose([wide, tall], 640, 272, 100) == wide
    assert choose([wide, tall], 272, 640, 9) == tall
    assert choose([wide, tall], 272, 640, 8) is None
    assert choose([wide, long, big], 96, 64, 100) == long  # frames before size
    assert choose([wide, long, big], 96, 64, 16) == big
    assert choose([tall, long], 64, 96, 100) == tall  # aspect before frames
    assert choose([tall, wide], 64, 64, 9) == choose([wide, tall], 64, 64, 9)


def test_windows() -> None:
    assert window_starts(20, 1, "first", "") == [0]
    assert window_starts(20, 3, "first", "") == [0, 10, 20]
    assert window_starts(20, 1, "middle", "") == [10]
    assert window_starts(20, 2, "middle", "") == [5, 15]
    assert window_starts(0, 5, "random", "x") == window_starts(0, 5, "first", "") == [0]
    drawn = [window_starts(99, 4, "random", str(salt)) for salt in range(50)]
    assert drawn[0] == window_starts(99, 4, "random", "0") and drawn[0] != drawn[1]
    assert all(25 * i <= start < 25 * (i + 1) for starts in drawn for i, start in enumerate(starts))
    assert {starts[0] for starts in (window_starts(1, 1, "random", str(salt)) for salt in range(20))} == {0, 1}


@pytest.mark.parametrize("starts", [[0], [7], [0, 2, 4], [1, 5], [0, 6], [3, 3 + 5]])
def test_windows_are_read_in_one_pass(tmp_path: Path, starts: list[int]) -> None:
    frames = frames_of(13, 4, (32, 32))
    video.write_video(f"{tmp_path}/x/", frames, fps=8)
    found = dict(read_windows(tmp_path / "x", starts, Bucket(32, 32, 5), None, "crop"))
    assert list(found) == starts
    assert all(torch.equal(found[start], frames[start : start + 5]) for start in starts)
