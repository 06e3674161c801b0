"""Where a finished model folder may go, and how it gets there whole. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from chatfine.errors import OutputError, ResourceError
from chatfine.i18n import t

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocabulary.json",  # what is new in a grown one: hub.vocabulary
    "new_pieces.json",  # the same for people
)
"""All that a tokenizer may consist of."""


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a place that is taken; `overwrite` allows to replace a model folder or a folder of
    tokenizer files, nothing else.

    Args:
        output: the folder to write.
        overwrite: whether such a folder there may go.
        inputs: folders that are read and so must stay.

    Raises:
        OutputError: naming --overwrite where it would help.
    """
    place = output.resolve()
    for source in inputs:
        if place == source.resolve() or place in source.resolve().parents:
            raise OutputError(
                "output-is-input",
                t("{path} holds what is being read", path=output),
                where="--output",
                fix=t("name a new folder"),
            )
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.exists():
        return
    is_model = (output / "config.json").is_file() and not (output / "config.yaml").is_file()
    replaceable = is_model or _is_tokenizer(output)
    if overwrite and replaceable:
        return
    raise OutputError(
        "output-not-empty",
        t("the folder {path} is not empty", path=output),
        where="--output",
        why=None if replaceable else t("it is not a model folder, so it is never replaced"),
        fix=t("name a new folder, or add --overwrite") if replaceable else t("name a new folder"),
    )


def _is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds tokenizer files and nothing else."""
    return all(item.is_file() and item.name in TOKENIZER_FILES for item in folder.iterdir())


def put_in_place(staged: Path, output: Path) -> None:
    """One rename; what was there goes away only when the new folder is complete."""
    plain = (staged / name for name in ("config.json", "params.json", "tokenizer_config.json"))
    usual = next(file for file in plain if file.is_file()).stat().st_mode
    for file in staged.iterdir():
        file.chmod(usual)  # safetensors makes files that only their owner can read
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    staged.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(output: Path, needed_bytes: float) -> None:
    """Refuse an output that would not fit on its disk.

    Raises:
        ResourceError: disk-full, with both sizes.
    """
    free = free_disk_bytes(output)
    if free < needed_bytes:
        raise ResourceError(
            "disk-full",
            t("this needs {need:.1f} GB of disk; {free:.1f} GB are free at {path}",
              need=needed_bytes / 1e9, free=free / 1e9, path=output),
            fix=t("free some space, or choose another disk with --output"),
        )  # fmt: skip
