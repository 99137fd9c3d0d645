"""Rotary tables against official Wan's construction, and the cache that holds them."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from pusa_fast.model.rope import RopeCache, rope_split, rope_tables


@pytest.mark.parametrize("head_dim", [2, 4, 6, 10, 24, 32, 64, 96, 128, 256])
def test_split_and_angles_are_official_wans(head_dim: int) -> None:
    split = rope_split(head_dim)
    assert sum(split) == head_dim and all(d % 2 == 0 for d in split)
    assert split == (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    # wan/modules/model.py, rope_params: one table per axis, each with its own width in the
    # exponent.
    tables = []
    for d in split:
        frequencies = (
            1.0 / torch.pow(10000, torch.arange(0, d, 2).to(torch.float64).div(d)) if d else torch.empty(0).double()
        )
        tables.append(torch.polar(torch.ones(30, d // 2).double(), torch.outer(torch.arange(30).double(), frequencies)))
    expected = torch.cat(tables, dim=1)
    cos, sin = rope_tables(head_dim, 30)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (30, head_dim // 2)
    torch.testing.assert_close(cos, expected.real.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, expected.imag.float(), rtol=0, atol=1e-7)


def test_cache_is_bounded_and_keeps_the_recent() -> None:
    cache, cpu = RopeCache(8, capacity=2), torch.device("cpu")
    first = cache((1, 2, 3), cpu)[0]
    assert cache((3, 1, 1), cpu)[0] is first  # same number of positions
    cache((4, 1, 1), cpu), cache((3, 3, 3), cpu), cache((5, 1, 1), cpu)
    assert cache((3, 1, 1), cpu)[0] is first and len(cache._tables) == 2
    assert cache((9, 4, 4), cpu)[0].shape == (9, 4) and cache((9, 4, 4), torch.device("meta"))[0].is_meta


def test_threads_can_share_a_cache() -> None:
    cache, start = RopeCache(8, capacity=1), Barrier(8)  # each other grid evicts what another thread just asked for

    def ask(thread: int) -> bool:
        start.wait()
        frames = (1 + thread * call % 5 for call in range(200))
        return all(cache((f, 1, 1), torch.device("cpu"))[0].shape == (f, 4) for f in frames)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(1, 9)))
    finally:
        sys.setswitchinterval(interval)


def test_tables_made_in_inference_mode_serve_training_and_copies() -> None:
    cache = RopeCache(8)
    with torch.inference_mode():
        cos, _ = cache((2, 2, 2), torch.device("cpu"))
    assert not cos.is_inference()
    assert torch.equal(copy.deepcopy(cache)((2, 2, 2), torch.device("cpu"))[0], cos)
