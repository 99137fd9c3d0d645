"""The software of a GPU machine on one without a GPU: kernels compiled under two versions of
Triton, CPU tests under its torch.

    python -m bench.gpu_software DIR --setup [--python python3.12]  # once: 3 GB in DIR
    python -m bench.gpu_software DIR [--out FILE] [-- PYTEST WORDS] # both checks

GPU builds of torch import only where CUDA's libraries are. Here a library of functions that fail
takes the place of each one that is missing: CPU ops and tests run, Triton compiles, and whatever
would touch a device reports that there is none. The second Triton is that of the Python which runs
this. Exits with 1 where a kernel does not compile or a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from bench.card import ROOT, card
from bench.harness import write_text

# What the GPU machine has. Triton 3.6's interpreter needs NumPy before 2.4; torch 2.11 setuptools
# before 82.
TORCH, TRITON, OTHERS = "torch==2.11.0", "triton==3.6.0", ("numpy<2.4", "setuptools<82")
NEED_TORCH = ("accelerate", "peft")  # pip would install torch's CUDA packages for them, gigabytes
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "packaging", "psutil")
NO_DEVICE = 100  # cudaErrorNoDevice, and a failure to every other library
ARCHS = (80, 90, 100)


def setup(folder: Path, python: str) -> None:
    """Create the environment. Raises CalledProcessError where pip or the C compiler fails."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-m", "venv", folder / "env"], check=True)
    pip = [folder / "env/bin/python", "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", TORCH, TRITON], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    names = {re.split(r"[^\w-]", line)[0] for line in [*wanted, *project["build-system"]["requires"]]}
    held = {re.split(r"[=<]", line)[0] for line in (TORCH, TRITON, *OTHERS)}
    versions = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text(
        "\n".join([*(v for v in versions if v.split("==")[0] not in held), *OTHERS]), encoding="utf-8"
    )
    pip += ["--constraint", constraints]
    tools = [] if shutil.which("cmake") and shutil.which("make") else ["cmake", "ninja"]
    subprocess.run([*pip, *OTHERS, *TORCH_NEEDS, *tools, *sorted(names - held - {*NEED_TORCH})], check=True)
    subprocess.run([*pip, "--no-deps", *NEED_TORCH], check=True)
    stand_in(next((folder / "env").glob("lib/python3*/site-packages/torch/lib")), folder / "stubs")


def stand_in(libraries: Path, out: Path) -> None:
    """Write to `out` a library of failing functions for each one that torch's need and the loader
    does not find."""
    out.mkdir(exist_ok=True)
    missing: set[str] = set()
    owner: dict[str, str] = {}  # symbol version -> library
    wanted: dict[str, set[str]] = defaultdict(set)  # symbol version, "" for none -> symbols
    for path in sorted(libraries.glob("lib*.so")):
        if path.name == "libcaffe2_nvrtc.so":  # wants the driver; torch opens it only to compile for a device
            continue
        missing |= set(re.findall(r"(\S+) => not found", _output("ldd", path)))
        for soname, names in re.findall(r"File: (\S+) .*\n((?:.*  Name: .*\n?)*)", _output("readelf", "-VW", path)):
            owner |= dict.fromkeys(re.findall(r"Name: (\S+)", names), soname)
        for symbol, version in re.findall(r" U (\w+)(?:@(\S+))?", _output("nm", "-D", "--undefined-only", path)):
            wanted[version].add(symbol)
    source, script = out / "stub.c", out / "versions.map"
    for soname in sorted(missing):
        versions = [version for version in wanted if owner.get(version) == soname]
        # Symbols without a version are found in whatever library has them: each gets those that
        # begin with its name.
        stem = soname.removeprefix("lib").split(".")[0].lower()
        plain = {s for s in wanted[""] if s.lower().removeprefix("p").startswith(stem)}
        symbols = plain.union(*(wanted[version] for version in versions))
        source.write_text(
            "".join(f"long {s}(void) {{ return {NO_DEVICE}; }}\n" for s in sorted(symbols)), encoding="utf-8"
        )
        script.write_text(
            "".join(f"{v} {{ global: {'; '.join(sorted(wanted[v]))}; }};\n" for v in versions), encoding="utf-8"
        )
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{soname}", source, "-o", out / soname]
        subprocess.run([*command, *([f"-Wl,--version-script={script}"] if versions else [])], check=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the Python of `folder` finds the stand-ins."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    found.pop("TRITON_INTERPRET", None)
    found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder / "stubs"), os.environ.get("LD_LIBRARY_PATH")]))
    return found


