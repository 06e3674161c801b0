"""A model folder's rows for a grown tokenizer: embedding and head get as long as it needs.

Files are copied byte by byte; only embedding and head get new bytes after the old ones, so every
old row stays what it was and memory is bounded by one matrix. A new row starts as one of

    mean    the mean of the rows of the old pieces that wrote it before; a mean also keeps the
            probabilities of old pieces sane (Hewitt 2021, "Initializing New Word Embeddings")
    first   the row of the first of these pieces; for the head the choice of EEVE (Kim et al. 2024):
            the model predicts it already where the new piece will have to be predicted
    random  drawn with the old rows' mean and deviation in each column
    zero

Rows beyond the tokenizer (matrices are padded to a multiple of 64 rows) are the mean of all old
rows: the logit of a mean is the mean of the logits, so such an id is never the likeliest, and its
probability is at most one over the number of old rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from chatfine import __version__
from chatfine.errors import ModelError, TokenizerError, UsageError
from chatfine.hub.folder import ModelFolder, read_model_folder
from chatfine.hub.place import check_disk, check_output, put_in_place
from chatfine.hub.shapes import EMBEDDINGS
from chatfine.hub.vocabulary import FILE, Vocabulary, read_vocabulary
from chatfine.i18n import t
from chatfine.model.row_files import Growth, plan_weights, write_weights
from chatfine.model.row_starts import RULES, tail_rows
from chatfine.runtime import home
from chatfine.tokenizer.before import grown_vocabulary, piece_ids
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import TokenizerFiles, copy_tokenizer, read_files

MULTIPLE = 64
"""GPUs multiply matrices of a multiple of 64 rows faster."""
MOST_PADDING = 16
"""One sixteenth of a model's rows, or 1,024, is more than any family has without a piece."""
FACTS = "chatfine.json"
_HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.bias")
_FLOATS = {"F32", "BF16", "F16"}
_CARRIED_FILES = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CARRIED_FACTS = ("system", "template", "datasets", "data")
"""What a model's chatfine.json says that stays true when it grows."""


@dataclass(frozen=True, slots=True)
class GrowResult:
    """What has grown."""

    output: Path
    old_rows: int
    """rows of the embedding before"""
    rows: int
    """rows now, a multiple of 64"""
    new_pieces: int
    added_parameters: int
    tied: bool
    """whether the head shares the embedding's weight"""


