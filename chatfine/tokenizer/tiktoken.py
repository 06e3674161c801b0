"""Llama 3's `tokenizer.model`: a list of byte strings in the order in which they are merged.

Each line holds a piece in base64 and its rank, which is its id. The file knows neither the pattern
that cuts a text before merging nor the control tokens; both are facts of Llama 3, taken from Meta's
published tokenizer (https://github.com/meta-llama/llama-models).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.bpe import added_token, begin_with, bpe_spec, merges_by_score

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
LLAMA3_RULES: dict[str, Any] = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
}  # fmt: skip
"""How Llama 3 cuts a text and puts it together again, as tokenizer.json says it."""
BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_CONTROL_TOKENS = 256
_NAMED = {
    False: {0: BEGIN, 1: END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN},
    True: {0: BEGIN, 1: END, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
           7: "<|end_header_id|>", 8: "<|eom_id|>", 9: END_OF_TURN, 10: "<|python_tag|>"},
}  # fmt: skip
"""Llama 3.1 (True) gave names to some of the tokens that Llama 3 kept in reserve."""


def is_rank_file(path: Path) -> bool:
    """Whether a `tokenizer.model` is of this kind, rather than SentencePiece's."""
    with path.open("rb") as stream:
        return bool(_LINE.fullmatch(stream.readline(200).strip()))


def read_ranks(path: Path, modern: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer.json and the tokenizer_config.json that stand for Llama 3's file.

    Args:
        modern: name the control tokens as Llama 3.1 does.

    Raises:
        TokenizerError: bad-tokenizer-model: a damaged file, or another vocabulary than Llama 3's.
    """
    letters = _byte_letters()
    vocab: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text, rank = line.split()
            piece = "".join(letters[byte] for byte in base64.b64decode(text, validate=True))
            if int(rank) != number or piece in vocab:
                raise ValueError
        except (ValueError, binascii.Error):
            raise _refusal(path, t("line {n} is damaged", n=number + 1)) from None
        vocab[piece] = number
    if any(letter not in vocab for letter in letters):
        raise _refusal(path, t("it lacks some of the 256 single bytes"))
    tokens = control_tokens(modern)
    added = [added_token(len(vocab) + n, token, special=True) for n, token in enumerate(tokens)]
    scores = {piece: -float(rank) for piece, rank in vocab.items()}
    spec = bpe_spec(vocab, merges_by_score(vocab, scores), added) | LLAMA3_RULES
    spec["model"]["ignore_merges"] = True  # a stretch that is a piece itself is that piece
    spec["post_processor"] = begin_with(BEGIN, len(vocab))
    return spec, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def ranks_of(spec: Mapping[str, Any]) -> bytes | None:
    """The way back from `read_ranks`: Llama 3's file; None for another tokenizer.json."""
    if spec.get("pre_tokenizer") != LLAMA3_RULES["pre_tokenizer"]:
        return None
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    ranked = sorted(spec["model"]["vocab"].items(), key=lambda entry: entry[1])
    pieces = (bytes(bytes_of[letter] for letter in piece) for piece, _ in ranked)
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))
    return b"".join(lines)


def control_tokens(modern: bool) -> list[str]:
    """All control tokens in the order of their ids: the named ones, the rest in reserve."""
    named, tokens, spare = _NAMED[modern], [], 0
    for number in range(_CONTROL_TOKENS):
        if number in named:
            tokens.append(named[number])
        else:
            tokens.append(f"<|reserved_special_token_{spare}|>")
            spare += 1
    return tokens


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies.

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _refusal(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "bad-tokenizer-model",
        t("can't convert {path}", path=path.name),
        where=str(path),
        why=why,
        fix=t("download tokenizer.model of Llama 3 again, or put the model's tokenizer.json into "
              "the folder"),
    )  # fmt: skip
