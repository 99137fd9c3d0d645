"""clip.json as 640e6fd wrote it: `--from` reads it, and gives the same clip where the same weights
run on a like CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pusa_fast import cli

HERE = Path(__file__).parents[1] / "written_by_640e6fd"
PICTURE = Path(__file__).parents[2] / "examples" / "first_frame.png"
OF_THE_RUN = {"seconds", "versions", "commit", "out", "hashes"}


def test_a_record_is_read_and_its_clip_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads((HERE / "clip.json").read_text())
    record["conditions"][0]["path"] = str(PICTURE)  # written there as an absolute path
    Path("old.json").write_text(json.dumps(record))
    result = CliRunner().invoke(cli.app, ["generate", "--from", "old.json"])
    assert result.exit_code == 0, result.output
    again = json.loads(Path("clip.json").read_text())
    assert list(again) == list(record), "the keys and their order"
    assert {k: v for k, v in again.items() if k not in OF_THE_RUN} == {
        k: v for k, v in record.items() if k not in OF_THE_RUN
    }
    made_on = json.loads((HERE / "made_on.json").read_text())
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    alike = (
        made_on["vendor"] in processor
        and made_on["capability"] == torch.backends.cpu.get_cpu_capability()
        and record["versions"]["torch"] == torch.__version__
    )
    if alike and again["hashes"]["model"] == record["hashes"]["model"]:
        assert again["hashes"]["frames"] == record["hashes"]["frames"]
