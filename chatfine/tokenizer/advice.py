"""Does a larger vocabulary pay? Measured on the user's text, judged by one rule.

What is measured: characters per token on a part of the corpus kept apart, the share of tokens that
are only part of a character, the weights that new rows add, and how often the corpus shows each new
piece. What others found is in `literature`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chatfine.i18n import t
from chatfine.tokenizer.grow_files import grown
from chatfine.tokenizer.growable import Growable
from chatfine.tokenizer.learn import Learned

SIZES = (1000, 4000, 8000, 16000)
MIN_GAIN = 1.25  # less than a fifth of the tokens saved is not worth untrained rows
MIN_STEP = 1.05  # what a larger size must bring over the one before
MIN_SHOWN = 50.0  # times the corpus shows a new piece on average; a row shown less stays a guess
MEASURED_TEXT = 2_700_000  # characters with which growing was measured not to pay (docs/LOG.md)
MIN_TEXT = 30_000_000  # characters below which the advice is against it
# All these thresholds are set by hand. MIN_TEXT is about ten times MEASURED_TEXT. Nothing between
# was measured, and the papers below speak of billions of tokens: there the "no" stops being
# certain, which is not yet a "yes".
KEPT_APART, LEAST_TEXTS, MOST_CHARACTERS = 20, 40, 300_000


@dataclass(frozen=True, slots=True)
class Measure:
    """One vocabulary on the kept-apart text."""

    added: int
    """new pieces; 0 = the vocabulary as it is"""
    ratio: float
    """characters per token"""
    shown: float
    """how often the corpus is written with a new piece, on average over them; 0 for added = 0"""
    broken: float
    """share of tokens that are only part of a character"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says: `size` pieces, 0 = don't."""

    size: int
    cause: Literal["may-pay", "too-little-text", "gains-little", "shown-too-rarely"]
    fits: int = 0
    """pieces that suit the text, however much there is of it; 0 = none"""


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts to learn from, and about one of twenty kept apart to measure on.

    Chosen by hash, since every twentieth would always be English where two languages take turns.
    With few texts nothing is kept apart; then the measure is on the corpus itself, and too good.
    """
    if len(texts) < LEAST_TEXTS:
        return list(texts), []
    apart: list[str] = []
    rest: list[str] = []
    characters = 0
    for text in texts:
        if zlib.crc32(text.encode()) % KEPT_APART == 0 and characters < MOST_CHARACTERS:
            apart.append(text)
            characters += len(text)
        else:
            rest.append(text)
    return rest, apart


def measure(base: Growable, after: Growable, apart: Sequence[str], corpus: int) -> Measure:
    """Encode the kept-apart text with `after`, grown from `base`.

    Args:
        corpus: characters of the whole corpus.
    """
    tokens = new = broken = 0
    for encoding in after.encode(apart):
        tokens += len(encoding.ids)
        new += sum(number >= base.first_new for number in encoding.ids)
        broken += sum(number in after.byte_tokens for number in encoding.ids)
    characters, added = sum(map(len, apart)), after.first_new - base.first_new
    whole = corpus / characters if characters else 0.0
    return Measure(
        added=added,
        ratio=characters / tokens if tokens else 0.0,
        shown=whole * new / added if added else 0.0,
        broken=broken / tokens if tokens else 0.0,
    )


def measure_sizes(
    base: Growable, learned: Learned, apart: Sequence[str], corpus: int, sizes: Sequence[int]
) -> list[Measure]:
    """The vocabulary as it is, and grown to each of `sizes` that the corpus has pieces for."""
    found = [measure(base, base, apart, corpus)]
    for size in sizes:
        growth = learned.grow(size)
        if len(growth.pieces) < size:
            break
        found.append(measure(base, grown(base, growth), apart, corpus))
    return found


def judge(now: Measure, sizes: Sequence[Measure], corpus: int) -> Verdict:
    """The largest size that still brings something and whose pieces the corpus shows often enough.

    With less than `MIN_TEXT` that size is only what would fit, and the verdict is against growing.

    Args:
        now: the vocabulary as it is.
        sizes: grown ones, the smallest first.
        corpus: characters of the whole corpus.
    """
    best, before = 0, now
    cause: Literal["gains-little", "shown-too-rarely"] = "gains-little"
    for one in sizes:
        if one.ratio < MIN_STEP * before.ratio:
            break
        if one.shown < MIN_SHOWN:
            cause = "shown-too-rarely"
            break
        before = one
        if one.ratio >= MIN_GAIN * now.ratio:
            best = one.added
    if not best:
        return Verdict(0, cause)
    if corpus < MIN_TEXT:
        return Verdict(0, "too-little-text", best)
    return Verdict(best, "may-pay", best)


def added_weights(pieces: int, hidden: int, tied: bool) -> int:
    """Weights of the new rows: one matrix where embedding and head are tied, else two."""
    return pieces * hidden * (1 if tied else 2)


def literature() -> list[str]:
    """What others needed to make new pieces pay, each with its source."""
    return [
        t("LLaMA Beyond English (Zhao et al. 2024, arXiv 2401.01055): up to tens of billions of "
          "tokens of further training, the old vocabulary did better than a larger one"),
        t("EEVE (Kim et al. 2024, arXiv 2402.14714): 2 billion tokens, new rows first and then "
          "the rest, in seven stages"),
        t("TokAlign (Li et al. 2025, arXiv 2506.03523): 5,000 steps after a change of the whole "
          "vocabulary, with rows started from those of similar tokens"),
    ]  # fmt: skip
