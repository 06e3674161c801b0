"""Where rows come from: a built-in set, a file, a folder of files, or a data set of the hub.

A built-in name wins over a file of the same name; write ./dialogs for the file. In a folder the
split of a file is read from its name or its parent's (train, validation, valid, val, dev, test,
eval); files without such a word are training data. Text files of a folder count only where nothing
else lies there, since a README or a licence is no data.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.data import builtin
from chatfine.data.problems import OnBad, raise_it
from chatfine.data.readers import SUFFIXES, TEXT_SUFFIXES, read_file
from chatfine.data.rows import Row
from chatfine.errors import DataError, did_you_mean
from chatfine.i18n import t

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
FUNCTION = re.compile(r".+\.py:\w+")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set lies: the files of each split, or its name on the hub."""

    splits: dict[str, tuple[Path, ...]]
    hub: str = ""


def locate(dataset: str) -> Place:
    """Find a data set without reading it (a hub set is fetched).

    Raises:
        DataError: there is no such data set.
    """
    if dataset in builtin.TABLE:
        entry = builtin.TABLE[dataset]
        return Place({split: (entry.path(split),) for split in entry.splits})
    path = Path(dataset).expanduser()
    if path.is_file():
        _check_suffix(path)
        return Place({"train": (path,)})
    if path.is_dir():
        return Place(_files_of(path))
    if FUNCTION.fullmatch(dataset):
        raise DataError(
            "data-function",
            t("data from a function ({name}) can't be used yet", name=dataset),
            fix=t("write the rows to a JSONL file and give that file"),
        )
    if HUB_NAME.fullmatch(dataset) and path.suffix.lower() not in SUFFIXES:
        return Place(dict.fromkeys(_hub(dataset), ()), hub=dataset)
    raise _no_dataset(dataset, path)


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
        raise DataError(
            "data-no-split",
            t("{dataset} has no split called {split}", dataset=dataset, split=split),
            why=t("it has: {names}", names=", ".join(splits)),
            fix=did_you_mean(split, splits) or t("name one of these splits"),
        )
    return split


def read_rows(dataset: str, split: str | None = None, on_bad: OnBad = raise_it) -> Iterator[Row]:
    """The rows of one split, in the order of the files; see `resolve_split` for `split`.

    Rows of built-in sets come as their files hold them. A row that can't be read goes to `on_bad`.

    Raises:
        DataError: no such data set or split, or a file that can't be read at all.
    """
    place = locate(dataset)
    split = resolve_split(dataset, split)
    if place.hub:
        where = f"{dataset}[{split}]"
        for number, values in enumerate(_hub(dataset)[split], start=1):
            yield Row(where, number, dict(values))
        return
    for path in place.splits[split]:
        shown = f"{dataset}/{path.name}" if dataset in builtin.TABLE else str(path)
        yield from read_file(path, shown, on_bad)


def digest(dataset: str) -> str:
    """A hash of all bytes of a data set, for the cache of tokenised data."""
    place = locate(dataset)
    total = hashlib.sha256()
    for split, paths in place.splits.items():
        if place.hub:
            total.update(f"{dataset} {split} {_hub(dataset)[split]._fingerprint}\n".encode())
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
        fix=did_you_mean(dataset, [*builtin.TABLE, *near])
        or t("built-in: {names}", names=", ".join(builtin.TABLE)),
    )


@functools.lru_cache(maxsize=4)
def _hub(name: str) -> dict[str, Any]:
    """The splits of a hub data set. With HF_HUB_OFFLINE=1 only what is cached already is used."""
    repo, _, config = name.partition(":")
    offline = any(
        os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    if offline and not _is_cached(repo):
        raise DataError(
            "data-offline",
            t(
                "the hub data set {name} is not cached, and HF_HUB_OFFLINE forbids asking",
                name=name,
            ),
            why=t("there is no file or folder of that name either"),
            fix=t("fetch it once with HF_HUB_OFFLINE=0, or give a local file"),
        )
    import datasets

    try:
        found = datasets.load_dataset(repo, config or None)
    except Exception as error:  # network, access, missing or script-only sets: many types
        raise DataError(
            "data-hub",
            t("the hub data set {name} can't be loaded", name=name),
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix=t(
                "check the name and the network (HF_ENDPOINT names a mirror), or give a local file"
            ),
        ) from None
    return dict(found)


def _is_cached(repo: str) -> bool:
    """Whether either cache of the hub's libraries has a folder for a data set."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    owner, _, name = repo.partition("/")
    return any(
        folder.is_dir()
        for folder in (hub / f"datasets--{owner}--{name}", prepared / f"{owner}___{name.lower()}")
    )
