"""Base + adapter → the files of a model folder, shard by shard, added in float32 (contract C6).

At most one shard of the output is in memory, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from chatfine.errors import ModelError
from chatfine.export.adapter import Adapter, Change, find_parameter
from chatfine.hub.folder import ModelFolder
from chatfine.hub.headers import INDEX
from chatfine.i18n import t
from chatfine.model.positions import Positions, with_positions
from chatfine.model.rounded import read_rounded
from chatfine.model.storages import STORAGES
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import agree_on_end, copy_tokenizer

SHARD_BYTES = 2_000_000_000
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEAD = "lm_head.weight"
_FORMAT_CODE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_CARRIED = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

Tensors = Mapping[str, torch.Tensor]


class Merging:
    """One merge: which tensor of the output comes from which of the base, changed how.

    Raises (on creation):
        ModelError: the adapter changes a parameter that the base has not, or otherwise shaped.
    """

    def __init__(
        self,
        base: ModelFolder,
        adapter: Adapter,
        dtype: torch.dtype | None,
        positions: Positions | None = None,
    ) -> None:
        self.base, self.adapter, self.dtype = base, adapter, dtype
        self.positions = positions
        self.rounded: Rounded | None = None
        """set: the adapter is added to the weights as a quantised base held them"""
        self.changes: dict[str, Change] = {}  # name in the files → change
        for name, change in adapter.changes.items():
            found = find_parameter(name, base.tensors)
            if found is None and name.endswith(HEAD) and base.tied:
                found = HEAD
            if found is None:
                raise _misfit(adapter, t("the base has no parameter {name}", name=name))
            self.changes[found] = change
        embedding = next((n for n in base.tensors if n.endswith(_EMBEDDINGS)), "")
        self.embedding = embedding
        self._share_rows(embedding)
        ends = [name for name in (embedding, HEAD) if name in self.changes]
        # PEFT ties a head to trained rows, but not to an adapter on one of the two
        self.untied = base.tied and any(not self.changes[name].rows for name in ends)
        self.source = {name: name for name in base.tensors}  # name in the output → in the base
        if self.untied:
            self.source.setdefault(HEAD, embedding)
        for name in self.changes:
            if name not in self.source:
                raise _misfit(adapter, t("the base has no parameter {name}", name=name))
        self.tensors = _load_adapter_tensors(adapter)
        _check_shapes(self)
        self.plan = [
            (name, base.tensors[old].file, self._size(name, old))
            for name, old in sorted(self.source.items())
        ]

    @property
    def changed_rows(self) -> list[int]:
        """Ids of all rows of embedding and head that the adapter replaces."""
        return sorted({one for change in self.changes.values() for one in change.row_ids})

    def _share_rows(self, embedding: str) -> None:
        """Rows of a tied embedding change the head too, which a file may hold once or twice."""
        rows = self.changes.get(embedding)
        if rows is None or not (self.base.tied and rows.rows):
            return
        if HEAD in self.base.tensors:
            self.changes[HEAD] = rows
        elif HEAD in self.changes and self.changes[HEAD].rows:
            del self.changes[HEAD]

    def _size(self, name: str, old: str) -> int:
        info = self.base.tensors[old]
        wanted = self.out_dtype(name)
        return info.bytes if wanted is None else info.numel * wanted.itemsize

    def out_dtype(self, name: str) -> torch.dtype | None:
        """The number format of an output tensor; None for one that is not of floats."""
        own = FLOATS.get(self.base.tensors[self.source[name]].dtype)
        return own and (self.dtype or own)

    @property
    def dtype_name(self) -> str:
        """The number format of the output as transformers spells it: float32, bfloat16, float16."""
        own = self.dtype or FLOATS[_FORMAT_CODE[self.base.dtype]]
        return str(own).removeprefix("torch.")

    def write_weights(self, folder: Path) -> None:
        """Write all shards and, where there are several, their index."""
        shards: list[list[str]] = [[]]
        room = SHARD_BYTES
        for name, _, size in self.plan:
            if size > room and shards[-1]:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(name)
            room -= size
        placed: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({n: self.read(n) for n in names}, str(folder / file), {"format": "pt"})
            placed |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(size for _, _, size in self.plan)
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the output, merged in float32 and rounded."""
        old = self.source[name]
        file = self.base.tensors[old].file
        try:
            with safe_open(str(file), framework="pt") as stream:
                tensor: torch.Tensor = stream.get_tensor(old)
        except SafetensorError as error:
            raise ModelError(
                "model-truncated", t("{file} can't be read", file=file.name), where=str(file),
                why=str(error), fix=t("download the model again"),
            ) from None  # fmt: skip
        if self.rounded is not None:
            tensor = self.rounded.of(name, tensor)
        if name in self.changes:
            tensor = changed(tensor.float(), self.changes[name], self.tensors)
        wanted = self.out_dtype(name)
        return (tensor if wanted is None else tensor.to(wanted)).contiguous()

    def write_rest(self, folder: Path) -> ChatTokenizer:
        """Config, tokenizer, template and what else belongs to the model; ends made to agree."""
        config = json.loads((self.base.path / "config.json").read_text(encoding="utf-8"))
        config = with_positions(config, self.positions)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = self.dtype_name
        if self.untied:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict):
                config["text_config"]["tie_word_embeddings"] = False
        for pattern in _CARRIED:
            for file in sorted(self.base.path.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        if not (folder / "generation_config.json").is_file():
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            write_json(
                folder / "generation_config.json",
                {key: config[key] for key in keys if config.get(key) is not None},
            )
        write_json(folder / "config.json", config)
        own = self.adapter.path
        template = str(self.adapter.facts.get("template") or "model")
        copy_tokenizer(
            own if (own / "tokenizer.json").is_file() else self.base.path,
            folder,
            None if template == "model" else template,
            self.positions.length if self.positions else 0,
        )
        tokenizer = ChatTokenizer.load(folder)
        agree_on_end(folder, tokenizer)
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        if "eos_token_id" in config and "eos_token_id" in ends:
            write_json(folder / "config.json", config | {"eos_token_id": ends["eos_token_id"]})
        return tokenizer


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantised base: which weights were packed (name in its files → in the model), how, and the
    file that holds them if they were rounded to texts."""

    storage: str
    names: Mapping[str, str]
    file: Path | None = None

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the quantised base computed with in place of `tensor`, in float32."""
        if name not in self.names:
            return tensor
        if self.file is not None:
            return read_rounded(self.file, self.names[name], tensor.shape[1])
        storage = STORAGES[self.storage]
        return storage.unpack(storage.pack(tensor), tensor.shape[1], torch.float32)


def changed(weight: torch.Tensor, change: Change, tensors: Tensors) -> torch.Tensor:
    """`weight` (float32) after `change`: W + scale·B·A, with DoRA's magnitude where there is one.

    DoRA (Liu et al. 2024, equation 5): each output of W + scale·B·A is brought to the length that
    `magnitude` says.
    """
    if change.whole:
        weight = tensors[change.whole].float()
    if change.added:
        weight = weight + change.scale * tensors[change.added].float()
    if change.a:
        delta = change.scale * (tensors[change.b].float() @ tensors[change.a].float())
        weight = weight + (delta.T if change.transposed else delta)
    if change.magnitude:
        outputs = 0 if change.transposed else 1
        length = torch.linalg.norm(weight, dim=outputs, keepdim=True)
        magnitude = tensors[change.magnitude].float()
        weight = weight * (magnitude.reshape(length.shape) / length)
    if change.rows:
        weight = weight.clone()
        weight[list(change.row_ids)] = tensors[change.rows].float()
    return weight


def _load_adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    file = adapter.path / "adapter_model.safetensors"
    try:
        tensors: dict[str, torch.Tensor] = load_file(str(file))
    except SafetensorError as error:
        raise _misfit(adapter, str(error)) from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _misfit(adapter, t("{name} holds numbers that are not finite", name=name))
    return tensors


def _check_shapes(job: Merging) -> None:
    """Try each change on tensors without memory: a misfit shows before anything is written."""
    shapes = {name: tensor.to("meta") for name, tensor in job.tensors.items()}
    for name, change in job.changes.items():
        info = job.base.tensors[job.source[name]]
        if info.dtype not in FLOATS:
            raise _misfit(job.adapter, t("{name} of the base is quantised ({dtype})", name=name,
                                         dtype=info.dtype))  # fmt: skip
        try:
            result = changed(torch.empty(info.shape, device="meta"), change, shapes)
            fits = result.shape == info.shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            raise _misfit(job.adapter, t("it does not fit {name} of shape {shape}", name=name,
                                         shape=list(info.shape)))  # fmt: skip


def _misfit(adapter: Adapter, why: str) -> ModelError:
    return ModelError(
        "adapter-unusable",
        t("the adapter in {folder} does not fit this model", folder=adapter.path),
        where=str(adapter.path),
        why=why,
        fix=t("name the model that the adapter was trained on: --model BASE"),
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object in UTF-8 with a line end, the same bytes on every system."""
    text = json.dumps(values, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
