"""`pusa-fast bench`: the result on its last line, and what the command refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import pusa_fast
from pusa_fast import cli
from pusa_fast.commands import bench as command

harness, run_ops = (command.load(name) for name in ("harness", "run_ops"))

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *words])


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
