"""Two languages: every text a person reads has a Chinese twin with the same fields."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from chatfine import i18n

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    pytest.importorskip("babel")
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "tools" / "catalogue.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_catalogue_is_complete_and_fresh(catalogue: ModuleType) -> None:
    # missing, stale or mismatched entries, a t() without a literal, an old .mo
    assert catalogue.problems() == []


def test_extraction_sees_what_a_person_sees(catalogue: ModuleType) -> None:
    texts, _ = catalogue.source_texts()
    assert "did you mean {word}?" in texts  # a literal in a call
    assert "rank of the adapter" in texts  # a setting's help
    assert "Fine-tune a model on a data set." in texts  # a command's first line


def test_a_text_that_is_no_literal_is_refused(
    catalogue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text("t(f'a {b}')\nt(name)\nt('good')\n", encoding="utf-8")
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    texts, refused = catalogue.source_texts()
    assert refused == ["bad.py:1", "bad.py:2"]
    assert "good" in texts


def test_problems_are_seen(
    catalogue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: one missing, one stale, one with another field, an old .mo."""
    texts = {"new": {"a.py"}, "hello {name}": {"a.py"}}
    known = {"hello {name}": "你好 {nmae}", "old": "旧"}
    monkeypatch.setattr(catalogue, "source_texts", lambda: (texts, []))
    monkeypatch.setattr(catalogue, "translations", lambda _: known)
    monkeypatch.setattr(catalogue, "MO", tmp_path / "chatfine.mo")
    found = catalogue.problems()
    assert [line.partition(":")[0] for line in found] == [
        "no translation", "no longer used", "other fields", "the .mo is not the compiled .po",
    ]  # fmt: skip


def test_compiling_is_deterministic_and_read_by_gettext(
    catalogue: ModuleType, tmp_path: Path
) -> None:
    import gettext

    known = {"b": "乙", "a {x}": "甲 {x}", "untranslated": ""}
    data = catalogue.mo_bytes(known)
    assert data == catalogue.mo_bytes(dict(reversed(known.items())))
    (tmp_path / "x.mo").write_bytes(data)
    with (tmp_path / "x.mo").open("rb") as file:
        read = gettext.GNUTranslations(file)
    assert [read.gettext(text) for text in known] == ["乙", "甲 {x}", "untranslated"]


def test_chinese_is_chinese(catalogue: ModuleType) -> None:
    """A translation holds Chinese unless the text is only fields, flags and marks."""
    latin = []
    for source, text in catalogue.translations(catalogue.load()).items():
        prose = re.sub(r"\{[^}]*\}|--\S+( [a-z0-9]+)?", " ", source)
        words = [word for word in prose.split() if word.isalpha() and word.islower()]
        if text and max(map(len, words), default=0) > 3 and not re.search("[\u4e00-\u9fff]", text):
            latin.append(source)
    assert latin == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"CHATFINE_LANG": "zh"}, "zh"),
        ({"CHATFINE_LANG": "en", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "C"}, "en"),
    ],
)
def test_language_is_chosen_by_variable_then_locale(
    settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHATFINE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert i18n.language() == expected


def test_a_text_is_shown_in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFINE_LANG", "zh")
    shown = i18n.t("there is no file {path}", path="甲.json")
    assert "甲.json" in shown
    assert "没有" in shown
