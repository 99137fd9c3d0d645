"""docs/design.md section 4, checked: arrows between parts, circles between files, the layout.

The layout block of that section is a tree, one entry a line:

    folder/
      name.py other.py      purpose of both
      {a,b}.py              purpose; the same as a.py b.py
      inner/                purpose of a folder, optional
        deeper.py           purpose
                            that goes on here
      next.py               (later) what will be built here

Indentation puts an entry into the folder above it. Names come first, separated by one space; two
spaces or more end them. A line that begins at column 20 or later goes on with the purpose above.
`(later)` marks what must not exist yet. The page has to name every source file of the folders in
`NAMED`, and nothing that does not exist.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_BELOW_PIPELINE = {
    *("kernels", "_native", "native", "config", "testing", "device", "errors", "ops", "attention", "_lazy"),
    *("model", "weights", "sampling", "video", "media", "options", "request", "media_plan", "stages"),
}
_ALL = {"__init__", *_BELOW_PIPELINE, "pipeline", "engine", "data", "training", "integrations", "bench"}

# Part -> the parts it may import. Itself always; `cli` never; `commands`, its other half, by
# `cli` alone.
ARROWS: dict[str, set[str]] = {
    "_native": set(),
    "native": {"_native"},
    "kernels": set(),
    "config": set(),
    "testing": set(),
    "errors": set(),
    "device": set(),
    "_lazy": set(),
    "options": set(),
    "video": {"errors"},
    "ops": {"kernels", "native"},
    "attention": {"kernels", "_native", "device"},
    "model": {"ops", "attention", "config", "device", "_lazy"},
    "weights": {"config", "model", "_lazy"},
    "sampling": {"ops", "_lazy", "errors"},
    "media": {"video", "sampling"},  # sampling: the name of a file as a medium
    "request": {"options", "config", "sampling", "media", "model"},  # model: the type of a tiling
    "media_plan": {"options", "request", "sampling", "video"},
    "stages": {"request", "sampling", "model", "video"},
    # attention: a backend asked for by name is refused before anything is loaded
    "pipeline": {"stages", "request", "sampling", "model", "weights", "config", "attention", "device"},
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
# (module, what it may import against the arrows): an old name of a class that has moved, loaded
# when a caller asks for it.
EXCEPTIONS = {("pusa_fast.sampling.sampler", "pusa_fast.model.experts")}
# Files that import each other all the same. Keep it empty.
EXPECTED_CIRCLES: set[frozenset[str]] = {frozenset({"pusa_fast.model.vae.memory", "pusa_fast.model.vae.model"})}
# Part -> the only packages, beyond the standard library, that it may import. Unlisted: any that
# is installed with us.
PACKAGES: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "config": {"torch"},
    "testing": {"torch"},
    "sampling": {"torch", "numpy"},
    "video": {"torch", "numpy", "av", "PIL"},
}
# Come with the extras only, so that the package itself must do without. A bridge to another
# library may ask for it.
EXTRAS = {"diffusers", "peft", "accelerate", "pytest", "hypothesis", "ray"}
MAY_USE_EXTRAS = {"integrations", "bench", "examples"}

# The page names every file with one of these suffixes below these folders.
NAMED, SUFFIXES = ("pusa_fast", "kernels", "csrc", "bench"), {".py", ".cpp", ".hpp", ".cu", ".sh"}


# Files and what they import.


@dataclass(frozen=True)
class Import:
    target: str  # dotted name of a module, or of a package whose name is imported
    runtime: bool  # False for type checkers and for tables of lazy names


def _files() -> Iterator[tuple[str, Path]]:
    """(module name, file) of everything that the arrows bind. Tests are free."""
    for folder, package in (
        ("pusa_fast", "pusa_fast"),
        ("kernels", "pusa_fast.kernels"),
        ("bench", "bench"),
        ("examples", "examples"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(names[:-1] if names[-1] == "__init__" else names)]), path


FILES = dict(_files())
# (package, public name) -> the module that defines it, where the package loads it on first use.
LAZY = {
    (module, name): home
    for module, path in FILES.items()
    if path.name == "__init__.py" and "lazy_names(" in path.read_text(encoding="utf-8")
    for name, home in importlib.import_module(module)._HOME.items()
}


def part_of(module: str) -> str:
    """`pusa_fast.model.dit` -> model; `pusa_fast` -> __init__; `bench.timing` -> bench."""
    names = module.split(".")
    if names[0] != "pusa_fast":
        return names[0]
    return names[1] if len(names) > 1 else "__init__"


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """What `source` imports: at the top, in functions, for type checkers, by a string, lazily.

    `from package import name` counts as the module package.name where there is one, a lazy name as
    the module that defines it.
    """
    return _imports(ast.parse(source), module, is_package, True)


def _imports(node: ast.AST, module: str, is_package: bool, runtime: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(_neighbour(alias.name, module), runtime) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _neighbour(node.module or "", module)
        if node.level:
            here = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
        yield from (Import(_resolved(base, alias.name), runtime) for alias in node.names)
    elif isinstance(node, ast.Call) and _name(node.func) in {"import_module", "__import__"} and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield Import(first.value, runtime)
    elif isinstance(node, ast.Call) and _name(node.func) == "lazy_names":
        homes = (home.value for home in ast.walk(node) if isinstance(home, ast.Constant))
        yield from (Import(home, False) for home in homes if isinstance(home, str) and home.startswith("pusa_fast."))
    if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
        parts = [(child, False) for child in node.body] + [(child, runtime) for child in node.orelse]
    else:
        parts = [(child, runtime) for child in ast.iter_child_nodes(node)]
    for child, runs in parts:
        yield from _imports(child, module, is_package, runs)


def _resolved(base: str, name: str) -> str:
    if f"{base}.{name}" in FILES or (base == "pusa_fast" and (base, name) not in LAZY):
        return f"{base}.{name}"
    return LAZY.get((base, name), base)


def _neighbour(name: str, module: str) -> str:
    """`photos` -> examples.nano.photos, as a script of that folder imports it."""
    beside = f"{module.rpartition('.')[0]}.{name}"
    return beside if module.startswith("examples.") and beside in FILES else name


def _name(expression: ast.expr) -> str:
    return expression.attr if isinstance(expression, ast.Attribute) else getattr(expression, "id", "")


def imports_of(module: str) -> Iterator[Import]:
    path = FILES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


# Arrows.


def violations(found: Iterable[Import], module: str) -> list[str]:
    """One line for each import of `module` that the tables above do not allow."""
    part, lines = part_of(module), []
    if part not in ARROWS:
        return [f"{module}: no row in ARROWS; decide what it may import"]
    for target in (one.target for one in found):
        package, to = target.split(".")[0], part_of(target)
        if package in {"pusa_fast", "bench", "examples"}:
            if to not in {part, "__version__", *ARROWS[part]} and (module, target) not in EXCEPTIONS:
                lines.append(f"{module} imports {target}: {part} -> {to} is no arrow")
        elif package in sys.stdlib_module_names:
            continue
        elif package not in PACKAGES.get(part, {package}):
            lines.append(f"{module} imports {target}: {part} may use only {sorted(PACKAGES[part])}")
        elif package in EXTRAS and part not in MAY_USE_EXTRAS:
            lines.append(f"{module} imports {target}: {package} is not installed with the package")
    return lines


def test_every_import_follows_the_arrows() -> None:
    found = [line for module in FILES for line in violations(imports_of(module), module)]
    assert not found, "\n".join(found)


def test_the_sources_are_seen() -> None:
    for module in (
        "pusa_fast",
        "pusa_fast.config",
        "pusa_fast.model.dit",
        "pusa_fast.kernels.reference",
        "bench.timing",
    ):
        assert module in FILES, f"{module} is not among {sorted(FILES)}"
    assert LAZY["pusa_fast", "WanDiT"] == "pusa_fast.model.dit"


def test_arrows_have_no_cycle_and_none_leads_to_cli() -> None:
    assert not any("cli" in targets for targets in ARROWS.values())
    assert [part for part, targets in ARROWS.items() if "commands" in targets] == ["cli"]
    left = {part: targets - {part} for part, targets in ARROWS.items() if part not in {"bench", "integrations"}}
    left = {part: targets - {"bench", "integrations"} for part, targets in left.items()}
    while left:
        leaves = {part for part, targets in left.items() if not targets & left.keys()}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {part: targets for part, targets in left.items() if part not in leaves}


# Circles.


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of nodes that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, left = set[str](), [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        reached[start] = seen
    return {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}


def test_no_two_files_import_each_other() -> None:
    """At the top of a file or inside functions. What only type checkers read may point back."""
    graph = {module: {one.target for one in imports_of(module) if one.runtime} & FILES.keys() for module in FILES}
    found = circles(graph)
    assert found == EXPECTED_CIRCLES, "\n".join(", ".join(sorted(group)) for group in found ^ EXPECTED_CIRCLES)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}) == {frozenset("abc")}
    assert circles({"a": {"a"}, "b": {"a"}}) == {frozenset("a")}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


# The page.


def layout(page: str) -> tuple[set[str], set[str]]:
    """(what is there, what comes later) by the page: paths from the root, without a final slash."""
    block = page.split("\n## 4.")[1].split("\n## 5.")[0].split("```")[1]
    there, later = set[str](), set[str]()
    folders = [(-1, "")]
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent >= 20:
            continue
        while folders[-1][0] >= indent:
            folders.pop()
        names, _, purpose = line.strip().partition("  ")
        paths = [folders[-1][1] + path for name in names.split(" ") for path in _braces(name)]
        (later if purpose.strip().startswith("(later)") else there).update(path.rstrip("/") for path in paths)
        if paths[-1].endswith("/"):
            folders.append((indent, paths[-1]))
    return there, later


def _braces(name: str) -> list[str]:
    """`{a,b}.{cpp,hpp}` -> a.cpp a.hpp b.cpp b.hpp."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def disagreements(page: str) -> list[str]:
    there, later = layout(page)
    files = {
        str(path.relative_to(ROOT))
        for folder in NAMED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and not path.is_relative_to(ROOT / "pusa_fast" / "kernels")
    }
    return [
        *(f"docs/design.md does not name {path}" for path in sorted(files - there)),
        *(f"docs/design.md names {path}, which does not exist" for path in sorted(there) if not (ROOT / path).exists()),
        *(f"docs/design.md says (later) of {path}, which exists" for path in sorted(later) if (ROOT / path).exists()),
    ]


