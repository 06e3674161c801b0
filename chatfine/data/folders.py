"""Folders that say themselves which files form which split: fetched ones, and `save_to_disk`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatfine.errors import DataError
from chatfine.hub.datasets import recorded_splits
from chatfine.i18n import t


def named_splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Split → files of a folder that came from a hub or from `datasets.save_to_disk`; else empty.

    Raises:
        DataError: data-missing-file, if a saved folder lacks a file of its list.
    """
    splits = _read(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        found = {str(split): _saved_files(folder / str(split)) for split in splits}
        return {split: files for split, files in found.items() if files}
    alone = _saved_files(folder)
    return {"train": alone} if alone else recorded_splits(folder)


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The Arrow files that a saved data set names in its state.json."""
    listed = _read(folder / "state.json").get("_data_files")
    names = [str(item.get("filename")) for item in listed if isinstance(item, dict)] \
        if isinstance(listed, list) else []  # fmt: skip
    paths = tuple(folder / Path(name).name for name in names)
    for path in paths:
        if not path.is_file():
            raise DataError(
                "data-missing-file", t("{path} is missing", path=path), where=str(folder),
                why=t("state.json of the saved data set names it"),
                fix=t("copy the folder again, with all its files"),
            )  # fmt: skip
    return paths


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
