"""A tokenizer in which nobody can spell a control token.

Inside it every control token goes by a random name, made up when it is loaded. Text typed by a
person, `<|im_end|>` included, is then text like any other; the template's own control tokens are
written by their random names. Ids, flags (`lstrip`, `normalized`, …), prefix spaces and
pre-tokenisation stay those of the original, because one call still encodes the whole dialogue.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Encoding, Tokenizer

from chatfine.errors import TokenizerError
from chatfine.i18n import t


class SealedTokenizer:
    """The tokenizer of a `tokenizer.json`, its control tokens renamed.

    Args:
        spec: contents of a tokenizer.json; not changed.
        control: the spellings to rename; each must be an added token of `spec`.

    Raises:
        TokenizerError: the file can't be loaded, or its ids are inconsistent.
    """

    def __init__(self, spec: Mapping[str, Any], control: Iterable[str]) -> None:
        self.nonce = secrets.token_hex(10)
        self.names = {
            token: f"q{self.nonce}t{number}z" for number, token in enumerate(sorted(set(control)))
        }
        """original spelling → random name"""
        self.spellings = {name: token for token, name in self.names.items()}
        self._pattern = any_of(self.names)
        self.tokenizer = _load(_rename(spec, self.names))
        self.ids: dict[str, int] = {}
        """original spelling → id"""
        expected = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
        for token, name in self.names.items():
            found = self.tokenizer.token_to_id(name)
            if found is None or found != expected[token]:
                raise TokenizerError(
                    "tokenizer-ids",
                    t("token {token} should have id {id} but gets {found}", token=token,
                      id=expected[token], found=found),
                    where="tokenizer.json",
                    fix=t("fetch the tokenizer's files again: they do not belong together"),
                )  # fmt: skip
            self.ids[token] = found

    def seal(self, text: str) -> str:
        """Write the control tokens in trusted `text` by their random names."""
        return self._pattern.sub(lambda match: self.names[match[0]], text)

    def encode(self, text: str) -> Encoding:
        """Ids and offsets of sealed text; nothing is added at either end."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        """`encode` for many texts, on several threads where the library allows it."""
        return self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None when there is no such id."""
        name = self.tokenizer.id_to_token(token_id)
        return None if name is None else self.spellings.get(name, name)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of `words`, longest first; without words it never matches."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _rename(spec: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`spec` with control tokens renamed, and without what adds, cuts or pads."""
    added = [
        {**entry, "content": names.get(entry["content"], entry["content"])}
        for entry in spec["added_tokens"]
    ]
    model = dict(spec["model"])
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        inside = [token for token in names if token in vocab]
        if inside:
            model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
            if "merges" in model:
                model["merges"] = _without(model["merges"], set(inside))
    else:  # Unigram: a list of (piece, score)
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    return {
        **spec,
        "added_tokens": added,
        "model": model,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _without(merges: list[Any], tokens: set[str]) -> list[Any]:
    """The merges that neither use nor build one of `tokens`."""
    kept = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left + right not in tokens and left not in tokens and right not in tokens:
            kept.append(merge)
    return kept


def _load(spec: Mapping[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            "bad-tokenizer",
            t("the tokenizers library can't load this tokenizer"),
            where="tokenizer.json",
            why=str(error),
            fix=t("fetch the tokenizer's files again, or update: pip install -U tokenizers"),
        ) from None
