"""Guidance and the per-frame Euler step, Triton and native, against torch in float64.

Frozen frames keep their bits.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.testing import assert_within_budget, make_input

pytest.importorskip("triton")

# Under the interpreter numpy warns of what the hardware passes over.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

GUIDANCE = 3.7  # no float32 number
TYPED = [("triton", t) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
TYPED += [("native", t) for t in (torch.float32, torch.bfloat16)]
each_dtype = pytest.mark.parametrize(("kernels", "dtype"), TYPED, ids=str, indirect=["kernels"])
triton_only = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 4, 2, 5), (1, 2, 3, 7, 1), (2, 1, 2, 16, 8), (1, 2, 2, 33, 65)]  # B, C, F, h, w
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def make(
    shape: tuple[int, ...], dtype: torch.dtype, velocity: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, v, v_neg and dsigma [F], of which the first is 0 and the last is not."""
    x, v, v_neg = (
        make_input(*shape, seed=i, dtype=t, device=device) for i, t in enumerate((dtype, velocity, velocity))
    )
    dsigma = -torch.arange(shape[2], dtype=torch.promote_types(dtype, torch.float32), device=device) / 7
    return x, v, v_neg, dsigma if shape[2] > 1 else dsigma - 0.25


def plain(x: Tensor, v: Tensor, v_neg: Tensor | None, dsigma: Tensor) -> Tensor:
    """Plain torch, each operation rounded to the dtype of its arguments."""
    velocity = v if v_neg is None else v_neg + GUIDANCE * (v - v_neg)
    return (x + velocity * dsigma[:, None, None]).to(x.dtype)


def check(kernels: ModuleType, x: Tensor, v: Tensor, v_neg: Tensor | None, dsigma: Tensor) -> Tensor:
    result: Tensor = kernels.guided_euler_step(x, v, v_neg, GUIDANCE, dsigma)
    doubles = (None if t is None else t.double() for t in (x, v, v_neg))
    exact = reference.guided_euler_step(*doubles, GUIDANCE, dsigma.double())  # type: ignore[arg-type]
    assert result.dtype == x.dtype and result.is_contiguous()
    if x.dtype == torch.float64:  # where the oracle is no better than the kernel
        torch.testing.assert_close(result, exact, rtol=1e-14, atol=1e-14)
    else:
        assert_within_budget(result, plain(x, v, v_neg, dsigma), exact)
    return result


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16], ids=str)
@each_dtype
def test_step(kernels: ModuleType, device: str, dtype: torch.dtype, velocity: torch.dtype, guided: bool) -> None:
    for shape in SHAPES:
        x, v, v_neg, dsigma = make(shape, dtype, velocity, device)
        check(kernels, x, v, v_neg if guided else None, dsigma)


def test_the_frame_of_a_pixel(kernels: ModuleType, device: str) -> None:
    """As many frames as channels, batches, rows and columns: only the third axis counts."""
    x = torch.zeros(3, 3, 3, 3, 3, device=device)
    v = torch.ones_like(x)
    dsigma = torch.tensor([-1.0, -2.0, -3.0], device=x.device)
    expected = dsigma[None, None, :, None, None].expand_as(x)
    assert torch.equal(kernels.guided_euler_step(x, v, None, 1.0, dsigma), expected)


@pytest.mark.parametrize("guided", [False, True])
@each_dtype
def test_frozen_frames_keep_their_bits(kernels: ModuleType, device: str, dtype: torch.dtype, guided: bool) -> None:
    """Negative zeros, NaN payloads and subnormals included, whatever the velocity is."""
    x, v, v_neg, dsigma = make((2, 3, 4, 2, 5), dtype, torch.bfloat16, device)
    frozen = [0, 2]
    dsigma[frozen] = torch.tensor([0.0, -0.0], dtype=dsigma.dtype, device=dsigma.device)
    x[:, :, frozen] = -0.0
    infinity = torch.tensor(math.inf, dtype=dtype).view(BITS[dtype]).item()
    patterns = x[:, 0, 2].contiguous().view(BITS[dtype])
    patterns.copy_(torch.arange(patterns.numel()).view_as(patterns))  # subnormals
    patterns[:, 0] = -1  # a NaN with all bits set
    patterns[:, 1] = infinity + 1  # a signalling one
    x[:, 0, 2] = patterns.view(dtype)
    v[:, :, 0], v[:, :, 2], v_neg[:, :, 2] = math.nan, math.inf, math.inf
    before = x.clone()
    result = kernels.guided_euler_step(x, v, v_neg if guided else None, GUIDANCE, dsigma)
    assert torch.equal(result[:, :, frozen].view(BITS[dtype]), before[:, :, frozen].view(BITS[dtype]))
    assert not torch.equal(result[:, :, [1, 3]], before[:, :, [1, 3]])
    assert torch.equal(x.view(BITS[dtype]), before.view(BITS[dtype]))


