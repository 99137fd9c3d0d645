"""What callers may rely on: names, versions, a cheap import, life without the compiled part."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pusa_fast

ROOT = Path(__file__).parents[1]
PUBLIC = ["Pipeline", "Condition", "DiTConfig", "VAEConfig", "WanDiT", "WanVAE", "Tiling"]
WEIGHTS = ["load_dit", "load_vae", "apply_lora", "read_lora"]


def run(source: str) -> str:
    """Output of a new interpreter that runs `source` in the repository root."""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_not_a_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow Hugging Face's `kernels` from the repo root"


def test_kernels_resolves_to_the_repo_directory() -> None:
    import pusa_fast.kernels.reference as m

    assert Path(m.__file__).resolve() == ROOT / "kernels" / "reference.py"


@pytest.mark.parametrize("folder", ["bench", "examples", "examples/nano", "kernels"])
def test_no_script_folder_shadows_a_module(folder: str) -> None:
    taken = {p.name for p in (ROOT / folder).glob("*.py")} & {"kernels.py", "types.py", "queue.py"}
    assert not taken, f"{folder}: scripts that stand there would import these instead"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_importable(name: str) -> None:
    assert name in pusa_fast.__all__ and name in dir(pusa_fast)
    assert getattr(pusa_fast, name).__name__ == name


@pytest.mark.parametrize("name", WEIGHTS)
def test_public_name_of_weights_is_importable(name: str) -> None:
    assert callable(getattr(importlib.import_module("pusa_fast.weights"), name))


def test_typing_and_lazy_names_agree() -> None:
    """The two lists of `__init__`, one for checkers and one for the interpreter, say the same."""
    tree = ast.parse((ROOT / "pusa_fast" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {a.name: n.module for n in guarded.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == pusa_fast._HOME
    assert sorted([*typed, "__version__"]) == pusa_fast.__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'WanDit'"):
        _ = pusa_fast.WanDit


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    source = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()  # not the wall clock: others may be using the machine
import pusa_fast
print(time.process_time() - start)
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded & {"triton", "transformers", "diffusers", "av", "PIL", "peft", "typer"}))
print(torch.cuda.is_initialized())
"""
    seconds, loaded, cuda = run(source).split("\n")
    assert float(seconds) < 0.1
    assert (loaded, cuda) == ("", "False")


def test_version_is_the_installed_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.metadata.version(project["name"]) == pusa_fast.__version__, "run `make test`, it installs again"


def test_native_reports_version_and_cpu() -> None:
    native = importlib.import_module("pusa_fast._native")  # `make test` builds it
    assert native.__version__ == pusa_fast.__version__
    features = native.cpu_features()
    assert list(features) == ["avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx"]
    assert set(map(type, features.values())) == {bool}
    assert features["avx512f"] or not (features["avx512bw"] or features["avx512_bf16"])
    assert isinstance(native.cuda_built(), bool)


def test_cpu_features_agree_with_the_operating_system() -> None:
    """Linux lists what it enabled; elsewhere there is nothing to compare with."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), None)
    names = {"avx2": "avx2", "fma": "fma", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512_bf16": "avx512_bf16"}
    features = importlib.import_module("pusa_fast._native").cpu_features()
    if flags is not None:
        assert {n: features[n] for n in names} == {n: flag in flags for n, flag in names.items()}
        assert features["amx"] == {"amx_tile", "amx_bf16"}.issubset(flags)


def test_works_without_the_compiled_part() -> None:
    source = """
import sys
sys.modules["pusa_fast._native"] = None  # every import of it now fails, as in a plain checkout
import torch
from pusa_fast import DiTConfig, WanDiT
sizes = dict(in_channels=4, out_channels=4, text_dim=8, freq_dim=8)
dit = WanDiT(DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, **sizes))
x = torch.randn(1, 4, 2, 4, 4)
with torch.no_grad():
    v = dit(x, torch.tensor([[0.0, 500.0]]), torch.randn(1, 3, 8))
print(v.shape == x.shape, "torch._dynamo" in sys.modules)
"""
    assert run(source) == "True False", "torch._dynamo takes longer to import than torch and all of the model"
