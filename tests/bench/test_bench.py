"""bench/: byte counts, timing, the correctness gate, results as JSON, and what the command refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import pusa_fast
from pusa_fast import DiTConfig, VAEConfig, cli
from pusa_fast.commands import bench as command

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
registry, providers, timing, peaks, memory, harness, run_ops, run_dit, run_e2e, run_numerics, dit_models = (
    command.load(name)
    for name in (
        "registry",
        "providers",
        "timing",
        "peaks",
        "memory",
        "harness",
        "run_ops",
        "run_dit",
        "run_e2e",
        "run_numerics",
        "dit_models",
    )
)
TINY = registry.SHAPES["tiny"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *words])


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


# Timing and memory.


def test_percentiles() -> None:
    assert [timing.percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], unit=10) == {"median": 35.0, "p20": 20.0, "p80": 50.0, "n": 6}
    with pytest.raises(ValueError, match="no samples"):
        timing.percentile([], 50)


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine got ten times slower in the middle: the quotient of medians would say 1."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.ratio([2.0, 2.0, 20.0], [1.0, 10.0, 10.0]) == 2.0


def test_rounds_interleave_and_each_starts_with_another() -> None:
    called: list[str] = []
    runs = {name: timing.Run(lambda name=name: called.append(name), lambda: called.append("reset")) for name in "abc"}
    seconds = timing.measure(runs, CPU, budget=0.0, min_rounds=3, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    order = "".join(name for name in called if name != "reset")
    assert order == "abc" + "abc" + "bca" + "cab"
    assert called[::2] == ["reset"] * 12  # before each call, warm-up included


def test_time_of_a_call_excludes_its_reset_and_the_flush() -> None:
    other = timing.Run(lambda: time.sleep(0.002), lambda: time.sleep(0.02))
    (values,) = timing.measure({"a": other}, CPU, budget=0.0, flush=lambda: time.sleep(0.02), min_rounds=3).values()
    assert 0.002 <= sorted(values)[0] < 0.02


def test_the_budget_ends_the_rounds() -> None:
    counted: dict[str, list[float]] = timing.measure(
        {"a": timing.Run(lambda: time.sleep(0.01))}, CPU, budget=0.05, min_rounds=1, warmup=0
    )
    assert 2 <= len(counted["a"]) <= 5
    assert len(timing.measure({"a": timing.Run(lambda: None)}, CPU, budget=9.0, max_rounds=4)["a"]) == 4


def test_sizes_of_caches() -> None:
    assert [timing._parse_size(text) for text in ("48K\n", "2M", "512")] == [49_152, 2 << 20, 512]
    assert timing.flush_bytes(CPU) >= 2 * 16 << 10
    assert timing.CacheFlush(CPU, enabled=False).bytes == 0


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> Tensor:
        first = torch.ones(1000)
        second = first + 1  # 8,000 bytes together
        del first
        return second * 2

    assert 8_000 <= memory.peak_bytes(call, CPU) < 8_100  # a scalar or two beside them
    assert memory._highest([100, -100, 60, 30, -60]) == 100


# The gate.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", list(registry.OPS.values()), ids=lambda op: op.name)
def test_every_formulation_computes_the_op(op: Any, dtype: torch.dtype) -> None:
    found = providers.candidates(op, CPU, quick=True)
    rows, runs = run_ops.gate(op, found, registry.Drawn(TINY, dtype, CPU))
    assert not [row for row in rows.values() if row["status"] == "failed"], rows
    assert {"pusa", "eager"} <= runs.keys()
    wanted = {name for name, entries in providers.FORMULATIONS.items() if op.name in entries}
    assert wanted <= runs.keys()
    assert all(rows[name]["error"] <= rows[name]["budget"] for name in runs)


def _broken(how: Callable[[Tensor], Tensor]) -> Any:
    """rms_norm by a formulation that is off by `how`."""

    def make(t: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (how(pusa_fast.kernels.reference.rms_norm(t["x"], t["weight"], registry.EPS)),)

    return providers.Candidate(providers.Formulation(make))


def _nan(n: Tensor) -> Tensor:
    n[0, -1, 0] = torch.nan
    return n


def _last_frame(n: Tensor) -> Tensor:
    n[:, -1] *= 1.1
    return n


def _raises(n: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal\nmemory access")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda n: n * 1.01, "output 0, frame 0: largest error"),
        (_last_frame, "output 0, frame 1: largest error"),
        (_nan, "frame 1: largest error nan"),
        (lambda n: n.double(), "output 0 is torch.float64 instead of torch.float32"),
        (lambda n: torch.empty_like(n), "largest error"),
        (_raises, "RuntimeError: CUDA error: an illegal memory access"),
    ],
    ids=["wrong", "last frame", "nan", "dtype", "unwritten", "raises"],
)
def test_a_broken_provider_does_not_pass_the_gate(how: Callable[[Tensor], Tensor], reason: str) -> None:
    rows, runs = run_ops.gate(
        registry.OPS["rms_norm"], {"broken": _broken(how)}, registry.Drawn(TINY, torch.float32, CPU)
    )
    assert rows["broken"]["status"] == "failed" and reason in rows["broken"]["reason"]
    assert not runs


def test_a_broken_provider_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, measure, timed = providers.candidates, timing.measure, []
    monkeypatch.setattr(run_ops, "candidates", lambda *given: {**real(*given), "broken": _broken(_last_frame)})
    monkeypatch.setattr(
        run_ops, "measure", lambda runs, *rest, **named: timed.extend(runs) or measure(runs, *rest, **named)
    )
    result = harness.execute("ops", harness.Options("cpu", True, ops=("rms_norm",), dtypes=("fp32",)))
    rows = {row["provider"]: row for row in result["rows"]}
    assert rows["broken"]["status"] == "failed" and "exceeds the budget" in rows["broken"]["reason"]
    assert "median_us" not in rows["broken"] and "broken" not in timed
    assert rows["pusa"]["status"] == "ok" and rows["pusa"]["median_us"] > 0 and "pusa" in timed


def test_memory_is_poisoned_before_a_provider_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that nobody wrote would often hold what the provider before computed."""
    order: list[str] = []
    monkeypatch.setattr(providers, "_poison", lambda _: order.append("poison"))
    op, t = registry.OPS["gelu"], registry.Drawn(TINY, torch.float32, CPU)
    right = pusa_fast.kernels.reference.gelu(t["hidden"])
    providers.check(op, timing.Run(lambda: order.append("call") or (right,)), t, providers.truths(op, t))
    assert order == ["poison", "call"]


