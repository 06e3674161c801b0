"""Llama 2 from Meta by the signed link of its e-mail: what Meta's download.sh does, in Python.

The link has a `*` in the place of the file's path. Sizes come from the server, MD5 sums from the
checklists that lie beside the weights; what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from pathlib import Path

from chatfine import runtime
from chatfine.errors import ChatfineError, ModelError, UsageError, did_you_mean
from chatfine.hub.catalog import RECORD
from chatfine.hub.fetch import (
    RemoteFile,
    fetch_bytes,
    hash_file,
    looks_like_html,
    remote_size,
)
from chatfine.hub.place import check_output
from chatfine.hub.refusals import bad_answer
from chatfine.hub.shards import write_json
from chatfine.hub.stage import Progress, Say, fetch_all, is_offline, lock, replace_by_stage, silent
from chatfine.i18n import t

SHARDS = {
    "llama-2-7b": 1, "llama-2-7b-chat": 1, "llama-2-13b": 2, "llama-2-13b-chat": 2,
    "llama-2-70b": 8, "llama-2-70b-chat": 8,
}  # fmt: skip
"""The models that Meta hands out this way, and the number of their weight files."""
REQUEST_PAGE = "https://www.llama.com/llama-downloads/"
_PAPERS = ("LICENSE", "USE_POLICY.md")
_TOKENIZER = ("tokenizer.model", "tokenizer_checklist.chk")
_SUM = re.compile(r"([0-9a-fA-F]{32})[ *]+(\S+)")
_REFUSED = ("hub-gated", "hub-login")  # 403 and 401
_MISSING = ("hub-not-found", "hub-no-file")


def download_meta(
    name: str, url: str, output: Path | None = None, say: Say = silent, progress: Progress = silent
) -> Path:
    """Fetch a Llama 2 in Meta's layout and return its folder; every file is in that one folder.

    Args:
        name: one of SHARDS; the hub's spelling of it is understood too.
        url: the signed link, with its `*`.
        output: folder to write; None = in the cache.
        say: receives one line for each thing that happens.
        progress: receives (bytes here, bytes in all).

    Raises:
        UsageError: meta-bad-link.
        ModelError: no-model, offline, meta-link-refused (expired, or for other models),
            meta-not-in-link, download-hash, or what the network did.
        OutputError: output-not-empty.
    """
    name = _known(name)
    url = _checked_link(url)
    if is_offline():
        raise ModelError("offline", t("not asked, because HF_HUB_OFFLINE is set"),
                         fix=t("unset HF_HUB_OFFLINE"))  # fmt: skip
    target = output or runtime.home() / "meta" / name
    names = [*_PAPERS, *_TOKENIZER, "checklist.chk", "params.json"]
    names += [f"consolidated.{number:02}.pth" for number in range(SHARDS[name])]
    with lock(target, say):
        if all((target / file).is_file() for file in names):
            say(t("already on this machine: {path}", path=target))
            return target
        check_output(target, False)
        stage = target.parent / f".{target.name}.partial"
        try:
            sums = _read_sums(url, name)
            files = [_remote(url, name, file) for file in names]
            say(t("{n} files from {host}", n=len(files), host=urllib.parse.urlsplit(url).hostname))
            fetch_all(files, stage, "", progress, lambda file: _check_sum(stage, file, sums))
        except ChatfineError as error:
            raise _explained(error, name) from None
        record = {"name": name, "licence": "Llama 2", "source": "meta"}  # the link is a secret
        write_json(stage / RECORD, record)
        replace_by_stage(stage, target)
    return target


def _known(name: str) -> str:
    found = name.lower().removeprefix("meta-llama/").removesuffix("-hf")
    if found not in SHARDS:
        raise ModelError(
            "no-model", t("Meta's links give no model called {name}", name=name),
            fix=[line for line in (
                did_you_mean(found, SHARDS), t("possible: {names}", names=", ".join(SHARDS)),
                t("for other models leave out --source meta"),
            ) if line],
        )  # fmt: skip
    return found


def _checked_link(url: str) -> str:
    """The link without what a shell or a mail program put around it."""
    url = url.strip().strip("'\"<>").replace("\\", "")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname and parts.path.count("*") == 1:
        return url
    if not url:
        what = t("the link from Meta's e-mail is missing")
    elif "*" not in url:
        what = t("the link has no * in it, where the file's name belongs")
    else:
        what = t("this is no link as Meta sends it: {start}", start=url[:60])
    raise UsageError(
        "meta-bad-link", what, where="--url",
        fix=[t("ask for one: {page}", page=REQUEST_PAGE),
             t("copy the whole link (do not open it), and put it in quotes: {command}",
               command='chatfine download llama-2-7b-chat --source meta --url "https://…"')],
    )  # fmt: skip


def _address(url: str, name: str, file: str) -> str:
    """Where `file` lies: what belongs to all models at the top, else in the model's folder."""
    shared = file in (*_PAPERS, *_TOKENIZER)
    return url.replace("*", file if shared else f"{name}/{file}", 1)


def _remote(url: str, name: str, file: str) -> RemoteFile:
    address = _address(url, name, file)
    return RemoteFile(file, address, remote_size(address))


def _read_sums(url: str, name: str) -> dict[str, str]:
    """File → MD5 out of both checklists."""
    sums: dict[str, str] = {}
    for file in ("tokenizer_checklist.chk", "checklist.chk"):
        address = _address(url, name, file)
        raw = fetch_bytes(address)
        found = _SUM.findall(raw.decode("utf-8", "replace"))
        if not found:
            page = looks_like_html(raw)
            why = t("it is a web page instead of {file}", file=file) if page else t(
                "{file} holds no checksums", file=file)  # fmt: skip
            raise bad_answer(address, why)
        sums |= {entry: digest.lower() for digest, entry in found}
    return sums


def _check_sum(stage: Path, file: RemoteFile, sums: dict[str, str]) -> None:
    """Hold an arrived file against its checklist; a wrong one goes away, so that it comes anew."""
    wanted = sums.get(file.name)
    path = stage / file.name
    if wanted is None or hash_file(path, hashlib.md5(usedforsecurity=False)) == wanted:
        return
    path.unlink()
    raise ModelError(
        "download-hash", t("{file} arrived with other bytes than Meta's checklist says",
                           file=file.name), where=file.url,
        why=t("the connection or a proxy changed it"),
        fix=t("run the same command again: this file comes anew, the others are kept"),
    )  # fmt: skip


def _explained(error: ChatfineError, name: str) -> ChatfineError:
    """The error in the words of Meta's links; the link's signature is left out."""
    if error.where:
        error.where = error.where.partition("?")[0]
    if error.code in _REFUSED:
        return ModelError(
            "meta-link-refused", t("Meta's server refuses the link (403)"), where=error.where,
            why=t("links hold for 24 hours and some downloads, and only for the models asked for; "
                  "or part of the link is missing"),
            fix=[t("ask for a new link: {page}", page=REQUEST_PAGE),
                 t("run the same command with it, in quotes; what has arrived is kept")],
        )  # fmt: skip
    if error.code in _MISSING:
        return ModelError(
            "meta-not-in-link", t("the link does not give {name} (404)", name=name),
            where=error.where, fix=t("ask for a link to Llama 2: {page}", page=REQUEST_PAGE),
        )  # fmt: skip
    return error
