"""ids → text. Pieces become bytes first, so a character is shown when its last byte is there."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of the byte-level alphabet (GPT-2): printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class PieceBytes:
    """Turns a vocabulary piece into the bytes it stands for, following tokenizer.json's decoder.

    Args:
        decoder: the `decoder` entry of a tokenizer.json.
    """

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        steps = list(_flatten(decoder))
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._space = ""
        self.strips_first_space = False
        """whether a text loses the one space that the tokenizer put before it"""
        for step in steps:
            if step["type"] == "Metaspace":
                self._space = step["replacement"]
                before = step.get("add_prefix_space", True)  # the flag's older form
                scheme = step.get("prepend_scheme", "always" if before else "never")
                self.strips_first_space = scheme != "never"
            elif step["type"] == "Replace" and step.get("content") == " ":
                self._space = step["pattern"].get("String", "")
            elif step["type"] == "Strip" and step.get("content") == " ":
                self.strips_first_space = step.get("start", 0) > 0

    def __call__(self, piece: str) -> bytes:
        """The bytes of an ordinary piece of the vocabulary."""
        if self._byte_level:
            alphabet = byte_level_alphabet()
            if all(char in alphabet for char in piece):
                return bytes(alphabet[char] for char in piece)
            return piece.encode()
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return (piece.replace(self._space, " ") if self._space else piece).encode()


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


class TextStream:
    """Text of a growing answer, never half a character.

    `"".join` of all that `push` and `finish` return equals `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: ChatTokenizer, keep_control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_control = keep_control
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; often one word, sometimes nothing yet."""
        if token_id in self._tokenizer.control_ids and not self._keep_control:
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_start and piece:
            piece, self._at_start = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: a replacement character if the answer broke off inside a character."""
        return self._decoder.decode(b"", final=True)
