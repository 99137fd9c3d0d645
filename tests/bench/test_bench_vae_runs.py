"""Whole runs of `bench vae`: the shape of the result, and what was promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pusa_fast import VAEConfig
from pusa_fast.commands import bench as command
from pusa_fast.ops import registry

Pretend = Callable[..., None]
CPU = torch.device("cpu")
TINY = VAEConfig(base_dim=8)


harness, run_vae, models = (command.load(name) for name in ("harness", "run_vae", "vae_models"))


SMALL = models.Clip(5, 32, 48, tile=(3, 4), stride=(2, 3))

pytestmark = pytest.mark.usefixtures("no_gradients")


def measured(run: Any, quick: bool = True, **more: Any) -> dict[str, Any]:
    options = harness.Options("cpu", quick, **more)
    recorder = harness.Recorder("vae", options, CPU)
    run(options, recorder, TINY)
    result: dict[str, Any] = json.loads(json.dumps(recorder.result, allow_nan=False))
    return result


# Whole runs.


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, pretend: Pretend) -> None:
    pretend("bench.vae_blend", run=lambda quick: {"blend_speedup": 12.5, "quick": quick})
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
    monkeypatch: pytest.MonkeyPatch, pretend: Pretend, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_vae, "_models", lambda *_: pytest.fail("a model was made"))
    pretend("bench.vae_blend", run=lambda quick: pytest.fail("blending was measured"))
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


def test_what_was_promised_of_the_vae(pretend: Pretend) -> None:
    good = {"speedup": 1.3, "x_floor": 1.25, "peak_ratio": 0.99}
    assert all(run_vae.meets("fp32", good).values())
    for name, value in (("speedup", 1.29), ("x_floor", 1.26), ("peak_ratio", 1.0)):
        assert not run_vae.meets("fp32", {**good, name: value})[name.removesuffix("_ratio")]
    assert (
        not run_vae.meets("bf16", {**good, "speedup": 1.59})["speedup"]
        and run_vae.meets("bf16", {**good, "speedup": 1.6})["speedup"]
    )
    pretend("bench.vae_blend", run=lambda quick: {"blend_speedup": 9.9})
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