def grow(
    model: Path,
    tokenizer: Path,
    output: Path,
    init: str = "mean",
    init_output: str = "mean",
    *,
    multiple: int = MULTIPLE,
    seed: int = 42,
    overwrite: bool = False,
) -> GrowResult:
    """Write `model` with the grown `tokenizer` and a row for each of its pieces as `output`.

    Old rows keep their bits and all numbers their format. An adapter for `model` does not belong to
    `output` (its base has another digest), but fits it: name it with --model.

    Args:
        model: model folder; its config.json may already say the new size over old weights.
        tokenizer: folder of the grown tokenizer, with or without vocabulary.json; may be `model`.
        output: folder to write; it appears whole or not at all.
        init: where new rows of the embedding start: mean, first, random or zero.
        init_output: the same for the head; a head tied to the embedding follows `init`.
        multiple: the number of rows is rounded up to a multiple of this.
        seed: of `random`.
        overwrite: put the new folder in the place of a model folder that is there.

    Raises:
        OutputError, ModelError, TokenizerError, ResourceError, UsageError: nothing was written.
    """
    for flag, rule in (("--init", init), ("--init-output", init_output)):
        if rule not in RULES:
            raise UsageError("bad-setting", t("{flag} is {value}; possible: {choices}", flag=flag,
                                              value=rule, choices=", ".join(RULES)))  # fmt: skip
    output = output.absolute()
    check_output(output, overwrite, (model, tokenizer))
    base = read_model_folder(model, allow_old_rows=True)
    vocabulary = grown_vocabulary(tokenizer, base.vocab_size)
    _check_pair(base, tokenizer, vocabulary)
    total = max(-(-vocabulary.new_size // multiple) * multiple, base.vocab_size)
    growth = _growth(base, vocabulary, (init, init_output), total, seed)
    check_disk(output, sum(tensor.bytes for tensor in plan_weights(base, growth)))
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        write_weights(base, staged, growth)
        _write_rest(base, tokenizer, vocabulary, staged, total)
        rules = {"init": init, "init_output": init if base.tied else init_output}
        _write_json(staged / FACTS, _facts(base, staged, vocabulary, rules))
        put_in_place(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    before = sum(base.tensors[name].numel for name in growth)
    after = sum((keep + len(tail)) * (tail.shape[1] if tail.ndim > 1 else 1)
                for keep, tail in growth.values())  # fmt: skip
    return GrowResult(
        output, base.vocab_size, total, len(vocabulary.pieces), after - before, base.tied
    )


def grown_folder(model: Path, init: str = "mean", init_output: str = "mean") -> Path:
    """`model` itself if its rows suffice for its tokenizer, else a grown copy in the cache.

    For the tutorial's door, whose readers copy a grown tokenizer into a model folder (and edit its
    vocab_size) themselves. The copy is made once for each model, tokenizer and rule.

    Raises:
        as `grow`.
    """
    from filelock import FileLock

    base = read_model_folder(model, allow_old_rows=True)
    tokenizer = ChatTokenizer.load(model)
    if tokenizer.size <= base.vocab_size:
        read_model_folder(model)  # config.json must then agree with the weights
        return model
    name = f"{base.digest()} {tokenizer.digest} {init} {init_output}"
    target = home() / "grown" / hashlib.sha256(name.encode()).hexdigest()[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target.with_suffix(".lock"))):
        if not target.exists():
            grow(model, model, target, init, init_output)
    return target


def _check_pair(base: ModelFolder, tokenizer: Path, vocabulary: Vocabulary) -> None:
    """Refuse a tokenizer that did not grow out of this model's own, and a model that has grown.

    Raises:
        ModelError: model-already-grown.
        TokenizerError: tokenizer-other-model.
    """
    own = _own_pieces(base.path)
    if read_vocabulary(base.path) == vocabulary and base.vocab_size >= vocabulary.new_size:
        raise ModelError(
            "model-already-grown",
            t("the model in {path} has the rows of these pieces already", path=base.path),
            where=str(base.path),
            why=t("growing it again would undo what they have learned"),
            fix=t("train it: {command}", command=f"chatfine train -m {base.path} -d DATASET"),
        )
    files = read_files(tokenizer)
    why = _why_other(base.vocab_size, own, files, vocabulary.old_size)
    if not why:
        return
    copied_in = own == piece_ids(files)
    raise TokenizerError(
        "tokenizer-other-model",
        t("the tokenizer in {path} did not grow out of this model's", path=tokenizer),
        where=str(base.path),
        why=why,
        fix=t("put the model's own tokenizer files back, then grow that one")
        if copied_in
        else t("grow the model's own: {command}",
               command=f"chatfine expand-vocab -m {base.path} --preset hanzi -o NEW_FOLDER"),
    )  # fmt: skip


def _why_other(rows: int, own: Mapping[str, int], files: TokenizerFiles, first: int) -> str:
    """What shows that a tokenizer did not grow out of the model's; "" where nothing does.

    Args:
        rows: of the model.
        own: piece → id of the tokenizer in the model's folder.
        files: the grown tokenizer, perhaps that very one.
        first: its first new id. Special tokens before it may lack a row, pieces may not.
    """
    grown = piece_ids(files)
    other = next((p for p, number in own.items() if number < first and grown.get(p) != number), "")
    if other:
        return t(
            "{piece} has the id {id} in the model's own tokenizer and {found} in the grown one",
            piece=repr(other), id=own[other], found=grown.get(other, "-"),
        )  # fmt: skip
    added = {entry["content"] for entry in files.spec["added_tokens"]}
    known = {number for piece, number in grown.items() if piece not in added}
    lacks = any(number in known for number in range(rows, first))
    idle = rows - first if own == grown else 0  # nothing but the sizes can tell
    if lacks or (not own and first > rows) or idle > max(1024, rows // MOST_PADDING):
        return t("new pieces begin at the id {first}, the model has {rows} rows",
                 first=first, rows=rows)  # fmt: skip
    return ""


def _own_pieces(folder: Path) -> dict[str, int]:
    """Piece → id of the tokenizer in a model folder; empty without one."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    return piece_ids(read_files(folder))


def _growth(
    base: ModelFolder, vocabulary: Vocabulary, rules: tuple[str, str], total: int, seed: int
) -> Growth:
    """The new rows of every tensor that has a row for each piece.

    Raises:
        ModelError: model-quantised, model-unknown-rows.
    """
    growth: dict[str, tuple[int, torch.Tensor]] = {}
    for name, info in sorted(base.tensors.items()):
        head = name.endswith(_HEADS)
        if not (head or name.endswith(EMBEDDINGS)):
            if info.shape[:1] == (base.vocab_size,) and ("embed" in name or "head" in name):
                raise _ungrowable("model-unknown-rows", name, t("what it is for is not known"))
            continue
        if info.dtype not in _FLOATS:
            raise _ungrowable("model-quantised", name, t("its numbers are {dtype}",
                                                         dtype=info.dtype))  # fmt: skip
        with safe_open(str(info.file), framework="pt") as file:
            old: torch.Tensor = file.get_tensor(name)
        apart = head and not base.tied
        keep, tail = tail_rows(
            old if old.ndim > 1 else old[:, None], vocabulary, rules[apart], total, seed + apart
        )
        growth[name] = keep, tail if old.ndim > 1 else tail[:, 0]
    return growth


def _ungrowable(code: str, name: str, why: str) -> ModelError:
    return ModelError(
        code, t("{name} can't get new rows", name=name), why=why,
        fix=t("use the model in a plain format (bf16, fp16 or fp32 safetensors)"),
    )  # fmt: skip


def _write_rest(
    base: ModelFolder, tokenizer: Path, vocabulary: Vocabulary, folder: Path, rows: int
) -> None:
    """Configs, licence, tokenizer and vocabulary.json."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows
    for pattern in _CARRIED_FILES:
        for file in sorted(base.path.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", config)
    has_own = read_files(tokenizer).template is not None
    template = None if has_own or not _own_pieces(base.path) else read_files(base.path).template
    copy_tokenizer(tokenizer, folder, template)
    pieces = zip(vocabulary.ids, vocabulary.pieces, map(list, vocabulary.before), strict=True)
    values = {"old_size": vocabulary.old_size, "new_size": vocabulary.new_size}
    text = json.dumps(values | {"pieces": [list(row) for row in pieces]}, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8", newline="\n")


def _facts(
    base: ModelFolder, folder: Path, vocabulary: Vocabulary, rules: Mapping[str, str]
) -> dict[str, Any]:
    """Where the grown model comes from, for its chatfine.json; no paths of this machine."""
    own = base.path / FACTS
    earlier = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    return {
        "chatfine": __version__,
        "kind": "grown",
        "base": base.path.name,
        "base_digest": base.digest(),
        **{name: earlier[name] for name in _CARRIED_FACTS if name in earlier},
        "tokenizer_digest": ChatTokenizer.load(folder).digest,
        "old_size": vocabulary.old_size,
        "new_size": vocabulary.new_size,
        **rules,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
