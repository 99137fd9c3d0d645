"""bench/ after the measuring: comparing results and versions, tables in documents, a GPU script."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from pusa_fast import cli
from pusa_fast.commands import bench as command

ROOT = Path(__file__).parents[2]
harness, compare, report, run_e2e = (command.load(name) for name in ("harness", "compare", "report", "run_e2e"))


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *words])


def card(gpu: str | None = None, date: str = "2026-01-01 00:00 UTC") -> dict[str, Any]:
    return {
        "device": "cuda" if gpu else "cpu", "gpu": {"name": gpu} if gpu else None,
        "cpu": {"model": "Mill", "threads": 2, "isa": "AVX2"}, "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef", "dirty": False, "date": date,
    }  # fmt: skip


def row(provider: str, median: float, spread: float = 0.1, **more: Any) -> dict[str, Any]:
    return {
        "op": "rms_norm", "kernel": "K4", "shape": "14b-480p", "dtype": "bf16", "provider": provider, "status": "ok",
        "bytes": 1000, "median_us": median, "p20_us": median * (1 - spread), "p80_us": median * (1 + spread), "n": 9,
        "gbps": 4000.0, "percent_of_copy": 93.0, "over_eager": 3.5, **more,
    }  # fmt: skip


def ops_result(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "bench": "ops",
        "card": card(),
        "quick": False,
        "complete": True,
        "peaks": {"copy": {"gbps": 4300.0}},
        "rows": list(rows),
        **more,
    }


def write(path: Path, result: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def test_two_files_are_compared(tmp_path: Path) -> None:
    before = write(
        tmp_path / "a.json",
        ops_result(row("pusa", 100.0), row("eager", 400.0), row("pusa[triton]", 100.0, 0.5), row("gone", 1.0)),
    )
    after = write(
        tmp_path / "b.json", ops_result(row("pusa", 50.0), row("eager", 440.0), row("pusa[triton]", 90.0, 0.5))
    )
    out = tmp_path / "c.json"
    answer = run("compare", before, after, "--out", str(out))
    assert answer.exit_code == 0, answer.stderr
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text())
    found = {r["name"].split()[-1]: r for r in result["rows"]}
    assert set(found) == {"pusa", "eager", "pusa[triton]"}
    assert (found["pusa"]["ratio"], found["pusa"]["verdict"]) == (0.5, "faster")
    assert (found["pusa"]["low"], found["pusa"]["high"]) == (
        pytest.approx(45 / 110, rel=1e-3),
        pytest.approx(55 / 90, rel=1e-3),
    )
    assert found["pusa[triton]"]["verdict"] == "same" and found["eager"]["verdict"] == "same"
    assert result["drift"] == pytest.approx(1.1)
    slower = compare.ratios(compare.times(ops_result(row("pusa", 50.0))), compare.times(ops_result(row("pusa", 100.0))))
    assert slower[0]["verdict"] == "slower"


def test_times_of_every_kind_of_result_are_found() -> None:
    spread = {"median": 2.0, "p20": 1.0, "p80": 3.0}
    attention = {
        "op": "attention",
        "kind": "self",
        "direction": "forward",
        "shape": "s",
        "dtype": "bf16",
        "provider": "sdpa",
    }
    timed = {f"{key}_ms": value for key, value in spread.items()}
    assert compare.times({"rows": [{**attention, **timed}]}) == {
        "attention self forward s bf16 sdpa": (0.002, 0.001, 0.003)
    }
    assert compare.times({"bf16": {"seconds": {"pusa": spread}}}) == {"bf16 pusa": (2.0, 1.0, 3.0)}
    e2e = {
        "forward": {"seconds": spread},
        "runs": [{"run": "warm", "stages_s": {"decode": 4.0}}, {"run": "cold", "status": "failed"}],
    }
    assert compare.times(e2e) == {"forward pusa": (2.0, 1.0, 3.0), "warm decode pusa": (4.0, 4.0, 4.0)}
    dit = {"rows": [{"shape": "s", "provider": "pusa", "forward": spread}], "bf16": {"speedup": 2.0}}
    assert compare.times(dit) == {"s pusa": (2.0, 1.0, 3.0)}
    vae = {
        "bf16": {"decode": {"seconds": {"pusa": spread}}},
        "rows": [{"direction": "encode", "shape": "s", "provider": "pusa", **timed}],
    }
    assert compare.times(vae) == {"encode s pusa": (0.002, 0.001, 0.003), "bf16 decode pusa": (2.0, 1.0, 3.0)}


def test_files_that_cannot_be_compared(tmp_path: Path) -> None:
    ours = write(tmp_path / "a.json", ops_result(row("pusa", 1.0)))
    other = write(tmp_path / "b.json", {**ops_result(), "bench": "dit"})
    assert "is a result of bench ops" in run("compare", ours, other).stderr
    assert "have no measurement in common" in run("compare", ours, write(tmp_path / "c.json", ops_result())).stderr
    (tmp_path / "d.json").write_text("{")
    assert "d.json is not valid JSON" in run("compare", ours, str(tmp_path / "d.json")).stderr
    assert "is not a result of bench" in run("compare", ours, write(tmp_path / "e.json", [1])).stderr
    elsewhere = write(tmp_path / "f.json", ops_result(row("pusa", 1.0), card=card("NVIDIA H200")))
    assert "the ratios compare machines, not code" in run("compare", ours, elsewhere).stderr


def test_versions_are_measured_alternately(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    medians = iter((10.0, 30.0, 34.0, 12.0))

    def measure(folder: Path | None, kind: str, options: Any) -> dict[str, Any]:
        order.append(str(folder))
        assert kind == "ops" and options.providers == ("pusa", "eager")
        return ops_result(row("pusa", next(medians)))

    monkeypatch.setattr(compare, "_measure", measure)
    monkeypatch.setattr(compare, "_package", lambda ref, _: contextlib.nullcontext(ref))
    result = compare.run("old", "new", "ops", harness.Options(), rounds=2)
    assert order == ["old", "new", "new", "old"]
    (only,) = result["rows"]
    assert only["ratio"] == pytest.approx(32 / 11, rel=1e-3) and only["verdict"] == "slower"
    assert only["low"] == pytest.approx(27 / 13.2, rel=1e-3) and only["high"] == pytest.approx(37.4 / 9, rel=1e-3)
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        compare.run("old", "new", "ops", harness.Options(), rounds=0)


def test_another_version_is_imported_from_its_folder(tmp_path: Path) -> None:
    """An editable install comes first on the path: the measured package must not be this one."""
    (tmp_path / "pusa_fast").mkdir()
    (tmp_path / "pusa_fast" / "__init__.py").write_text("__version__ = 'other'")
    use = f"from bench.__main__ import use_package; use_package({str(tmp_path)!r})"
    source = f"{use}; import pusa_fast; print(pusa_fast.__version__)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "other", done.stderr


# Tables.


def documents(
    root: Path, *results: dict[str, Any], text: str = "# T\n\n<!-- bench:ops -->\nold\n<!-- /bench:ops -->\ntail\n"
) -> Path:
    for number, result in enumerate(results):
        write(root / "bench" / "results" / f"{number}.json", result)
    (root / "README.md").write_text(text)
    return root


def test_tables_are_made_from_results(tmp_path: Path) -> None:
    stale = ops_result(row("pusa", 999.0), card=card("NVIDIA H200", "2026-01-01 00:00 UTC"))
    fresh = ops_result(row("pusa", 123.4), row("eager", 456.0), card=card("NVIDIA H200", "2026-02-01 00:00 UTC"))
    quick = ops_result(row("pusa", 777.0), quick=True, card=card("NVIDIA H200", "2026-03-01 00:00 UTC"))
    on_cpu = ops_result(row("pusa", 55.0), complete=False)
    root = documents(tmp_path, on_cpu, fresh, stale, quick)
    assert report.run(check=True, root=root)["changed"] == ["README.md"]
    assert "old" in (root / "README.md").read_text()
    assert report.run(root=root) == {"bench": "report", "check": False, "changed": ["README.md"], "results": 3}
    text = (root / "README.md").read_text()
    assert text.startswith("# T\n\n<!-- bench:ops -->\nNVIDIA H200; torch 2.13.0; commit 0123456789; 2026-02-01.\n")
    assert text.endswith("<!-- /bench:ops -->\ntail\n")
    assert "| `rms_norm` | 14b-480p bf16 | 123 (111-136) | 4000 | 93 % | 3.50x |" in text
    assert not [other for other in ("999", "777", "456") if f"| {other} (" in text]
    assert (
        text.index("NVIDIA H200") < text.index("Mill, 2 threads, AVX2") and "Incomplete: the run was cut short" in text
    )
    assert report.run(root=root)["changed"] == [] == report.run(check=True, root=root)["changed"]
    assert (root / "README.md").read_text() == text


def test_every_table_without_and_with_results(tmp_path: Path) -> None:
    marked = "\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->" for name in report.TABLES)
    root = documents(tmp_path, text=marked)
    report.run(root=root)
    empty = (root / "README.md").read_text()
    assert (
        empty.count("No results yet") == 7 and "Not compiled yet" in empty and "No GPU has measured these yet" in empty
    )

    spread = {"median": 2.0, "p20": 1.0, "p80": 3.0}
    attention = {
        "kind": "self", "direction": "forward", "shape": "14b-480p", "dtype": "bf16", "provider": "fa3",
        "status": "ok", "tflops": 640.0, **{f"{key}_ms": value for key, value in spread.items()}, "over_sdpa": 1.9,
    }  # fmt: skip
    ratios = {"speedup": 1.7, "speedup_scalar": 1.2, "x_floor": 1.25, "peak_ratio": 0.6}
    sizes = {"blocks": 2, "shape": "1.3b-2k", "tokens": 2048, "frames": 4, "text_tokens": 512}
    block = {
        "shape": "14b-480p",
        "provider": "pusa",
        "status": "ok",
        "block_ms": spread,
        "forward_s": 2.51,
        "peak_gib": 9.0,
    }
    clip = {"run": "warm", "status": "ok", "stages_s": {"text": 0.1, "decode": 1.3}, "total_s": 12.0, "peak_gib": 60.0}
    passes = {"decode": {**ratios, "x_floor_packed": 1.3, "ms_per_frame": {"pusa": 123.4}}}
    tiled = {
        "direction": "decode", "shape": "17x128x224", "dtype": "bf16", "provider": "pusa feather", "status": "ok",
        **{f"{k}_ms": v for k, v in spread.items()}, "ms_per_frame": 0.12, "peak_mib": 80.0, "predicted_mib": 84.0,
        "psnr_pusa_db": 31.4, "seam": 1.07,
    }  # fmt: skip
    large = {
        "direction": "decode",
        "shape": "81x720x1280",
        "dtype": "bf16",
        "provider": "diffusers",
        "status": "failed",
        "reason": "out of memory",
    }
    forward = {"tokens": 32760, "seconds": spread, "x_roofline": 1.05, "roofline_s": {"total": 2.4}}
    named = {"quick": False, "complete": True}
    write(root / "bench/results/ops.json", ops_result(row("pusa", 1.0), card=card("NVIDIA H200")))
    write(
        root / "bench/results/attention.json",
        {"bench": "attention", "card": card("NVIDIA H200"), "rows": [attention], **named},
    )
    write(
        root / "bench/results/dit.json",
        {"bench": "dit", "card": card(), "fp32": ratios, "bf16": ratios, **sizes, **named},
    )
    write(
        root / "bench/results/dit-gpu.json",
        {"bench": "dit", "card": card("NVIDIA H200"), "rows": [block], "scaling": "2 and 4 blocks timed", **named},
    )
    vae = {
        "bench": "vae",
        "clip": "17x128x224",
        "blend_speedup": 12.34,
        "rows": [tiled, {"provider": "x", "status": "skipped", "reason": "r"}],
        "fp32": passes,
    }
    write(root / "bench/results/vae.json", {"card": card(), **vae, **named})
    for size in ("480p", "720p"):
        rows = [{**large, "shape": size}]
        write(
            root / f"bench/results/vae-{size}.json",
            {"bench": "vae", "card": card("NVIDIA H200"), "rows": rows, "size": size, **named},
        )
    e2e = {
        "bench": "e2e",
        "card": card("NVIDIA H200"),
        "model": "wan2.1-t2v-14b",
        "random_weights": True,
        "size": "480p",
        "steps": 4,
    }
    write(root / "bench/results/e2e.json", {**e2e, "runs": [clip], "forward": forward, **named})
    compiled = {
        "kernel": "k",
        "op": "rms_norm",
        "variant": "",
        "model": "14B",
        "warps": 4,
        "registers": 64,
        "spills": 0,
        "shared": 16,
    }
    write(
        root / "bench/results/ahead_of_time.json",
        [
            {**compiled, "arch": 100},
            {**compiled, "arch": 90, "registers": 60},
            {**compiled, "arch": 90, "registers": 65, "model": "nano"},
        ],
    )
    drift = {
        "psnr_db": {"mean": 35.26, "min": 31.0},
        "same_direction": {"mean": 0.75},
        "end_apart_px": {"mean": 0.5, "max": 1.25},
    }
    numerics = {
        "model": "nano",
        "clips_compared": 4,
        "emulated": True,
        "blocks": {"fp8": [0.0123, 0.034]},
        "clips": {"fp8, t2v": drift},
    }
    write(root / "bench/results/numerics.json", {"bench": "numerics", "card": card(), **numerics, **named})
    step = {
        "seconds": {"pusa": spread, "reference": spread},
        "peak_mib": {"pusa": 244.1, "reference": 338.4},
        "planned_step_mib": 244.3,
    }
    write(
        root / "bench/results/train.json",
        {"bench": "train", "card": card(), "batch": 32, "rank": 16, "tokens": 2560, "speedup": 1.413, **step, **named},
    )
    gpu = {
        "size": "480p",
        "layers": 40,
        "rank": 512,
        "seconds": spread,
        "peak_gib": 101.5,
        "planned_gib": 100.0,
        "mfu": 0.45,
    }
    write(root / "bench/results/train-gpu.json", {"bench": "train", "card": card("NVIDIA H200"), **gpu, **named})
    report.run(root=root)
    full = (root / "README.md").read_text()
    for line in (
        "| `rms_norm` | K4 | x/rms(x)*weight | 2 u + 1 row | norm.py | 93 % |",
        "| self forward | 14b-480p bf16 | fa3 | 2 (1-3) | 640 | 1.90x |",
        "| fp32 | 1.70x | 1.20x | 1.25x | 0.60x |",
        "| 14b-480p | pusa | 2 | 2.51 | 9 |",
        "| warm | 0.1 | 1.3 | 12 | 60 |",
        "| decode fp32 | 1.70x | 1.25x | 1.30x | 0.60x | 123.4 |",
        "True size, 17x128x224.",
        "Blending and finishing a tiled decode: 12.3 times as fast",
        "| decode 17x128x224 bf16 | pusa feather | 2 (1-3) | 0.12 | 80 | 84 | 31.4 |  | 1.07 |",
        "| decode 480p bf16 | diffusers | failed: out of memory |",
        "| decode 720p bf16 | diffusers | failed: out of memory |",
        "One forward of 32760 tokens: 2 s (1-3), 1.05 times the 2.4 s",
        "| kernel, 14B | op | warps | sm_90 | sm_100 |",
        "| `k` | rms_norm | 4 | 60 / 0 / 16 | 64 / 0 / 16 |",
        "| relative error of | block 1 | velocity |",
        "| fp8 | 0.012 | 0.034 |",
        "| fp8, t2v | 35.3 (31.0) | 75 % | 0.50 (1.25) |",
        "| pusa | 2.000 (1.000-3.000) | 244.1 |",
        "1.41 times as fast as the reference's formulation. `train --plan` had said 244.3 MiB.",
        "| 480p | 40 | 512 | 2.00 | 101.5 | 100 | 0.45 |",
        "nano, 4 clips of each task, against float32. fp8 emulated.",
        "Other sizes (nano): at most 65 registers, 0 spills, 16 bytes",
    ):
        assert line in full, f"{line}\n{full}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:speed -->\n<!-- /bench:speed -->", "README.md: table bench:speed does not exist: choose from ops"),
        ("<!-- bench:ops -->\n", "README.md: <!-- bench:ops --> is not closed"),
        ("<!-- /bench:ops -->\n", "do not match"),
        ("<!-- bench:ops --><!-- bench:dit -->", "do not match"),
        ("<!-- bench:ops --><!-- /bench:dit -->", "do not match"),
    ],
)
def test_bad_markers_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.run(root=documents(tmp_path, text=text))


def test_check_fails_where_a_table_is_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "run", lambda check: {"bench": "report", "changed": ["README.md"]})
    result = run("report", "--check")
    assert (result.exit_code, result.stdout) == (
        2,
        "",
    ) and "out of date: README.md: run pusa-fast bench report" in result.stderr


def test_the_tables_of_this_checkout_are_up_to_date() -> None:
    assert report.run(check=True)["changed"] == []


# The script for a GPU.


def test_the_gpu_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    """With a stand-in for Python that records its arguments and fails."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >>{calls}\necho >>{calls}\nexit 3\n')
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    script = str(ROOT / "bench" / "on_gpu.sh")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t")[:-1] for line in calls.read_text().splitlines()]
    assert [words[1] for words in lines] == ["pybind11", "pytest", *["bench"] * 10]
    for words in lines[2:]:
        options = harness.Options.from_json(words[3])
        assert words[2] in harness.RUNS and options.device == "cuda" and options.seconds >= 30
        assert Path(options.out).parent == tmp_path / "out"
        assert words[2] != "e2e" or run_e2e._plan(replace(options, device="cuda"), torch.device("cuda"))["steps"] == 4
    assert done.stdout.count("exit 3") == 12
    assert [harness.Options.from_json(words[3]).size for words in lines[2:] if words[2] == "vae"] == ["480p", "720p"]
    wrong = subprocess.run([script, "speed"], env=environment, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "speed: no such step" in wrong.stderr
