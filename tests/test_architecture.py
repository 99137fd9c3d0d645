"""The arrows of docs/design.md section 4: which part may import which, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pusa_fast

ROOT = Path(__file__).parents[1]

_BELOW_PIPELINE = {
    *("kernels", "_native", "native", "config", "testing", "device", "ops", "attention", "_lazy"),
    *("model", "weights", "sampling", "video", "media"),
}
_ALL = {"__init__", *_BELOW_PIPELINE, "pipeline", "engine", "data", "training", "integrations", "bench"}

# Part -> the parts it may import. Itself always; `cli` never; `commands`, its other half, by `cli` alone.
ARROWS: dict[str, set[str]] = {
    "_native": set(),
    "native": {"_native"},
    "kernels": set(),
    "config": set(),
    "testing": set(),
    "video": set(),
    "device": set(),
    "_lazy": set(),
    "ops": {"kernels", "native"},
    "attention": {"kernels", "_native", "device"},
    "model": {"ops", "attention", "config", "native", "_native", "device", "_lazy"},
    "weights": {"config", "model", "_lazy"},
    "sampling": {"ops"},
    "media": {"video"},
    # attention: a backend asked for by name is refused before anything is loaded
    "pipeline": {"sampling", "model", "weights", "video", "config", "media", "attention", "device"},
    "engine": {*_BELOW_PIPELINE, "pipeline"},
    "data": _BELOW_PIPELINE,
    "training": {*_BELOW_PIPELINE, "pipeline", "data"},
    "integrations": _ALL,
    "commands": _ALL,
    "cli": {*_ALL, "commands"},
    "bench": _ALL,
    "examples": _ALL,
    "__init__": _ALL,  # names, not imports: test_packaging.py holds what an import of the package loads
}
# Part -> the only packages, beside the standard library, that it may import. Unlisted: any that is installed with us.
PACKAGES: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "config": {"torch"},
    "testing": {"torch"},
    "sampling": {"torch", "numpy"},
    "video": {"torch", "numpy", "av", "PIL"},
}
# Come with the extras only, so that the package itself must do without. A bridge to another library may ask for it.
EXTRAS = {"diffusers", "peft", "accelerate", "pytest", "hypothesis", "ray"}
MAY_USE_EXTRAS = {"integrations", "bench", "examples"}


def part_of(module: str) -> str:
    """`pusa_fast.model.dit` -> model; `pusa_fast` -> __init__; `bench.timing` -> bench."""
    names = module.split(".")
    if names[0] != "pusa_fast":
        return names[0]
    return names[1] if len(names) > 1 else "__init__"


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of everything that the arrows bind. Tests are free."""
    for path in sorted((ROOT / "pusa_fast").rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(names[:-1] if names[-1] == "__init__" else names), path
    for folder, package in (("kernels", "pusa_fast.kernels"), ("bench", "bench"), ("examples", "examples")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]), path


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names that `source` imports: at the top, inside functions, for type checkers alone, or by a literal string.

    `from pusa_fast import ops` counts as pusa_fast.ops, a lazy public name as the module that defines it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                parent = here[: len(here) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield from (_resolved(base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _resolved(base: str, name: str) -> str:
    if base != "pusa_fast":
        return base
    return "pusa_fast.__version__" if name == "__version__" else pusa_fast._HOME.get(name, f"pusa_fast.{name}")


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of `source` that the tables above do not allow."""
    part, found = part_of(module), []
    if part not in ARROWS:
        return [f"{module}: no row in ARROWS; decide what it may import"]
    for target in imports(source, module, is_package):
        package, to = target.split(".")[0], part_of(target)
        if package in {"pusa_fast", "bench", "examples"}:
            if to not in {part, "__version__"} and to not in ARROWS[part]:
                found.append(f"{module} imports {target}: {part} -> {to} is no arrow")
        elif package in sys.stdlib_module_names:
            continue
        elif package not in PACKAGES.get(part, {package}):
            found.append(f"{module} imports {target}: {part} may use only {sorted(PACKAGES[part])}")
        elif package in EXTRAS and part not in MAY_USE_EXTRAS:
            found.append(f"{module} imports {target}: {package} is not installed with the package")
    return found


def test_every_import_follows_the_arrows() -> None:
    found = [
        line
        for module, path in sources()
        for line in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_the_sources_are_seen() -> None:
    seen = dict(sources())
    for module in ("pusa_fast", "pusa_fast.config", "pusa_fast.model.dit", "pusa_fast.kernels.reference"):
        assert module in seen, f"{module} is not among {sorted(seen)}"


def test_arrows_have_no_cycle_and_none_leads_to_cli() -> None:
    assert not any("cli" in targets for targets in ARROWS.values())
    assert [part for part, targets in ARROWS.items() if "commands" in targets] == ["cli"]
    left = {part: targets - {part} for part, targets in ARROWS.items() if part not in {"bench", "integrations"}}
    left = {part: targets - {"bench", "integrations"} for part, targets in left.items()}
    while left:
        leaves = {part for part, targets in left.items() if not targets & left.keys()}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {part: targets for part, targets in left.items() if part not in leaves}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pusa_fast.sampling.sampler", "from pusa_fast.model.dit import WanDiT"),
        ("pusa_fast.sampling.sampler", "from pusa_fast import WanDiT"),
        ("pusa_fast.sampling.sampler", "from ..model import dit"),
        ("pusa_fast.sampling.sampler", "from .. import model"),
        ("pusa_fast.sampling.task", "def f():\n    import pusa_fast.model.vae.model"),
        ("pusa_fast.sampling.task", "if TYPE_CHECKING:\n    from pusa_fast.pipeline import Pipeline"),
        ("pusa_fast.sampling.task", "import importlib\nimportlib.import_module('pusa_fast.model.dit')"),
        ("pusa_fast.sampling.task", "from PIL import Image"),
        ("pusa_fast.sampling.task", "import pusa_fast"),
        ("pusa_fast.model.dit", "from pusa_fast.weights import load_dit"),
        ("pusa_fast.model.dit", "from pusa_fast.kernels import reference"),
        ("pusa_fast.config", "from pusa_fast import ops"),
        ("pusa_fast.ops", "from pusa_fast.attention import attention"),
        ("pusa_fast.kernels.norm", "import numpy"),
        ("pusa_fast.kernels.norm", "from pusa_fast import ops"),
        ("pusa_fast.pipeline", "from pusa_fast.training import fafm"),
        ("pusa_fast.pipeline", "import diffusers"),
        ("pusa_fast.integrations.ray", "from pusa_fast import cli"),
        ("bench.compare", "from pusa_fast.cli import app"),
        ("pusa_fast.engine.runner", "from bench import timing"),
        ("pusa_fast.novelty", "import torch"),
    ],
)
def test_a_violation_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("pusa_fast.model.dit", "import math\nimport torch\nfrom pusa_fast import ops\nfrom . import rope", False),
        ("pusa_fast.model", "from .dit import WanDiT", True),
        ("pusa_fast.sampling.task", "from pusa_fast.sampling.schedule import Schedule\nfrom .. import ops", False),
        ("pusa_fast.kernels.norm", "import triton.language as tl\nfrom pusa_fast.kernels._launch import blocks", False),
        ("pusa_fast.pipeline", "from pusa_fast import WanDiT, __version__, video", False),
        ("pusa_fast.integrations.diffusers", "import diffusers\nfrom pusa_fast import Pipeline", False),
        ("pusa_fast.cli", "import bench.registry\nimport pusa_fast", False),
    ],
)
def test_what_the_arrows_allow_passes(module: str, source: str, is_package: bool) -> None:
    assert violations(source, module, is_package) == []
