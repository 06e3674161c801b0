"""Growing a tokenizer by what a corpus needs, and the measures of what came out."""

from __future__ import annotations

from collections.abc import Sequence

from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.grow_files import grown
from chatfine.tokenizer.growable import Growable, Growth
from chatfine.tokenizer.learn import Learned


def fill(base: Growable, learned: Learned, size: int) -> Growth:
    """`size` new pieces, every one of which its own text is written with.

    Raises:
        TokenizerError: corpus-too-small: it has not so many pieces.
    """
    growth = learned.grow(size)
    lost = set(unreachable(base, growth)) - learned.needed(growth)
    if lost:
        growth = learned.grow(size, lost)
    if len(growth.pieces) < size:
        raise _too_small(size, len(growth.pieces))
    return growth


def unreachable(base: Growable, growth: Growth) -> list[str]:
    """Whole pieces that their own text is not written with."""
    after = grown(base, growth)
    return [
        piece.spelling
        for number, piece in enumerate(growth.pieces, start=base.first_new)
        if number not in after.byte_tokens and after.tokens_of(piece.spelling) != (number,)
    ]


def unused(base: Growable, growth: Growth, texts: Sequence[str]) -> list[str]:
    """New pieces that no text is written with: those that only longer pieces are made of."""
    used: set[int] = set()
    for encoding in grown(base, growth).encode(texts):
        used.update(encoding.ids)
    return [
        piece.spelling
        for number, piece in enumerate(growth.pieces, start=base.first_new)
        if number not in used
    ]


def _too_small(size: int, most: int) -> TokenizerError:
    if most == 0:
        return TokenizerError(
            "nothing-to-add",
            t("the corpus has nothing that the vocabulary lacks"),
            where="--corpus",
            why=t("new pieces need a character from U+2E80 on (Chinese, Japanese, Korean, emoji); "
                  "other text must keep its ids"),
            fix=t("name a corpus in the language that is to be added"),
        )  # fmt: skip
    return TokenizerError(
        "corpus-too-small",
        t("the corpus has no {size} new pieces", size=size),
        where="--size",
        why=t("only {most} occur at least twice and are not in the vocabulary yet", most=most),
        fix=t("add more text with --corpus, or use --size {most}", most=most),
    )
