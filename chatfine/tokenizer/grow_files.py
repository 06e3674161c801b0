"""A grown tokenizer's folder: tokenizer.json, tokenizer.model, settings, and what is new in it.

Ids that special tokens took after the vocabulary (Llama-3's, a `<pad>`) stay theirs; new pieces
come after them. A tokenizer.model gives ids by position, so it gets those tokens too.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.hub.vocabulary import FILE
from chatfine.i18n import t
from chatfine.tokenizer.bpe import added_token
from chatfine.tokenizer.files import write_tokenizer
from chatfine.tokenizer.growable import Growable, Growth, NewPiece, is_text

NEW_PIECES = "new_pieces.json"
"""What is new, as people read it: text → id, in the form of the tutorial's added_tokens.json."""
MODEL = "tokenizer.model"
_KEPT = ("special_tokens_map.json", "added_tokens.json")


def grown(base: Growable, growth: Growth) -> Growable:
    """The tokenizer after `growth`, in memory."""
    return Growable(replace(base.files, spec=grown_spec(base, growth)))


def grown_spec(base: Growable, growth: Growth) -> dict[str, Any]:
    """The tokenizer.json after `growth`: old ids and merges first, as they were."""
    spec = dict(base.files.spec)
    model = spec["model"] = dict(spec["model"])
    vocab = dict(base.vocab)
    for number, spelling in _between(base):
        vocab.setdefault(spelling, number)
    for number, piece in enumerate(growth.pieces, start=base.first_new):
        vocab[piece.spelling] = number
    model["vocab"] = vocab
    old: list[Any] = [
        tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one)
        for one in model.get("merges", [])
    ]
    if base.kind == "sentencepiece":
        new = {piece.spelling for piece in growth.pieces}
        merges = _with_cuts(old, new, _ordinary(base, vocab), growth)
    else:
        merges = [*old, *growth.merges]
    as_text = bool(model.get("merges")) and isinstance(model["merges"][0], str)
    model["merges"] = [" ".join(pair) if as_text else list(pair) for pair in merges]
    return spec


def _ordinary(base: Growable, vocab: dict[str, int]) -> dict[str, int]:
    """The pieces that merges may join: neither control tokens nor bytes."""
    barred = {entry["content"] for entry in base.files.spec["added_tokens"]}
    barred |= {f"<0x{byte:02X}>" for byte in range(256)}
    return {piece: number for piece, number in vocab.items() if piece not in barred}


def _with_cuts(
    old: list[Any], new: set[str], vocab: dict[str, int], growth: Growth
) -> list[tuple[str, str]]:
    """The old merges and all cuts of which the whole or a part is new.

    SentencePiece joins any two neighbours that make a piece, so a cut of an old piece into a new
    one and another becomes possible, at the old piece's rank.
    """
    place = {left + right: rank for rank, (left, right) in enumerate(old)}
    extra: dict[int, list[tuple[str, str]]] = {}
    for whole, rank in place.items():
        extra[rank] = [cut for cut in _cuts(whole, vocab) if cut[0] in new or cut[1] in new]
    merges = []
    for rank, pair in enumerate(old):
        merges += [pair, *extra.get(rank, ())]
    for piece in growth.pieces:
        merges += _cuts(piece.spelling, vocab)
    return merges