def test_an_op_in_place_is_given_fresh_inputs_every_time() -> None:
    op, t = registry.OPS["qk_rope_inplace"], registry.Drawn(TINY, torch.float32, CPU)
    before = t["qkv"].clone()
    built = providers.build(op, providers.candidates(op, CPU, True)["pusa"], t)
    first = [x.clone() for x in built.call()]
    built.reset()
    assert all(torch.equal(a, b) for a, b in zip(first, built.call(), strict=True))
    assert torch.equal(t["qkv"], before)


def test_torch_compile_is_a_provider() -> None:
    op = registry.OPS["rms_norm"]
    assert providers.candidates(op, CPU, quick=True)["torch.compile"].reason is not None
    assert providers.candidates(op, CPU, quick=False)["torch.compile"].formulation is not None


# Results.


def test_the_last_line_is_the_result(tmp_path: Path) -> None:
    """A process of its own: nothing follows the document, and nothing else is on stdout."""
    out = tmp_path / "result.json"
    words = [
        "bench",
        "ops",
        "--quick",
        "--device",
        "cpu",
        "--op",
        "rms_norm",
        "--op",
        "quantize_rows",
        "--dtype",
        "bf16",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pusa_fast.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text()) and list(tmp_path.iterdir()) == [out]
    assert result["complete"] and result["quick"] and result["card"]["device"] == "cpu"
    assert {"cpu", "versions", "commit", "dirty", "date"} <= result["card"].keys() and result["card"]["gpu"] is None
    rows = {(row["op"], row["provider"]): row for row in result["rows"]}
    ours = rows["rms_norm", "pusa"]
    assert ours["gbps"] == pytest.approx(ours["bytes"] / ours["median_us"] / 1e3, rel=1e-3)
    assert ours["percent_of_copy"] == pytest.approx(100 * ours["gbps"] / result["peaks"]["copy"]["gbps"], rel=1e-2)
    assert ours["p20_us"] <= ours["median_us"] <= ours["p80_us"] and ours["over_per-token"] > 0
    assert rows["quantize_rows", "pusa"] | {"status": "skipped"} == rows["quantize_rows", "pusa"]
    assert "On the CPU, at small sizes" in done.stderr


