"""Where rows come from: a built-in set, a file, a folder of files, a function of the user, or a
data set of the hub.

    NAME  NAME:PATH      a built-in set, or files of the user read as that set (builtin.py)
    FILE  FOLDER         data files
    FILE.py:FUNCTION     a function, get_custom_dataset where none is named (custom.py)
    OWNER/NAME:SUBSET    a data set of the hub
    …[SPLIT]             only that split of any of these

A built-in name wins over a file of the same name; write ./dialogs for the file. In a folder the
split of a file is read from its name or its parent's (train, validation, valid, val, dev, test,
eval); files without such a word are training data. Text files of a folder count only where nothing
else lies there, since a README or a licence is no data.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from chatfine import console
from chatfine.data import builtin, custom, places
from chatfine.data.builtin import BuiltIn
from chatfine.data.folders import named_splits
from chatfine.data.problems import OnBad, raise_it
from chatfine.data.readers import SUFFIXES, TEXT_SUFFIXES, read_file
from chatfine.data.rows import Row
from chatfine.data.user_file import Function, check_file
from chatfine.errors import DataError, did_you_mean
from chatfine.hub.catalog import RECORD
from chatfine.hub.datasets import fetch_dataset, is_hub_name
from chatfine.i18n import t

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ONE_SPLIT = re.compile(r"(?P<dataset>.+)\[(?P<split>[\w.-]+)\]")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
            RECORD}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set lies: the files of each split, its name on the hub, or a function.

    `entry` is there for a built-in set, also where its files are the user's.
    """

    splits: dict[str, tuple[Path, ...]]
    hub: str = ""
    function: Function | None = None
    entry: BuiltIn | None = None


def locate(dataset: str) -> Place:
    """Find a data set without reading it (a hub set is fetched).

    Raises:
        DataError: there is no such data set.
    """
    path = Path(dataset).expanduser()
    one = ONE_SPLIT.fullmatch(dataset)
    if one and not path.exists():
        return _only(one["split"], one["dataset"])
    known = builtin.find(dataset)
    if known:
        return _builtin(*known)
    function = custom.find(dataset)
    if function:
        check_file(function)
        return Place(dict.fromkeys(custom.SPLITS, ()), function=function)
    if path.is_file():
        _check_suffix(path)
        return Place({"train": (path,)})
    if path.is_dir():
        return Place(_files_of(path))
    if is_hub_name(dataset) and path.suffix.lower() not in SUFFIXES:
        return Place(_files_of(fetch_dataset(dataset, say=console.say)), hub=dataset)
    raise _no_dataset(dataset, path)


def absolute(dataset: str) -> str:
    """The same data set under a name that means it from every folder."""
    one = ONE_SPLIT.fullmatch(dataset)
    if one and not os.path.exists(dataset):
        return f"{absolute(one['dataset'])}[{one['split']}]"
    known = builtin.find(dataset)
    if known:
        entry, path = known
        here = Path(path).expanduser() if path else places.in_working_folder(entry)
        return dataset if here is None else f"{entry.name}:{os.path.abspath(here)}"
    function = custom.find(dataset)
    if function:
        return str(function)
    return os.path.abspath(dataset) if os.path.exists(dataset) else dataset


def _only(split: str, dataset: str) -> Place:
    """One split of a data set; a function may know splits that we don't."""
    place = locate(dataset)
    if place.function is None and split not in place.splits:
        raise _no_split(dataset, split, tuple(place.splits))
    return replace(place, splits={split: place.splits.get(split, ())})


def _builtin(entry: BuiltIn, path: str) -> Place:
    found = places.place_of(entry, path)
    if isinstance(found, dict):
        return Place({split: (file,) for split, file in found.items()}, entry=entry)
    if found.is_file():
        _check_suffix(found)
        return Place({"train": (found,)}, entry=entry)
    splits = _files_of(found)
    if "train" not in splits:  # JFLEG has only validation and test
        present = [splits[name] for name in SPLIT_WORDS if name in splits]
        splits = dict(zip(("train", "validation"), present, strict=False))
    return Place(splits, entry=entry)


def splits_of(dataset: str) -> tuple[str, ...]:
    """The names of a data set's splits; a single file has just "train"."""
    return tuple(locate(dataset).splits)


def resolve_split(dataset: str, split: str | None) -> str:
    """The split meant by `split`; None means train, or the only one there is.

    Raises:
        DataError: the data set has no such split.
    """
    splits = splits_of(dataset)
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        raise _no_split(dataset, split, splits)
    return split


def _no_split(dataset: str, split: str, splits: tuple[str, ...]) -> DataError:
    return DataError(
        "data-no-split",
        t("{dataset} has no split called {split}", dataset=dataset, split=split),
        why=t("it has: {names}", names=", ".join(splits)),
        fix=did_you_mean(split, splits) or t("name one of these splits"),
    )


def read_rows(dataset: str, split: str | None = None, on_bad: OnBad = raise_it) -> Iterator[Row]:
    """The rows of one split, in the order of the files; see `resolve_split` for `split`.

    Rows of built-in sets come as their files hold them. A row that can't be read goes to `on_bad`.

    Raises:
        DataError: no such data set or split, or a file that can't be read at all.
    """
    place = locate(dataset)
    split = resolve_split(dataset, split)
    for path in place.splits[split]:
        shipped = place.entry is not None and place.entry.shipped
        shown = f"{dataset}/{path.name}" if place.hub or shipped else str(path)
        yield from read_file(path, shown, on_bad)


def digest(dataset: str) -> str:
    """A hash of all bytes of a data set, for the cache of tokenised data."""
    place = locate(dataset)
    total = hashlib.sha256()
    for split, paths in place.splits.items():
        for path in paths:
            total.update(f"{split} {path.name}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() in SUFFIXES:
        return
    excel = path.suffix.lower() in (".xls", ".xlsx")
    raise DataError(
        "data-unknown-kind",
        t("{path}: this kind of file is not known", path=path),
        why=t("known: {names}", names=" ".join(SUFFIXES)),
        fix=t("save the table as CSV (UTF-8)") if excel else t("rename or convert the file"),
    )


def _split_of_file(path: Path, root: Path) -> str:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", " ".join(path.relative_to(root).parts))
    found = {word.lower() for word in words}
    return next((name for name, known in SPLIT_WORDS.items() if found & set(known)), "train")


def _files_of(folder: Path) -> dict[str, tuple[Path, ...]]:
    named = named_splits(folder)
    if named:
        return named
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and path.name not in NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    structured = [path for path in paths if path.suffix.lower() not in TEXT_SUFFIXES]
    splits: dict[str, tuple[Path, ...]] = {}
    for name in SPLIT_WORDS:
        chosen = [p for p in structured or paths if _split_of_file(p, folder) == name]
        if chosen:
            splits[name] = tuple(chosen)
    if not splits:
        raise DataError(
            "data-empty-folder",
            t("the folder {path} holds no data file", path=folder),
            why=t("known: {names}", names=" ".join(SUFFIXES)),
            fix=t("give the path of a file, or another folder"),
        )
    return splits


def _no_dataset(dataset: str, path: Path) -> DataError:
    try:
        near = [str(path.parent / other.name) for other in path.parent.iterdir()]
    except OSError:
        near = []
    return DataError(
        "no-dataset",
        t("there is no data set {name}", name=dataset),
        why=t("it is no file, no folder, no built-in name and no hub name (OWNER/NAME)"),
        fix=did_you_mean(dataset, [*builtin.TABLE, *builtin.ALIASES, custom.NAME, *near])
        or t("built-in: {names}", names=", ".join(builtin.TABLE)),
    )