def compiled(python: str | Path, variables: dict[str, str]) -> dict[str, Any]:
    """Architecture -> what bench/ahead_of_time.py compiled, and what is wrong with the rest.

    `forms`: different calls of an op; `kernels`: those at each model's shapes and dtypes.
    """
    found: dict[str, Any] = {}
    for arch in ARCHS:
        print(f"compiling for sm_{arch} under {python}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            command = [python, "-m", "bench.ahead_of_time", "--arch", str(arch), "--json", f"{scratch}/out.json"]
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
            path = Path(scratch, "out.json")
            records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        faults = [line for line in done.stdout.splitlines() if f", sm_{arch}): " in line]
        if done.returncode and not faults:
            faults = [f"exit {done.returncode}: {done.stderr.strip()[-2000:]}"]
        good = [record for record in records if "error" not in record]
        forms = {(record["op"], record["variant"]) for record in good}
        ops = sorted({op for op, _ in forms})
        found[f"sm_{arch}"] = {"forms": len(forms), "kernels": len(good), "ops": ops, "faults": faults}
    return found


def tested(python: Path, variables: dict[str, str], words: list[str]) -> dict[str, Any]:
    """Run pytest: how many tests passed, were skipped or failed, and which failed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={scratch}/out.xml", *words]
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=sys.stderr)
        path = Path(scratch, "out.xml")
        cases = list(ET.parse(path).iter("testcase")) if path.exists() else []
    by_outcome: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in {"failure", "error", "skipped"}), "passed")
        by_outcome[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    failed = [*by_outcome["failure"], *by_outcome["error"]]
    return {
        "passed": len(by_outcome["passed"]),
        "skipped": len(by_outcome["skipped"]),
        "failed": len(failed),
        "failures": failed,
        "exit": done.returncode,
        "words": words,
        "seconds": round(time.monotonic() - begun),
    }


def check(folder: Path, words: list[str]) -> dict[str, Any]:
    """Both checks. The package is installed into the environment first, from this checkout."""
    python, variables = folder / "env/bin/python", environment(folder)
    # Isolated builds would fetch their own tools; the tests need no CUDA code.
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "-Ccmake.define.PUSA_CUDA=OFF", "-e", ROOT]
    subprocess.run([python, "-m", "pip", *install], check=True, env=variables)
    source = (
        "import json, platform, numpy, torch, triton\n"
        "versions = {m.__name__: m.__version__ for m in (torch, triton, numpy)}\n"
        "print(json.dumps(versions | {'python': platform.python_version()}))"
    )
    software = json.loads(subprocess.check_output([python, "-c", source], env=variables))
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    about = card(torch.device("cpu"))
    return {
        "bench": "gpu_software",
        "card": about,
        "software": software,
        "compiled": {
            f"triton {software['triton']}": compiled(python, variables),
            f"triton {about['versions']['triton']}": compiled(sys.executable, here),
        },
        "tests": tested(python, variables, words),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the package under a GPU machine's software, without a GPU.")
    parser.add_argument("folder", type=lambda name: Path(name).absolute(), help="where the environment is")
    parser.add_argument("--setup", action="store_true", help="create the environment, check nothing")
    parser.add_argument("--python", default="python3.12", help="interpreter of the environment (default: python3.12)")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("words", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    if options.setup:
        setup(options.folder, options.python)
        return 0
    result = check(options.folder, options.words)
    text = json.dumps(result, indent=1)
    if options.out:
        write_text(options.out, text + "\n")
    print(text)
    failed = any(found["faults"] for by_arch in result["compiled"].values() for found in by_arch.values())
    return int(failed or result["tests"]["exit"] != 0)


if __name__ == "__main__":
    sys.exit(main())
