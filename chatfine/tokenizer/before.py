"""How the pieces of a grown tokenizer were written before it grew.

The folder says so itself where `chatfine expand-vocab` grew it (vocabulary.json). Where it was
grown by another program, the tokenizer that it was is still inside it: the pieces and merges below
the first new id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from chatfine.errors import TokenizerError
from chatfine.hub.vocabulary import Vocabulary, read_vocabulary
from chatfine.i18n import t
from chatfine.tokenizer.files import TokenizerFiles, read_files


def grown_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The new pieces of the tokenizer in `folder`, held against its own table.

    Args:
        folder: of the grown tokenizer.
        rows: rows of the embedding that has not grown yet; where there is no vocabulary.json, the
            ids from here on are the new ones.

    Raises:
        TokenizerError: vocabulary-damaged, vocabulary-mismatch, vocabulary-not-grown,
            vocabulary-gaps, or what `read_files` says.
    """
    files = read_files(folder)
    known = piece_ids(files)
    stated = read_vocabulary(folder)
    if stated is not None:
        stated.check_tokenizer(known, folder)
        return stated
    new = {number: piece for piece, number in known.items() if number >= rows}
    if not new:
        raise TokenizerError(
            "vocabulary-not-grown",
            t("the tokenizer in {path} has nothing new: {pieces} pieces for {rows} rows",
              path=folder, pieces=len(known), rows=rows),
            fix=t("grow it first: {command}",
                  command=f"chatfine expand-vocab -m {folder} --preset hanzi -o NEW_FOLDER"),
        )  # fmt: skip
    if sorted(new) != list(range(rows, rows + len(new))):
        raise TokenizerError(
            "vocabulary-gaps",
            t("the tokenizer in {path} leaves out ids after {rows}", path=folder, rows=rows),
            where=str(folder),
            fix=t("grow it with: {command}", command="chatfine expand-vocab"),
        )
    pieces = tuple(new[number] for number in sorted(new))
    return Vocabulary(rows, pieces, _written_before(files, pieces, rows))


def piece_ids(files: TokenizerFiles) -> dict[str, int]:
    """Piece → id of the whole tokenizer, added tokens included."""
    vocab = files.spec["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {p: n for n, (p, _) in enumerate(vocab)}
    return ids | {entry["content"]: entry["id"] for entry in files.spec["added_tokens"]}


def _written_before(
    files: TokenizerFiles, pieces: tuple[str, ...], rows: int
) -> tuple[tuple[int, ...], ...]:
    """Ids of each piece under the pieces and merges whose ids are below `rows`."""
    model: dict[str, Any] = dict(files.spec["model"])
    if not isinstance(model["vocab"], dict):  # Unigram: (piece, score) in the order of ids
        model["vocab"] = model["vocab"][:rows]
    else:
        vocab = {piece: number for piece, number in model["vocab"].items() if number < rows}
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges", [])]
        kept = [[a, b] for a, b in merges if a in vocab and b in vocab and a + b in vocab]
        model |= {"vocab": vocab, "merges": kept}
    # a piece is spelled in the model's own alphabet already, so nothing may come before the model
    bare = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(bare, ensure_ascii=False))
    byte_level = "ByteLevel" in json.dumps(files.spec.get("pre_tokenizer"))
    plain = {entry["content"] for entry in files.spec["added_tokens"]}
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = []
    for piece in pieces:
        if byte_level and piece in plain:  # an added token is spelled as in the text
            piece = "".join(part for part, _ in alphabet.pre_tokenize_str(piece))
        written.append(tuple(tokenizer.encode(piece, add_special_tokens=False).ids))
    return tuple(written)
