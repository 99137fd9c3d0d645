"""The transformer, whole runs, training steps and lower precisions as bench measures them."""

from __future__ import annotations

import pytest
import torch

from pusa_fast import DiTConfig, VAEConfig
from pusa_fast.commands import bench as command

harness, run_dit, run_e2e, run_numerics, dit_models = (
    command.load(name) for name in ("harness", "run_dit", "run_e2e", "run_numerics", "dit_models")
)

CPU = torch.device("cpu")


# The transformer and whole runs.


@pytest.mark.parametrize(
    ("here", "asked", "measured"), [(True, (), ["fp32", "bf16"]), (False, (), ["fp32"]), (False, ("bf16",), ["bf16"])]
)
def test_bf16_in_software_is_measured_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    here: bool,
    asked: tuple[str, ...],
    measured: list[str],
) -> None:
    monkeypatch.setattr(harness, "ONEDNN_BF16", here)
    options = harness.Options("cpu", dtypes=asked)
    assert harness.model_dtypes(options, harness.Recorder("dit", options, CPU)) == measured
    assert ("bf16 left out" in capsys.readouterr().err) == (not here and not asked)


def test_dit_quick() -> None:
    found = harness.execute("dit", harness.Options("cpu", True, dtypes=("fp32",)))
    own = found["fp32"]
    assert {"speedup", "speedup_scalar", "x_floor", "peak_ratio"} <= own.keys()
    assert own["seconds"].keys() == {"pusa", "pusa prepared", "diffusers per-token", "diffusers scalar", "floor"}
    assert own["relative_error"]["pusa per-token"] < 1e-5 and own["peak_mib"]["pusa"] > 0
    assert "meets" not in own  # another shape than the one that was promised


def test_the_dit_gate_sees_a_wrong_weight() -> None:
    dit = dit_models.our_model(DiTConfig(48, 80, 2, 1, text_dim=24, freq_dim=32), torch.float32, CPU)
    theirs = dit_models.their_model(dit)
    assert dit_models.check(dit, theirs, 5)["pusa per-token"] < 1e-5
    dit.blocks[0].cross_attn.o.bias[0] += 1e-2
    with pytest.raises(AssertionError):
        dit_models.check(dit, theirs, 5)


def test_diffusers_keeps_in_float32_what_its_loader_keeps() -> None:
    theirs = dit_models.their_model(
        dit_models.our_model(DiTConfig(48, 80, 2, 1, text_dim=24, freq_dim=32), torch.bfloat16, CPU)
    )
    kept = {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in kept and "condition_embedder.time_embedder.linear_1.weight" in kept
    assert theirs.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16 and theirs.rope.freqs_cos.dtype == torch.float32


def test_what_was_promised_of_the_transformer() -> None:
    good = {"speedup": 1.5, "speedup_scalar": 1.01, "x_floor": 1.3, "peak_ratio": 0.9, "peak_ratio_scalar": 0.9}
    assert all(run_dit.meets("fp32", good).values())
    for name, value in (("speedup", 1.49), ("speedup_scalar", 1.0), ("x_floor", 1.31), ("peak_ratio", 1.0)):
        assert not run_dit.meets("fp32", {**good, name: value})[name.replace("peak_ratio", "peak")]
    assert run_dit.meets("bf16", {**good, "speedup": 1.3})["speedup"]


def test_a_forward_is_scaled_from_two_depths() -> None:
    """1 s around the blocks, 2 s a block: 5 s with two of them, 9 s with four, 81 s with forty."""
    found = run_dit.scaled({"pusa@2": [5.0, 5.0], "pusa@4": [9.0, 9.0]}, "pusa")
    assert (found["block_ms"]["median"], found["forward_s"]) == (2000, 81)


def test_random_weights_run_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the 14B model, on a small one."""
    monkeypatch.setattr(run_e2e, "MODELS", {"small": DiTConfig(64, 128, 2, 2, text_dim=32)})
    monkeypatch.setattr(
        run_e2e, "_UMT5", {"vocab_size": 4096, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 1}
    )
    monkeypatch.setattr(run_e2e, "VAEConfig", lambda: VAEConfig(base_dim=8))
    monkeypatch.setattr(run_e2e, "SIZES", {"480p": (32, 48)})
    monkeypatch.setattr(run_e2e, "FRAMES", 5)
    options = harness.Options("cpu", random_weights=True)
    recorder = harness.Recorder("e2e", options, CPU)
    plan = {"model": "small", "random_weights": True, "size": "480p", "steps": 2}
    pipe = run_e2e._random("small", CPU, options)
    found = run_e2e._end_to_end(pipe, plan, quick=False)
    assert list(found["stages_s"]) == ["text", "encode", "denoise", "decode"] and found["status"] == "ok"
    recorder.save(runs=[{"run": "cold", **found}], **{**plan, "quick": True})
    run_e2e._forwards(pipe, plan, recorder, {"product_bf16": {"tflops": 1.0}, "copy": {"gbps": 10.0}})
    forward = recorder.result["forward"]
    assert forward["tokens"] == 2 * 2 * 3 and forward["x_roofline"] > 0
    run_e2e._show(recorder)


def test_a_training_step_beside_the_reference() -> None:
    """Loss and gradients of both formulations agree, and the plan's memory is what was measured."""
    pytest.importorskip("peft")
    found = harness.execute("train", harness.Options("cpu", True))
    assert found["relative_error"]["loss"] < 1e-5 and found["relative_error"]["gradient"] < 1e-3
    assert found["speedup"] > 0 and found["peak_mib"]["pusa"] < found["peak_mib"]["reference"]
    assert found["planned_step_mib"] == pytest.approx(found["peak_mib"]["pusa"], rel=0.1)


def test_lower_precisions_are_compared_on_the_model_as_it_is_used() -> None:
    """With nano's LoRA on all of them. Otherwise the clips would have little in common."""
    found = run_numerics.run(CPU, clips=1)
    assert found["emulated"] and list(found["blocks"]) == ["bf16", "fp8"]
    for name, blocks, psnr in (("bf16", (0.001, 0.02), 45), ("fp8", (0.005, 0.1), 30)):
        errors = found["blocks"][name]
        assert len(errors) == 6 + 1 and all(blocks[0] < error < blocks[1] for error in errors)
        for task in ("text-to-video", "image-to-video"):
            row = found["clips"][f"{name}, {task}"]
            assert row["psnr_db"]["min"] > psnr and row["same_direction"]["min"] == 1.0
