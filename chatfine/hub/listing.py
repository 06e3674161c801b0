"""What files a hub has for a model, and which of them are fetched. Names are checked, none trusted.

Hugging Face and its mirror: `/api/models/REPO/revision/main?blobs=true`; ModelScope:
`/api/v1/models/REPO/repo/files`. Both announce size and hash of each file.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.catalog import Entry, hub_home
from chatfine.hub.fetch import RemoteFile, bad_answer, fetch_json
from chatfine.hub.headers import INDEX
from chatfine.i18n import t

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://modelscope.cn"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_BESIDE = re.compile(
    r"[\w.-]+\.(json|jinja)|tokenizer\.model|(licen[cs]e|readme|notice|use_policy)[\w.-]*",
    re.IGNORECASE,
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows devices


@dataclass(frozen=True, slots=True)
class Listing:
    """The files to fetch, smallest first."""

    repo: str
    revision: str
    files: list[RemoteFile]
    token: str = ""


def hugging_face(entry: Entry) -> Listing:
    """The listing of the hub, or of the one HF_ENDPOINT names."""
    base = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    return _list_hub(base, entry.repo, _token())


def mirror(entry: Entry) -> Listing:
    """The listing of the hub's mirror; the user's token is not sent there."""
    return _list_hub(MIRROR, entry.repo, "")


def _list_hub(base: str, repo: str, token: str) -> Listing:
    url = f"{base}/api/models/{repo}/revision/main?blobs=true"
    answer = fetch_json(url, token)

    def read(item: Any, revision: str) -> RemoteFile:
        name, lfs = str(item["rfilename"]), item.get("lfs") or {}
        address = f"{base}/{repo}/resolve/{revision}/{urllib.parse.quote(name)}"
        return RemoteFile(name, address, int(item["size"]), str(lfs.get("sha256", "")),
                          str(item["blobId"]))  # fmt: skip

    revision = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(revision, str) or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise bad_answer(url, t("the listing has no revision"))
    files = _choose(url, answer.get("siblings"), "rfilename", lambda item: read(item, revision))
    return Listing(repo, revision, files, token)


def model_scope(entry: Entry) -> Listing:
    """The listing of ModelScope."""
    prefix = f"{MODELSCOPE}/api/v1/models/{entry.modelscope_repo}/repo"
    url = f"{prefix}/files?Revision=master&Recursive=true"
    answer = fetch_json(url)

    def read(item: Any) -> RemoteFile:
        name = str(item["Path"])
        query = urllib.parse.urlencode({"Revision": "master", "FilePath": name})
        return RemoteFile(name, f"{prefix}?{query}", int(item["Size"]), str(item["Sha256"]))

    data = answer.get("Data") if isinstance(answer, dict) else None
    listed = data.get("Files") if isinstance(data, dict) else None
    files = _choose(url, listed, "Path", read)
    return Listing(entry.modelscope_repo, "master", files)


def _choose(url: str, items: Any, key: str, read: Callable[[Any], RemoteFile]) -> list[RemoteFile]:
    """The files worth fetching out of a listing: weights and what belongs beside them."""
    try:
        names = [str(item[key]) for item in items]
        for name in names:
            _refuse_unsafe(name, url)
        weights = [name for name in names if _WEIGHTS.fullmatch(name)]
        if INDEX in names and len(weights) > 1:  # both forms are there: one is enough
            weights = [name for name in weights if name != "model.safetensors"]
        wanted = {*weights, *(name for name in names if _BESIDE.fullmatch(name))}
        wanted -= {name for name in wanted if name.endswith(".bin.index.json")}
        files = [read(item) for item in items if str(item[key]) in wanted]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise bad_answer(url, t("the listing lacks names, sizes or hashes")) from None
    if "config.json" not in wanted or not weights:
        raise _nothing_usable(names, url)
    return sorted(files, key=lambda file: file.size)


def _refuse_unsafe(name: str, url: str) -> None:
    parts = name.split("/")
    if (
        not name
        or any(part in ("", ".", "..") or _RESERVED.fullmatch(part) for part in parts)
        or re.search(r'[\\:*?"<>|\x00-\x1f]', name)
    ):
        raise ModelError(
            "unsafe-name", t("the hub lists a file called {name}", name=repr(name)), where=url,
            why=t("such a name could leave the model's folder"),
            fix=t("do not use this model"),
        )  # fmt: skip


def _nothing_usable(names: list[str], url: str) -> ModelError:
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        why = t("its weights are pickles ({files}), which can run any program",
                files=", ".join(pickles[:3]))  # fmt: skip
    else:
        why = t("it has no config.json with model.safetensors")
    return ModelError(
        "hub-no-safetensors", t("this repository holds no model that can be used"), where=url,
        why=why, fix=t("see models that work: {command}", command="chatfine models"),
    )  # fmt: skip


def _token() -> str:
    """The user's token for the hub, as the hub's own tools keep it; empty if there is none."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        return token
    file = Path(os.environ.get("HF_TOKEN_PATH", hub_home() / "token"))
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
