"""The pages with the table of flags are what the table says, and hold all of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from chatfine.tutorial.show import DOORS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", ROOT / "tools" / "parity.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_fresh(parity: ModuleType) -> None:
    assert parity.stale() == [], "run: python tools/parity.py write"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_page_has_a_whole_row_for_each_field(parity: ModuleType, language: str) -> None:
    lines = parity.page(language).read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines if line.startswith("| `--")]
    fields = [one for table in DOORS.values() for one in table]
    assert [row[0] for row in rows] == [f"`--{one.name}`" for one in fields]
    assert all(row[-1].strip() and row[-2].strip() for row in rows)


def test_a_stale_page_is_seen(
    parity: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    assert parity.main(["check"]) == 1
    assert parity.main(["write"]) == 0
    assert parity.main(["check"]) == 0
    page = parity.page("en")
    page.write_text(page.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert parity.stale() == [page]
