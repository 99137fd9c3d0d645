"""The fp8 transformer, emulated: what is quantised, what each block loses, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from pusa_fast import DiTConfig, WanDiT, ops
from pusa_fast.kernels import reference
from pusa_fast.model.dit import Linear
from pusa_fast.model.fp8 import FP8Linear, block_errors, check_precision, quantize
from pusa_fast.model.linear import add_lora
from pusa_fast.testing import make_input, relative_error
from pusa_fast.weights import apply_lora

CONFIG = DiTConfig(
    dim=64, ffn_dim=160, num_heads=2, num_layers=3, in_channels=4, out_channels=4, text_dim=24, freq_dim=32
)
E4M3_STEP = 2.0**-4  # relative, half a step: three bits of mantissa


@pytest.fixture(scope="module")
def exact() -> WanDiT:
    torch.manual_seed(3)
    dit = WanDiT(CONFIG).bfloat16().eval()
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    return dit


@pytest.fixture
def lossy(exact: WanDiT) -> WanDiT:
    return quantize(copy.deepcopy(exact), emulate=True)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_input(2, 4, 3, 4, 6, dtype=torch.bfloat16)
    return x, torch.tensor([[0.0, 500, 900], [100, 100, 1000]]), make_input(2, 5, 24, seed=1, dtype=torch.bfloat16)


def test_a_linear_is_the_product_of_its_rounded_rows() -> None:
    linear = torch.nn.Linear(48, 32).bfloat16()
    x = make_input(2, 5, 48, seed=4, dtype=torch.bfloat16)
    x[0, 1] *= 100  # rows have scales of their own
    x[1, 2] = 0
    (q, s), (w, ws) = reference.quantize_rows(x), reference.quantize_rows(linear.weight.detach())
    expected = (q.double() * s.double()) @ (w.double() * ws.double()).T + linear.bias.double()
    out = FP8Linear(linear)(x)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < torch.finfo(torch.bfloat16).eps
    assert torch.equal(out[1, 2], linear.bias)
    # Every activation and weight is within half a step of e4m3, or of its smallest step below the
    # normal range.
    assert bool(((q.float() * s - x.float()).abs() <= E4M3_STEP * x.float().abs() + s * 2.0**-10).all())
    assert torch.equal(FP8Linear(linear)((q, s)), out)


def test_the_blocks_products_are_quantised_and_nothing_else(exact: WanDiT, lossy: WanDiT) -> None:
    kinds = {name: type(m) for name, m in lossy.named_modules() if isinstance(m, (torch.nn.Linear, FP8Linear))}
    block = {
        name.removeprefix("blocks.1.") for name, kind in kinds.items() if kind is FP8Linear and "blocks.1." in name
    }
    assert block == {"self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"}
    assert sum(kind is FP8Linear for kind in kinds.values()) == 6 * CONFIG.num_layers
    assert kinds["blocks.0.cross_attn.kv"] is Linear and kinds["head.head"] is Linear
    weight = lossy.blocks[0].self_attn.qkv.weight
    assert weight.dtype == torch.float8_e4m3fn and weight.shape == exact.blocks[0].self_attn.qkv.weight.shape
    assert not any(p.requires_grad for p in lossy.parameters())


def test_the_loss_is_e4m3s_and_grows_slowly_with_depth(exact: WanDiT, lossy: WanDiT) -> None:
    wide = copy.deepcopy(exact).float()
    errors = block_errors(lossy, wide, *inputs())
    assert len(errors) == CONFIG.num_layers + 1
    bf16 = block_errors(exact, wide, *inputs())
    assert all(2 * b < e < 2 * E4M3_STEP for b, e in zip(bf16, errors, strict=True)), (bf16, errors)
    assert block_errors(exact, exact, *inputs()) == [0.0] * len(errors)


@torch.no_grad()
def test_the_norms_rows_feed_the_products(lossy: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attention outputs a block are quantised; norms and GELU emit the other four."""
    counts = {"quantize_rows": 0, "gelu_quantize_rows": 0}

    def counted(name: str) -> None:
        original = getattr(ops, name)

        def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            counts[name] += 1
            return original(x)

        monkeypatch.setattr(ops, name, call)

    for name in counts:
        counted(name)
    lossy(*inputs())
    assert counts == {"quantize_rows": 2 * CONFIG.num_layers, "gelu_quantize_rows": CONFIG.num_layers}


def test_states_of_before_are_refused(exact: WanDiT) -> None:
    dit = copy.deepcopy(exact)
    x, t, c = inputs()
    state = dit.prepare(t[None], c)
    quantize(dit, emulate=True)
    with pytest.raises(RuntimeError, match="call prepare again"):
        dit.denoise(x, 0, state)


def test_what_cannot_be_quantised_is_refused(exact: WanDiT, lossy: WanDiT) -> None:
    with pytest.raises(ValueError, match=r"fp8 needs an NVIDIA GPU of compute capability 8\.9"):
        quantize(copy.deepcopy(exact))
    with pytest.raises(ValueError, match="quantised to fp8 already"):
        quantize(lossy, emulate=True)
    with pytest.raises(ValueError, match=r"the model is torch\.float32: load it with dtype=torch\.bfloat16"):
        quantize(copy.deepcopy(exact).float(), emulate=True)
    narrow = WanDiT(DiTConfig(dim=64, ffn_dim=72, num_heads=2, num_layers=1, text_dim=24, freq_dim=32)).bfloat16()
    with pytest.raises(ValueError, match="multiples of 16, ffn_dim is 72"):
        quantize(narrow, emulate=True)
    adapted = copy.deepcopy(exact)
    add_lora(adapted, 2)
    with pytest.raises(ValueError, match="unmerged adapters"):
        quantize(adapted, emulate=True)


def test_a_lora_comes_too_late(lossy: WanDiT) -> None:
    lora = {
        f"blocks.0.self_attn.q.lora_{m}.default.weight": torch.zeros(2, 64).t() if m == "B" else torch.zeros(2, 64)
        for m in "AB"
    }
    with pytest.raises(ValueError, match=r"is quantised \(fp8\), its exact weight is gone: put LoRAs on first"):
        apply_lora(lossy, lora)
    with pytest.raises(ValueError, match="is quantised to fp8, for inference only"):
        add_lora(lossy, 2, targets=["cross_attn.k"])


def test_a_lora_that_keeps_its_base_is_refused(exact: WanDiT) -> None:
    dit = copy.deepcopy(exact)
    lora = {
        f"blocks.0.self_attn.o.lora_{m}.default.weight": torch.zeros(2, 64).t() if m == "B" else torch.zeros(2, 64)
        for m in "AB"
    }
    handle = apply_lora(dit, lora)
    with pytest.raises(ValueError, match="apply it with keep_base=False"):
        quantize(dit, emulate=True)
    handle.remove()
    quantize(dit, emulate=True)


@torch.no_grad()
def test_casting_leaves_rows_and_scales_alone(lossy: WanDiT) -> None:
    before = lossy(*inputs())
    lossy.to(torch.bfloat16)
    assert lossy.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    assert lossy.blocks[0].ffn[0].weight_scale.dtype == torch.float32
    assert torch.equal(lossy(*inputs()), before)
    assert copy.deepcopy(lossy).to("meta").blocks[0].ffn[0].weight.is_meta


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_which_gpus(capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    device = torch.device("cuda")
    if fits:
        assert check_precision("fp8", device, None) == torch.bfloat16
    else:
        with pytest.raises(ValueError, match=r"precision fp8 cannot be used: .* Card has 8\.0"):
            check_precision("fp8", device, None)
    assert check_precision(None, device, torch.float16) == torch.float16
