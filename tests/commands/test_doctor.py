"""`pusa-fast doctor`: always succeeds, says what can be used, and why the rest cannot."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import pusa_fast
from pusa_fast import attention, cli, ops
from pusa_fast.commands import doctor


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["doctor", *words])


def test_it_prints_every_section() -> None:
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"pusa_fast {pusa_fast.__version__}" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    for section in ("devices:", "native:", "ops:", "attention:", "nano:", "codecs:"):
        assert f"\n{section}\n" in result.stdout
    assert "  sdpa: yes" in result.stdout
    for name, reason in attention.backends().items():
        assert f"  {name}: {f'no: {reason}' if reason else 'yes'}" in result.stdout
    assert "  libx264: yes" in result.stdout


def test_json_is_one_document() -> None:
    found = json.loads(run("--json").stdout)
    assert found["attention"] == attention.backends()
    assert set(found["ops"]) == set(ops.BACKENDS)
    assert found["devices"][0].startswith("cpu (")
    assert "reason" in found["nano"]


def test_it_says_that_the_compiled_part_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "pusa_fast._native":
            raise ModuleNotFoundError("No module named 'pusa_fast._native'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    reason = doctor.examine()["native"]["reason"]
    assert "No module named" in reason
    assert "pip install -e ." in reason


def test_it_says_that_nano_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ValueError("nano is no model: restore it")

    monkeypatch.setattr(doctor, "find_model", missing)
    result = run()
    assert result.exit_code == 0
    assert "  no: nano is no model: restore it" in result.stdout


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == pusa_fast.__version__
