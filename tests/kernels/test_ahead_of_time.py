"""Every Triton kernel compiled at the shapes of 14B, 1.3B and nano, without a GPU: none spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # a minute a GPU

ROOT = Path(__file__).resolve().parents[2]
OPS = {
    "residual_norm",
    "residual_norm_backward",
    "gated_residual",
    "gated_residual_backward",
    "rms_norm",
    "rms_norm_backward",
    "qk_rope",
    "qk_rope_backward",
    "guided_euler_step",
    "noise_and_target",
    "flow_loss",
    "flow_loss_backward",
}
FP8_OPS = {"residual_norm_fp8", "quantize_rows", "gelu_quantize_rows"}

# What is added to x, and how its norm is modulated: Triton 3.6 once compiled 6 of 21 forms.
FORMS = {f"{r}, {n}" for r in ("gate", "no gate", "no y") for n in ("modulation", "affine", "bare")}

# 128 numbers a thread are needed twice, and 64 registers allowed.
SPILLING = """
import torch, triton, triton.language as tl
from bench.ahead_of_time import compiling, faults, resources

@triton.jit
def centre(x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    values = tl.load(x + offsets)
    tl.store(x + offsets, values - tl.sum(values))

with compiling(90) as launches:
    centre[(1,)](torch.empty(4096, device="meta"), N=4096, num_warps=1, maxnreg=64)
found = resources(launches[0])
assert found.spills > 0 and found.registers == 64, found
record = {"arch": 90, "registers": 255, "spills": found.spills, "shared": 228 << 10, "warps": 16}
assert [fault.split()[1] for fault in faults(record)] == ["spills", "bytes", "registers"], faults(record)
"""

# Triton meets a name that is nowhere; the other form is as it should be.
BROKEN = """
import torch, triton, triton.language as tl
from bench import ahead_of_time

@triton.jit
def double(x, BROKEN: tl.constexpr):
    factor = nowhere if BROKEN else 2
    tl.store(x, tl.load(x) * factor)

def call(model, broken):
    double[(1,)](model.stream(), BROKEN=broken)

case = ahead_of_time.Case
forms = [case("double", str(broken), lambda m, broken=broken: call(m, broken)) for broken in (True, False)]
ahead_of_time.cases_of = lambda model: forms
good, bad = ahead_of_time.measure([90], ["nano"])
assert (good["variant"], good["registers"] > 0, ahead_of_time.faults(good)) == ("False", True, []), good
assert (bad["variant"], bad["arch"]) == ("True", 90), bad
(fault,) = ahead_of_time.faults(bad)
assert fault.startswith("does not compile:") and "nowhere" in fault, fault
assert "double: False" in ahead_of_time.table([good, bad])
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python in a process whose Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("source", [SPILLING, BROKEN], ids=["spilling", "broken"])
def test_a_faulty_kernel_is_seen(source: str, tmp_path: Path) -> None:
    """Triton reads a kernel's source from its file."""
    script = tmp_path / "faulty.py"
    script.write_text(source, encoding="utf-8")
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_fit(arch: int, tmp_path: Path) -> None:
    """No spill, room in shared memory and registers; forward kernels move 16 bytes at a time."""
    done = run("-m", "bench.ahead_of_time", "--arch", str(arch), "--json", tmp_path / "records.json")
    assert done.returncode == 0, done.stdout + done.stderr
    records: list[dict[str, Any]] = json.loads((tmp_path / "records.json").read_text(encoding="utf-8"))
    for model in ("14B", "1.3B", "nano"):
        assert {r["op"] for r in records if r["model"] == model} == (OPS if arch < 89 else OPS | FP8_OPS)
        for op in {"residual_norm", "residual_norm_backward", "residual_norm_fp8"} & {r["op"] for r in records}:
            found = {r["variant"].split("; ")[0] for r in records if r["model"] == model and r["op"] == op}
            assert found == FORMS, op
    assert not any(r["spills"] for r in records)
    stages = [r for r in records if r["op"] == "vae_act"]
    assert {(r["dim"], r["dtype"]) for r in stages} >= {(c, t) for c in (96, 192, 384) for t in ("bfloat16", "float32")}
    assert {r["dim"] for r in stages} >= {8, 16, 32, 64}
    for r in stages:
        if r["dim"] >= 96:
            assert r["loads_16"] and r["stores_16"] and not r["narrow"], r
    wide = [r for r in records if r["model"] == "14B" and r["forward"]]
    assert {r["dim"] for r in wide} == {5120} and {r["dtype"] for r in wide} == {"bfloat16"}
    for r in wide:
        assert r["loads_16"] and not r["narrow"], r
        assert r["stores_16"] or r["fp8"], r  # 8 elements of e4m3 are 8 bytes
