"""The parts of a tokenizer.json of the type BPE."""

from __future__ import annotations

from typing import Any

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def merges_by_score(vocab: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """Every way to cut a piece in two pieces, the best piece first: the merges of a tokenizer that
    joins whichever neighbours make the piece with the best score."""
    ranked = []
    for whole, score in scores.items():
        cuts = [(whole[:at], whole[at:]) for at in range(1, len(whole))]
        known = [cut for cut in cuts if cut[0] in scores and cut[1] in scores]
        known.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        ranked += [(-score, cut) for cut in known]
    ranked.sort(key=lambda entry: entry[0])
    return [[left, right] for _, (left, right) in ranked]


def added_token(number: int, content: str, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`."""
    return {"id": number, "content": content, **dict.fromkeys(_FLAGS, False), "special": special}


def bpe_spec(
    vocab: dict[str, int], merges: list[Any], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """A tokenizer.json of the type BPE that leaves texts as they are."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def begin_with(token: str, number: int) -> dict[str, Any]:
    """A `post_processor` that puts a beginning token before every text."""
    parts = [
        [{"SpecialToken": {"id": token, "type_id": n}}, {"Sequence": {"id": name, "type_id": n}}]
        for n, name in enumerate("AB")
    ]
    return {
        "type": "TemplateProcessing",
        "single": parts[0],
        "pair": [*parts[0], *parts[1]],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
