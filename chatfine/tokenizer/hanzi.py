"""The preset `hanzi`: every Chinese character of the basic block, and Chinese punctuation."""

from __future__ import annotations

from chatfine.tokenizer.growable import FIRST_RICH, Growable, Growth, NewPiece
from chatfine.tokenizer.learn import chain_merges

CHARACTERS = "".join(map(chr, range(0x4E00, 0x9FFF)))
SIGNS_BEFORE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
SIGNS_AFTER = "《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
# the tutorial's string goes over two lines, so its newline became a token (52320 of Llama-2), an
# untrained one at every line break; its loop leaves out the block's last character
HANZI = CHARACTERS + SIGNS_BEFORE + "\u9fff" + SIGNS_AFTER
"""In the order of the ids."""
LLAMA2_FIRST, LLAMA2_PIECES = 32000, 20_339
"""The tutorial's table of ids on Llama-2: from 丂 32000 over 习 32069 to ﹏ 52338."""


def hanzi(base: Growable) -> Growth:
    """The characters that are no pieces yet.

    In a byte-level vocabulary a character is a chain of merges, with half characters on the way
    where none were there. Three signs below U+2E80 are left out there: ‛‟‧ share their first bytes
    with “ and …, whose ids must not change.
    """
    byte_level = base.kind == "byte-level"
    pieces: dict[str, NewPiece] = {}
    merges: dict[tuple[str, str], None] = {}  # a set that keeps its order
    for character in HANZI:
        spelling = base.spell(character)
        before = base.tokens_of(spelling)
        if len(before) < 2 or base.normalized(character) != character:
            continue
        if byte_level:
            if ord(character) < FIRST_RICH:
                continue
            chain = chain_merges([base.spellings[part] for part in before])
            for end, (left, right) in enumerate(chain, start=2):
                merges[left, right] = None
                if left + right not in base.vocab:
                    pieces.setdefault(left + right, NewPiece(left + right, before[:end]))
        else:
            pieces[spelling] = NewPiece(spelling, before)
    return Growth(tuple(pieces.values()), tuple(merges))
