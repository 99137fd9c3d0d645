"""Peak memory of the VAE: predicted without running, and what `Tiling.auto` makes of it."""

from __future__ import annotations

import time

import pytest
import torch

from bench.memory import peak_bytes as measured_bytes
from pusa_fast import Tiling, VAEConfig, WanVAE
from pusa_fast.device import weight_bytes
from pusa_fast.model.vae import memory as vae_memory
from pusa_fast.model.vae.memory import peak_bytes, resolve
from pusa_fast.ops import registry
from pusa_fast.testing import make_input, relative_error

CPU = torch.device("cpu")
# Without bf16 in oneDNN torch converts whole clips to float32 on its way, which no prediction knows
# of.
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not registry.ONEDNN_BF16, reason="no bf16 products in oneDNN here")
    ),
]
TILINGS = [None, Tiling(tile=(6, 8), mode="exact"), Tiling(tile=(8, 8), stride=(6, 7))]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(VAEConfig(base_dim=16)).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: "whole" if t is None else t.mode)
@pytest.mark.parametrize("chunk_bytes", [1, 32 << 20])
def test_the_prediction_is_what_a_run_takes(
    vae: WanVAE, dtype: torch.dtype, tiling: Tiling | None, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = vae.to(dtype)
    monkeypatch.setattr(vae, "chunk_bytes", chunk_bytes)
    z, video = make_input(1, 16, 3, 11, 14, dtype=dtype), make_input(1, 3, 9, 88, 112, dtype=dtype)
    for kind, x in (("decode", z), ("encode", video)):
        taken = measured_bytes(lambda: getattr(vae, kind)(x, tiling), CPU)  # noqa: B023
        assert peak_bytes(vae, kind, tuple(x.shape), tiling) == pytest.approx(taken, rel=0.15), kind
    taken = measured_bytes(lambda: [None for _ in vae.decode_frames(z, tiling)], CPU)
    assert peak_bytes(vae, "decode", tuple(z.shape), tiling, frames=True) == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(6, 7), (3, 3)], ids=["few", "many"])
