"""`chatfine convert`: another layout becomes a Hugging Face folder, or one becomes Meta's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.commands.get import byte_bar
from chatfine.config import ConvertConfig, TrainConfig, load_yaml
from chatfine.errors import ModelError, OutputError, TokenizerError, UsageError
from chatfine.hub.catalog import find_model
from chatfine.hub.convert import gguf_to_folder
from chatfine.hub.folder import check_vocabulary, read_model_folder
from chatfine.hub.meta import MetaFolder, find_meta_folder, meta_to_folder, read_meta_folder
from chatfine.hub.place import check_output, put_in_place
from chatfine.hub.shards import write_json
from chatfine.hub.to_meta import folder_to_meta
from chatfine.i18n import t
from chatfine.model.positions import with_positions_of
from chatfine.tokenizer import tiktoken
from chatfine.tokenizer.convert import read_model_file
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import (
    agree_on_end,
    copy_tokenizer,
    read_files,
    write_from_gguf,
    write_tokenizer,
)
from chatfine.tokenizer.template import LLAMA2, LLAMA3
from chatfine.train.prepare import positions_of

_FORMATS = {"auto": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_TEMPLATES = {"Llama 2": LLAMA2, "Code Llama": LLAMA2, "Llama 3": LLAMA3, "Llama 3.1": LLAMA3}
_ENDS = (tiktoken.END_OF_TURN, tiktoken.END, "<|eom_id|>")
_PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Find out what the source is, and write the other layout.

    Returns:
        `output`, and for a Hugging Face folder its size and lengths.

    Raises:
        Refused: what can't be converted, or a taken output folder; nothing is left behind.
    """
    source = Path(config.source).expanduser()
    if config.to == "meta":
        return _to_meta(config)
    if config.shards != 1:
        raise UsageError("bad-setting", t("{flag} goes with --to meta", flag="--shards"))
    if source.is_file() and source.suffix.lower() == ".gguf":
        return _from_gguf(config, source)
    if (source / "config.yaml").is_file():
        return _from_run(config, source)
    folder = find_meta_folder(source)
    if folder is not None:
        return _from_meta(config, read_meta_folder(folder))
    raise _unknown_source(source)


def _unknown_source(source: Path) -> ModelError:
    """The error for a source that is none of the known kinds."""
    known = t("known are: a folder with params.json and consolidated.00.pth, a .gguf file, a run "
              "folder; with --to meta a model folder")  # fmt: skip
    if not source.exists():
        return ModelError("no-source", t("there is no file or folder {name}", name=source),
                          why=known, fix=t("check the path"))  # fmt: skip
    if (source / "config.json").is_file():
        return ModelError(
            "nothing-to-convert", t("{path} is a Hugging Face folder already", path=source),
            where=str(source),
            fix=[t("use it as it is: {command}", command=f"chatfine chat {source}"),
                 t("or make Meta's layout of it: add --to meta")],
        )  # fmt: skip
    if source.suffix == ".pth":
        return ModelError(
            "nothing-to-convert", t("{path} is one file; the folder is needed", path=source),
            fix=t("name the folder: {command}",
                  command=f"chatfine convert {source.parent} -o NEW_FOLDER"),
        )  # fmt: skip
    return ModelError(
        "nothing-to-convert", t("{path} is nothing that can be converted", path=source),
        where=str(source), why=known, fix=t("name the folder that holds the weights"),
    )  # fmt: skip


