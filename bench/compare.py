"""`bench compare`: two result files, or two versions measured alternately, as ratios with a band.

A ratio is time after over time before. Its band goes from (p20 after / p80 before) to (p80 after /
p20 before): a band that includes 1 shows nothing. Providers that are not ours did not change, so
their median ratio is the machine's own drift.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import harness
from bench.card import ROOT, machine
from bench.harness import Options, Recorder
from bench.timing import percentile, significant

Row = dict[str, Any]
Times = dict[str, tuple[float, float, float]]  # name -> median, p20, p80 in seconds

WORKING_TREE = "."


def run(before: str, after: str, kind: str, options: Options, rounds: int = 2) -> Row:
    """Compare two JSON files, or two git refs (".": the working tree). ValueError: neither."""
    recorder = Recorder("compare", replace(options, out=None), harness.resolve_device("cpu"))
    if Path(before).is_file() and Path(after).is_file():
        first, second = read(before), read(after)
        if first["bench"] != second["bench"]:
            raise ValueError(
                f"{before} is a result of bench {first['bench']}, {after} one of {second['bench']}: give two of a kind"
            )
        if machine(first["card"]) != machine(second["card"]):
            recorder.note(
                f"warning: {machine(first['card'])}, {machine(second['card'])}: the ratios compare machines, not code"
            )
        kind, pair = first["bench"], (times(first), times(second))
    else:
        harness.choose("kind", (kind,), list(harness.RUNS), ())
        pair = _measure_refs(before, after, kind, options, rounds, recorder)
    rows = ratios(*pair)
    if not rows:
        raise ValueError(f"{before} and {after} have no measurement in common")
    result = {"bench": "compare", "kind": kind, "before": before, "after": after, "drift": drift(rows), "rows": rows}
    _show(recorder, result)
    return result


def read(path: str | Path) -> Row:
    """A result file. Raises ValueError for anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): give a file that bench --out wrote") from None
    if not isinstance(found, dict) or "bench" not in found or "card" not in found:
        raise ValueError(f"{path} is not a result of bench: give a file that bench --out wrote")
    return found


def times(result: Row) -> Times:
    """Every time in a result, by a name that is the same in all results of its kind."""
    found: Times = {}
    for name, value, unit in _spreads(result):
        found[name] = (value["median"] * unit, value["p20"] * unit, value["p80"] * unit)
    return found


def _spreads(result: Row) -> Iterator[tuple[str, Mapping[str, float], float]]:
    for row in result.get("rows", ()):
        words = [str(row[key]) for key in ("op", "kind", "direction", "shape", "dtype", "provider") if key in row]
        name = " ".join(words)
        if "median_us" in row:
            yield name, {key: row[f"{key}_us"] for key in ("median", "p20", "p80")}, 1e-6
        elif "median_ms" in row:
            yield name, {key: row[f"{key}_ms"] for key in ("median", "p20", "p80")}, 1e-3
        elif "forward" in row:
            yield name, row["forward"], 1.0
    for dtype in ("fp32", "bf16"):
        found = result.get(dtype, {})
        for part, own in (
            ("", found),
            *((f" {direction}", found.get(direction, {})) for direction in ("decode", "encode")),
        ):
            for provider, value in own.get("seconds", {}).items():
                yield f"{dtype}{part} {provider}", value, 1.0
    if "forward" in result:
        yield "forward pusa", result["forward"]["seconds"], 1.0
    for row in result.get("runs", ()):
        for stage, spent in row.get("stages_s", {}).items():
            yield f"{row['run']} {stage} pusa", dict.fromkeys(("median", "p20", "p80"), spent), 1.0


def ratios(before: Times, after: Times) -> list[Row]:
    """One row for each name that both have."""
    rows = []
    for name in (name for name in before if name in after):
        (m0, low0, high0), (m1, low1, high1) = before[name], after[name]
        low, high = low1 / high0, high1 / low0
        verdict = "same" if low <= 1 <= high else "faster" if high < 1 else "slower"
        row = {"name": name, "before_s": m0, "after_s": m1, "ratio": m1 / m0, "low": low, "high": high}
        rows.append(
            {**{key: value if key == "name" else significant(value) for key, value in row.items()}, "verdict": verdict}
        )
    return rows


def drift(rows: list[Row]) -> float | None:
    """Median ratio of the providers that are not ours: the machine's own change in speed."""
    others = [
        row["ratio"]
        for row in rows
        if "pusa" not in row["name"].split() and not any(w.startswith("pusa[") for w in row["name"].split())
    ]
    return significant(percentile(others, 50)) if others else None


def pooled(runs: list[Times]) -> Times:
    """Several runs of one version: the median of medians and the widest spread."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {
        name: (
            percentile([run[name][0] for run in runs], 50),
            min(run[name][1] for run in runs),
            max(run[name][2] for run in runs),
        )
        for name in names
    }


def _measure_refs(
    before: str, after: str, kind: str, options: Options, rounds: int, recorder: Recorder
) -> tuple[Times, Times]:
    """Rounds of before, after, after, before, so that drift affects both."""
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    if not options.providers and kind == "ops":
        options = replace(options, providers=("pusa", "eager"))
    with ExitStack() as stack:
        folders = [stack.enter_context(_package(ref, recorder)) for ref in (before, after)]
        found: tuple[list[Times], list[Times]] = ([], [])
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                recorder.note(f"round {number + 1} of {rounds}: {(before, after)[which]}")
                found[which].append(times(_measure(folders[which], kind, options)))
        return pooled(found[0]), pooled(found[1])


@contextmanager
def _package(ref: str, recorder: Recorder) -> Iterator[Path | None]:
    """A folder to import pusa_fast at `ref` from, native code built; None: the working tree."""
    if ref == WORKING_TREE:
        yield None
        return
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if commit is None:
        raise ValueError(
            f"{ref} is neither a result file nor a commit of {ROOT} (the working tree is {WORKING_TREE!r})"
        )
    with tempfile.TemporaryDirectory(prefix="pusa-bench-") as folder:
        tree, target = Path(folder) / "tree", Path(folder) / "installed"
        if _git("worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise ValueError(f"{ref}: git worktree add failed")
        try:
            recorder.note(f"building {ref} ({commit[:10]})")
            words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(tree)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                recorder.note(f"warning: {ref} did not build, it runs without native code: {_last_line(done.stderr)}")
            yield tree if done.returncode else target
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _measure(folder: Path | None, kind: str, options: Options) -> Row:
    """One run in its own process; the benchmark code is always this checkout's."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PUSA_BENCH_PACKAGE"] = str(folder)
    given = {
        name: value for name, value in asdict(replace(options, out=None)).items() if value not in (None, (), False)
    }
    words = [sys.executable, "-m", "bench", kind, json.dumps(given)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"bench {kind} failed with the package in {folder or ROOT}: {_last_line(done.stderr)}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _show(recorder: Recorder, result: Row) -> None:
    lines = [
        [
            row["name"],
            f"{1e3 * row['before_s']:.4g}",
            f"{1e3 * row['after_s']:.4g}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
            row["verdict"],
        ]
        for row in result["rows"]
    ]
    title = f"{result['kind']}: {result['before']} -> {result['after']}"
    recorder.table(title, ("", "before, ms", "after, ms", "after/before", "band", ""), lines)
    if result["drift"] is not None:
        recorder.note(f"other providers (the machine's drift): {result['drift']:.3f}")