def test_any_strides(kernels: ModuleType, device: str) -> None:
    """Gaps hold NaN; each layout gives the bits of the contiguous one."""
    x, v, v_neg, dsigma = make((2, 3, 4, 2, 5), torch.float32, torch.float32, device)
    expected = check(kernels, x, v, v_neg, dsigma)

    def padded(t: Tensor) -> Tensor:
        return t.new_full((*t.shape[:-1], t.shape[-1] + 2), math.nan)[..., :-2].copy_(t)

    def frames_first(t: Tensor) -> Tensor:
        return t.movedim(2, 0).contiguous().movedim(0, 2)

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last_3d)

    def window(t: Tensor) -> Tensor:
        """Frames of a longer clip."""
        return torch.cat([torch.full_like(t[:, :, :1], math.nan), t], dim=2)[:, :, 1:]

    dsigma_view = torch.stack([dsigma, torch.full_like(dsigma, math.nan)], dim=1)[:, 0]
    for place in (padded, frames_first, channels_last, window):
        for others in (place, torch.clone):
            result = kernels.guided_euler_step(place(x), others(v), others(v_neg), GUIDANCE, dsigma_view)
            assert torch.equal(result, expected)
            assert result.is_contiguous()


@triton_only
def test_many_programs(kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as on a GPU, and finer, where the interpreter would take everything as one tile."""
    module = importlib.import_module("pusa_fast.kernels._planes")
    monkeypatch.setattr(module, "_INTERPRETER_TILE", 32)
    monkeypatch.setattr(module, "_TILE", 32)
    monkeypatch.setattr(module, "_MAX_BLOCK", 16)
    check(kernels, *make((2, 1, 3, 3, 7), torch.float32, torch.float32, device))


def test_empty(kernels: ModuleType, device: str) -> None:
    for shape in ((0, 2, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5)):
        x, v, v_neg, dsigma = make(shape, torch.float32, torch.float32, device)
        assert kernels.guided_euler_step(x, v, v_neg, GUIDANCE, dsigma).shape == shape


def test_offsets_beyond_31_bits(kernels: ModuleType, device: str) -> None:
    """Frames 2^30 elements apart: 4 GiB of addresses, of which a few pages are touched."""
    x, v, v_neg, dsigma = make((1, 1, 3, 2, 5), torch.bfloat16, torch.bfloat16, device)
    far = torch.empty_strided((2 * 2**30 + 64,), (1,), dtype=torch.bfloat16, device=device)
    views = [far.as_strided(x.shape, (0, 0, 2**30, 5, 1), start) for start in (0, 16, 32)]
    for view, values in zip(views, (x, v, v_neg), strict=True):
        view.copy_(values)
    result = kernels.guided_euler_step(*views, GUIDANCE, dsigma)
    assert torch.equal(result, kernels.guided_euler_step(x, v, v_neg, GUIDANCE, dsigma))


@pytest.mark.parametrize("guided", [False, True])
def test_opcheck_and_compile(guided: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, v, v_neg, dsigma = make((1, 2, 3, 2, 5), torch.float32, torch.bfloat16, device)
    arguments = (x.transpose(0, 1), v.transpose(0, 1), v_neg.transpose(0, 1) if guided else None, GUIDANCE, dsigma)
    with ops.use("triton"):
        torch.library.opcheck(torch.ops.pusa_fast.guided_euler_step.default, arguments)
        compiled = torch.compile(ops.guided_euler_step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), ops.guided_euler_step(*arguments))