@contextmanager
def _staged(config: ConvertConfig, source: Path) -> Iterator[Path]:
    """A folder beside the output that takes its place at the end, or leaves nothing."""
    check_output(Path(config.output), config.overwrite, (source,))
    output = Path(config.output).absolute()
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield staged
        put_in_place(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _from_meta(config: ConvertConfig, meta: MetaFolder) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in meta.shards)
    context = config.context or meta.facts.get("max_position_embeddings") or meta.family.context
    with _staged(config, meta.path) as staged:
        console.say(
            t("{family} in Meta's layout: {n} weight files, {size}; context {context} tokens",
              family=meta.family.name, n=len(meta.shards), size=console.size(size),
              context=context)
        )  # fmt: skip
        tokenizer = _write_tokenizer(config, meta, staged)
        with byte_bar() as progress:
            meta_to_folder(
                meta, staged, _FORMATS[config.dtype], context, _ids(tokenizer, staged), progress
            )
        for pattern in _PAPERS:
            for file in (*meta.path.parent.glob(pattern), *meta.path.glob(pattern)):
                shutil.copyfile(file, staged / file.name)
        _check(staged)
    return _show(config, {"family": meta.family.name, "context": context})


def _write_tokenizer(config: ConvertConfig, meta: MetaFolder, staged: Path) -> ChatTokenizer:
    """Tokenizer files and, for a chat model, its family's template, in the staged folder."""
    template = _TEMPLATES.get(meta.family.name) if meta.is_chat else None
    if config.tokenizer:
        places = [Path(config.tokenizer).expanduser()]
    else:
        places = [meta.path, meta.path.parent]  # Meta's download.sh puts it beside the models
    for place in places:
        if (place / "tokenizer.json").is_file():
            own = read_files(place).template
            copy_tokenizer(place, staged, None if own else template)
            return ChatTokenizer.load(staged)
        file = place / "tokenizer.model" if place.is_dir() else place
        if file.is_file():
            spec, settings = read_model_file(file, modern=meta.family.name == "Llama 3.1")
            if meta.is_chat and settings.get("eos_token") == tiktoken.END:
                settings["eos_token"] = tiktoken.END_OF_TURN
            settings["model_max_length"] = config.context or meta.family.context
            write_tokenizer(staged, spec, settings, template)
            if not tiktoken.is_rank_file(
                file
            ):  # other programs expect SentencePiece's by this name
                shutil.copyfile(file, staged / "tokenizer.model")
            return ChatTokenizer.load(staged)
    raise TokenizerError(
        "no-tokenizer",
        t("there is no tokenizer.model in {places}", places=", ".join(map(str, places))),
        fix=t("name it: {command}",
              command=f"chatfine convert {config.source} -o {config.output} --tokenizer FILE"),
    )  # fmt: skip


def _ids(tokenizer: ChatTokenizer, staged: Path) -> dict[str, Any]:
    """The ids of both configs: where a text begins, where an answer ends, what fills a batch."""
    added = {entry["content"]: entry["id"] for entry in read_files(staged).spec["added_tokens"]}
    ends = [tokenizer.turn_end_id, tokenizer.eos_id]
    if tokenizer.turn_end_id == added.get(tiktoken.END_OF_TURN, -1):
        ends += [added.get(token) for token in _ENDS]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _check(staged: Path) -> None:
    """What was written must be what every other command takes."""
    folder = read_model_folder(staged)
    tokenizer = ChatTokenizer.load(staged)
    check_vocabulary(folder, tokenizer.size)
    agree_on_end(staged, tokenizer)
    generation = json.loads((staged / "generation_config.json").read_text(encoding="utf-8"))
    if "eos_token_id" in generation:
        write_json(staged / "config.json",
                   folder.config | {"eos_token_id": generation["eos_token_id"]})  # fmt: skip


def _from_gguf(config: ConvertConfig, gguf: Path) -> dict[str, Any]:
    if config.dtype not in ("auto", "bf16"):
        raise UsageError("bad-setting", t("a GGUF file can only become bf16, not {dtype}",
                                          dtype=config.dtype), where="--dtype")  # fmt: skip
    with _staged(config, gguf) as staged:
        place = Path(config.tokenizer).expanduser()
        if not config.tokenizer:
            write_from_gguf(gguf, staged)
        elif place.is_dir():
            copy_tokenizer(place, staged)
        else:
            write_tokenizer(staged, *read_model_file(place), None)
        console.say(t("writing the weights as bf16 safetensors"))
        gguf_to_folder(gguf, staged)
        _check(staged)
    return _show(config, {})


