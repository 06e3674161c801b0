"""Which files of a hub's data set are its rows, by subset and split.

The card (README.md) may say it: `configs`, as documented at
https://huggingface.co/docs/hub/datasets-manual-configuration. Else names decide: shards like
data/SPLIT-00000-of-00001.parquet, or whole files of the best format there is. The hub keeps parquet
copies of most data sets on a branch of their own, as SUBSET/SPLIT/0000.parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from chatfine.errors import DataError, did_you_mean
from chatfine.hub.listing import Answer, refuse_unsafe
from chatfine.i18n import t

CARD = "README.md"
_FAMILIES = (
    (".parquet",), (".arrow",), (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".txt",),
)  # fmt: skip
_READABLE = tuple(suffix for family in _FAMILIES for suffix in family)
_NOT_ROWS = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
    "requirements.txt", "license.txt", "licence.txt", "readme.txt",
}  # fmt: skip
_SHARD = re.compile(r"(?:.*/)?(\w[\w.]*?)-\d{5}-of-\d{5}[\w.-]*")
_COPY = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d+\.parquet")


@dataclass(frozen=True, slots=True)
class Choice:
    """Names of the files to fetch, and the splits they form; no splits: their names tell."""

    names: tuple[str, ...]
    splits: dict[str, list[str]]


def read_card(raw: bytes) -> dict[str, Any]:
    """The settings at the top of a data set's README.md; empty if there are none."""
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n").removeprefix("\ufeff")
    head = re.match(r"---\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def choose(answer: Answer, card: Mapping[str, Any], subset: str, name: str) -> Choice:
    """The files of a data set, or of one subset of it; no names if none can be read.

    Args:
        answer: the listing of the repository.
        card: what `read_card` gave.
        subset: a name from the card's `configs`, a folder, or a file's stem; "" = the default.
        name: OWNER/NAME, for messages.

    Raises:
        DataError: data-subset, if a subset must be named or has another name.
    """
    names = _rows_of(answer)
    configs = _configs(card)
    if configs and not (subset and subset not in configs and _below(names, subset)):
        patterns = configs[_pick(subset, configs, _default(card), name)]
        if patterns:
            splits = {split: _matching(names, globs) for split, globs in patterns.items()}
            splits = {split: chosen for split, chosen in splits.items() if chosen}
            chosen = tuple(dict.fromkeys(one for some in splits.values() for one in some))
            return Choice(chosen, splits)
    elif subset:
        below = _below(names, subset)
        if names and not below:
            folders = {PurePosixPath(one).parts[0] for one in names if "/" in one} - {"data"}
            _pick(subset, folders, "", name)
        names = below
    chosen = tuple(_best_family(names))
    return Choice(chosen, _splits_of_shards(chosen))


def choose_copies(answer: Answer, subset: str, name: str) -> Choice:
    """The files of the hub's parquet copies of a data set, or of one subset of it.

    Raises:
        DataError: data-subset, if a subset must be named or has another name.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for one in sorted(answer.items):
        match = _COPY.fullmatch(one)
        if match:
            refuse_unsafe(one, answer)
            found.setdefault(match[1], {}).setdefault(match[2], []).append(one)
    if not found:
        return Choice((), {})
    splits = _ordered(found[_pick(subset, found, "default", name)])
    return Choice(tuple(one for some in splits.values() for one in some), splits)


def is_script_only(answer: Answer) -> bool:
    """Whether the repository brings a Python program that would make the rows."""
    return any(name.endswith(".py") for name in answer.items)


def _rows_of(answer: Answer) -> list[str]:
    """Names of all files that may hold rows, sorted."""
    names = sorted(name for name in answer.items if name.lower().endswith(_READABLE))
    for name in names:
        refuse_unsafe(name, answer)
    return [
        name
        for name in names
        if name.rpartition("/")[2].lower() not in _NOT_ROWS
        and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]


def _configs(card: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Subset → split → glob patterns, as the card has them; no patterns: names decide."""
    listed = card.get("configs")
    found: dict[str, dict[str, list[str]]] = {}
    for config in listed if isinstance(listed, list) else ():
        if isinstance(config, dict) and config.get("config_name"):
            folder = config.get("data_dir")
            files = config.get("data_files", f"{folder}/**" if folder else None)
            prefix = f"{folder}/" if folder and "data_files" in config else ""
            found[str(config["config_name"])] = _patterns(files, prefix)
    return found


def _patterns(files: Any, prefix: str) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for item in files if isinstance(files, list) else [files]:
        split, paths = ("train", item)
        if isinstance(item, dict):
            split, paths = str(item.get("split", "train")), item.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                splits.setdefault(split, []).append(prefix + path.removeprefix("./"))
    return splits


def _default(card: Mapping[str, Any]) -> str:
    listed = card.get("configs")
    for config in listed if isinstance(listed, list) else ():
        if isinstance(config, dict) and config.get("default"):
            return str(config.get("config_name"))
    return "default"


def _pick(subset: str, known: Iterable[str], default: str, name: str) -> str:
    """The subset meant by `subset`."""
    names = sorted(known)
    if subset in names:
        return subset
    if not subset and (default in names or len(names) == 1):
        return default if default in names else names[0]
    what = (
        t("{name} has no subset called {subset}", name=name, subset=subset)
        if subset
        else t("{name} has several subsets: name one", name=name)
    )
    example = t("for example: {name}", name=f"{name}:{names[0]}") if names else ""
    raise DataError(
        "data-subset", what, where=name,
        why=t("it has: {names}", names=", ".join(names)) if names else t("it has no subsets"),
        fix=did_you_mean(subset, names) or example or t("leave out the part after the colon"),
    )  # fmt: skip


def _below(names: Sequence[str], subset: str) -> list[str]:
    """The files of a folder `subset`, or the one file of that name without its suffix."""
    folders = (f"{subset}/", f"data/{subset}/")
    found = [name for name in names if name.startswith(folders)]
    return found or [name for name in names if PurePosixPath(name).stem == subset]


def _matching(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    patterns = [re.compile(_regex(glob)) for glob in globs]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]


def _regex(glob: str) -> str:
    """A glob as a regular expression: * stays within a folder, ** does not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return "".join(pieces.get(part, re.escape(part)) for part in parts)


def _best_family(names: Sequence[str]) -> list[str]:
    """The files of the first format there is, so that no row is there twice."""
    for family in _FAMILIES:
        found = [name for name in names if name.lower().endswith(family)]
        below = [name for name in found if name.startswith("data/")]
        if found:
            return below if family == (".parquet",) and below else found
    return []


def _splits_of_shards(names: Sequence[str]) -> dict[str, list[str]]:
    """Split → files where all files are called SPLIT-00000-of-00001; else empty."""
    splits: dict[str, list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None:
            return {}
        splits.setdefault(match[1], []).append(name)
    return _ordered(splits)


def _ordered(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Training data first, then validation, then test, then the rest."""
    known = ("train", "validation", "test")
    place = {
        split: next((n for n, word in enumerate(known) if split.startswith(word)), len(known))
        for split in splits
    }
    return {split: splits[split] for split in sorted(splits, key=lambda split: place[split])}
