"""Which rows of embedding and head learn beside an adapter; refused before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chatfine.errors import UsageError
from chatfine.hub.folder import ModelFolder, resolve_source
from chatfine.hub.headers import read_json
from chatfine.hub.vocabulary import FILE, read_vocabulary
from chatfine.i18n import t
from chatfine.tokenizer.before import piece_ids
from chatfine.tokenizer.files import read_files

METHODS = ("lora", "dora", "rows")
"""Methods beside which new rows can learn."""


def learning_rows(
    model: ModelFolder, method: str, train_rows: str, adapter: str = ""
) -> Sequence[int]:
    """The ids whose rows learn; empty for none.

    Args:
        model: the model; its vocabulary.json says what is new.
        method: as `model.adapters.attach`; under `full` all rows learn anyway.
        train_rows: auto (the new ones, where there are some and the method allows it), none or new.
        adapter: an adapter to go on from, whose rows then are the ones.

    Raises:
        UsageError: no-new-rows, rows-and-method, rows-not-in-adapter.
        TokenizerError: a vocabulary.json that does not fit the tokenizer beside it.
    """
    if method == "rows" and train_rows == "none":
        raise _with_method(t("--method rows does not go with --train-rows none"), "--method lora")
    if method not in METHODS:
        if train_rows == "new" and method != "full":
            what = t("--train-rows new does not go with --method {method}", method=method)
            raise _with_method(what, "--method lora", "--train-rows none")
        return ()
    if adapter:
        return _of_adapter(model, method, train_rows, adapter)
    needed = method == "rows" or train_rows == "new"
    vocabulary = None if train_rows == "none" else read_vocabulary(model.path)
    if vocabulary is not None:
        vocabulary.check_tokenizer(piece_ids(read_files(model.path)), model.path)
        return vocabulary.ids
    if needed:
        raise UsageError(
            "no-new-rows",
            t("the model in {path} has no new rows", path=model.path),
            where="--method" if method == "rows" else "--train-rows",
            why=t("there is no {file} in its folder", file=FILE),
            fix=[t("give it some: {command}",
                   command=f"chatfine expand-vocab -m {model.path} -o NEW_FOLDER"),
                 t("or train without: {flag}", flag="--method lora --train-rows none")],
        )  # fmt: skip
    return ()


def _of_adapter(
    model: ModelFolder, method: str, train_rows: str, adapter: str
) -> Sequence[int]:  # fmt: skip
    """The ids whose rows an adapter holds."""
    folder = resolve_source(adapter, str(model.path)).adapter
    if folder is None:
        return ()  # refused where it is opened
    settings = read_json(folder / "adapter_config.json", "adapter-bad-config")
    peft_type = str(settings.get("peft_type", "")).upper()
    kind = {"TRAINABLE_TOKENS": "rows", "LORA": "lora"}.get(peft_type, peft_type.lower())
    if (kind == "rows") != (method == "rows"):
        raise UsageError(
            "adapter-and-method",
            t("the adapter in {path} is of the kind {kind}, not {method}", path=folder, kind=kind,
              method=method),
            where="--adapter",
            fix=[f"--method {kind}",
                 t("or merge it and train the result: {command}",
                   command=f"chatfine merge {adapter} -o NEW_MODEL")],
        )  # fmt: skip
    ids = _ids(settings)
    if train_rows == "new" and not ids:
        raise UsageError(
            "rows-not-in-adapter",
            t("the adapter in {path} has no new rows to go on with", path=folder),
            where="--train-rows",
            fix=t("merge it and train the result: {command}",
                  command=f"chatfine merge {adapter} -o NEW_MODEL"),
        )  # fmt: skip
    return () if train_rows == "none" else ids


def _ids(settings: Mapping[str, Any]) -> Sequence[int]:
    found = settings.get("token_indices") or settings.get("trainable_token_indices") or ()
    if isinstance(found, Mapping):  # by the name of the matrix
        found = max(found.values(), key=len, default=())
    return tuple(map(int, found))


def _with_method(what: str, *fix: str) -> UsageError:
    return UsageError("rows-and-method", what, where="--train-rows", fix=fix)


def first_steps(rows_first: float, rows: Sequence[int], total: int) -> int:
    """How many of the `total` steps only the rows learn.

    Args:
        rows_first: a share of all steps below 1, else a number of steps.
        rows: ids of the rows that learn.
        total: steps of the run.

    Raises:
        UsageError: rows-first: there are no new rows, or nothing is left for the rest.
    """
    steps = math.ceil(rows_first * total) if rows_first < 1 else round(rows_first)
    if not steps:
        return 0
    if not rows:
        why, fix = t("no new rows learn in this run"), t("leave --rows-first out")
    elif steps >= total:
        why = t("the run has {total} steps", total=total)
        fix = t("train rows alone: {flag}", flag="--method rows")
    else:
        return steps
    raise UsageError(
        "rows-first", t("--rows-first {value} does not work here", value=f"{rows_first:g}"),
        where="--rows-first", why=why, fix=fix,
    )  # fmt: skip
