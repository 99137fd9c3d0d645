"""Blocks under torch.compile, with every backend of the ops: whole graphs, and eager's results."""

from __future__ import annotations

import copy

import pytest
import torch

from pusa_fast import DiTConfig, WanDiT
from pusa_fast.model.fp8 import quantize
from pusa_fast.testing import make_input, relative_error

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def model() -> WanDiT:
    torch.manual_seed(0)
    dit = WanDiT(CONFIG)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    return dit


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_input(1, 4, 3, 4, 4, dtype=dtype)
    return x, torch.tensor([[0.0, 437, 1000]]), make_input(1, 5, 16, seed=1, dtype=dtype)


def compile_blocks(dit: WanDiT, backend: str = "aot_eager") -> WanDiT:
    compiled = copy.deepcopy(dit)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend=backend)
    return compiled


@torch.no_grad()
def test_inference(ops_backend: str) -> None:
    dit = model()
    compiled = compile_blocks(dit)
    x, t, c = inputs()
    assert relative_error(compiled(x, t, c), dit(x, t, c)) < 1e-6
    assert relative_error(compiled(x + 1, t / 2, c), dit(x + 1, t / 2, c)) < 1e-6


def test_training(ops_backend: str) -> None:
    dit = model()
    compiled = compile_blocks(dit)
    x, t, c = inputs()
    for module in (dit, compiled):
        module(x, t, c).square().sum().backward()
    exact = {name: p.grad for name, p in dit.named_parameters()}
    for name, p in compiled.named_parameters():
        assert p.grad is not None and exact[name] is not None, name
        assert relative_error(p.grad, exact[name]) < 1e-5, name


@torch.no_grad()
def test_fp8() -> None:
    dit = quantize(model().bfloat16(), emulate=True)
    x, t, c = inputs(torch.bfloat16)
    assert torch.equal(compile_blocks(dit)(x, t, c), dit(x, t, c))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_in_earnest(dtype: torch.dtype) -> None:
    dit = model().to(dtype)
    x, t, c = inputs(dtype)
    limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert relative_error(compile_blocks(dit, "inductor")(x, t, c), dit(x, t, c)) < limit
