"""`pusa-fast bench`: measurements, from a checkout. Its options are parsed here, since nothing but
them is in the package.

stdout ends with one JSON document; everything else goes to stderr.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import typer

import pusa_fast
from pusa_fast.commands.parser import command
from pusa_fast.errors import ArgumentError
from pusa_fast.options import declared, option

app = typer.Typer(help="Measure: ops, attention, the transformer, the VAE, whole runs. Works in a checkout only.")

Names = list[str] | None


@dataclass(frozen=True, kw_only=True)
class Common:
    device: str | None = option("Where (default: a GPU where there is one).", "cpu|cuda")
    quick: bool = option("Tiny sizes, warm caches: shows that it runs, not how fast.", default=False)
    out: str | None = option("Also write the result there, step by step.", "FILE")


@dataclass(frozen=True, kw_only=True)
class Timed(Common):
    seconds: float | None = option("Start nothing new after that many seconds.")


@dataclass(frozen=True, kw_only=True)
class Typed(Timed):
    dtype: Names = option("Repeatable (default: both on a CPU, bf16 on a GPU).", "fp32|bf16", key="dtypes")


@dataclass(frozen=True, kw_only=True)
class Shaped(Typed):
    shape: Names = option("14b-480p, 14b-720p, 1.3b-480p, 1.3b-2k, tiny. Repeatable.", key="shapes")


@dataclass(frozen=True, kw_only=True)
class Provided(Shaped):
    provider: Names = option("Who computes it (default all). Repeatable.", key="providers")


@dataclass(frozen=True, kw_only=True)
class Ops(Provided):
    op: Names = option("Default all. Repeatable.", key="ops")


@dataclass(frozen=True, kw_only=True)
class Sized(Typed):
    size: str | None = option("On a GPU: 81 frames of 832x480 or 1280x720 (default both; train: 480p).", "480p|720p")


@dataclass(frozen=True, kw_only=True)
class Train(Timed):
    size: str | None = option("On a GPU: 81 frames of 832x480 or 1280x720 (default both; train: 480p).", "480p|720p")


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Timed):
    model: str | None = option("nano, a model's folder, or with --random-weights a size.", "NAME|DIR")
    random_weights: bool = option("A model of that size, made up: times, no pictures.", default=False)
    size: str | None = option("81 frames of 832x480 or 1280x720 (default 480p).", "480p|720p")
    steps: int | None = option("Denoising steps (default 4).")
    precision: str | None = option("Of the transformer's matmuls.", "fp8")


@dataclass(frozen=True, kw_only=True)
class Compare(Ops):
    before: str = option("A result file, or a git ref.", argument=True, default=MISSING)
    after: str = option('Likewise. "." is the working tree.', argument=True, default=MISSING)
    kind: str = option("What to measure, for git refs.", default="ops")
    rounds: int = option("Runs of each, alternating, for git refs.", default=2)


@dataclass(frozen=True, kw_only=True)
class Report:
    check: bool = option("Change nothing; fail where a table is out of date.", default=False)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# Command -> its options and its help.
_KINDS: dict[str, tuple[type[Common], str]] = {
    "ops": (
        Ops,
        "Each op: time, GB/s, per cent of the copy bandwidth of the same run; next to plain torch, torch.compile and "
        "others' formulations.",
    ),
    "attention": (Provided, "Every attention backend that can be used here, forward and backward."),
    "dit": (
        Shaped,
        "A forward of the transformer next to diffusers' on the same weights, and to its bare matmuls and attention.",
    ),
    "vae": (
        Sized,
        "Encode and decode next to diffusers' VAE on the same weights and to the bare convolutions; tilings and chunk "
        "sizes.",
    ),
    "e2e": (EndToEnd, "Whole runs with their stages, and forwards next to the roofline."),
    "train": (
        Train,
        "A step of LoRA training: on the CPU nano next to the reference's formulation, on a GPU 14B at rank 512.",
    ),
    "numerics": (Common, "What bf16 and fp8 cost in accuracy against float32, on nano."),
}


def _add(kind: str, options: type[Common], text: str) -> None:
    def run(given: Common) -> None:
        harness = load("harness")
        with harness.quiet_stdout():
            result = harness.execute(kind, _harness_options(given))
        harness.print_json(result)

    run.__name__, run.__doc__ = kind, text
    command(app, options)(run)


def _harness_options(given: Common, *without: str) -> Any:
    kind: type = type(given)
    values = {o.key: getattr(given, o.name) for o in declared(kind).values() if o.name not in without}
    if (seconds := values.get("seconds")) is not None and not seconds >= 1:
        raise ArgumentError("seconds", f" must be at least 1, got {seconds:g}")
    lists = {"ops", "shapes", "dtypes", "providers"}
    filled = {key: tuple(value or ()) if key in lists else value for key, value in values.items()}
    return load("harness").Options(**filled)


for _kind, (_options, _text) in _KINDS.items():
    _add(_kind, _options, _text)


@command(app, Compare)
def compare(given: Compare) -> None:
    """Two results, or two versions measured now: ratios with a noise band."""
    harness = load("harness")
    options = _harness_options(given, "before", "after", "kind", "rounds", "out")
    with harness.quiet_stdout():
        result = load("compare").run(given.before, given.after, given.kind, options, given.rounds)
    if given.out is not None:
        harness.write_json(given.out, result)
    harness.print_json(result)


@command(app, Report)
def report(given: Report) -> None:
    """Write the tables of the documents from bench/results."""
    harness = load("harness")
    result = load("report").run(given.check)
    if given.check and result["changed"]:
        raise ValueError(f"out of date: {', '.join(result['changed'])}: run pusa-fast bench report")
    harness.print_json(result)


def load(name: str) -> Any:
    """A module of the folder bench/ next to the package. Raises ValueError outside a checkout."""
    root = checkout()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"bench.{name}")


def checkout() -> Path:
    """The folder that holds the package and bench/. Raises ValueError where the package was
    installed without it."""
    root = Path(pusa_fast.__file__).resolve().parents[1]
    if not (root / "bench" / "harness.py").is_file():
        raise ValueError(
            f"the installed package ({root / 'pusa_fast'}) carries no bench: run it from a "
            "checkout of the repository, installed with pip install -e ."
        )
    return root
