"""Read a model folder without running anything in it: JSON and safetensors headers only.

What could run code is refused: pickles, `auto_map`, and private config keys that make transformers
load kernels by name.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.catalog import find_model
from chatfine.hub.headers import INDEX, TensorInfo, lfs_pointer, read_json, read_tensors
from chatfine.hub.lfs import is_pointer
from chatfine.hub.shapes import LLAMA_LIKE, check_shapes, embedding_name
from chatfine.i18n import t

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_CODE_FILES = ("config.json", "tokenizer_config.json", "generation_config.json",
               "processor_config.json", "preprocessor_config.json")  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that was read and found sound. No weight has been loaded."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config (multimodal models nest it)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.text_config["vocab_size"])

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return int(self.text_config["hidden_size"])

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.text_config["num_hidden_layers"])

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens the model was made for."""
        return int(self.text_config.get("max_position_embeddings") or 2048)

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight."""
        if self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings")):
            return True
        return not any(name.endswith("lm_head.weight") for name in self.tensors)

    @property
    def parameters(self) -> int:
        """How many weights; a head stored beside the embedding it is tied to is counted once."""
        return sum(
            info.numel
            for name, info in self.tensors.items()
            if not (self.tied and name.endswith("lm_head.weight"))
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The number format of most bytes: fp32, bf16, fp16, or the format's own name."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.bytes
        name = sizes.most_common(1)[0][0]
        return _DTYPE_NAMES.get(name, name.lower())

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted({info.file for info in self.tensors.values()})

    def digest(self) -> str:
        """SHA-256 that names this model: config, headers, file sizes, both ends of each shard.

        Fast at any size; a changed weight in the middle of a shard is not noticed.
        """
        state = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, info in sorted(self.tensors.items()):
            state.update(f"{name} {info.dtype} {info.shape} {info.begin} {info.end}\n".encode())
        for shard in self.shards:
            size = shard.stat().st_size
            state.update(f"{shard.name} {size}\n".encode())
            with shard.open("rb") as file:
                state.update(file.read(65536))
                file.seek(max(0, size - 65536))
                state.update(file.read(65536))
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """What a name given to chat, eval or merge stands for."""

    model: Path
    adapter: Path | None = None
    run: Path | None = None


def read_model_folder(path: str | Path, allow_old_rows: bool = False) -> ModelFolder:
    """Read and check a model folder: config, shards, shapes. Opens headers only; runs nothing.

    Args:
        path: the folder.
        allow_old_rows: whether the embedding may have fewer rows than config.json says (somebody
            wrote the size of a grown tokenizer there); `vocab_size` is then that of the weights.

    Raises:
        ModelError: no-model, model-no-config, model-bad-config, model-pickle,
            model-metas-layout, model-runs-code, model-no-weights, model-missing-shard,
            model-lfs-pointer, model-truncated, model-bad-weights, model-missing-tensor or
            model-wrong-shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(
            "no-model", t("there is no model folder {name}", name=path),
            fix=t("see the names: {command}", command="chatfine models"),
        )  # fmt: skip
    _refuse_pickle_only(path)
    if not (path / "config.json").is_file():
        raise _no_config(path)
    refuse_pointers(path)
    config = check_config(path)
    tensors = read_tensors(path)
    if allow_old_rows:
        config = _with_rows_of(tensors, config)
    folder = ModelFolder(path, config, tensors)
    check_shapes(path, folder.text_config, {name: info.shape for name, info in tensors.items()})
    return folder


