"""What a hub has of a model or data set. Names are checked, none trusted.

Hugging Face and its mirror: `/api/models/REPO/revision/main?blobs=true` (`datasets` for data sets);
ModelScope: `/api/v1/models/REPO/repo/files`, and for data sets `/api/v1/datasets/REPO/repo/tree`,
page by page. All announce the size of each file and a hash.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import ChatfineError, ModelError
from chatfine.hub.catalog import Entry, hub_home
from chatfine.hub.fetch import RemoteFile, fetch_json
from chatfine.hub.headers import INDEX
from chatfine.hub.refusals import Repository, bad_answer
from chatfine.i18n import t

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://modelscope.cn"
PAGE_FILES = 200
_MOST_PAGES = 100
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_BESIDE = re.compile(
    r"[\w.-]+\.(json|jinja)|tokenizer\.model|(licen[cs]e|readme|notice|use_policy)[\w.-]*",
    re.IGNORECASE,
)
_RESERVED = re.compile(  # devices of Windows, also with a suffix
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files to fetch, smallest first."""

    repo: str
    revision: str
    files: list[RemoteFile]
    token: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A hub's listing as it came: its items by name, and how one item is read."""

    url: str
    revision: str
    repository: Repository
    items: dict[str, Any]
    read: Callable[[str, Any], RemoteFile]

    def files(self, names: Iterable[str]) -> list[RemoteFile]:
        """The files of these names, smallest first.

        Raises:
            ModelError or DataError: hub-bad-answer if the listing does not describe them.
        """
        try:
            files = [self.read(name, self.items[name]) for name in names]
        except (KeyError, TypeError, ValueError, AttributeError):
            why = t("the listing lacks names, sizes or hashes")
            raise bad_answer(self.url, why, self.repository) from None
        return sorted(files, key=lambda file: file.size)


def hugging_face(entry: Entry) -> Listing:
    """The listing of the hub, or of the one HF_ENDPOINT names."""
    return _choose(ask_hub(endpoint(), entry.repo, _model(entry), token()), entry.repo, token())


def mirror(entry: Entry) -> Listing:
    """The listing of the hub's mirror; the user's token is not sent there."""
    return _choose(ask_hub(MIRROR, entry.repo, _model(entry, token_to_mirror())), entry.repo)


def model_scope(entry: Entry) -> Listing:
    """The listing of ModelScope."""
    repo = entry.modelscope_repo
    command = f"modelscope download --model {repo} --local_dir DIR"
    page = f"{MODELSCOPE}/models/{repo}"
    asked = Repository("model", page, entry.gated, advice=by_hand(command))
    return _choose(ask_model_scope(repo, asked), repo)


def _model(entry: Entry, advice: str = "") -> Repository:
    return Repository("model", f"{HUB}/{entry.repo}", entry.gated, advice)


def token_to_mirror() -> str:
    """What to do if the mirror wants a token, which is not sent there unasked."""
    return t("with HF_TOKEN set, HF_ENDPOINT={mirror} and --source hf your token is sent to the "
             "mirror", mirror=MIRROR)  # fmt: skip


