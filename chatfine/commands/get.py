"""`chatfine download` and `chatfine models`: the hub, the tokenizer's files and data joined."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.config import DownloadConfig, ModelsConfig
from chatfine.errors import UsageError
from chatfine.hub import catalog
from chatfine.hub import download as hub
from chatfine.hub.datasets import fetch_dataset, is_hub_name
from chatfine.hub.folder import read_model_folder
from chatfine.hub.stage import Progress
from chatfine.i18n import t


def get_model(name: str, source: str = "auto", output: str | Path | None = None) -> Path:
    """Download a model (or find it here) and return its folder; shows what happens."""
    from chatfine.tokenizer.files import write_from_gguf

    with byte_bar() as progress:
        return hub.download(
            name, source, output or None, say=console.say, finish=write_from_gguf, progress=progress
        )


def download(config: DownloadConfig) -> dict[str, Any]:
    """Get a model or a data set and put it into the cache or a folder."""
    if config.source == "meta":
        return _download_meta(config)
    if config.url:
        raise UsageError("bad-setting", t("{flag} goes with --source meta", flag="--url"))
    if config.kind == "dataset":
        return _download_dataset(config)
    path = get_model(config.name, config.source, config.output)
    folder = read_model_folder(path)
    console.say(
        t("{name}: {count} million weights, {dtype}, {size}, in {path}",
          name=config.name, count=round(folder.parameters / 1e6), dtype=folder.dtype,
          size=console.size(folder.weight_bytes), path=path)
    )  # fmt: skip
    named = config.output or config.name
    console.say(t("now type: {command}", command=f"chatfine chat {named}"), style="bold")
    return {
        "name": config.name,
        "path": str(path),
        "parameters": folder.parameters,
        "weight_bytes": folder.weight_bytes,
        "dtype": folder.dtype,
    }


def _download_meta(config: DownloadConfig) -> dict[str, Any]:
    from chatfine.hub.meta_download import download_meta

    url = config.url
    if not url and sys.stdin.isatty():
        url = console.ask(t("the link from Meta's e-mail: "))
    output = Path(config.output).expanduser() if config.output else None
    with byte_bar() as progress:
        path = download_meta(config.name, url, output, console.say, progress)
    console.say(t("{name} is in {path}, in Meta's layout", name=config.name, path=path))
    convert = f"chatfine convert {path} -o {Path(config.name).name.lower().removesuffix('-hf')}-hf"
    console.say(t("now type: {command}", command=convert), style="bold")
    return {"name": config.name, "path": str(path)}


def _download_dataset(config: DownloadConfig) -> dict[str, Any]:
    from chatfine.data.sources import locate

    named = config.name
    if is_hub_name(named) and not Path(named).exists():
        with byte_bar() as progress:
            path = fetch_dataset(named, config.source, console.say, config.output, progress)
        named = str(path) if config.output else named
        console.say(t("{name} is in {path}", name=config.name, path=path))
    splits = {split: [str(file) for file in files] for split, files in locate(named).splits.items()}
    sizes = {split: sum(Path(file).stat().st_size for file in splits[split]) for split in splits}
    console.table(
        [t("split"), t("files"), t("size")],
        [[split, str(len(splits[split])), console.size(sizes[split])] for split in splits],
    )
    check = f"chatfine data check {named} -m smollm2-135m-instruct"
    console.say(t("now type: {command}", command=check), style="bold")
    return {"name": config.name, "dataset": named, "splits": splits, "bytes": sum(sizes.values())}


def models(config: ModelsConfig) -> dict[str, Any]:
    """List the models known by name, and which of them are on this machine."""
    cached = set(catalog.cached_names())
    listed = [_describe(entry, cached) for entry in catalog.CATALOG.values()]
    listed += [
        {"name": name, "licence": "", "size_bytes": 0, "gated": False, "package": False,
         "here": True, "repo": name}
        for name in sorted(cached - set(catalog.CATALOG))
    ]  # fmt: skip
    console.table(
        [t("name"), t("size"), t("licence"), t("here"), t("note")],
        [
            [entry["name"], console.size(entry["size_bytes"]) if entry["size_bytes"] else "",
             entry["licence"], t("yes") if entry["here"] else "", _note(entry)]
            for entry in listed
        ],
    )  # fmt: skip
    console.say(t("get one: {command}", command="chatfine download NAME"))
    console.say(t("any other chat model of the hub works by its full name, OWNER/NAME"))
    return {"models": listed}


def _describe(entry: catalog.Entry, cached: set[str]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "licence": entry.licence,
        "size_bytes": entry.size_bytes,
        "gated": entry.gated,
        "package": entry.package is not None,
        "here": entry.name in cached or next(catalog.local_copies(entry), None) is not None,
        "repo": entry.repo,
    }


def _note(entry: dict[str, Any]) -> str:
    if entry["gated"]:
        return t("its licence has to be accepted on the hub first")
    if entry["package"]:
        return t("also comes as a Python package, where no hub can be reached")
    return ""


@contextmanager
def byte_bar() -> Iterator[Progress]:
    """A bar that appears with the first byte."""
    from rich import progress

    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=console.console(), transient=True)
    task = bar.add_task("", total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
