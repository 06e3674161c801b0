"""`chatfine data check|show`."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatfine import console
from chatfine.commands.check import coloured, data
from chatfine.config import DataConfig
from chatfine.errors import DataError
from chatfine.tokenizer.encode import ChatTokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")
    console.console.cache_clear()


def config(tiny: Path, action: str, *datasets: str, **more: object) -> DataConfig:
    return DataConfig.read({"action": action, "model": str(tiny), "dataset": datasets, **more})


def test_check_reports_what_training_would_read(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = data(config(tiny, "check", "dialogs", "identity"))
    assert (result["rows"], result["train"], result["validation"]) == (330, 304, 26)
    assert result["max_length"] == 512
    printed = capsys.readouterr().out
    assert "dialogs" in printed
    assert "All rows can be used." in printed


def test_show_marks_exactly_the_trained_tokens(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = data(config(tiny, "show", "identity", number=2))
    printed = capsys.readouterr().out
    assert [one["where"] for one in result["examples"]] == [
        "identity/train.jsonl:1", "identity/train.jsonl:2",
    ]  # fmt: skip
    tokenizer = ChatTokenizer.load(tiny)
    for one in result["examples"]:
        trained = [token for token, on in zip(one["ids"], one["mask"], strict=True) if on]
        assert f"⟦{tokenizer.decode(trained, keep_control=True)}⟧" in printed
        assert one["trained"] == len(trained) > 0


def test_coloured_text_is_the_whole_example(tiny: Path) -> None:
    from chatfine.types import Message

    tokenizer = ChatTokenizer.load(tiny)
    example = tokenizer.encode_dialogue([Message("user", "你是谁？"), Message("assistant", "我")])
    text = coloured(example, tokenizer).plain.replace("⟦", "").replace("⟧", "")
    assert text == tokenizer.decode(example.ids, keep_control=True)


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q"}\n', encoding="utf-8")
    with pytest.raises(DataError):
        data(config(tiny, "check", str(path)))
    assert not (tmp_path / "home").exists()
