"""What bench counts by hand: bytes of each op, the arithmetic of a forward."""

from __future__ import annotations

import pytest
import torch

import pusa_fast
from pusa_fast.commands import bench as command

registry, peaks = (command.load(name) for name in ("registry", "peaks"))

CPU = torch.device("cpu")
TINY = registry.SHAPES["tiny"]


# Registry and roofline.

U = 32_760 * 5_120 * 2
FRAME_ROW, ROW = 21 * 5_120 * 4, 5_120 * 2


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("residual_norm_k1", 4 * U + 3 * FRAME_ROW),
        ("residual_norm_k3", 4 * U + FRAME_ROW + 2 * ROW),
        ("residual_norm_k5", 4 * U + 2 * FRAME_ROW),
        ("rms_norm", 2 * U + ROW),
        ("qk_rope", 4 * U + 2 * ROW + 52 * 64 * 2 * 4),
        ("qk_rope_inplace", 4 * U + 2 * ROW + 52 * 64 * 2 * 4),
        ("guided_euler_step", 4 * (16 * 21 * 60 * 104) * 4 + 21 * 4),
        ("noise_and_target", 4 * (16 * 21 * 60 * 104) * 4 + 21 * 4),
        ("flow_loss", 3 * (16 * 21 * 60 * 104) * 4 + 21 * 4),
        ("vae_act", 2 * (21 * 240 * 416 * 96) * 2 + 2 * 96 * 2),
        ("vae_act_residual", 4 * (21 * 240 * 416 * 96) * 2 + 2 * 96 * 2),
        ("gelu", 2 * 32_760 * 13_824 * 2),
        ("quantize_rows", U + U // 2 + 32_760 * 4),
        ("gelu_quantize_rows", 32_760 * 13_824 * 3 + 32_760 * 4),
        ("residual_norm_fp8", 3 * U + U // 2 + 32_760 * 4 + 3 * FRAME_ROW),
        ("residual_norm_backward", 5 * U + 2 * 32_760 * 4 + 2 * FRAME_ROW),
        ("residual_norm_backward_full", 6 * U + 2 * 32_760 * 4 + 5 * FRAME_ROW),
        ("rms_norm_backward", 3 * U + 32_760 * 4 + ROW),
        ("qk_rope_backward", 8 * U + 2 * 32_760 * 4 + 2 * ROW + 52 * 64 * 2 * 4),
    ],
)
def test_bytes_of_an_op_by_hand(op: str, expected: int) -> None:
    assert registry.OPS[op].bytes(registry.SHAPES["14b-480p"], 2) == expected


def test_every_op_is_counted_by_hand_and_has_a_file() -> None:
    counted = test_bytes_of_an_op_by_hand.pytestmark[0].args[1]
    assert {op for op, _ in counted} == set(registry.OPS)
    assert {op.kernel.split()[0] for op in registry.OPS.values()} == set(registry.FILES)


def test_bytes_are_those_of_the_tensors() -> None:
    t = registry.Drawn(TINY, torch.float32, CPU)
    r, n = registry.k3(pusa_fast.kernels.reference, t)
    held = (t["x"], t["y"], r, n, t["table"][:, :, 2], t["weight"], t["bias"])
    assert registry.OPS["residual_norm_k3"].bytes(TINY, 4) == sum(x.numel() * x.element_size() for x in held)


def test_the_arithmetic_of_a_forward() -> None:
    """docs/performance.md."""
    for name, block, forward, seconds, elementwise in (
        ("14b-480p", 41.96, 1.678, 2.39, 56),
        ("14b-720p", 163.08, 6.523, 9.66, 130),
    ):
        shape = registry.SHAPES[name]
        total = sum(peaks.block_flops(shape).values())
        assert (round(total / 1e12, 2), round(40 * total / 1e15, 3)) == (block, forward)
        floor = peaks.floor_seconds(shape, 40, products=790e12, attention=640e12, copy=4.3e12)
        assert round(floor["products"] + floor["attention"], 2) == seconds
        assert round(1e3 * floor["elementwise"]) == elementwise
        assert floor["total"] == pytest.approx(sum(floor[part] for part in ("products", "attention", "elementwise")))
    assert peaks.BLOCK_UNITS["pusa"] == 18
    assert (
        peaks.attention_flops(3, 5, 7) == 4 * 3 * 5 * 7
        and peaks.attention_flops(3, 5, 7, backward=True) == 10 * 3 * 5 * 7
    )
