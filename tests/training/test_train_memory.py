"""What checkpointing and offload keep: the same gradients, attention once, one residual a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pusa_fast import DiTConfig, WanDiT
from pusa_fast.model.dit import Pending
from pusa_fast.model.linear import add_lora
from pusa_fast.testing import make_input
from pusa_fast.training import memory
from pusa_fast.training.memory import MODES, Offload, save_memory

LAYERS = 3


@pytest.fixture
def dit() -> WanDiT:
    made = WanDiT(DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=LAYERS, text_dim=64, freq_dim=32))
    torch.nn.init.normal_(made.head.head.weight, std=0.05)
    return made


def gradients(dit: WanDiT) -> dict[str, Tensor]:
    dit.zero_grad()
    out = dit(
        make_input(2, 16, 3, 4, 4),
        torch.tensor([[900.0, 100.0, 5.0], [1000.0, 3.0, 400.0]]),
        make_input(2, 6, 64, seed=1),
    )
    (out * make_input(*out.shape, seed=2)).sum().backward()
    return {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize(
    ("mode", "offload"), [("block", False), ("attention", False), ("block", True), ("attention", True)]
)
def test_gradients_are_the_same_to_the_bit(
    dit: WanDiT, monkeypatch: pytest.MonkeyPatch, trains: str, mode: str, offload: bool
) -> None:
    if trains == "lora":
        for adapter in add_lora(dit, rank=4):
            torch.nn.init.normal_(adapter, std=0.05)
    save_memory(dit, "none")
    plain = gradients(dit)
    assert len(plain) == sum(p.requires_grad for p in dit.parameters()) and all(bool(g.any()) for g in plain.values())
    monkeypatch.setattr(memory, "Offload", lambda device: Offload(device, smallest=0))
    save_memory(dit, mode, offload)
    for _ in range(2):  # nothing of the first pass is left for the second
        assert same(gradients(dit), plain)


class Calls(TorchDispatchMode):
    """Counts operators, attention under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found["attention" if func in memory._ATTENTION else str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("attention", 1), ("block", 2)])
def test_how_often_attention_and_products_run(dit: WanDiT, mode: str, times: int) -> None:
    add_lora(dit, rank=4)
    save_memory(dit, mode)
    with Calls() as calls:
        gradients(dit)
    assert calls.found["attention"] == times * 2 * LAYERS  # over itself and over the text
    with Calls() as again, torch.no_grad():
        dit(make_input(1, 16, 1, 4, 4), torch.tensor(5.0), make_input(1, 6, 64))
    assert again.found["attention"] == 2 * LAYERS


@contextmanager
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    pack, fetch = Offload._pack, Offload._fetch

    def packing(self: Offload, tensor: Tensor) -> Any:
        counted["away"] += 1
        return pack(self, tensor)

    def fetching(self: Offload, parked: Any) -> Tensor:
        counted["back"] += parked.back is None
        return fetch(self, parked)

    with monkeypatch.context() as patch:
        patch.setattr(Offload, "_pack", packing)
        patch.setattr(Offload, "_fetch", fetching)
        yield counted


def test_offload_brings_each_tensor_back_once_and_leaves_none(dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lora(dit, rank=4)
    made: list[Offload] = []
    monkeypatch.setattr(memory, "Offload", lambda device: made.append(Offload(device, smallest=0)) or made[-1])
    save_memory(dit, "attention", offload=True)
    for _ in range(2):
        with copies(monkeypatch) as counted:
            gradients(dit)
        assert counted["away"] >= 2 * LAYERS and counted["back"] == counted["away"]
        assert not made[0]._parked


def test_offload_is_one_block_ahead(dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lora(dit, rank=4)
    order: list[tuple[str, int]] = []
    unpack, fetch = Offload._unpack, Offload._fetch

    def unpacking(self: Offload, saved: Any) -> Tensor:
        order.append(("use", saved.block))
        return unpack(self, saved)

    def fetching(self: Offload, parked: Any) -> Tensor:
        if parked.back is None:
            order.append(("fetch", parked.block))
        return fetch(self, parked)

    monkeypatch.setattr(Offload, "_unpack", unpacking)
    monkeypatch.setattr(Offload, "_fetch", fetching)
    monkeypatch.setattr(memory, "Offload", lambda device: Offload(device, smallest=0))
    save_memory(dit, "block", offload=True)
    gradients(dit)
    for block in range(LAYERS - 1):
        last_fetch = max(at for at, entry in enumerate(order) if entry == ("fetch", block))
        assert last_fetch < order.index(("use", block)), "a block waited for its own input"
        assert order.index(("fetch", block)) > order.index(("use", block + 1)), "more than a block is on its way"


# What is kept, at the width of the 14B models, where a second tensor of a residual's size would
# be hundreds of megabytes.

WIDE = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1)


GRID = (3, 30, 52)


def flash(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """What `attention` runs on a GPU; meta tensors would take another way."""
    out: Tensor = torch.ops.pusa_fast.flash_attention(q, k, v, "fa2")[0]
    return out


def _block(mode: str) -> tuple[Counter[tuple[int, ...]], int]:
    """Shapes that a block keeps for its backward pass: by hooks, and in the checkpoint's cache."""
    with torch.device("meta"):
        dit = WanDiT(WIDE).to(torch.bfloat16)
    add_lora(dit, rank=8)
    save_memory(dit, mode)
    F, h, w = GRID
    L, D = F * h * w, WIDE.dim
    x = torch.empty(1, L, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    t_mod = torch.empty(1, F, 6, D, dtype=torch.float32, device="meta")
    context = torch.empty(1, 512, D, dtype=torch.bfloat16, device="meta")
    rope = (torch.empty(1024, 64, device="meta"), torch.empty(1024, 64, device="meta"))
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    cached: list[Tensor] = []

    class Cache(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in memory._ATTENTION and mode == "attention":
                cached.extend(t for t in out if isinstance(t, Tensor) and t.numel() > 1)
            return out

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Cache():
        out, pending = dit.blocks[0](x, Pending(), t_mod, context, rope, (F, h, w), "auto", True)
    assert out.shape == (1, L, D) and pending.y_BLD is None
    weights = {id(p) for p in dit.parameters()}
    shapes = Counter(tuple(t.shape) for key, t in kept.items() if key not in weights)
    shapes.update(tuple(t.shape) for t in cached)
    return shapes, L


def test_a_block_keeps_one_residual_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pusa_fast.model.dit.attention", flash)
    shapes, L = _block("attention")
    D, heads = WIDE.dim, (1, L, WIDE.num_heads, WIDE.dim // WIDE.num_heads)
    per_token = {shape: count for shape, count in shapes.items() if torch.Size(shape).numel() >= L * WIDE.num_heads}
    # Its input, and twice (over the video, over the text) attention's result with its log-sum-
    # exp; the context is every block's own.
    assert per_token == {(1, L, D): 1, heads: 2, (1, WIDE.num_heads, L): 2, (1, 512, D): 1}
    plain, _ = _block("none")
    assert sum(torch.Size(s).numel() * n for s, n in plain.items()) > 4 * sum(
        torch.Size(s).numel() * n for s, n in shapes.items()
    )
    assert not any(6 in s and L in s for s in plain), "modulation was spread over the tokens"


def test_modes_that_do_not_exist(dit: WanDiT) -> None:
    with pytest.raises(ValueError, match=f"checkpointing 'all' is unknown: choose one of {', '.join(MODES)}"):
        save_memory(dit, "all")
    with pytest.raises(ValueError, match="set checkpointing to attention or block"):
        save_memory(dit, "none", offload=True)