def _from_run(config: ConvertConfig, run: Path) -> dict[str, Any]:
    """The best checkpoint of a full run, also a sharded or unfinished one, as a model folder."""
    settings = TrainConfig.read(load_yaml(run / "config.yaml"), str(run / "config.yaml"))
    if settings.method not in ("full", "freeze"):
        raise OutputError(
            "run-of-adapter",
            t("{path} trains an adapter ({method}), not a whole model", path=run,
              method=settings.method),
            fix=f"chatfine merge {run} -o {config.output}",
        )  # fmt: skip
    base = read_model_folder(find_model(settings.model))
    positions = positions_of(settings, base)
    base = with_positions_of(base, positions)
    with _staged(config, run) as staged:
        from chatfine.train.consolidate import run_to_folder

        step = run_to_folder(run, base, staged, _FORMATS[config.dtype])
        template = None
        if settings.template != "model":
            template = ChatTokenizer.load(base.path, template=settings.template).template
        copy_tokenizer(base.path, staged, template, positions.length if positions else 0)
        _check(staged)
    return _show(config, {"step": step})


def _to_meta(config: ConvertConfig) -> dict[str, Any]:
    model = read_model_folder(find_model(config.source))
    output = Path(config.output)
    with _staged(config, model.path) as staged:
        with byte_bar() as progress:
            folder_to_meta(model, staged, config.shards, _FORMATS[config.dtype], progress)
        copy_tokenizer(model.path, staged)
        for name in ("generation_config.json", *_PAPERS):
            for file in model.path.glob(name):
                shutil.copyfile(file, staged / file.name)
        if not (staged / "tokenizer.model").is_file():
            _write_ranks(model.path, staged)
    files = sorted(output.glob("consolidated.*.pth"))
    console.say(
        t("written: {path}: {n} weight files, {size}", path=output, n=len(files),
          size=console.size(sum(file.stat().st_size for file in files)))
    )  # fmt: skip
    back = f"chatfine convert {output} -o NEW_FOLDER"
    console.say(t("the way back: {command}", command=back), style="bold")
    return {"output": str(output), "files": [file.name for file in files]}


def _write_ranks(source: Path, staged: Path) -> None:
    """Llama 3's tokenizer.model again; other byte-level vocabularies have none."""
    ranks = tiktoken.ranks_of(read_files(source).spec)
    if ranks is not None:
        (staged / "tokenizer.model").write_bytes(ranks)
        return
    console.warn(
        t("the model has no tokenizer.model, which Meta's own programs need; its tokenizer.json "
          "goes along")
    )  # fmt: skip


def _show(config: ConvertConfig, more: dict[str, Any]) -> dict[str, Any]:
    """Say what was written and what to type next; the command's result."""
    folder = read_model_folder(Path(config.output))
    text = folder.text_config
    console.say(
        t("written: {path}: {count} million weights, {dtype}, {size}", path=config.output,
          count=round(folder.parameters / 1e6), dtype=folder.dtype,
          size=console.size(folder.weight_bytes))
    )  # fmt: skip
    heads = text.get("num_attention_heads", 0)
    shared = text.get("num_key_value_heads") or heads
    console.say(
        t("{layers} layers of width {hidden}, {heads} heads ({shared} for keys), {rows} pieces",
          layers=folder.layers, hidden=folder.hidden_size, heads=heads, shared=shared,
          rows=folder.vocab_size)
    )  # fmt: skip
    console.say(t("now type: {command}", command=f"chatfine chat {config.output}"), style="bold")
    return {
        "output": config.output,
        "parameters": folder.parameters,
        "weight_bytes": folder.weight_bytes,
        "dtype": folder.dtype,
        "layers": folder.layers,
        "hidden_size": folder.hidden_size,
        "vocab_size": folder.vocab_size,
        **more,
    }
