"""The hidden folder a download arrives in: room on its disk, one process at a time, its files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from chatfine import runtime
from chatfine.errors import OutputError
from chatfine.hub.fetch import RemoteFile, fetch_file
from chatfine.hub.refusals import disk_full
from chatfine.i18n import t

SPARE_BYTES = 20_000_000
_LARGE = (".part", ".safetensors", ".parquet", ".arrow", ".csv", ".jsonl")

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def silent(*values: object) -> None:
    """A `say` or `progress` that does nothing."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking a hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def open_stage(stage: Path, needed: int) -> None:
    """Make the hidden folder the files arrive in, if so many bytes fit on its disk."""
    there = next(parent for parent in stage.absolute().parents if parent.exists())
    if shutil.disk_usage(there).free < needed + SPARE_BYTES:
        raise disk_full(there, needed + SPARE_BYTES)
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "output-not-writable", t("{path} can't be written", path=stage.parent),
            where=str(stage.parent), why=str(error), fix=t("name another folder: -o DIR"),
        ) from None  # fmt: skip


def fetch_all(
    files: Sequence[RemoteFile],
    stage: Path,
    token: str,
    progress: Progress,
    check: Callable[[RemoteFile], None] = silent,
) -> None:
    """Fetch the files into `stage`, go on with those that are there, remove what is not wanted.

    Args:
        check: called with each file that has arrived; may raise to end the download.
    """
    total = sum(file.size for file in files)
    here = sum(f.stat().st_size for f in stage.rglob("*") if f.is_file()) if stage.is_dir() else 0
    open_stage(stage, total - here)
    arrived = 0

    def count(change: int) -> None:
        nonlocal arrived
        arrived += change
        progress(arrived, total)

    for file in files:
        fetch_file(file, stage, token, count)
        check(file)
    wanted = {stage / file.name for file in files}
    for item in sorted(stage.rglob("*"), reverse=True):  # left by an earlier try elsewhere
        if item.is_dir():
            if not any(item.iterdir()):
                item.rmdir()
        elif item not in wanted:
            item.unlink()


def worth_keeping(stage: Path) -> bool:
    """Whether something large has arrived that the next try can go on with."""
    files = [item for item in stage.rglob("*") if item.is_file()] if stage.is_dir() else []
    return any(item.suffix in _LARGE and item.stat().st_size > 0 for item in files)


def replace_by_stage(stage: Path, target: Path) -> None:
    """Put the finished stage in the place of `target`, which is missing or empty."""
    if target.is_dir():
        target.rmdir()  # Windows does not rename over a folder
    os.rename(stage, target)


@contextmanager
def lock(target: Path, say: Say) -> Iterator[None]:
    """One process at a time per target. The lock file lies in the cache, not beside the target."""
    key = re.sub(r"[^\w.-]+", "-", str(target.resolve()))[-120:]
    folder = runtime.home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f"{key}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        say(t("another process is fetching it; waiting"))
        held.acquire()
    try:
        yield
    finally:
        held.release()
