"""The compiled tiles built in other ways: under sanitizers, for CUDA, as wheels. Without a GPU.

The CUDA kernel also runs on the CPU, compiled against cuda_on_cpu, and its results are the CPU
code's to the bit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from pusa_fast import native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FORMULAS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-I", CSRC]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ISAS: dict[str, list[str]] = {"base": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512bw", "-mfma"]}
_native: Any = native.compiled
needs_native = pytest.mark.skipif(native.missing("blend_box") is not None, reason="no compiled tiles")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_native
def test_imports_without_a_driver() -> None:
    """Alone, so that torch brings nothing: no library of CUDA's is asked for."""
    assert run(sys.executable, HERE / "native_alone.py", _native.__file__).strip() == str(_native.cuda_built())


def compile_cuda(arch: str, folder: Path) -> None:
    """Without spills."""
    options = ["-std=c++17", f"-arch=sm_{arch}", "-I", CSRC, "-Xptxas=-v"]
    log = run("nvcc", *options, "-c", CSRC / "vae_tiling.cu", "-o", folder / "tiling.o")
    spills = [line for line in log.splitlines() if "spill" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@needs_nvcc
def test_compiles_for_cuda(tmp_path: Path) -> None:
    compile_cuda("90", tmp_path)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "100", "120"])
def test_compiles_for_other_devices(arch: str, tmp_path: Path) -> None:
    compile_cuda(arch, tmp_path)


def compile_rows(isa: str, folder: Path) -> Path:
    found = folder / f"{isa}.o"
    options = ["-std=c++17", *SANITIZERS, *FORMULAS, *ISAS[isa], f"-DPUSA_ISA={isa}"]
    run("g++", *options, "-c", CSRC / "vae_tiling_rows.cpp", "-o", found)
    return found


@pytest.mark.slow
@needs_gcc
@needs_native
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """ASan and UBSan on the CPU code: odd sizes, each buffer no larger than it must be."""
    names = list(ISAS) if "avx2" in _native.isas() else ["base"]
    objects = [compile_rows(isa, tmp_path) for isa in names]
    sources = [CSRC / "vae_tiling.cpp", HERE / "vae_tiling_fuzz.cpp"]
    define = ["-DPUSA_X86_KERNELS"] if len(names) > 1 else []
    run("g++", "-std=c++17", *SANITIZERS, *FORMULAS, *define, *sources, *objects, "-o", tmp_path / "fuzz")
    for index, isa in enumerate(names):
        if isa in _native.isas():
            assert "all well" in run(tmp_path / "fuzz", str(index), "1500")


@pytest.mark.slow
@needs_gcc
def test_the_cuda_kernel_on_the_cpu_is_the_cpu_s(tmp_path: Path) -> None:
    """The same bits, and no access outside memory."""
    sources = [compile_rows("base", tmp_path), CSRC / "vae_tiling.cpp", HERE / "vae_tiling_fuzz.cpp"]
    options = ["-std=c++17", *SANITIZERS, *FORMULAS, "-I", HERE / "cuda_on_cpu", "-DPUSA_EMULATED"]
    kernel = ["-x", "c++", CSRC / "vae_tiling.cu"]
    run("g++", *options, *sources, *kernel, "-o", tmp_path / "emulated")
    assert "all well" in run(tmp_path / "emulated", "0", "1500")


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["OFF", pytest.param("ON", marks=needs_nvcc)])
def test_wheel_builds_with_and_without_cuda(cuda: str, tmp_path: Path) -> None:
    options = [f"-Ccmake.define.PUSA_CUDA={cuda}", f"-Cbuild-dir={tmp_path / 'build'}"]
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", *options, "-w", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    (library,) = (tmp_path / "wheel" / "pusa_fast").glob(f"_native{EXTENSION_SUFFIXES[0]}")
    assert run(sys.executable, HERE / "native_alone.py", library).strip() == str(cuda == "ON")
