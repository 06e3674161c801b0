"""Bring a data set of a hub into the cache or a folder: hub, its mirror, ModelScope.

Only files of rows are fetched (parquet, arrow, JSON, CSV, text), never a program. They arrive as a
model does: in a hidden folder, checked, under their final name by one rename. A record beside them
says where they come from and which files form which split.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine import runtime
from chatfine.console import size as readable
from chatfine.errors import ChatfineError, DataError, OutputError, ResourceError
from chatfine.hub import listing
from chatfine.hub.catalog import RECORD, hub_home
from chatfine.hub.data_files import CARD, Choice, choose, choose_copies, is_script_only, read_card
from chatfine.hub.fetch import fetch_bytes
from chatfine.hub.listing import Answer
from chatfine.hub.refusals import Repository
from chatfine.hub.stage import (
    Progress,
    Say,
    fetch_all,
    is_offline,
    lock,
    replace_by_stage,
    silent,
    worth_keeping,
)
from chatfine.i18n import t

SOURCES = ("hf", "hf-mirror", "modelscope")
"""In the order `auto` tries them."""
COPIES = "refs/convert/parquet"
"""The branch where the hub keeps parquet copies."""
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<subset>\w[\w.-]*))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A data set's name in its parts."""

    name: str
    repo: str
    subset: str


def is_hub_name(name: str) -> bool:
    """Whether `name` is written OWNER/NAME or OWNER/NAME:SUBSET."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def fetch_dataset(
    name: str,
    source: str = "auto",
    say: Say = silent,
    output: str | Path | None = None,
    progress: Progress = silent,
) -> Path:
    """The folder of a hub data set, fetched if it is not in the cache yet.

    Args:
        name: `owner/name` or `owner/name:subset`; a subset is one of the card, a folder of the
            repository, or the name of a file in it without its suffix.
        source: "auto" or one of SOURCES.
        say: receives one line for each thing that happens.
        output: folder to write instead of the cache; must be new or empty.
        progress: receives (bytes here, bytes in all).

    Raises:
        DataError: no-dataset, no-source, data-offline, data-subset, data-no-files, or what the one
            source asked for said.
        OutputError: output-not-empty.
        ResourceError: disk-full.
    """
    wanted = _parse(name)
    if source not in (*SOURCES, "auto"):
        raise DataError(
            "data-source", t("data sets do not come from the source {source}", source=source),
            where="--source", fix=t("use one of: {names}", names=", ".join(("auto", *SOURCES))),
        )  # fmt: skip
    target = Path(output).expanduser() if output else cache_folder(name)
    if _is_whole(target, name):
        return target
    with lock(target, say):
        if _is_whole(target, name):  # another process fetched it meanwhile
            return target
        if _forbidden():
            raise _offline(wanted)
        stage = target.parent / f".{target.name}.partial"
        _make_way(target, stage, ours=not output)
        try:
            record = _fill(wanted, source, stage, say, progress)
        except ChatfineError:
            if not worth_keeping(stage):
                shutil.rmtree(stage, ignore_errors=True)
            raise
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        replace_by_stage(stage, target)
    return target


def cache_folder(name: str) -> Path:
    """Where `fetch_dataset` puts this data set when no output folder is named."""
    wanted = _parse(name)
    folder = wanted.repo.replace("/", "--") + (f"@{wanted.subset}" if wanted.subset else "")
    return runtime.home() / "datasets" / folder


def recorded_splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Split → files of a folder that `fetch_dataset` wrote; empty where the names tell."""
    splits = _record(folder).get("splits")
    found: dict[str, tuple[Path, ...]] = {}
    for split, names in splits.items() if isinstance(splits, dict) else ():
        paths = tuple(folder / str(name) for name in names)
        if all(path.is_file() and path.resolve().is_relative_to(folder.resolve())
               for path in paths):  # fmt: skip
            found[str(split)] = paths
    return found


def _parse(name: str) -> _Wanted:
    match = _NAME.fullmatch(name) if is_hub_name(name) else None
    if match is None:
        raise DataError(
            "no-dataset", t("{name} is no name of a hub's data set", name=name),
            fix=t("it is OWNER/NAME or OWNER/NAME:SUBSET, as in the address of its page"),
        )  # fmt: skip
    return _Wanted(name, match["repo"], match["subset"] or "")


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("kind") == "dataset" else {}


