"""`chatfine tokens`: what is shown and what --json gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from chatfine.commands.tokens import tokens
from chatfine.config import TokensConfig
from chatfine.errors import ChatfineError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]


def test_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tokens(TokensConfig(text="hi 🙂", model=str(tiny)))
    assert bytes.fromhex("".join(t["bytes"] for t in result["tokens"])).decode() == "hi 🙂"
    assert result["characters"] == 4
    assert result["characters_per_token"] == round(4 / len(result["tokens"]), 3)
    shown = capsys.readouterr().out
    assert all(str(token["id"]) in shown for token in result["tokens"])


def test_compare(tiny: Path, smaller: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tokens(TokensConfig(text="你好", model=str(tiny), compare=str(smaller)))
    assert result["compare"]["model"] == str(smaller)
    assert "2 characters in" in capsys.readouterr().out


@pytest.fixture
def smaller(styles: dict[str, Path], tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with another tokenizer (only the folder's look matters)."""
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(tiny, folder)
    for path in styles["llama3"].iterdir():
        shutil.copy(path, folder)
    return folder


def test_messages(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dialogue.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8")
    result = tokens(TokensConfig(messages=str(path), model=str(tiny)))
    assert set(result) == {"ids", "mask"}
    assert len(result["ids"]) == len(result["mask"])
    assert json.loads(json.dumps(result)) == result
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n你好<|im_end|>" in shown
    assert f"{len(result['ids'])} tokens, {sum(result['mask'])} of them" in shown


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'[{"role": "user"}]', "bad-messages"),
        (b"[]", "bad-messages"),
        (b'[{"role": "user", \n"content" "x"}]', "bad-json"),
        ('["你"]'.encode("gbk"), "not-utf8"),
        (None, "no-messages-file"),
    ],
)
def test_bad_messages(tiny: Path, tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "dialogue.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChatfineError) as refused:
        tokens(TokensConfig(messages=str(path), model=str(tiny)))
    assert refused.value.code == code
    if code == "bad-json":
        assert refused.value.where == f"{path}:2:11"


def test_text_or_messages(tiny: Path) -> None:
    for text, messages in (("", ""), ("x", "y")):
        with pytest.raises(ChatfineError, match="either a text or --messages"):
            tokens(TokensConfig(text=text, messages=messages, model=str(tiny)))


def test_explain(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five ways on one screen; only byte-level BPE knows every character."""
    text = "Hello 你好 🙂 龘"
    result = tokens(TokensConfig(text=text, model=str(tiny), explain=True))
    ways = {way["way"]: way["tokens"] for way in result["ways"]}
    assert list(ways) == ["word", "character", "subword", "BPE", "BBPE"]
    assert len(ways["character"]) == len(text)
    assert all("�" in ways[name] for name in ("word", "character", "subword", "BPE"))
    parts = [bytes.fromhex(one) if re.fullmatch("([0-9a-f]{2})+", one) else one.encode()
             for one in ways["BBPE"]]  # fmt: skip
    assert b"".join(parts).decode() == text
    assert bytes.fromhex("".join(t["bytes"] for t in result["tokens"])).decode() == text
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24
    assert all(f"{name}: " in shown for name in ways)


def test_a_folder_with_only_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, tmp_path / name)
    alone = tokens(TokensConfig(text="hi", model=str(tmp_path), compare=str(tiny)))
    assert alone["tokens"] == alone["compare"]["tokens"]