def test_what_libraries_print_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with harness.quiet_stdout():
        print("from python")
        os.write(1, b"from C\n")
    harness.print_json({"a": 1})
    caught = capfd.readouterr()
    assert caught.out == '{"a": 1}\n' and caught.err == "from python\nfrom C\n"
    with pytest.raises(ValueError, match="Out of range float values"):
        harness.print_json({"a": float("nan")})


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result.json"
    harness.write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        harness.write_json(target, {"a": float("inf")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        harness.write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [target]


def test_out_of_time_is_said(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = harness.execute(
        "ops", harness.Options("cpu", True, str(out), seconds=1e-9, ops=("rms_norm", "gelu"), dtypes=("fp32",))
    )
    assert {row["status"] for row in result["rows"]} == {"skipped"}
    assert all("out of time" in row["reason"] for row in result["rows"])


def test_a_run_that_dies_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "result.json", run_ops.gate

    def dies(op: Any, *rest: Any) -> Any:
        if op.name == "gelu":
            raise KeyboardInterrupt
        return real(op, *rest)

    monkeypatch.setattr(run_ops, "gate", dies)
    with pytest.raises(KeyboardInterrupt):
        harness.execute("ops", harness.Options("cpu", True, str(out), ops=("rms_norm", "gelu"), dtypes=("fp32",)))
    kept = json.loads(out.read_text())
    assert not kept["complete"] and {row["op"] for row in kept["rows"]} == {"rms_norm"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ops", "--op", "softmax"), "--op softmax does not exist: choose from residual_norm_k1"),
        (("ops", "--shape", "8k"), "--shape 8k does not exist: choose from 14b-480p"),
        (("ops", "--dtype", "int4"), "--dtype int4 does not exist: choose from fp32, bf16"),
        (("ops", "--provider", "magic"), "--provider magic does not exist: choose from pusa, "),
        (("attention", "--provider", "fa9"), "--provider fa9 does not exist: choose from sdpa"),
        (("ops", "--device", "tpu"), "--device tpu is not available: choose cpu or cuda"),
        (("ops", "--out", "/nowhere/x.json"), "--out /nowhere/x.json: its folder does not exist"),
        (("ops", "--seconds", "soon"), "Invalid value for '--seconds'"),
        (
            ("dit", "--device", "cpu", "--shape", "tiny", "--shape", "1.3b-2k"),
            "--shape 1.3b-2k: on the CPU bench dit measures one shape",
        ),
        (("vae", "--device", "cpu", "--size", "480p"), "--size 480p: on the CPU bench vae measures 17x128x224 only"),
        (("vae", "--device", "cpu", "--dtype", "int4"), "--dtype int4 does not exist: choose from fp32, bf16"),
        (("e2e", "--size", "4k"), "--size 4k does not exist: choose from 480p, 720p"),
        (("e2e", "--steps", "0"), "--steps must be at least 1, got 0"),
        (("e2e", "--model", "wan2.1-t2v-14b"), "is a size, not weights: add --random-weights"),
        (("e2e", "--model", "nano", "--random-weights"), "--model nano is no size that random weights can be made of"),
        (("e2e", "--device", "cpu", "--random-weights"), "needs a GPU of 80 GB: on the CPU run --model nano"),
        (("e2e", "--precision", "fp4"), "--precision fp4 does not exist"),
        (("compare", "HEAD~9999", "HEAD"), "HEAD~9999 is neither a result file nor a commit"),
        (("compare", "HEAD", ".", "--kind", "speed"), "--kind speed does not exist: choose from ops"),
        (("speed",), "No such command 'speed'"),
    ],
)
def test_bad_arguments_are_named(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_measured() -> None:
    assert "--device cuda: this machine has no CUDA device" in run("ops", "--device", "cuda").stderr


def test_a_wheel_carries_no_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pusa_fast").mkdir()
    monkeypatch.setattr(pusa_fast, "__file__", str(tmp_path / "pusa_fast" / "__init__.py"))
    result = run("ops", "--quick")
    assert result.exit_code == 2
    assert "carries no bench: run it from a checkout" in result.stderr


def test_the_command_line_stays_light() -> None:
    source = (
        "import sys, pusa_fast.cli; print(*sorted({'torch', 'bench', 'rich.progress', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "", done.stderr
    assert "compare" in run().stdout  # help


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
    """1 s around the blocks and 2 s a block: 5 s with two of them, 9 s with four, 81 s with forty."""
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
    """With nano's LoRA on all of them: without it, or on one alone, the clips would have little in common."""
    found = run_numerics.run(CPU, clips=1)
    assert found["emulated"] and list(found["blocks"]) == ["bf16", "fp8"]
    for name, blocks, psnr in (("bf16", (0.001, 0.02), 45), ("fp8", (0.005, 0.1), 30)):
        errors = found["blocks"][name]
        assert len(errors) == 6 + 1 and all(blocks[0] < error < blocks[1] for error in errors)
        for task in ("text-to-video", "image-to-video"):
            row = found["clips"][f"{name}, {task}"]
            assert row["psnr_db"]["min"] > psnr and row["same_direction"]["min"] == 1.0
