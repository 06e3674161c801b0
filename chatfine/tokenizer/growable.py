"""A tokenizer that can grow: what kind it is, what its pieces stand for, where new ids begin.

Two kinds of BPE can. A *sentencepiece* vocabulary (Llama-2, Mistral) is made of characters; those
it lacks are written as byte pieces, so a new character is one piece more. A *byte-level* vocabulary
(GPT-2, Llama-3, Qwen, SmolLM2) is made of bytes; a new character is a chain of merges.

Both grow the same way: new merges come after all old ones. So a new encoding only joins tokens of
the old one, and text without a new piece in it keeps its ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding

from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.control import SealedTokenizer, any_of
from chatfine.tokenizer.files import TokenizerFiles, read_files
from chatfine.tokenizer.stream import PieceBytes, byte_level_alphabet

FIRST_RICH = 0x2E80
"""Text below this code point (all of Europe's, Arabic, Indic and South-East Asian scripts, symbols)
never changes: a new piece holds a character from here on (CJK, kana, Hangul, emoji)."""

BATCH = 256  # texts encoded at once
_RICH_BYTES = re.compile(rb"[\xe3-\xff]|\xe2[\xba-\xbf]")

Kind = Literal["sentencepiece", "byte-level"]


@dataclass(frozen=True, slots=True)
class NewPiece:
    """One piece to add."""

    spelling: str
    """as the tokenizer's own model spells it"""
    before: tuple[int, ...]
    """old ids it was written with until now"""


@dataclass(frozen=True, slots=True)
class Growth:
    """What is added to a tokenizer, in the order of ids and of ranks."""

    pieces: tuple[NewPiece, ...]
    merges: tuple[tuple[str, str], ...]
    """of a byte-level vocabulary; SentencePiece joins whatever makes a piece"""


class Growable:
    """The tokenizer of a folder, ready to be measured and grown.

    Raises:
        TokenizerError: tokenizer-cannot-grow, tokenizer-grown-beside, special-token-in-the-way.

    Attributes:
        files: what the folder holds.
        kind: see the module.
        vocab: piece → id of the model's own vocabulary, without added tokens.
        first_new: the first free id, after all pieces and added tokens.
        spellings: piece of each id, "" where there is none.
        bytes: what each id stands for, part of a character perhaps; b"" for an added token.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.kind = kind_of(files)
        self.vocab: dict[str, int] = files.spec["model"]["vocab"]
        added = {entry["content"]: int(entry["id"]) for entry in files.spec["added_tokens"]}
        _refuse_added_text(files)
        self._sealed = SealedTokenizer(files.spec, added)
        self._markup = any_of(
            entry["content"] for entry in files.spec["added_tokens"] if entry.get("special")
        )
        self.first_new: int = 1 + max([*self.vocab.values(), *added.values()])
        self.spellings = [""] * self.first_new
        for piece, number in self.vocab.items():
            self.spellings[number] = piece
        read = PieceBytes(files.spec.get("decoder"))
        skipped = set(added.values())
        self.bytes = [
            read(piece) if piece and number not in skipped else b""
            for number, piece in enumerate(self.spellings)
        ]

    @classmethod
    def load(cls, folder: Path) -> Growable:
        """Read a tokenizer folder.

        Raises:
            TokenizerError: no tokenizer, or one of a kind that can't grow.
        """
        return cls(read_files(Path(folder)))

    @functools.cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids that are only part of a character: what byte fallback writes."""
        return frozenset(n for n, part in enumerate(self.bytes) if part and not is_text(part))

    def spell(self, text: str) -> str:
        """`text` as the model's vocabulary would spell it as one piece."""
        if self.kind == "byte-level":
            return "".join(map(_byte_characters().__getitem__, text.encode()))
        return text.replace(" ", "▁")

    def tokens_of(self, spelling: str) -> tuple[int, ...]:
        """Ids of a stretch that the pre-tokenizer leaves whole, spelled as in the vocabulary."""
        return tuple(token.id for token in self._sealed.tokenizer.model.tokenize(spelling))

    def normalized(self, text: str) -> str:
        """`text` after the tokenizer's normalizer; the ▁ that may stand before it is left out."""
        normalizer = self._sealed.tokenizer.normalizer
        if normalizer is None:
            return text
        done: str = normalizer.normalize_str(text)
        return done if text.startswith("▁") else done.removeprefix("▁")

    def encode(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Encodings of running text, control tokens spelled in it being ordinary text."""
        for begin in range(0, len(texts), BATCH):
            yield from self._sealed.encode_batch(list(texts[begin : begin + BATCH]))

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens `texts` have."""
        return sum(len(encoding) for encoding in self.encode(texts))

    def spelled_control(self, text: str) -> str:
        """The first control token that a text spells; "" where it spells none.

        Other added tokens (runs of spaces, tags of HTML) are text that some tokenizers keep whole.
        """
        found = self._markup.search(text)
        return found[0] if found else ""


def is_rich(part: bytes) -> bool:
    """Whether bytes of a UTF-8 text can only come from a stretch with a character ≥ FIRST_RICH.

    Lead bytes E3 to F4 belong to U+3000 and above; E2 does from U+2E80 on when BA to BF follows.
    """
    return _RICH_BYTES.search(part) is not None


def kind_of(files: TokenizerFiles) -> Kind:
    """How a tokenizer writes characters that it has no piece for.

    Raises:
        TokenizerError: tokenizer-cannot-grow: it is neither kind.
    """
    model = files.spec["model"]
    name = model.get("type") or ("BPE" if "merges" in model else "?")
    if name == "BPE" and isinstance(model["vocab"], dict):
        marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        steps = {step["type"] for part in ("pre_tokenizer", "normalizer", "decoder")
                 for step in _steps(files.spec.get(part))}  # fmt: skip
        if not marked and "ByteLevel" in steps:
            return "byte-level"
        every = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        if not marked and model.get("byte_fallback") and every:
            return "sentencepiece"
        name = "BPE"
    raise TokenizerError(
        "tokenizer-cannot-grow",
        t("this tokenizer (of the type {kind}) can't grow", kind=name),
        where=str(files.folder),
        why=t("only BPE over bytes (GPT-2, Llama-3, Qwen) and SentencePiece-BPE with byte fallback "
              "(Llama-2, Mistral) can write every text and be continued"),
        fix=t("use another model: {command}", command="chatfine models"),
    )  # fmt: skip


def _refuse_added_text(files: TokenizerFiles) -> None:
    """Refuse a tokenizer that has Chinese text as added tokens: the pieces would be there twice.

    Raises:
        TokenizerError: tokenizer-grown-beside, special-token-in-the-way.
    """
    rich = [
        entry
        for entry in files.spec["added_tokens"]
        if min(map(ord, entry["content"]), default=0) >= FIRST_RICH
    ]
    beside = [str(entry["content"]) for entry in rich if not entry.get("special")]
    special = [str(entry["content"]) for entry in rich if entry.get("special")]
    if special:
        raise TokenizerError(
            "special-token-in-the-way",
            t("the special token {token} stands where a new piece would", token=special[0]),
            where=str(files.folder),
            why=t("it is matched before the tokenizer's own pieces, so a piece with its text could "
                  "never be reached"),
            fix=t("start from the model's original tokenizer, which has no such token"),
        )  # fmt: skip
    if beside:
        raise TokenizerError(
            "tokenizer-grown-beside",
            t("this tokenizer has grown before: {count} added tokens such as {example} stand "
              "beside its vocabulary", count=len(beside), example=beside[0]),
            where=str(files.folder),
            why=t("they are matched before its own pieces, so these could not grow on"),
            fix=t("start from the folder it was grown from"),
        )  # fmt: skip


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    if part:
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(name, ()):
                yield from _steps(inner)


def is_text(part: bytes) -> bool:
    """Whether bytes are whole UTF-8 characters."""
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _byte_characters() -> dict[int, str]:
    return {byte: character for character, byte in byte_level_alphabet().items()}