def _is_whole(folder: Path, name: str) -> bool:
    """Whether the folder holds this data set with all its files at their full length."""
    record = _record(folder)
    files = record.get("files")
    if record.get("name") != name or not isinstance(files, dict) or not files:
        return False
    paths = [(folder / str(file), size) for file, size in files.items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _make_way(target: Path, stage: Path, ours: bool) -> None:
    """Let a damaged copy in the cache be mended; refuse any other folder that is not empty."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not ours:
        raise OutputError(
            "output-not-empty", t("{path} is there already and not empty", path=target),
            where=str(target), fix=t("name a new folder: -o DIR"),
        )  # fmt: skip
    shutil.rmtree(stage, ignore_errors=True)
    os.rename(target, stage)


def _forbidden() -> bool:
    theirs = os.environ.get("HF_DATASETS_OFFLINE", "").strip().upper()
    return is_offline() or theirs in ("1", "ON", "YES", "TRUE")


def _offline(wanted: _Wanted) -> DataError:
    owner, _, short = wanted.repo.partition("/")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", hub_home() / "hub"))
    snapshots = hub_cache / f"datasets--{owner}--{short}" / "snapshots"
    fixes = [t("fetch it once with HF_HUB_OFFLINE=0, or give a local file or folder")]
    for folder in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        fixes.append(t("the hub's own tools fetched files of it: name that folder: {folder}",
                       folder=folder))  # fmt: skip
    return DataError(
        "data-offline",
        t("the hub data set {name} is not cached, and HF_HUB_OFFLINE forbids asking",
          name=wanted.name),
        why=t("there is no file or folder of that name either"), fix=fixes[:2],
    )  # fmt: skip


def _fill(
    wanted: _Wanted, source: str, stage: Path, say: Say, progress: Progress
) -> dict[str, Any]:
    """Fill the staged folder from the first source that can; returns what to record."""
    failures: list[tuple[str, ChatfineError]] = []
    for kind in _worth_asking() if source == "auto" else (source,):
        try:
            return _fill_from(kind, wanted, stage, say, progress)
        except ChatfineError as error:
            if isinstance(error, ResourceError) or error.code == "data-subset":
                raise  # another source would say the same
            failures.append((kind, error))
            if source == "auto":
                say(t("{source}: {what}", source=kind, what=error.what))
    raise failures[0][1] if source != "auto" else _no_source(wanted, failures)


def _worth_asking() -> list[str]:
    mirror_twice = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") == listing.MIRROR
    return [kind for kind in SOURCES if not (kind == "hf-mirror" and mirror_twice)]


def _fill_from(
    kind: str, wanted: _Wanted, stage: Path, say: Say, progress: Progress
) -> dict[str, Any]:
    ask, token = _asker(kind, wanted)
    answer = ask("main")
    card = _card_of(answer, token)
    choice = choose(answer, card, wanted.subset, wanted.repo)
    if not choice.names:
        answer, choice = _copies(kind, wanted, answer, ask, say)
    files = answer.files(choice.names)
    total = sum(file.size for file in files)
    say(t("{source}: {n} files from {repo}, {size}", source=kind, n=len(files), repo=wanted.repo,
          size=readable(total)))  # fmt: skip
    licence = card.get("license", "")
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
    if licence:
        say(t("licence of the data set: {licence}", licence=licence))
    fetch_all(files, stage, token, progress)
    return {
        "kind": "dataset",
        "name": wanted.name,
        "licence": licence,
        "source": kind,
        "repo": wanted.repo,
        "revision": answer.revision,
        "splits": choice.splits,
        "files": {file.name: file.size for file in files},
    }


def _asker(kind: str, wanted: _Wanted) -> tuple[Callable[[str], Answer], str]:
    """(revision → listing of one source, token for its files)."""
    repo = wanted.repo
    if kind == "modelscope":
        command = f"modelscope download --dataset {repo} --local_dir DIR"
        page = f"{listing.MODELSCOPE}/datasets/{repo}"
        asked = Repository("dataset", page, advice=listing.by_hand(command))
        return lambda revision: listing.ask_model_scope(repo, asked), ""
    page = f"{listing.HUB}/datasets/{repo}"
    if kind == "hf-mirror":
        asked = Repository("dataset", page, advice=listing.token_to_mirror())
        return lambda revision: listing.ask_hub(listing.MIRROR, repo, asked, "", revision), ""
    asked, token = Repository("dataset", page), listing.token()
    base = listing.endpoint()
    return lambda revision: listing.ask_hub(base, repo, asked, token, revision), token


def _card_of(answer: Answer, token: str) -> dict[str, Any]:
    if CARD not in answer.items:
        return {}
    (file,) = answer.files([CARD])
    return read_card(fetch_bytes(file.url, token, answer.repository))


def _copies(
    kind: str, wanted: _Wanted, answer: Answer, ask: Callable[[str], Answer], say: Say
) -> tuple[Answer, Choice]:
    """The hub's parquet copies of a data set whose own files can't be read here."""
    why = (
        t("it only has a program that makes the rows; such programs are never run")
        if is_script_only(answer)
        else t("it has no parquet, arrow, JSON or CSV files")
    )
    if kind != "modelscope":
        try:
            copies = ask(COPIES)
            choice = choose_copies(copies, wanted.subset, wanted.repo)
        except DataError as error:
            if error.code != "hub-not-found":
                raise
        else:
            if any("/partial-" in name for name in choice.names):
                say(t("the hub keeps a parquet copy of the first part only; that part is used"))
            if choice.names:
                return copies, choice
    raise DataError(
        "data-no-files", t("{repo} has no files of rows that can be read", repo=wanted.repo),
        where=answer.url, why=why,
        fix=[t("look for a copy of it on the hub that has parquet or JSON files"),
             t("or write its rows to a JSONL file yourself and give that file")],
    )  # fmt: skip


def _no_source(wanted: _Wanted, failures: list[tuple[str, ChatfineError]]) -> DataError:
    codes = {error.code for _, error in failures}
    why = "\n".join(f"{kind}: {error.what}" for kind, error in failures)
    if codes <= {"hub-not-found", "hub-login"}:
        return DataError(
            "no-dataset", t("no hub has a data set called {name}", name=wanted.repo),
            why=why + "\n" + t("there is no file or folder of that name either"),
            fix=[failures[0][1].fix[0], *failures[0][1].fix[-1:]],
        )  # fmt: skip
    telling = ("hub-gated", "unsafe-name", "data-no-files", "hub-certificate")
    for code in telling:  # a hub that has the data set tells more than one that can't be reached
        for _, error in failures:
            if error.code == code:
                return DataError(code, error.what, where=error.where, fix=error.fix,
                                 why="\n".join(filter(None, (error.why, why))))  # fmt: skip
    return DataError(
        "no-source", t("no source gave the data set {name}", name=wanted.name), why=why,
        fix=[t("behind a proxy set HTTPS_PROXY; HF_ENDPOINT names another hub"),
             t("or download its files by hand and give their folder")],
    )  # fmt: skip
