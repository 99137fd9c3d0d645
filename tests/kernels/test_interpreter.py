"""The patched interpreter's casts, against integer arithmetic and the list of e4m3 numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pusa_fast.kernels import _launch

if not _launch.interpreted():
    pytest.skip("the kernels run on a GPU", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


def converted(source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    copy_kernel[(1,)](source, target, source.numel())
    return target


def some_floats(count: int) -> Tensor:
    """Random bit patterns: all magnitudes, subnormal numbers, infinities and NaN with them."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32).view(torch.float32)


def e4m3_numbers() -> Tensor:
    """The 127 numbers 0 .. 448 by code: 16 exponents of 8, the first subnormal; code 127 is NaN."""
    codes = torch.arange(127)
    exponent, mantissa = codes >> 3, (codes & 7).double() / 8
    return torch.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * torch.exp2(exponent - 7.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # numpy, of signalling NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_bf16_number_survives_the_way_up_and_back(dtype: torch.dtype) -> None:
    codes = torch.arange(2**16)
    wide = converted(codes.to(torch.uint16).view(torch.bfloat16), dtype)
    back = converted(wide, torch.bfloat16)
    number = (codes & 0x7FFF) <= 0x7F80
    assert torch.equal(wide.float().view(torch.int32)[number] >> 16 & 0xFFFF, codes[number].int())
    assert torch.equal(back.view(torch.uint16).long()[number], codes[number])
    assert wide[~number].isnan().all() and back[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bf16_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    ties = (torch.arange(2**15, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    values = torch.cat((some_floats(2**15), ties))
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    expected = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
    result = converted(values.to(dtype), torch.bfloat16)
    number = ~values.isnan()
    assert torch.equal(result.view(torch.int16).long()[number] & 0xFFFF, expected[number])
    assert result[~number].isnan().all()


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    numbers = e4m3_numbers()
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.tensor([0.0, torch.inf, 464.0, 1e30], dtype=torch.float64)
    values = torch.cat((numbers, middles, middles * (1 - 2**-20), middles * (1 + 2**-20), edges))
    values = torch.cat((values, -values)).float()
    values = torch.cat((values, some_floats(2**12 - len(values))))
    magnitude = values.double().abs().clamp(max=448)
    distance = (magnitude[:, None] - numbers).abs()
    lower = distance.argmin(1)  # the first of two at the same distance
    tie = (distance == distance.amin(1, keepdim=True)).sum(1) == 2
    expected = torch.where(tie & (lower % 2 == 1), lower + 1, lower) | (torch.signbit(values).long() << 7)
    result = converted(values, torch.float8_e4m3fn).view(torch.uint8).long()
    number = ~values.isnan()
    assert torch.equal(result[number], expected[number])
    assert torch.equal(result[~number] & 0x7F, torch.full_like(result[~number], 0x7F))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_e4m3_is_read_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    result = converted(numbers, dtype)
    number = torch.arange(256) & 127 != 127
    expected = torch.cat((e4m3_numbers(), torch.zeros(1), -e4m3_numbers(), torch.zeros(1)))
    assert torch.equal(result[number].double(), expected[number])
    assert torch.equal(torch.signbit(result)[number], (torch.arange(256) >= 128)[number])
    assert result[~number].isnan().all()
