"""Texts → the stretches in which new pieces may grow, written in an alphabet of old tokens.

Every old token becomes one character of a private alphabet, and so does every character that the
tokenizer can write only in parts (习 is three byte tokens in Llama-2): that is a new piece in
itself. What is left out of the stretches can never be part of a new piece, so the rules of the
vocabulary are all here:

- A stretch has no two tokens in a row that could stand in a text below U+2E80. So whatever is
  joined holds a character from there on, and other text keeps its ids.
- In a byte-level vocabulary the tokenizer's own pre-tokenizer bounds the stretches.
- SentencePiece has no pre-tokenizer; there a stretch is of one script, decimal digits stay alone
  (as its trainer does it for the Llama models: split_by_unicode_script, split_digits), the word
  mark ▁ may begin it, or one sign may: ，但是. That last rule is the one of the pre-tokenizers of
  GPT-4, Llama-3 and Qwen; on kept-apart text it is worth 2 to 10 %.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from chatfine.tokenizer.growable import Growable, is_rich, is_text

FIRST = 0xE000
"""The old token with the id n is the character FIRST + n; missing characters follow."""
_GAP = "\x1f"
_HAN = {"CJK", "KANGXI", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"}
# what a token is to the rules, one letter each; scripts get a letter from here on
_NOTHING, _SPACE, _SIGN, _SPACED_SIGN, _DIGIT, _RICH = " ", "_", "p", "P", "0", "r"
_SCRIPT, _SPACED_SCRIPT, _SCRIPTS = 0x80, 0xC0, 64


@dataclass(slots=True)
class Run:
    """How often a stretch occurs, and the numbers of the first and the last text it stands in."""

    count: int
    first: int
    last: int


@dataclass
class Runs:
    """All stretches of some texts."""

    base: Growable
    found: dict[str, Run] = field(default_factory=dict)
    units: list[tuple[int, ...]] = field(default_factory=list)
    """the missing characters: old ids each is written with"""

    def parts(self, symbol: str) -> tuple[int, ...]:
        """The old ids that one character of the alphabet stands for."""
        number = ord(symbol) - FIRST
        known = number < self.base.first_new
        return (number,) if known else self.units[number - self.base.first_new]

    def is_unit(self, symbol: str) -> bool:
        """Whether a character of the alphabet is a missing character."""
        return ord(symbol) - FIRST >= self.base.first_new

    def spelling(self, symbols: str) -> str:
        """How the vocabulary would spell what the symbols stand for, as one piece."""
        spelled = []
        for symbol in symbols:
            parts = self.parts(symbol)
            if self.is_unit(symbol) and self.base.kind == "sentencepiece":
                spelled.append(b"".join(self.base.bytes[part] for part in parts).decode())
            else:
                spelled.append("".join(self.base.spellings[part] for part in parts))
        return "".join(spelled)


def find_runs(base: Growable, texts: Sequence[str]) -> Runs:
    """The stretches of `texts` under the old tokenizer."""
    runs = Runs(base)
    alphabet = _Alphabet(runs)
    lines = [alphabet.line(encoding) for encoding in base.encode(texts)]
    kinds, pattern = alphabet.kinds()
    for number, line in enumerate(lines):
        codes = np.frombuffer(line.encode("utf-32-le"), "<u4")
        for match in pattern.finditer(kinds[codes].tobytes().decode("latin-1")):
            stretch = line[match.start() : match.end()]
            if len(stretch) == 1 and not runs.is_unit(stretch):
                continue
            run = runs.found.get(stretch)
            if run is None:
                runs.found[stretch] = Run(1, number, number)
            else:
                run.count += 1
                run.last = number
    return runs


class _Alphabet:
    def __init__(self, runs: Runs) -> None:
        base = runs.base
        self._runs = runs
        self._units: dict[str, str] = {}
        follow = [n for n, part in enumerate(base.bytes) if part and part[0] & 0xC0 == 0x80]
        begin = base.byte_tokens - set(follow)
        # a character in parts: a token that ends inside one, then all that begin inside one
        self._broken = re.compile(f"[{_letters(begin)}][{_letters(follow)}]+")

    def line(self, encoding: Encoding) -> str:
        """A text in the alphabet, with gaps between the words of the pre-tokenizer."""
        codes = np.array(encoding.ids, dtype="<u4") + FIRST
        if self._runs.base.kind == "byte-level":
            words = np.array([-1 if word is None else word for word in encoding.word_ids])
            codes = np.insert(codes, np.flatnonzero(np.diff(words)) + 1, ord(_GAP))
        return self._broken.sub(self._join, codes.astype("<u4").tobytes().decode("utf-32-le"))

    def _join(self, match: re.Match[str]) -> str:
        symbol = self._units.get(match[0])
        if symbol is None:
            base, parts = self._runs.base, tuple(ord(letter) - FIRST for letter in match[0])
            whole = b"".join(base.bytes[part] for part in parts)
            symbol = _GAP
            if is_text(whole) and is_rich(whole) and all(map(_is_shown, whole.decode())):
                symbol = chr(FIRST + base.first_new + len(self._runs.units))
                self._runs.units.append(parts)
            self._units[match[0]] = symbol
        return symbol

    def kinds(self) -> tuple[npt.NDArray[np.uint8], re.Pattern[str]]:
        """Kind of every character of the alphabet (by its code), and the pattern of a stretch."""
        base = self._runs.base
        whole = [b"".join(base.bytes[part] for part in unit) for unit in self._runs.units]
        kinds = np.full(FIRST + base.first_new + len(whole), ord(_NOTHING), np.uint8)
        scripts: dict[str, int] = {}
        for number, part in enumerate([*base.bytes, *whole]):
            if part:
                byte_level = base.kind == "byte-level"
                kind = _byte_kind(part) if byte_level else _script_kind(part, scripts)
                kinds[FIRST + number] = ord(kind)
        pattern = f"{_SIGN}?{_RICH}+(?:{_SIGN}{_RICH}+)*{_SIGN}?"
        return kinds, re.compile(pattern if base.kind == "byte-level" else _of_scripts(scripts))


def _is_shown(letter: str) -> bool:
    """No control, format, private or unassigned character, nor the sign of a failed decoding."""
    return unicodedata.category(letter)[0] != "C" and letter != "\ufffd"


def _letters(ids: Iterable[int]) -> str:
    """A character class of tokens; one that no text holds where there are none."""
    return "".join(chr(FIRST + number) for number in sorted(ids)) or "\x00"


def _byte_kind(part: bytes) -> str:
    if is_rich(part):
        return _RICH
    if not is_text(part) or any(letter.isalnum() for letter in part.decode()):
        return _NOTHING
    return _SIGN


def _script_kind(part: bytes, scripts: dict[str, int]) -> str:
    """Kind of a token of a SentencePiece vocabulary; `scripts` numbers those met so far."""
    if not is_text(part):
        return _NOTHING
    if part == b" ":
        return _SPACE
    if not is_rich(part):
        return _NOTHING
    text = part.decode()
    spaced, names = text.startswith(" "), {_script(letter) for letter in text.strip(" ")}
    if len(names) != 1:
        return _NOTHING
    name = names.pop()
    if name in (_SIGN, _DIGIT):
        return name.upper() if spaced else name
    number = scripts.setdefault(name, len(scripts))
    if number >= _SCRIPTS:
        return _NOTHING
    return chr((_SPACED_SCRIPT if spaced else _SCRIPT) + number)


def _script(letter: str) -> str:
    """The script of a letter by the first word of its name; kana count as Han, as there."""
    category = unicodedata.category(letter)
    if category == "Nd":
        return _DIGIT
    if category[0] != "L":
        return _SIGN
    name = unicodedata.name(letter, "?").split()[0]
    return "Han" if name in _HAN else name


def _of_scripts(scripts: dict[str, int]) -> str:
    """The pattern of a stretch in a SentencePiece vocabulary."""
    ways = []
    for number in range(min(len(scripts), _SCRIPTS)):
        plain, spaced = chr(_SCRIPT + number), chr(_SPACED_SCRIPT + number)
        ways.append(f"[{_SPACE}{_SIGN}{_SPACED_SIGN}]?{plain}+|{spaced}{plain}*")
    return "|".join([*ways, f"{_SPACE}?{_SIGN}+|{_SPACED_SIGN}{_SIGN}*", _DIGIT])
