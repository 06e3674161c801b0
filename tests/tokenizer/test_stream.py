"""ids → text: never half a character, and what is streamed is what is decoded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chat_styles import STYLES, random_text
from tokenizers import Tokenizer

from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.stream import TextStream


@pytest.mark.parametrize("style", STYLES)
def test_stream_of_text(styles: dict[str, Path], style: str) -> None:
    tokenizer = ChatTokenizer.load(styles[style])
    rng = random.Random(2)
    for _ in range(60):
        text = random_text(rng)
        ids = tokenizer.encode_text(text)
        stream = TextStream(tokenizer)
        parts = [stream.push(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert stream.finish() == ""
        assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize("style", STYLES)
def test_decode_equals_the_library(styles: dict[str, Path], style: str) -> None:
    tokenizer = ChatTokenizer.load(styles[style])
    library = Tokenizer.from_file(str(styles[style] / "tokenizer.json"))
    rng = random.Random(6)
    for _ in range(60):
        ids = tokenizer.encode_text(random_text(rng))
        assert tokenizer.decode(ids) == library.decode(ids)
        ids = [*ids, tokenizer.eos_id, *ids]
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)
    assert tokenizer.size == library.get_vocab_size()
    assert [tokenizer.piece(i) for i in range(tokenizer.size)] == [
        library.id_to_token(i) for i in range(tokenizer.size)
    ]


@pytest.mark.parametrize("style", STYLES)
def test_stream_of_anything(styles: dict[str, Path], style: str) -> None:
    """Random ids, broken characters, control tokens and ids without a piece (padded embeddings)."""
    tokenizer = ChatTokenizer.load(styles[style])
    rng = random.Random(7)
    for keep in (False, True):
        for _ in range(40):
            ids = [rng.randrange(tokenizer.size + 8) for _ in range(30)]
            stream = TextStream(tokenizer, keep)
            text = "".join([*map(stream.push, ids), stream.finish()])
            assert text == tokenizer.decode(ids, keep)


def test_a_character_waits_for_its_last_byte(styles: dict[str, Path]) -> None:
    tokenizer = ChatTokenizer.load(styles["llama2"])
    ids = [i for i in tokenizer.encode_text("🙂") if tokenizer.piece(i).startswith("<0x")]
    assert len(ids) == 4
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_bytes_of_pieces(styles: dict[str, Path]) -> None:
    for style in STYLES:
        tokenizer = ChatTokenizer.load(styles[style])
        for text in ("你好 🙂", "a b\n", "é"):
            data = b"".join(map(tokenizer.token_bytes, tokenizer.encode_text(text)))
            prefix = b" " if style in ("llama2", "mistral") else b""
            assert data == prefix + text.encode()
