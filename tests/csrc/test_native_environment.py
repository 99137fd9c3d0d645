"""How the environment chooses the compiled part's instruction set, and what happens without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pusa_fast.native import rows as native

_native = pytest.importorskip("pusa_fast._native")
ISAS = _native.isas()


def run(source: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return done.stdout.strip()


def test_environment_chooses_the_instruction_set() -> None:
    source = """
import pusa_fast._native as native
try:
    print(native.isa())
except ValueError as error:
    print(error)
"""
    assert run(source, PUSA_NATIVE_ISA="base") == "base"
    assert run(source, PUSA_NATIVE_ISA="") == ISAS[-1]
    have = ", ".join(ISAS)
    assert run(source, PUSA_NATIVE_ISA="avx9") == f"PUSA_NATIVE_ISA is avx9: this build and processor have {have}"


def test_without_the_compiled_part_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import sys
sys.modules["pusa_fast._native"] = None
from pusa_fast.native import rows as native
print(native.available())
"""
    assert "pip install -e ." in run(source)
    monkeypatch.delattr(_native, "gelu")
    reason = native.available()
    assert reason is not None and "lacks gelu: it is older than this source" in reason
