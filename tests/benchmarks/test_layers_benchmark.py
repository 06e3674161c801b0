"""benchmarks/layers.py on a tiny shape: every way runs, and what it writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("layers", None)
    return importlib.import_module("layers")


def test_every_way_is_measured(
    layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WARM_RUNS", 1)
    rows = layers.main(["-o", str(tmp_path), "--tiny", "--rows", "2", "--layers", "1"])
    ways = {row["way"] for row in rows}
    assert ways >= {*layers.ADAPTERS, "cuDNN", "flash", "compiler"}
    assert all(row["ms"] > 0 for row in rows)
    table = (tmp_path / "layers.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"| {row['what']} | {row['way']} | {row['ms']:.2f} |" in table
    for what in {row["what"] for row in rows}:  # each group has a fastest one
        assert any(
            f"| {what} |" in line and line.endswith("| 1.00 |") for line in table.split("\n")
        )
    assert json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))["rows"] == rows


@pytest.mark.parametrize("words", [["--only", "norms"], []])
def test_what_it_cannot_do_it_says(
    layers: Any, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(layers.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        layers.main(["-o", str(tmp_path), *words])
    said = capsys.readouterr().err
    assert ("there are adapters, attention, small" if words else "--tiny") in said