def test_a_long_clip_in_feathered_tiles_takes_what_is_predicted(
    dtype: torch.dtype, stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the tiles, or their sum, weigh more than what the layers hold."""
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(base_dim=8, num_res_blocks=1)).eval().to(dtype)
    monkeypatch.setattr(vae, "chunk_bytes", 1)
    z = make_input(1, 16, 9, 11, 14, dtype=dtype)
    tiling = Tiling(tile=(8, 8), stride=stride)
    for frames, call in (
        (False, lambda: vae.decode(z, tiling)),
        (True, lambda: [None for _ in vae.decode_frames(z, tiling)]),
    ):
        taken = measured_bytes(call, CPU)
        assert peak_bytes(vae, "decode", tuple(z.shape), tiling, frames) == pytest.approx(taken, rel=0.15), frames


def test_pieces_and_tiles_bound_memory(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip four times as long takes hardly more besides its frames, and a tile a fraction."""
    monkeypatch.setattr(vae, "chunk_bytes", 1)
    short, long = (peak_bytes(vae, "decode", (1, 16, n, 30, 52), frames=True) for n in (5, 20))
    assert long < 1.05 * short
    tiled = peak_bytes(vae, "decode", (1, 16, 5, 30, 52), Tiling(tile=(8, 8), mode="exact"), frames=True)
    assert tiled < 0.4 * short


def test_auto_is_whole_where_that_fits_else_the_largest_tiles_that_do(vae: WanVAE) -> None:
    shape = (1, 16, 3, 20, 30)
    whole = peak_bytes(vae, "decode", shape)
    assert resolve(vae, "decode", shape, Tiling.auto(whole)) is None
    found = resolve(vae, "decode", shape, Tiling.auto(whole - 1))
    assert found is not None and found.mode == "exact" and found.tile[0] <= 20 and found.tile[1] <= 30
    assert peak_bytes(vae, "decode", shape, found) <= whole - 1
    smaller = resolve(vae, "decode", shape, Tiling.auto(whole // 3))
    assert smaller is not None and smaller.tile[0] * smaller.tile[1] < found.tile[0] * found.tile[1]
    assert peak_bytes(vae, "decode", shape, smaller) <= whole // 3
    with pytest.raises(ValueError, match=r"GiB in the smallest tiles.*smaller height and width"):
        resolve(vae, "decode", shape, Tiling.auto(1000))


@pytest.mark.parametrize(
    ("kind", "shape", "diffusers_mib"), [("decode", (1, 16, 5, 16, 28), 301), ("encode", (1, 3, 17, 128, 224), 224.7)]
)
def test_the_published_size_takes_less_than_diffusers(kind: str, shape: tuple[int, ...], diffusers_mib: float) -> None:
    """bf16 on the CPU; diffusers' figures are bench vae's (bench/results/vae-cpu.json)."""
    with torch.device("meta"):
        full = WanVAE().to(torch.bfloat16)
    full.adds = True
    assert peak_bytes(full, kind, shape) < 0.81 * diffusers_mib * 2**20


def test_auto_answers_soon(vae: WanVAE) -> None:
    """The published size at 720p, where nothing fits: plans the smallest tiles, not each grid."""
    with torch.device("meta"):
        full = WanVAE()
    start = time.perf_counter()
    with pytest.raises(ValueError, match="smallest tiles"):
        resolve(full, "decode", (1, 16, 21, 90, 160), Tiling.auto(1 << 20), frames=True)
    assert time.perf_counter() - start < 20


def test_frames_that_leave_count_for_nothing(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "chunk_bytes", 1)
    shape = (1, 16, 40, 6, 8)
    memory = peak_bytes(vae, "decode", shape, frames=True)
    assert memory < peak_bytes(vae, "decode", shape)
    assert resolve(vae, "decode", shape, Tiling.auto(memory), frames=True) is None
    assert (
        resolve(
            vae,
            "decode",
            (1, 16, 40, 12, 16),
            Tiling.auto(peak_bytes(vae, "decode", (1, 16, 40, 12, 16), frames=True)),
            frames=True,
        )
        is None
    )


def test_weights_are_those_on_the_device_each_once(vae: WanVAE) -> None:
    layer = torch.nn.Linear(10, 10)
    layer.register_buffer("scale", torch.zeros(5))
    tied = torch.nn.Linear(10, 10)
    tied.weight = layer.weight
    elsewhere = torch.nn.Linear(10, 10, device="meta")
    assert weight_bytes(CPU, layer, tied, None, elsewhere) == 4 * (100 + 10 + 5 + 10)


def test_auto_changes_no_result(vae: WanVAE) -> None:
    vae = vae.float()
    z = make_input(1, 16, 2, 8, 10)
    memory = peak_bytes(vae, "decode", tuple(z.shape)) * 3 // 4
    assert vae.resolve("decode", tuple(z.shape), Tiling.auto(memory)) is not None
    assert relative_error(vae.decode(z, Tiling.auto(memory)), vae.decode(z)) < 1e-5
    video = make_input(1, 3, 5, 128, 160).clamp(-1, 1)
    memory = peak_bytes(vae, "encode", tuple(video.shape)) * 9 // 10
    assert vae.resolve("encode", tuple(video.shape), Tiling.auto(memory)) is not None
    assert relative_error(vae.encode(video, Tiling.auto(memory)), vae.encode(video)) < 1e-5


def test_auto_by_itself_plans_with_the_device_less_the_weights(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 16, 3, 20, 30)
    weights = sum(p.numel() * p.element_size() for p in vae.parameters())
    for spare, whole in ((0, True), (-1, False)):
        monkeypatch.setattr(
            vae_memory, "usable_memory", lambda _, spare=spare: peak_bytes(vae, "decode", shape) + weights + spare
        )
        assert (resolve(vae, "decode", shape, Tiling.auto()) is None) == whole


def test_the_machine_has_memory() -> None:
    assert 2**28 < vae_memory.usable_memory(CPU) < 2**50


@pytest.mark.parametrize(
    ("given", "message"), [({"mode": "auto", "memory": 0}, "memory=0"), ({"memory": 5}, "'auto' only")]
)
def test_bad_budgets_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiling(**given)  # type: ignore[arg-type]