def _cuts(whole: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The ways to cut a piece into two pieces, in the order transformers gives them."""
    cuts = [(whole[:at], whole[at:]) for at in range(1, len(whole))]
    known = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    return sorted(known, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))


def _between(base: Growable) -> list[tuple[int, str]]:
    """Ids after the vocabulary and before the first new one: special tokens, and gaps filled."""
    added = {int(entry["id"]): str(entry["content"]) for entry in base.files.spec["added_tokens"]}
    taken = set(base.vocab.values())
    free = (number for number in range(base.first_new) if number not in taken)
    return [(number, added.get(number, f"<unused_{number}>")) for number in free]


def write_grown(base: Growable, growth: Growth, folder: Path, form: str) -> None:
    """Write the whole folder of the grown tokenizer.

    Args:
        folder: made if need be; files that are there are replaced.
        form: "grown": new pieces are part of the tokenizer's own model; "added-tokens": they stand
            beside it, as transformers' `add_tokens` puts them.

    Raises:
        TokenizerError: tokenizer-files-disagree: tokenizer.json and tokenizer.model are not of one
            tokenizer.
    """
    source = base.files.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = base.files.special_tokens | dict(base.files.config)
    if form == "grown":
        spec = grown_spec(base, growth)
        if base.kind == "sentencepiece":
            # transformers 5 lets the class LlamaTokenizer replace the rules in tokenizer.json, and
            # then drops a space at the beginning of a text
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        growth = _as_text(base, growth)
        spec = _with_added(base, growth)
    write_tokenizer(folder, spec, config, base.files.template)
    for name in _KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / MODEL).is_file():
        if form != "grown":
            shutil.copyfile(source / MODEL, folder / MODEL)
        elif base.kind == "sentencepiece":  # Llama-3's file of that name would be the old one
            (folder / MODEL).write_bytes(_grown_model(base, growth))
    _write_lists(base, growth, folder, form)


def _as_text(base: Growable, growth: Growth) -> Growth:
    """The whole characters, spelled as in a text: added tokens need no half characters."""
    texts = [(readable(base, piece.spelling), piece) for piece in growth.pieces]
    whole = [NewPiece(text, piece.before) for text, piece in texts if base.spell(text) ==
             piece.spelling]  # fmt: skip
    return Growth(tuple(whole), ())


def _with_added(base: Growable, growth: Growth) -> dict[str, Any]:
    """The old tokenizer.json with every new piece as an added token."""
    entries = [
        added_token(number, piece.spelling, special=False)
        for number, piece in enumerate(growth.pieces, start=base.first_new)
    ]
    return {**base.files.spec, "added_tokens": [*base.files.spec["added_tokens"], *entries]}


def _grown_model(base: Growable, growth: Growth) -> bytes:
    """The tokenizer.model with the new pieces: each scored below all before it."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    path = base.files.folder / MODEL
    model = protocol.ModelProto()
    model.ParseFromString(path.read_bytes())
    between = _between(base)
    pieces = [piece.piece for piece in model.pieces]
    known = base.vocab | {spelling: number for number, spelling in between}
    if any(known.get(piece) != number for number, piece in enumerate(pieces)):
        raise TokenizerError(
            "tokenizer-files-disagree",
            t("tokenizer.json and tokenizer.model are not of one tokenizer"),
            where=str(base.files.folder),
            fix=t("fetch the files again from where the model came from"),
        )
    kinds = protocol.ModelProto.SentencePiece
    special = base.files.control
    for number in range(len(pieces), base.first_new):
        spelling = dict(between)[number]
        ordinary = spelling not in special and not spelling.startswith("<unused_")
        model.pieces.add(piece=spelling, score=0.0,
                         type=kinds.USER_DEFINED if ordinary else kinds.CONTROL)  # fmt: skip
    score = min(piece.score for piece in model.pieces)
    for new in growth.pieces:
        score = _below(score)
        model.pieces.add(piece=new.spelling, score=score, type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    data: bytes = model.SerializeToString()
    return data


def _below(score: float) -> float:
    """A score below `score` that float32, which the file holds, can tell from it.

    Llama-2's runs of spaces are scored -1e9, where float32 knows only every 64th number.
    """
    import numpy as np

    next_one = float(np.nextafter(np.float32(score), np.float32(-np.inf)))
    return min(next_one, float(np.float32(score - 1)))


def readable(base: Growable, spelling: str) -> str:
    """A new piece as text; bytes of half a character in hexadecimal."""
    if base.kind == "sentencepiece":
        return spelling
    from chatfine.tokenizer.stream import byte_level_alphabet

    part = bytes(map(byte_level_alphabet().__getitem__, spelling))
    return part.decode() if is_text(part) else part.hex(" ")


def _write_lists(base: Growable, growth: Growth, folder: Path, form: str) -> None:
    rows = list(enumerate(growth.pieces, start=base.first_new))
    vocabulary = {
        "old_size": base.first_new,
        "new_size": base.first_new + len(rows),
        "pieces": [[number, piece.spelling, list(piece.before)] for number, piece in rows],
    }
    _write_json(folder / FILE, vocabulary, None)
    if form == "grown":
        shown = {readable(base, piece.spelling): number for number, piece in rows}
        _write_json(folder / NEW_PIECES, shown, 0)
        return
    before = folder / "added_tokens.json"
    earlier = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    shown = {piece.spelling: number for number, piece in rows}
    _write_json(before, {**earlier, **shown}, 0)


def _write_json(path: Path, value: Any, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
