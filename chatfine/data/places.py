"""Where the files of a built-in data set lie: in the package, where the user says, in the working
folder, or fetched from a hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from chatfine import console
from chatfine.data.builtin import FOLDER, TABLE, BuiltIn
from chatfine.data.readers import SUFFIXES, TEXT_SUFFIXES
from chatfine.errors import DataError, Refused
from chatfine.hub.datasets import fetch_dataset
from chatfine.i18n import t
from chatfine.runtime import home

ARCHIVES = (".7z", ".zip", ".gz", ".tar", ".rar")

Found = Path | dict[str, Path]
"""A file or folder to be read as a whole, or the file of each split."""


def shipped(entry: BuiltIn) -> dict[str, Path]:
    """The files that come with the package, by split."""
    return {split: FOLDER / entry.name / f"{split}.jsonl" for split in entry.shipped}


def place_of(entry: BuiltIn, path: str = "") -> Found:
    """Where a built-in set lies; it is fetched if need be.

    Args:
        entry: the set.
        path: what the user named, "" = look for it.

    Raises:
        DataError: it is not there and can't be fetched; names where it was looked for.
    """
    if entry.shipped:
        return shipped(entry)
    if path:
        named = Path(path).expanduser()
        if not named.exists():
            raise _no_file(entry, named)
        return _files_in(entry, named) or named
    here = in_working_folder(entry)
    return _fetched(entry.name, home()) if here is None else _files_in(entry, here) or here


def in_working_folder(entry: BuiltIn) -> Path | None:
    """The folder below the working folder that holds a set; None: there is none.

    Raises:
        DataError: there is one, but its data is still packed.
    """
    for name in entry.folders:
        folder = Path(name)
        if not folder.is_dir():
            continue
        if _files_in(entry, folder) or (not entry.files and _holds_data(folder)):
            return folder
        packed = sorted(one for one in folder.iterdir() if one.suffix.lower() in ARCHIVES)
        if packed and not entry.files:
            raise DataError(
                "data-packed",
                t("the data set {name} is still packed", name=entry.name),
                where=str(packed[0]),
                fix=t("unpack it into {folder}", folder=folder.resolve()),
            )
    return None


def _files_in(entry: BuiltIn, folder: Path) -> dict[str, Path]:
    """The files that a set is known by, where `folder` holds its training file."""
    paths = {split: folder / name for split, name in entry.files.items()}
    found = {split: path for split, path in paths.items() if path.is_file()}
    return found if "train" in found else {}


def _holds_data(folder: Path) -> bool:
    kinds = set(SUFFIXES) - set(TEXT_SUFFIXES)
    return any(path.suffix.lower() in kinds for path in folder.rglob("*"))


@functools.lru_cache(maxsize=8)
def _fetched(builtin: str, _cache: Path) -> Path:
    """The folder of a set that comes from a hub; the first name that works."""
    entry = TABLE[builtin]
    refusals = []
    for name, licence in entry.hub.items():
        try:
            folder = fetch_dataset(name, say=console.say)
        except Refused as error:
            refusals.append(f"{name}: {error.what}")
            continue
        console.say(t("data set {name}: licence {licence}", name=name, licence=licence))
        return folder
    raise _missing(entry, _looked_for(entry), refusals)


def _looked_for(entry: BuiltIn) -> list[str]:
    """The places below the working folder where a set may lie."""
    first = next(iter(entry.files.values()), "")
    return [(Path(name) / first).as_posix() for name in entry.folders]


def _no_file(entry: BuiltIn, path: Path) -> DataError:
    return DataError(
        "no-dataset",
        t("there is no file or folder {path}", path=path),
        where=f"{entry.name}:{path}",
        fix=t("write {name}:FILE, with records such as {record}", name=entry.name,
              record=entry.record),
    )  # fmt: skip


def _missing(entry: BuiltIn, looked: Sequence[str], refusals: Sequence[str]) -> DataError:
    reasons = [
        t("looked for {places} in {folder}", places=", ".join(looked), folder=Path.cwd()),
        *refusals,
    ]
    fixes = []
    if entry.hub:
        name = next(iter(entry.hub))
        command = f"chatfine download {name} --kind dataset -o {entry.folders[0]}"
        fixes.append(t("get it: {command}", command=command))
    else:
        fixes.append(t("copy your file to {path}", path=looked[0]))
    fixes.append(
        t("or name your file: -d {name}:FILE, with records such as {record}",
          name=entry.name, record=entry.record)
    )  # fmt: skip
    return DataError(
        "data-not-here",
        t("the data set {name} is not here", name=entry.name),
        why="; ".join(reasons),
        fix=fixes,
    )
