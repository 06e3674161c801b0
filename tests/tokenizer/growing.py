"""What must hold for every grown tokenizer, whatever it learned."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

from random_texts import random_texts

from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.growable import FIRST_RICH, Growable


def ends(tokenizer: Growable, ids: list[int]) -> list[int]:
    """The byte at which each token ends."""
    return list(accumulate(len(tokenizer.bytes[number]) for number in ids))


def check_only_joined(
    before: Growable, after: Growable, texts: list[str], spared: str = ""
) -> None:
    """A new encoding only joins old tokens, and text below U+2E80 keeps its ids."""
    low = ["".join(c for c in text if ord(c) < FIRST_RICH and c not in spared) for text in texts]
    every = [*texts, *filter(None, low)]
    pairs = zip(before.encode(every), after.encode(every), strict=True)
    for text, (old, new) in zip(every, pairs, strict=True):
        old_ends, new_ends = ends(before, old.ids), ends(after, new.ids)
        assert old_ends[-1] == new_ends[-1], text
        assert set(new_ends) <= set(old_ends), text
        if all(ord(letter) < FIRST_RICH and letter not in spared for letter in text):
            assert new.ids == old.ids, text


def check_folder(before: Growable, folder: Path, count: int, seed: int, spared: str = "") -> None:
    """Joined tokens only, round trip, and one encoding by every library that reads the folder."""
    import sentencepiece
    from transformers import AutoTokenizer

    after, texts = Growable.load(folder), random_texts(count, seed)
    check_only_joined(before, after, texts, spared)
    chat, library = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    model = folder / "tokenizer.model"
    processor = (
        sentencepiece.SentencePieceProcessor(model_file=str(model)) if model.is_file() else None
    )
    for text in texts:
        ids = chat.encode_text(text)
        assert library.encode(text, add_special_tokens=False) == ids, text
        assert processor is None or processor.encode(text) == ids, text
        assert chat.decode(ids).removeprefix(" ") == text.removeprefix(" "), text
    assert len(library) == chat.size


def new_pieces(folder: Path) -> list[tuple[int, str, list[int]]]:
    """The rows of vocabulary.json."""
    values = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    rows = [(number, piece, before) for number, piece, before in values["pieces"]]
    assert [row[0] for row in rows] == list(range(values["old_size"], values["new_size"]))
    return rows
