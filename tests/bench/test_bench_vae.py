"""`bench vae`: the gate, the floor's convolutions, quality figures, ways to run it as rows, and the result's shape."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pusa_fast import Tiling, VAEConfig, WanVAE
from pusa_fast.commands import bench as command
from pusa_fast.model.vae.layers import FrameAttention
from pusa_fast.ops import registry

CPU = torch.device("cpu")
TINY = VAEConfig(base_dim=8)
harness, run_vae, models, variants, quality = (
    command.load(name) for name in ("harness", "run_vae", "vae_models", "vae_variants", "vae_quality")
)
Candidate, Clip = variants.Candidate, models.Clip
SMALL = Clip(5, 32, 48, tile=(3, 4), stride=(2, 3))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return models.our_model(TINY, torch.float32, CPU)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def measured(run: Any, quick: bool = True, **more: Any) -> dict[str, Any]:
    options = harness.Options("cpu", quick, **more)
    recorder = harness.Recorder("vae", options, CPU)
    run(options, recorder, TINY)
    result: dict[str, Any] = json.loads(json.dumps(recorder.result, allow_nan=False))
    return result


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module of that name, whether or not there is one."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


# Models and the gate.


def test_no_parameter_is_left_at_a_constant(vae: WanVAE) -> None:
    for name, parameter in vae.named_parameters():
        assert len(parameter.unique()) == parameter.numel() or len(parameter.unique()) > 0.9 * parameter.numel(), name
    pixels = models.plain(vae, "decode", models.make_input(vae, "decode", SMALL))
    assert float(pixels.std()) > 0.2 and float((pixels.abs() == 1).float().mean()) < 0.01, "the clamp would hide errors"


def test_the_models_share_weights_but_not_memory(vae: WanVAE) -> None:
    theirs = models.their_model(vae)
    own = {tensor.data_ptr() for tensor in vae.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    assert not [tensor for tensor in (*theirs.parameters(), *theirs.buffers()) if tensor.is_meta]


def test_the_gate_passes_and_both_directions_are_in_it(vae: WanVAE) -> None:
    found = models.check(vae, models.their_model(vae))
    assert found.keys() == {f"{who} {direction}" for who in ("pusa", "diffusers") for direction in models.DIRECTIONS}
    assert all(0 < error < 1e-5 for error in found.values())


@pytest.mark.parametrize("direction", ["encoder", "decoder"])
@pytest.mark.parametrize("who", ["pusa", "diffusers"])
def test_the_gate_sees_a_wrong_weight(who: str, direction: str) -> None:
    vae = models.our_model(TINY, torch.float32, CPU)
    theirs = models.their_model(vae)
    wrong = getattr(theirs, direction).mid_block.resnets[1].conv2.bias
    if who == "pusa":  # in what runs, not in what the oracle is made from
        wrong = None
        vae.encode, vae.decode = (_off(getattr(vae, name)) for name in ("encode", "decode"))  # type: ignore[method-assign]
    else:
        wrong[0] += 1e-2
    with pytest.raises(AssertionError, match=f"{who}, .*exceeds the budget"):
        models.check(vae, theirs, Clip(5, 16, 24))


def _off(call: Any) -> Any:
    def run(x: Tensor, tiling: Any = None) -> Tensor:
        value: Tensor = call(x, tiling)
        value[:, :, -1] += 1e-4
        return value

    return run


def test_a_difference_at_the_measured_size_ends_the_run(monkeypatch: pytest.MonkeyPatch, vae: WanVAE) -> None:
    theirs = models.their_model(vae)
    theirs.post_quant_conv.bias += 1.0
    with pytest.raises(AssertionError, match="pusa, decode of 5x32x48 computes something else"):
        run_vae._direction_cpu(vae, theirs, "decode", SMALL, CPU, True)


# The floor.


@pytest.mark.parametrize(("height", "width", "decode", "encode"), [(480, 832, 275, 163), (720, 1280, 639, 381)])
def test_the_arithmetic_of_81_frames(height: int, width: int, decode: int, encode: int) -> None:
    """TFLOP of docs/performance.md, convolutions and the attention of each latent frame."""
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    clip, attention = Clip(81, height, width), 4 * (height * width // 64) ** 2 * 384 * 21
    for direction, expected in (("decode", decode), ("encode", encode)):
        total = sum(layer.flops for layer in models.conv_layers(vae, direction, clip)) + attention
        assert total / 1e12 == pytest.approx(expected, rel=0.007)


@pytest.mark.parametrize("direction", models.DIRECTIONS)
def test_the_floor_computes_every_convolution_once(vae: WanVAE, direction: str) -> None:
    """Counted by torch from what the training path really does. Of two latent frames one would stand alone, which it computes with fewer taps."""
    clip = Clip(9, 16, 24)
    x = models.make_input(vae, direction, clip)
    with FlopCounterMode(display=False) as real:
        models.plain(vae, direction, x)
    layers = models.conv_layers(vae, direction, clip)
    with FlopCounterMode(display=False) as floor:
        models.floor_call(layers)()
    counted = [
        sum(n for op, n in mode.get_flop_counts()["Global"].items() if "convolution" in str(op))
        for mode in (real, floor)
    ]
    assert counted[0] == counted[1] == sum(layer.flops for layer in layers)


def test_the_floor_reads_channels_last_inputs_and_all_weights(monkeypatch: pytest.MonkeyPatch, vae: WanVAE) -> None:
    called: list[tuple[Tensor, Tensor]] = []
    layers = models.conv_layers(vae, "encode", SMALL)
    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(models.nnf, name, lambda x, weight, *rest: called.append((x, weight)))
    models.floor_call(layers)()
    for x, weight in called:
        kind = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        assert x.is_contiguous(memory_format=kind) and weight.is_contiguous(memory_format=kind)
        assert x.untyped_storage().data_ptr() == called[0][0].untyped_storage().data_ptr(), "one buffer serves them all"
    convs = {m.weight for m in (*vae.encoder.modules(), vae.conv1) if isinstance(m, (nn.Conv2d, nn.Conv3d))}
    assert sum(weight.numel() for _, weight in called) == sum(weight.numel() for weight in convs)


def test_packed_convolutions_compute_the_same(vae: WanVAE) -> None:
    for layer in models.conv_layers(vae, "encode", Clip(5, 16, 16)):
        x = models._channels_last(torch.randn(math.prod(layer.size)), layer.size)
        torch.testing.assert_close(models._packed(layer, x)(), models._plain(layer, x)(), rtol=1e-4, atol=1e-5)


def test_large_convolutions_are_cut_along_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_PIECE", 4 * 3 * 5 * 5)
    causal, halves, picture = (
        nn.Conv3d(3, 2, 3, padding=(0, 1, 1)),
        nn.Conv3d(3, 2, (3, 1, 1), stride=(2, 1, 1)),
        nn.Conv2d(3, 2, 3),
    )
    for module, size, frames in (
        (causal, (1, 3, 9, 5, 5), [4, 4, 4, 3]),
        (halves, (1, 3, 9, 5, 5), [3, 3, 3, 3]),
        (picture, (9, 3, 5, 5), [4, 4, 1]),
    ):
        layer = models.Layer(module, size)
        pieces = list(layer.pieces())
        assert [piece[0 if len(size) == 4 else 2] for piece in pieces] == frames
        assert sum(models.Layer(module, piece).flops for piece in pieces) == layer.flops
    monkeypatch.undo()
    assert list(models.Layer(causal, (1, 3, 9, 5, 5)).pieces()) == [(1, 3, 9, 5, 5)]


def test_a_convolution_that_the_floor_would_miss_is_named(monkeypatch: pytest.MonkeyPatch, vae: WanVAE) -> None:
    monkeypatch.setattr(FrameAttention, "forward", lambda self, x, cache=None: x)
    with pytest.raises(AssertionError, match=r"did not call: \['decoder.middle.1.proj', 'decoder.middle.1.to_qkv'\]"):
        models.conv_layers(vae, "decode", SMALL)


# Quality.


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert quality.psnr(a + 0.02, a) == pytest.approx(40, abs=1e-4) and quality.psnr(a, a.clone()) is None


def test_where_tiles_meet() -> None:
    assert quality.tile_lines(16, 12, 8, 1) == [8, 12] and quality.tile_lines(28, 16, 12, 8) == [96, 128]
    assert quality.tile_lines(8, 8, 8, 8) == []


def test_the_seam_metric_by_hand() -> None:
    """An error that rises by 1 from pixel to pixel, and by 5 more across the border: 6 against 1 in one direction."""
    columns = torch.arange(6.0)
    columns[4:] += 5
    error = columns.expand(1, 1, 2, 6)
    assert quality.seam(error, (), (4,)) == pytest.approx(
        6 / (4 * 2 / (4 * 2 + 6))
    )  # six vertical neighbours do not differ
    assert quality.seam(error.mT, (4,), ()) == quality.seam(error, (), (4,))
    assert quality.seam(error, (), (2,)) < 1
    smooth = torch.arange(6.0).expand(1, 1, 6, 6) + torch.arange(6.0)[:, None]
    assert quality.seam(smooth, (2, 4), (3,)) == pytest.approx(1)
    assert quality.seam(torch.zeros(1, 1, 4, 4), (2,), (2,)) is None and quality.seam(error, (), ()) is None


# Ways to run it.


def test_what_goes_wrong_is_a_finding_and_not_timed() -> None:
    x = torch.linspace(-1, 1, 3 * 2 * 4 * 4).view(1, 3, 2, 4, 4)
    called: list[str] = []

    def gives(name: str, value: Tensor) -> Any:
        return lambda: called.append(name) or value

    def exhausted() -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    rows = {
        row["provider"]: row
        for row in variants.compare(
            [
                Candidate("diffusers", gives("diffusers", x)),
                Candidate("diffusers tiled", gives("tiled", x), instead_of="diffusers"),
                Candidate("pusa", gives("pusa", x + 1e-7)),
                Candidate("blended", gives("blended", x + 0.02), approximate=True, lines=([2], [2])),
                Candidate("wrong", gives("wrong", x + 0.02)),
                Candidate("large", exhausted),
                Candidate("absent", reason="not built"),
            ],
            SimpleNamespace(frames=2), CPU, 0.0, min_rounds=2, max_rounds=2,
        )
    }  # fmt: skip
    assert "diffusers tiled" not in rows and "tiled" not in called
    assert "computes something else" in rows["wrong"]["reason"] and rows["large"]["reason"].startswith(
        "OutOfMemoryError: CUDA out of memory. Tried"
    )
    assert rows["absent"] == {"provider": "absent", "status": "skipped", "reason": "not built"}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {
        name for name, row in rows.items() if "median_ms" in row
    }
    assert called.count("wrong") == 1 and called.count("pusa") == 4  # value, peak, two rounds
    blended = rows["blended"]
    assert blended["psnr_pusa_db"] == pytest.approx(40, abs=0.01) == blended["psnr_diffusers_db"]
    assert (
        blended["ms_per_frame"] == pytest.approx(blended["median_ms"] / 2, rel=1e-3)
        and {"over_pusa", "over_diffusers", "seam"} <= blended.keys()
    )
    assert "over_pusa" not in rows["pusa"] and rows["pusa"]["n"] == 2


def test_diffusers_tiles_where_whole_does_not_fit(vae: WanVAE) -> None:
    theirs, x = models.their_model(vae), torch.randn(1, 16, 1, 33, 4)
    tiled = models.their_call(theirs, TINY, "decode", x, tiled=True)
    fails = Candidate("diffusers", lambda: 1 / 0)
    rows = variants.compare([fails, Candidate("diffusers tiled", tiled, instead_of="diffusers")], SMALL, CPU, 0.0, 1, 1)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    whole = models.their_call(theirs, TINY, "decode", x)()
    assert not torch.equal(whole, tiled()) and torch.equal(whole, models.their_call(theirs, TINY, "decode", x)())


def test_tiles_are_compared_along_their_borders(monkeypatch: pytest.MonkeyPatch, vae: WanVAE) -> None:
    x = models.make_input(vae, "decode", SMALL)
    feather, *_ = variants.tilings(vae, "decode", x, SMALL)
    assert feather.lines == ([16, 24], [24, 32]) and feather.approximate
    assert torch.equal(feather.call(), vae.decode(x, Tiling((3, 4), (2, 3))))
    feather, *_ = variants.tilings(vae, "encode", models.make_input(vae, "encode", SMALL), SMALL)
    assert feather.lines == ([2, 3], [3, 4])

    def only_feather(tile: Any, stride: Any, mode: str) -> Tiling:
        if mode != "feather":
            raise ValueError("Tiling.mode is unknown")
        return Tiling(tile, stride)

    monkeypatch.setattr(variants, "Tiling", only_feather)
    _, exact = variants.tilings(vae, "decode", x, SMALL)
    assert (exact.call, exact.reason) == (None, "Tiling.mode is unknown")
    monkeypatch.undo()
    _, exact = variants.tilings(vae, "decode", x, SMALL)
    assert not exact.approximate, "exact has to give what whole gives"
    assert exact.lines == ([24], [32]), "tiles side by side, whatever the stride"
    assert torch.equal(exact.call(), vae.decode(x, Tiling((3, 4), mode="exact")))


def test_the_size_of_a_chunk_is_set_for_the_call_only() -> None:
    clip = Clip(5, 32, 48, chunks=(1 << 20, 1 << 21))
    able = SimpleNamespace(chunk_bytes=None, decode=lambda x, tiling: able.chunk_bytes)
    found = list(variants.chunk_sizes(able, "decode", torch.empty(0), clip))
    assert [c.name for c in found] == ["pusa chunks of 1 MiB", "pusa chunks of 2 MiB"]
    assert [c.call() for c in found] == [1 << 20, 1 << 21] and able.chunk_bytes is None
    unable = SimpleNamespace(decode=None)
    assert all(
        c.call is None and "no chunk_bytes" in c.reason
        for c in variants.chunk_sizes(unable, "decode", torch.empty(0), clip)
    )


def test_predicted_peaks_stand_beside_measured_ones(monkeypatch: pytest.MonkeyPatch, vae: WanVAE) -> None:
    asked: list[Any] = []
    pretend(monkeypatch, "pusa_fast.model.vae.memory", peak_bytes=lambda *given: asked.append(given) or 3 << 20)
    x = models.make_input(vae, "encode", SMALL)
    (row,) = variants.compare([variants.whole(vae, "encode", x)], SMALL, CPU, 0.0, 1, 1)
    assert asked == [(vae, "encode", (1, 3, 5, 32, 48), None)] and row["predicted_mib"] == 3
    assert row["predicted_over_measured"] == pytest.approx(3 / row["peak_mib"], rel=1e-2)
    assert variants.no_memory_model() == []
    monkeypatch.setattr(variants, "_MEMORY_MODEL", "pusa_fast.model.nothing")
    assert variants.predicted_peak(vae, "encode", x, None) is None
    assert "there is no pusa_fast.model.nothing" in variants.no_memory_model()[0]["reason"]


# Whole runs.


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "bench.vae_blend", run=lambda quick: {"blend_speedup": 12.5, "quick": quick})
    monkeypatch.setattr(run_vae, "CPU_QUICK", SMALL)
    result = measured(run_vae.run, dtypes=("fp32", "bf16"))
    for dtype in ("fp32", "bf16"):
        for direction in ("decode", "encode"):
            own = result[dtype][direction]
            assert {"speedup", "x_floor", "peak_ratio"} <= own.keys() and "meets" not in own, (
                "not the size that was promised"
            )
            assert (
                own["seconds"].keys()
                == own["gflops"].keys()
                == {"pusa", "diffusers", "floor"} | ({"floor packed"} if dtype == "bf16" else set())
            )
            assert own["peak_mib"]["pusa"] / own["peak_mib"]["diffusers"] == pytest.approx(own["peak_ratio"], rel=1e-2)
            assert own["ms_per_frame"]["pusa"] == pytest.approx(own["seconds"]["pusa"]["median"] * 1e3 / 5, rel=1e-2)
    assert (result["blend_speedup"], result["blend"]["quick"], result["clip"]) == (12.5, True, "5x32x48")
    rows = {(row["provider"], row.get("direction")): row for row in result["rows"]}
    for direction in ("decode", "encode"):
        assert rows["pusa", direction]["status"] == rows["pusa feather", direction]["status"] == "ok"
        assert rows["pusa feather", direction]["seam"] > 0 and rows["pusa feather", direction]["dtype"] == "bf16"
        assert not [row for row in rows.values() if row["status"] == "failed"]
        assert all(row["reason"] for row in rows.values() if row["status"] == "skipped")
    assert rows["pusa feather", "decode"]["psnr_pusa_db"] > 5
    assert result["targets"]["bf16"]["speedup"] == 1.6 and set(result["relative_error"]) == {"fp32", "bf16"}


@pytest.mark.skipif(not registry.ONEDNN_BF16, reason="takes minutes without bf16 in oneDNN")
def test_the_path_of_a_gpu_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_vae, "SIZES", {"480p": (32, 48), "720p": (48, 64)})
    real, made = run_vae.floor_call, []
    monkeypatch.setattr(run_vae, "floor_call", lambda layers: made.append(len(layers)) or real(layers))
    result = measured(run_vae._run_cuda, size="720p")
    assert {row["shape"] for row in result["rows"] if "shape" in row} == {"17x48x64"}
    assert made == [39, 32], "the floor of each direction is laid out once, before it is timed"
    rows = {(row["provider"], row.get("direction")): row for row in result["rows"]}
    for direction in ("decode", "encode"):
        assert all(rows[name, direction]["status"] == "ok" for name in ("pusa", "pusa feather", "diffusers", "floor"))
        assert ("diffusers tiled", direction) not in rows
        speedup = result["bf16"][direction]["speedup"]
        assert speedup == pytest.approx(1 / rows["pusa", direction]["over_diffusers"], rel=1e-3)
        assert result["bf16"][direction]["x_floor"] == rows["pusa", direction]["over_floor"]
    assert rows["pusa", "decode"]["psnr_diffusers_db"] > 20 and "psnr_diffusers_db" not in rows["pusa", "encode"]
    with pytest.raises(ValueError, match="on a GPU bench vae measures one dtype a run, here fp32"):
        measured(run_vae._run_cuda, dtypes=("fp32", "bf16"))


def test_out_of_time_is_said_and_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_vae, "_models", lambda *_: pytest.fail("a model was made"))
    pretend(monkeypatch, "bench.vae_blend", run=lambda quick: pytest.fail("blending was measured"))
    result = measured(run_vae.run, seconds=1e-9)
    assert not {"fp32", "bf16"} & result.keys() and result["blend"]["status"] == "skipped"
    assert "fp32 left out: out of time" in capfd.readouterr().err


def test_blending_that_is_not_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_vae.importlib.util.find_spec
    monkeypatch.setattr(
        run_vae.importlib.util, "find_spec", lambda name: None if name == "bench.vae_blend" else real(name)
    )
    recorder = harness.Recorder("vae", harness.Options(), CPU)
    run_vae._blend(recorder, True)
    assert recorder.result["blend_speedup"] is None and recorder.result["blend"]["status"] == "missing"


def test_what_was_promised_of_the_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"speedup": 1.3, "x_floor": 1.25, "peak_ratio": 0.99}
    assert all(run_vae.meets("fp32", good).values())
    for name, value in (("speedup", 1.29), ("x_floor", 1.26), ("peak_ratio", 1.0)):
        assert not run_vae.meets("fp32", {**good, name: value})[name.removesuffix("_ratio")]
    assert (
        not run_vae.meets("bf16", {**good, "speedup": 1.59})["speedup"]
        and run_vae.meets("bf16", {**good, "speedup": 1.6})["speedup"]
    )
    pretend(monkeypatch, "bench.vae_blend", run=lambda quick: {"blend_speedup": 9.9})
    recorder = harness.Recorder("vae", harness.Options(), CPU)
    run_vae._blend(recorder, False)
    assert recorder.result["blend"]["meets"] == {"blend_speedup": False}


def test_at_the_promised_size_the_aims_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = {"speedup": 1.4, "x_floor": 1.3, "peak_ratio": 0.5, "seconds": {}, "ms_per_frame": {}, "peak_mib": {}}
    monkeypatch.setattr(run_vae, "_direction_cpu", lambda *_: dict(figures))
    recorder = harness.Recorder("vae", harness.Options(out=str(tmp_path / "r.json")), CPU)
    run_vae._compare_cpu(None, None, run_vae.CPU_CLIP, "bf16", recorder, False, promised=True)
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["bf16"]["decode"]["meets"] == {"speedup": False, "x_floor": False, "peak": True}


def test_figures_by_hand() -> None:
    seconds = {"pusa": [2.0, 2.0], "diffusers": [3.0, 3.0], "floor": [1.6, 1.6], "floor packed": [1.0, 1.0]}
    layers = [models.Layer(nn.Conv2d(3, 2, 3), (9, 3, 5, 5))]  # 2 * 9 frames * 3x3 places * 3x3 taps * 3 * 2 channels
    found = run_vae._figures(seconds, {"pusa": 100 << 20, "diffusers": 200 << 20}, layers, SMALL, 110 << 20)
    assert [
        found[name] for name in ("speedup", "x_floor", "x_floor_packed", "peak_ratio", "predicted_over_measured_peak")
    ] == [1.5, 1.25, 2, 0.5, 1.1]
    assert found["ms_per_frame"]["pusa"] == 400 and found["gflops"]["floor packed"] == pytest.approx(8748e-9, rel=1e-3)
    assert found["peak_mib"] == {"pusa": 100, "diffusers": 200} and "speedup" not in run_vae._figures(
        {"pusa": [1.0], "floor": [1.0]}, {"pusa": 1}, layers, SMALL, None
    )