def test_the_page_names_every_file() -> None:
    found = disagreements((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_a_page_that_is_wrong_is_caught() -> None:
    lines = ["a/  x", "  b.py {c,d}.h  x", " " * 24 + "e.py", "  f/", "    g.py", "h  (later)"]
    page = "\n".join(["", "## 4.", "```", *lines, "```", "## 5."])
    assert layout(page) == ({"a", "a/b.py", "a/c.h", "a/d.h", "a/f", "a/f/g.py"}, {"h"})
    found = disagreements(page.replace("a/", "pusa_fast/").replace("h  (", "csrc/  ("))
    assert "docs/design.md does not name pusa_fast/config.py" in found
    assert "docs/design.md names pusa_fast/b.py, which does not exist" in found
    assert found[-1] == "docs/design.md says (later) of csrc, which exists"


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
        ("pusa_fast.sampling.task", "lazy_names(__name__, {'WanDiT': 'pusa_fast.model.dit'})"),
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
    assert len(violations(imports(source, module), module)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("pusa_fast.model.dit", "import math\nimport torch\nfrom pusa_fast import ops\nfrom . import rope", False),
        ("pusa_fast.model", "from .dit import WanDiT", True),
        ("pusa_fast.sampling.task", "from pusa_fast.sampling.schedule import Schedule\nfrom .. import ops", False),
        ("pusa_fast.kernels.norm", "import triton.language as tl\nfrom pusa_fast.kernels._launch import blocks", False),
        ("pusa_fast.pipeline", "from pusa_fast import WanDiT, __version__, stages", False),
        ("pusa_fast.integrations.diffusers", "import diffusers\nfrom pusa_fast import Pipeline", False),
        ("pusa_fast.cli", "import bench.registry\nimport pusa_fast", False),
    ],
)
def test_what_the_arrows_allow_passes(module: str, source: str, is_package: bool) -> None:
    assert violations(imports(source, module, is_package), module) == []