def _with_rows_of(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the embedding's own number of rows where it has fewer than promised."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    name = embedding_name(tensors)
    rows = tensors[name].shape[0] if name else text["vocab_size"]
    if rows >= text["vocab_size"]:
        return config
    return config | ({"text_config": text | {"vocab_size": rows}} if text is nested
                     else {"vocab_size": rows})  # fmt: skip


def check_config(path: Path) -> dict[str, Any]:
    """The folder's config.json, after all that may run code in it and beside it was refused."""
    for name in _CODE_FILES:
        if (path / name).is_file():
            _refuse_code(path / name, read_json(path / name))
    config = read_json(path / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    needed = ["vocab_size", "hidden_size", "num_hidden_layers"]
    if text.get("model_type") in LLAMA_LIKE:
        needed += ["num_attention_heads", "intermediate_size"]
    for name in needed:
        value = text.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(
                "model-bad-config",
                t("config.json says {name} = {value}; a whole number above 0 is needed",
                  name=name, value=json.dumps(value)),
                where=str(path / "config.json"),
                fix=t("use a decoder model in Hugging Face's format: chatfine models"),
            )  # fmt: skip
    return config


def check_vocabulary(folder: ModelFolder, tokenizer_size: int) -> None:
    """Refuse a tokenizer with more pieces than the embedding has rows."""
    if tokenizer_size > folder.vocab_size:
        command = f"chatfine expand-vocab -m {folder.path} -o NEW_FOLDER"
        raise ModelError(
            "model-small-embedding",
            t("the tokenizer has {pieces} pieces, the model's embedding only {rows} rows",
              pieces=tokenizer_size, rows=folder.vocab_size),
            where=str(folder.path),
            why=t("ids from {rows} on would have no row", rows=folder.vocab_size),
            fix=t("give the embedding more rows: {command}", command=command),
        )  # fmt: skip


def resolve_source(name: str | Path, base: str = "") -> Source:
    """What `name` stands for: a model, an adapter on its base model, or a run folder.

    Args:
        name: a folder, or a model's name in the cache.
        base: the base model of an adapter; empty = the one the adapter names.
    """
    folder = find_model(name)
    if (folder / "config.yaml").is_file():  # first: a tutorial's run is a PEFT folder as well
        for part in ("adapter", "model"):
            if (folder / part / "adapter_config.json").is_file():
                return Source(_base_of(folder / part, base), folder / part, folder)
            if (folder / part / "config.json").is_file():
                return Source(folder / part, run=folder)
        raise ModelError(
            "run-unfinished", t("the run {path} holds no adapter or model yet", path=folder),
            where=str(folder),
            fix=t("finish it: {command}", command=f"chatfine resume {folder}"),
        )  # fmt: skip
    if (folder / "adapter_config.json").is_file():
        return Source(_base_of(folder, base), adapter=folder)
    _refuse_pickle_only(folder)
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    return Source(folder)


def _base_of(adapter: Path, base: str) -> Path:
    settings = read_json(adapter / "adapter_config.json", "adapter-bad-config")
    _refuse_code(adapter / "adapter_config.json", settings)
    ours = adapter / "chatfine.json"
    facts = read_json(ours, "adapter-bad-config") if ours.is_file() else {}
    named = base or facts.get("base") or settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            "adapter-no-base", t("the adapter does not name its base model"), where=str(adapter),
            fix=t("name it: --model BASE"),
        )  # fmt: skip
    try:
        return find_model(named)
    except ModelError as error:
        raise ModelError(
            "adapter-no-base", t("the adapter's base model {name} is not here", name=named),
            where=str(adapter), fix=[*error.fix, t("or name it: --model BASE")],
        ) from None  # fmt: skip


def _refuse_code(file: Path, value: Any) -> None:
    """Refuse keys that make a library import code named by the folder, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        named = isinstance(inner, str) and ("/" in inner or ":" in inner)
        kernel = named and key.lstrip("_").endswith(("implementation", "implementation_internal"))
        hidden = named and key.startswith("_") and key != "_name_or_path"
        library = inner.get("parent_library") if isinstance(inner, dict) else None
        known = ("transformers.", "peft.")
        foreign = isinstance(library, str) and not f"{library}.".startswith(known)
        if (key == "auto_map" and inner) or kernel or hidden or (key == "auto_mapping" and foreign):
            raise ModelError(
                "model-runs-code",
                t("{file} has {key}: the model wants to run code of its own", file=file.name,
                  key=key),
                where=str(file),
                why=t("such code can do anything on this machine, so it is never run"),
                fix=t("use a version of the model that the transformers library knows itself"),
            )  # fmt: skip
        _refuse_code(file, inner)
    for inner in value if isinstance(value, list) else ():
        _refuse_code(file, inner)


def _refuse_pickle_only(path: Path) -> None:
    if any(path.glob("*.safetensors")) or (path / INDEX).is_file():
        return
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in PICKLES)
    if (path / "params.json").is_file() and any(path.glob("consolidated.*.pth")):
        raise ModelError(
            "model-metas-layout", t("{path} is in Meta's layout", path=path), where=str(path),
            fix=t("make a model folder of it: {command}",
                  command=f"chatfine convert {path} -o {path.name}-hf"),
        )  # fmt: skip
    if pickles:
        raise ModelError(
            "model-pickle",
            t("the weights are pickles ({files}); they are never opened",
              files=", ".join(pickles[:3])),
            where=str(path),
            why=t("a pickle can run any program while it is read"),
            fix=t("get the model with *.safetensors files: {command}",
                  command="chatfine download NAME"),
        )  # fmt: skip


def refuse_pointers(path: Path) -> None:
    """Refuse a folder with git-lfs pointers among its JSON and tokenizer files."""
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".model") and file.is_file() and is_pointer(file):
            raise lfs_pointer(file)


def _no_config(path: Path) -> ModelError:
    return ModelError(
        "model-no-config", t("there is no config.json in {path}", path=path), where=str(path),
        fix=[t("name the folder that holds config.json and *.safetensors"),
             t("see the names: {command}", command="chatfine models")],
    )  # fmt: skip