def by_hand(command: str) -> str:
    """What to do if ModelScope wants a login."""
    return t("or get it by ModelScope's own tool, then name the folder: {command}", command=command)


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else the hub itself.

    Raises:
        ModelError: hub-endpoint, if HF_ENDPOINT is no address.
    """
    value = os.environ.get("HF_ENDPOINT", "").strip()
    if not value:
        return HUB
    parts = urllib.parse.urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(
            "hub-endpoint", t("HF_ENDPOINT is {value}, which is no web address", value=value),
            fix=[t("set it to a whole address: HF_ENDPOINT={mirror}", mirror=MIRROR),
                 t("or unset HF_ENDPOINT")],
        )  # fmt: skip
    return value.rstrip("/")


def ask_hub(
    base: str, repo: str, repository: Repository, token: str = "", revision: str = "main"
) -> Answer:
    """The listing of a repository of the hub or a mirror of it."""
    data = repository.kind == "dataset"
    revision = urllib.parse.quote(revision, safe="")
    kind, prefix = ("datasets", "datasets/") if data else ("models", "")
    url = f"{base}/api/{kind}/{repo}/revision/{revision}?blobs=true"
    answer = fetch_json(url, token, repository)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise bad_answer(url, t("the listing has no revision"), repository)

    def read(name: str, item: Any) -> RemoteFile:
        lfs = item.get("lfs") or {}
        address = f"{base}/{prefix}{repo}/resolve/{commit}/{urllib.parse.quote(name)}"
        return RemoteFile(name, address, int(item["size"]), str(lfs.get("sha256", "")),
                          str(item["blobId"]), repository)  # fmt: skip

    items = _by_name(answer.get("siblings"), "rfilename", url, repository)
    return Answer(url, commit, repository, items, read)


def ask_model_scope(repo: str, repository: Repository) -> Answer:
    """The listing of a repository of ModelScope."""
    data = repository.kind == "dataset"
    base = os.environ.get("MODELSCOPE_ENDPOINT", "").strip().rstrip("/") or MODELSCOPE
    kind = "datasets" if data else "models"
    prefix = f"{base}/api/v1/{kind}/{repo}/repo"
    url = f"{prefix}/tree" if data else f"{prefix}/files"
    items: dict[str, Any] = {}
    for page in range(1, _MOST_PAGES + 1):
        pages = f"&PageNumber={page}&PageSize={PAGE_FILES}" if data else ""
        listed = _files_on(f"{url}?Revision=master&Recursive=True{pages}", repository)
        items |= _by_name(listed, "Path", url, repository)
        if not data or len(listed) < PAGE_FILES:
            break
    items = {name: item for name, item in items.items() if item.get("Type") != "tree"}

    def read(name: str, item: Any) -> RemoteFile:
        query = urllib.parse.urlencode({"Revision": "master", "FilePath": name})
        # not every file of a data set has a hash there; its rows are checked when they are read
        sha256 = str(item.get("Sha256") or "") if data else str(item["Sha256"])
        return RemoteFile(name, f"{prefix}?{query}", int(item["Size"]), sha256,
                          repository=repository)  # fmt: skip

    return Answer(url, "master", repository, items, read)


def _files_on(url: str, repository: Repository) -> list[Any]:
    """The items on one page of ModelScope's listing, which reports failures inside of its JSON."""
    answer = fetch_json(url, "", repository)
    data = answer.get("Data") if isinstance(answer, dict) else None
    files = data.get("Files") if isinstance(data, dict) else None
    if isinstance(files, list):
        return files
    said = answer.get("Message") if isinstance(answer, dict) else None
    why = t("it says: {message}", message=said) if said else t("the listing has no files")
    raise bad_answer(url, why, repository)


def _by_name(items: Any, key: str, url: str, repository: Repository) -> dict[str, Any]:
    try:
        return {str(item[key]): item for item in items}
    except (KeyError, TypeError, ValueError):
        why = t("the listing lacks names, sizes or hashes")
        raise bad_answer(url, why, repository) from None


def _choose(answer: Answer, repo: str, token: str = "") -> Listing:
    """The files worth fetching of a model: weights and what belongs beside them."""
    names = list(answer.items)
    for name in names:
        refuse_unsafe(name, answer)
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if INDEX in names and len(weights) > 1:  # both forms are there: one is enough
        weights = [name for name in weights if name != "model.safetensors"]
    wanted = {*weights, *(name for name in names if _BESIDE.fullmatch(name))}
    wanted -= {name for name in wanted if name.endswith(".bin.index.json")}
    files = answer.files(name for name in names if name in wanted)
    if "config.json" not in wanted or not weights:
        raise _nothing_usable(names, answer.url)
    return Listing(repo, answer.revision, files, token)


def refuse_unsafe(name: str, answer: Answer) -> None:
    """Refuse a name that could leave the target folder, or that Windows would read otherwise."""
    parts = name.split("/")
    if (
        not name
        or any(part in ("", ".", "..") or _RESERVED.fullmatch(part) for part in parts)
        or any(part.endswith((" ", ".")) for part in parts)
        or re.search(r'[\\:*?"<>|\x00-\x1f]', name)
    ):
        thing = answer.repository.thing
        raise answer.repository.refuse(
            "unsafe-name", t("the hub lists a file called {name}", name=repr(name)), answer.url,
            t("do not use this {thing}", thing=thing),
            why=t("such a name could leave the folder of the {thing}", thing=thing),
        )  # fmt: skip


def _nothing_usable(names: list[str], url: str) -> ChatfineError:
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


def token() -> str:
    """The user's token for the hub, as the hub's own tools keep it; empty if there is none."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        return token
    file = Path(os.environ.get("HF_TOKEN_PATH", hub_home() / "token"))
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
