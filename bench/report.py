"""`bench report`: writes the tables between `bench:NAME` markers from bench/results/*.json.

A table goes between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.
Figures in the `DOCUMENTS` come from here and are never typed. A table shows the latest result of
each machine, GPUs first; runs with --quick are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import compare, harness
from bench.card import ROOT, machine, title
from bench.registry import FILES, OPS

Row = dict[str, Any]
Results = list[Row]

DOCUMENTS = (
    "README.md",
    "kernels/README.md",
    "bench/README.md",
    "docs/performance.md",
    "docs/numerics.md",
    "docs/training.md",
)
AHEAD_OF_TIME = "ahead_of_time.json"
_MARKER = re.compile(r"<!-- (?P<close>/?)bench:(?P<name>[a-z0-9_-]+) -->")


def run(check: bool = False, root: Path = ROOT) -> Row:
    """Rewrite the documents, or with `check` only compare. ValueError: a bad file or marker."""
    results, registers = load(root / "bench" / "results")
    changed = []
    for name in DOCUMENTS:
        path = root / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        fresh = render(text, results, registers, name)
        if fresh != text:
            changed.append(name)
            if not check:
                harness.write_text(path, fresh)
    return {"bench": "report", "check": check, "changed": changed, "results": len(results)}


def load(folder: Path) -> tuple[Results, list[Row]]:
    """(results of runs, newest last; the kernels' registers). ValueError for any other file."""
    results: Results = []
    registers: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        if path.name == AHEAD_OF_TIME:
            registers = json.loads(path.read_text(encoding="utf-8"))
        else:
            results.append(compare.read(path))
    results.sort(key=lambda result: (result["card"]["date"], result["bench"]))
    return [result for result in results if not result.get("quick")], registers


def render(text: str, results: Results, registers: list[Row], where: str) -> str:
    """`text` with every marked table replaced. ValueError for an unknown or unclosed table."""
    out, position, opened = [], 0, ""
    for marker in _MARKER.finditer(text):
        name, closing = marker["name"], bool(marker["close"])
        if name not in TABLES:
            raise ValueError(f"{where}: table bench:{name} does not exist: choose from {', '.join(TABLES)}")
        if closing != bool(opened) or (closing and name != opened):
            raise ValueError(
                f"{where}: <!-- bench:{opened or name} --> and <!-- /bench:{opened or name} --> do not match"
            )
        if closing:
            out.append(f"\n{TABLES[name](results, registers).strip()}\n{marker.group()}")
            opened = ""
        else:
            out.append(text[position : marker.end()])
            opened = name
        position = marker.end()
    if opened:
        raise ValueError(f"{where}: <!-- bench:{opened} --> is not closed")
    return "".join([*out, text[position:]])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def latest(results: Results, kind: str) -> Results:
    """The last result of each machine (and of what `_APART` names), GPUs first."""
    found: dict[tuple[str, ...], Row] = {}
    for result in results:
        if result["bench"] == kind:
            what = tuple(str(result.get(key)) for key in _APART.get(kind, ()))
            found[machine(result["card"]), *what] = result
    return sorted(found.values(), key=lambda result: result["card"]["gpu"] is None)


_APART = {"e2e": ("model", "size"), "vae": ("size",), "train": ("size",)}


def _sections(results: Results, kind: str, table: Callable[[Row], str]) -> str:
    parts = []
    for result in latest(results, kind):
        note = "" if result.get("complete") else " Incomplete: the run was cut short."
        parts.append(f"{title(result['card'])}.{note}\n\n{table(result)}")
    return "\n\n".join(parts) or (
        f"No results yet: `pusa-fast bench {kind} --out bench/results/{kind}.json`, then `pusa-fast bench report`."
    )


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _ops(results: Results, _: list[Row]) -> str:
    return _sections(results, "ops", _ops_table)


def _ops_table(result: Row) -> str:
    """Ours, one row per op and shape; the other providers' rows are in the result file."""
    rows = [
        [
            f"`{row['op']}`",
            f"{row['shape']} {row['dtype']}",
            f"{row['median_us']:.0f} ({row['p20_us']:.0f}-{row['p80_us']:.0f})",
            f"{row['gbps']:.4g}",
            f"{row['percent_of_copy']:.0f} %",
            *(_times(row.get(f"over_{other}")) for other in _OTHERS),
        ]
        if row["status"] == "ok"
        else [
            f"`{row['op']}`",
            f"{row['shape']} {row['dtype']}",
            f"{row['status']}: {row['reason']}",
            "",
            "",
            *("" for _ in _OTHERS),
        ]
        for row in result["rows"]
        if row["provider"] == "pusa" and row["status"] != "skipped"
    ]
    columns = ("op", "shape", "us (p20-p80)", "GB/s", "of copy", *(f"faster than {other}" for other in _OTHERS))
    return f"{markdown(columns, rows)}\n\nCopy bandwidth of that run: {result['peaks']['copy']['gbps']:g} GB/s."


_OTHERS = ("eager", "torch.compile", "per-token", "reference")


def _attention(results: Results, _: list[Row]) -> str:
    return _sections(results, "attention", _attention_table)


def _attention_table(result: Row) -> str:
    rows = [
        [
            f"{row['kind']} {row['direction']}",
            f"{row['shape']} {row['dtype']}",
            row["provider"] + (" (lossy)" if row.get("lossy") else ""),
            f"{row['median_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g})"
            if "tflops" in row
            else f"{row['status']}: {row['reason']}",
            f"{row['tflops']:.3g}" if "tflops" in row else "",
            _times(row.get("over_sdpa")),
        ]
        for row in result["rows"]
        if row["status"] in ("ok", "failed")
    ]
    return markdown(("case", "shape", "backend", "ms (p20-p80)", "TFLOP/s", "faster than sdpa"), rows)


def _dit(results: Results, _: list[Row]) -> str:
    return _sections(results, "dit", lambda result: (_dit_cuda if result["card"]["gpu"] else _dit_cpu)(result))


def _dit_cpu(result: Row) -> str:
    columns = (
        "dtype",
        "faster than diffusers per token",
        "than its scalar forward",
        "time over matmuls and attention",
        "peak memory over diffusers'",
    )
    rows = [
        [
            dtype,
            *(
                f"{found[key]:.2f}x" if key in found else ""
                for key in ("speedup", "speedup_scalar", "x_floor", "peak_ratio")
            ),
        ]
        for dtype in ("fp32", "bf16")
        if (found := result.get(dtype))
    ]
    tokens = f"{result['tokens']} tokens in {result['frames']} frames, {result['text_tokens']} text tokens"
    return f"{markdown(columns, rows)}\n\n{result['blocks']} blocks, {result['shape']}: {tokens}."


def _dit_cuda(result: Row) -> str:
    rows = [
        [
            row["shape"],
            row["provider"],
            f"{row['block_ms']['median']:.4g}" if "block_ms" in row else "",
            f"{row['forward_s']:.4g}" if "forward_s" in row else f"{row['status']}: {row['reason']}",
            f"{row['peak_gib']:.3g}" if "peak_gib" in row else "",
        ]
        for row in result["rows"]
        if row["status"] in ("ok", "failed") and "provider" in row
    ]
    columns = ("shape", "forward", "block, ms", "40 blocks, s", "peak GiB (4 blocks)")
    return f"{markdown(columns, rows)}\n\n{result['scaling']}."


def _vae(results: Results, _: list[Row]) -> str:
    return _sections(results, "vae", lambda result: (_vae_rows if result["card"]["gpu"] else _vae_cpu)(result))


def _vae_cpu(result: Row) -> str:
    columns = (
        "",
        "faster than diffusers",
        "time over bare convolutions",
        "over those with packed weights",
        "peak memory over diffusers'",
        "ms a frame",
    )
    rows = [
        [
            f"{direction} {dtype}",
            *(_times(own.get(key)) for key in ("speedup", "x_floor", "x_floor_packed", "peak_ratio")),
            f"{own['ms_per_frame']['pusa']:.4g}",
        ]
        for dtype in ("fp32", "bf16")
        for direction, own in result.get(dtype, {}).items()
    ]
    text = f"True size, {result['clip']}.\n\n{markdown(columns, rows)}"
    if result.get("blend_speedup") is not None:
        times = f"{result['blend_speedup']:.3g} times as fast as the reference's torch code"
        text += f"\n\nBlending and finishing a tiled decode: {times}."
    return f"{text}\n\n{_vae_rows(result)}" if result.get("rows") else text


def _vae_rows(result: Row) -> str:
    """Every way to run it: time, memory, distance from the whole clip's and diffusers' pixels."""
    columns = (
        "",
        "how",
        "ms (p20-p80)",
        "ms a frame",
        "peak MiB",
        "predicted peak",
        "PSNR to whole, dB",
        "to diffusers, dB",
        "seam",
    )
    rows = [
        [
            f"{row['direction']} {row['shape']} {row['dtype']}",
            row["provider"],
            f"{row['median_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g})"
            if "median_ms" in row
            else f"{row['status']}: {row['reason']}",
            *(
                f"{row[key]:.4g}" if key in row else ""
                for key in ("ms_per_frame", "peak_mib", "predicted_mib", "psnr_pusa_db", "psnr_diffusers_db", "seam")
            ),
        ]
        for row in result["rows"]
        if row["status"] in ("ok", "failed")
    ]
    return markdown(columns, rows)


def _e2e(results: Results, _: list[Row]) -> str:
    return _sections(results, "e2e", _e2e_table)


def _e2e_table(result: Row) -> str:
    stages = list(dict.fromkeys(stage for row in result["runs"] for stage in row.get("stages_s", ())))
    rows = [
        [
            row["run"],
            *(f"{row['stages_s'][stage]:.4g}" if stage in row["stages_s"] else "" for stage in stages),
            f"{row['total_s']:.4g}",
            f"{row['peak_gib']:.3g}",
        ]
        if row["status"] == "ok"
        else [row["run"], *("" for _ in stages), f"{row['status']}: {row['reason']}", ""]
        for row in result["runs"]
    ]
    weights = " with random weights" if result["random_weights"] else ""
    what = f"{result['model']}{weights}, {result['size'] or 'its own size'}, {result['steps']} steps."
    text = f"{what}\n\n{markdown(('run, seconds', *stages, 'total', 'peak GiB'), rows)}"
    forward = result.get("forward")
    if forward:
        own = forward["seconds"]
        text += (
            f"\n\nOne forward of {forward['tokens']} tokens: {own['median']:.4g} s ({own['p20']:.4g}-{own['p80']:.4g})"
        )
        if "roofline_s" in forward:
            ideal = forward["roofline_s"]["total"]
            text += f", {forward['x_roofline']:.2f} times the {ideal:.4g} s at the rates measured in that run"
        text += "."
    return text


def _kernels(results: Results, _: list[Row]) -> str:
    """Every op: formula, bytes moved, file, share of the copy bandwidth if a GPU measured it."""
    gpus = [result for result in latest(results, "ops") if result["card"]["gpu"]]
    rows = []
    for op in OPS.values():
        near = [
            f"{row['percent_of_copy']:.0f} %"
            for row in (gpus[0]["rows"] if gpus else ())
            if row["op"] == op.name
            and row["provider"] == "pusa"
            and row["shape"] == "14b-480p"
            and "percent_of_copy" in row
        ]
        moves = " + ".join(f"{count:g} {unit}" for unit, count in op.moves.items())
        rows.append(
            [
                f"`{op.name}`",
                op.kernel,
                op.formula,
                moves,
                FILES[op.kernel.split()[0]],
                near[0] if near else "not measured",
            ]
        )
    foot = f"Measured on {title(gpus[0]['card'])}." if gpus else "No GPU has measured these yet."
    columns = ("op", "kernel", "formula", "one pass moves", "file", "of copy bandwidth, 14B 480p")
    return f"{markdown(columns, rows)}\n\n{foot}"


def _registers(_: Results, registers: list[Row]) -> str:
    """Kernels compiled ahead of time, by architecture: `_SHOWN_MODELS`, other sizes in one line."""
    if not registers:
        return f"Not compiled yet: `python -m bench.ahead_of_time --json bench/results/{AHEAD_OF_TIME}`."
    arches = sorted({int(row["arch"]) for row in registers})
    text = "Registers a thread / spills / bytes of shared memory, compiled without a GPU."
    for model in _SHOWN_MODELS:
        cells: dict[tuple[str, ...], dict[int, str]] = {}
        for row in registers:
            if row["model"] == model:
                key = (f"`{row['kernel']}`", ": ".join(filter(None, (row["op"], row["variant"]))), str(row["warps"]))
                cells.setdefault(key, {})[int(row["arch"])] = f"{row['registers']} / {row['spills']} / {row['shared']}"
        rows = [[*key, *(found.get(arch, "") for arch in arches)] for key, found in cells.items()]
        if rows:
            text += "\n\n" + markdown((f"kernel, {model}", "op", "warps", *(f"sm_{arch}" for arch in arches)), rows)
    others = [row for row in registers if row["model"] not in _SHOWN_MODELS]
    if others:
        most = [max(row[what] for row in others) for what in ("registers", "spills", "shared")]
        names = ", ".join(dict.fromkeys(row["model"].split()[0] for row in others))
        text += f"\n\nOther sizes ({names}): at most {most[0]} registers, {most[1]} spills, {most[2]} bytes of shared "
        text += "memory."
    return text


def _numerics(results: Results, _: list[Row]) -> str:
    return _sections(results, "numerics", _numerics_table)


def _numerics_table(result: Row) -> str:
    """Errors of the residual stream by depth, then their effect on clips; all against float32."""
    depth = len(next(iter(result["blocks"].values()))) - 1
    columns = ("relative error of", *(f"block {i + 1}" for i in range(depth)), "velocity")
    blocks = [[name, *(f"{error:.2g}" for error in errors)] for name, errors in result["blocks"].items()]
    clips = [
        [
            name,
            f"{found['psnr_db']['mean']:.1f} ({found['psnr_db']['min']:.1f})",
            f"{100 * found['same_direction']['mean']:.0f} %",
            f"{found['end_apart_px']['mean']:.2f} ({found['end_apart_px']['max']:.2f})",
        ]
        for name, found in result["clips"].items()
    ]
    heads = ("clips", "PSNR dB, mean (worst)", "same direction", "end positions apart, px, mean (worst)")
    emulated = " fp8 emulated." if result["emulated"] else ""
    what = f"{result['model']}, {result['clips_compared']} clips of each task, against float32.{emulated}"
    return f"{markdown(columns, blocks)}\n\n{markdown(heads, clips)}\n\n{what}"


_SHOWN_MODELS = ("14B", "VAE 96 bfloat16")


def _train(results: Results, _: list[Row]) -> str:
    return _sections(results, "train", lambda result: (_train_cuda if result["card"]["gpu"] else _train_cpu)(result))


def _train_cpu(result: Row) -> str:
    rows = [
        [name, f"{own['median']:.3f} ({own['p20']:.3f}-{own['p80']:.3f})", f"{result['peak_mib'][name]:.4g}"]
        for name, own in result["seconds"].items()
    ]
    text = f"nano, {result['batch']} clips ({result['tokens']} tokens), LoRA of rank {result['rank']}, float32.\n\n"
    text += markdown(("formulation", "s a step (p20-p80)", "peak MiB beyond weights"), rows)
    faster = f"{result['speedup']:.2f} times as fast as the reference's formulation. " if "speedup" in result else ""
    return f"{text}\n\n{faster}`train --plan` had said {result['planned_step_mib']:.4g} MiB."


def _train_cuda(result: Row) -> str:
    own = result["seconds"]
    cells = [
        result["size"],
        str(result["layers"]),
        str(result["rank"]),
        f"{own['median']:.2f}",
        f"{result['peak_gib']:.4g}",
        f"{result['planned_gib']:.4g}",
    ]
    columns = ("clip", "blocks", "rank", "s a step", "peak GiB", "planned GiB", "MFU")
    table = markdown(columns, [[*cells, str(result["mfu"])]])
    return f"14B shapes, random weights, one clip of 81 frames a step.\n\n{table}"


TABLES: Mapping[str, Callable[[Results, list[Row]], str]] = {
    "ops": _ops,
    "attention": _attention,
    "dit": _dit,
    "vae": _vae,
    "e2e": _e2e,
    "kernels": _kernels,
    "registers": _registers,
    "numerics": _numerics,
    "train": _train,
}
