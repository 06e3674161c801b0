"""Five ways to cut a text into tokens, each learned on the spot from the same few texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from chatfine.i18n import t
from chatfine.tokenizer.growable import is_text
from chatfine.tokenizer.stream import PieceBytes

PIECES = 2000
UNKNOWN = "�"
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Way:
    """One way, and what becomes of a text."""

    name: str
    tokens: tuple[str, ...]
    """with UNKNOWN where the vocabulary has nothing, and bytes of half a character in hex"""
    vocabulary: int
    idea: str


def five_ways(text: str, learned_from: Sequence[str]) -> list[Way]:
    """Cut `text` by words, characters, subwords, BPE and byte-level BPE.

    Args:
        learned_from: what the vocabularies are made of; they are small, so that their limits show.
    """
    words = {word for one in learned_from for word in _WORD.findall(one)}
    letters = {letter for one in learned_from for letter in one}
    return [
        Way(t("word"), tuple(word if word in words else UNKNOWN for word in _WORD.findall(text)),
            len(words), t("A token is a word. New words are unknown, the list is endless, and "
                          "Chinese puts no spaces between words.")),
        Way(t("character"), tuple(letter if letter in letters else UNKNOWN for letter in text),
            len(letters), t("A token is a character. Texts become long, and characters that were "
                            "never seen are unknown.")),
        _subword(text, learned_from),
        _bpe(text, learned_from),
        _byte_level_bpe(text, learned_from),
    ]  # fmt: skip


def _subword(text: str, learned_from: Sequence[str]) -> Way:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, unk_token=UNKNOWN, special_tokens=[UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(learned_from, trainer)
    idea = t("Between the two: common words whole, rare ones in parts. Here the likeliest cut is "
             "taken (Unigram).")  # fmt: skip
    return Way(t("subword"), _shown(tokenizer, text), tokenizer.get_vocab_size(), idea)


def _bpe(text: str, learned_from: Sequence[str]) -> Way:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=[UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(learned_from, trainer)
    idea = t("Subwords, found by joining the most frequent pair of neighbours again and again "
             "(Llama-2's is one; it writes unknown characters as bytes).")  # fmt: skip
    return Way("BPE", _shown(tokenizer, text), tokenizer.get_vocab_size(), idea)


def _byte_level_bpe(text: str, learned_from: Sequence[str]) -> Way:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(learned_from, trainer)
    read = PieceBytes({"type": "ByteLevel"})
    tokens = tuple(_of_bytes(read(piece)) for piece in tokenizer.encode(text).tokens)
    idea = t("The same over bytes instead of characters: 256 of them write everything, nothing is "
             "unknown (GPT, Llama-3, Qwen, SmolLM2).")  # fmt: skip
    return Way("BBPE", tokens, tokenizer.get_vocab_size(), idea)


def _shown(tokenizer: Tokenizer, text: str) -> tuple[str, ...]:
    """Pieces with the text they stand for; an unknown one has its sign."""
    encoding = tokenizer.encode(text)
    known = tokenizer.get_vocab()
    unknown = known[UNKNOWN]
    return tuple(
        UNKNOWN if number == unknown else piece.replace("▁", " ")
        for number, piece in zip(encoding.ids, encoding.tokens, strict=True)
    )


def _of_bytes(part: bytes) -> str:
    return part.decode() if is_text(part) else part.hex()
