"""The judges themselves: budgets that pass a good result and fail a bad one, inputs that repeat."""

from __future__ import annotations

import math

import pytest
import torch

from pusa_fast.testing import assert_within_budget, error_budget, make_input, max_error, relative_error


def test_budget_is_twice_torch_plus_rounding() -> None:
    oracle = torch.tensor([1.0, -4.0], dtype=torch.float64)
    low = torch.tensor([1.0, -4.5], dtype=torch.float32)
    assert error_budget(low, oracle) == 2 * (0.5 + torch.finfo(torch.float32).eps * 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_passes_torch_and_fails_what_is_worse(dtype: torch.dtype) -> None:
    x = make_input(64, 64, dtype=dtype)
    oracle, low = x.double().exp(), x.exp()
    assert_within_budget(low, low, oracle)
    worse = (low.double() + 3 * error_budget(low, oracle)).to(dtype)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(worse, low, oracle)


def test_nan_fails_the_budget() -> None:
    x = make_input(4)
    bad = x.clone()
    bad[2] = math.nan
    with pytest.raises(AssertionError):
        assert_within_budget(bad, x, x.double())


def test_comparisons_that_say_nothing_are_refused() -> None:
    x = make_input(2, 3)
    for call in (
        lambda: max_error(x, x[0]),  # would broadcast
        lambda: relative_error(x, x[0]),
        lambda: error_budget(x, x),  # no oracle
        lambda: assert_within_budget(x.bfloat16(), x, x.double()),
    ):
        with pytest.raises(ValueError, match=r"compare|float64|budget"):
            call()


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(reference, torch.zeros(2)) == math.inf


def test_empty_tensors_compare_equal() -> None:
    empty = torch.empty(0, 3)
    assert max_error(empty, empty) == 0
    assert_within_budget(empty, empty, empty.double())


def test_inputs_repeat_and_are_the_same_numbers_in_every_dtype() -> None:
    torch.rand(3)  # the global generator plays no part
    wide = make_input(5, 7, seed=3, dtype=torch.float64)
    assert torch.equal(make_input(5, 7, seed=3), wide.float())
    assert torch.equal(make_input(5, 7, seed=3, dtype=torch.bfloat16, scale=2.0), (wide * 2).bfloat16())
    assert not torch.equal(make_input(5, 7, seed=4, dtype=torch.float64), wide)


def test_padded_input_is_surrounded_by_nan() -> None:
    x = make_input(2, 3, 5, padded=True)
    assert torch.equal(x, make_input(2, 3, 5)) and not x.is_contiguous() and x.stride() == (24, 8, 1)
    assert torch.as_strided(x, (2, 3, 3), (24, 8, 1), 5).isnan().all()
