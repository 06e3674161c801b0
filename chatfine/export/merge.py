"""Base + adapter → an ordinary model folder, written shard by shard and proved (contract C6).

One model at most is in memory at a time, and only for the proof. The proof has three links: logits of
base + adapter as PEFT computes them equal those of the weights merged in float32; the folder that was
written, loaded again, holds exactly these weights rounded; what the rounding costs is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from chatfine import __version__
from chatfine.errors import ModelError, OutputError, ProofError, ResourceError
from chatfine.export.adapter import FACTS, Adapter, Change, find_parameter, read_adapter
from chatfine.hub.folder import ModelFolder, read_model_folder
from chatfine.hub.headers import INDEX
from chatfine.i18n import t
from chatfine.model.adapters import load_adapter
from chatfine.model.load import load_model
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import agree_on_end, copy_tokenizer

MAX_GAP = 1e-3
"""Largest difference of logits (of sizes up to about 40) between base + adapter and merged, float32."""
SHARD_BYTES = 2_000_000_000
PROOF_TOKENS = 512
"""So much of each prompt is read for the proof."""
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEAD = "lm_head.weight"
_CARRIED = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What the proof measured: logits over all positions of all prompts."""

    dtype: str
    gap: float
    """largest difference between base + adapter and the merged weights before rounding"""
    rounding_gap: float
    """largest difference that rounding to `dtype` makes"""
    top1_agreement: float
    """share of positions whose likeliest token is the same after rounding"""
    positions: int
    changed: int
    """parameters that the adapter changed"""
    untied: bool
    """whether the head had to get a weight of its own"""


def merge(
    model: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype | None,
    prompts: Sequence[Sequence[int]],
    overwrite: bool = False,
) -> MergeResult:
    """Write `model` with `adapter` merged in as the model folder `output`, with proof.

    Args:
        model: folder of the base.
        adapter: PEFT folder (LoRA or DoRA).
        output: folder to write; it appears whole after the proof, or not at all.
        dtype: number format of the weights; None keeps the base's, tensor by tensor.
        prompts: token ids of real prompts for the proof.
        overwrite: put the new folder in the place of a model folder that is there.

    Raises:
        OutputError, ModelError, ResourceError: before anything was written.
        ProofError: the merged model does not compute what base + adapter compute.
    """
    check_output(output, overwrite)
    job = _Job(read_model_folder(model), read_adapter(adapter), dtype)
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    _check_disk(output, job)
    try:
        staged.mkdir(parents=True)
        job.write_weights(staged)
        tokenizer = job.write_rest(staged)
        result = _prove(job, staged, [list(ids[:PROOF_TOKENS]) for ids in prompts if ids])
        _write_json(staged / FACTS, _facts(job, tokenizer, result))
        _put_in_place(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return result


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a place that is taken; `overwrite` allows to replace a model folder, nothing else.

    Raises:
        OutputError: naming --overwrite where it would help.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.exists():
        return
    replaceable = (output / "config.json").is_file() and not (output / "config.yaml").is_file()
    if overwrite and replaceable:
        return
    raise OutputError(
        "output-not-empty",
        t("the folder {path} is not empty", path=output),
        where="--output",
        why=None if replaceable else t("it is not a model folder, so it is never replaced"),
        fix=t("name a new folder, or add --overwrite") if replaceable else t("name a new folder"),
    )


def _check_disk(output: Path, job: _Job) -> None:
    place = next(folder for folder in output.absolute().parents if folder.exists())
    needed, free = sum(size for _, _, size in job.plan), shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            "disk-full",
            t("the merged model needs {need:.1f} GB of disk; {free:.1f} GB are free at {path}",
              need=needed / 1e9, free=free / 1e9, path=place),
            fix=t("free some space, or choose another disk with --output"),
        )  # fmt: skip


def _put_in_place(staged: Path, output: Path) -> None:
    """One rename; what was there goes away only when the new folder is complete."""
    for file in staged.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    staged.rename(output)
    shutil.rmtree(old, ignore_errors=True)


class _Job:
    """One merge: which tensor of the output comes from which of the base, changed how.

    Raises (on creation):
        ModelError: the adapter changes a parameter that the base does not have, or not in this shape.
    """

    def __init__(self, base: ModelFolder, adapter: Adapter, dtype: torch.dtype | None) -> None:
        self.base, self.adapter, self.dtype = base, adapter, dtype
        self.changes: dict[str, Change] = {}  # name in the files → change
        for name, change in adapter.changes.items():
            found = find_parameter(name, base.tensors)
            if found is None and name.endswith(HEAD) and base.tied:
                found = HEAD
            if found is None:
                raise _misfit(adapter, t("the base has no parameter {name}", name=name))
            self.changes[found] = change
        embedding = next((n for n in base.tensors if n.endswith(_embedding_names)), "")
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

    def _size(self, name: str, old: str) -> int:
        info = self.base.tensors[old]
        wanted = self.out_dtype(name)
        return info.bytes if wanted is None else info.numel * wanted.itemsize

    def out_dtype(self, name: str) -> torch.dtype | None:
        """The number format of an output tensor; None for one that is not of floats."""
        own = FLOATS.get(self.base.tensors[self.source[name]].dtype)
        return own and (self.dtype or own)

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
            _write_json(
                folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed}
            )

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
        if name in self.changes:
            tensor = changed(tensor.float(), self.changes[name], self.tensors)
        wanted = self.out_dtype(name)
        return (tensor if wanted is None else tensor.to(wanted)).contiguous()

    def write_rest(self, folder: Path) -> ChatTokenizer:
        """Config, tokenizer, template and what else belongs to the model; ends made to agree."""
        config = json.loads((self.base.path / "config.json").read_text(encoding="utf-8"))
        name = str(self.dtype or FLOATS[_FORMAT_CODE[self.base.dtype]]).removeprefix("torch.")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
        if self.untied:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict):
                config["text_config"]["tie_word_embeddings"] = False
        for pattern in _CARRIED:
            for file in sorted(self.base.path.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        if not (folder / "generation_config.json").is_file():
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            _write_json(
                folder / "generation_config.json",
                {key: config[key] for key in keys if config.get(key) is not None},
            )
        _write_json(folder / "config.json", config)
        own = self.adapter.path
        template = str(self.adapter.facts.get("template") or "model")
        copy_tokenizer(
            own if (own / "tokenizer.json").is_file() else self.base.path,
            folder,
            None if template == "model" else template,
        )
        tokenizer = ChatTokenizer.load(folder)
        agree_on_end(folder, tokenizer)
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        if "eos_token_id" in config and "eos_token_id" in ends:
            _write_json(folder / "config.json", config | {"eos_token_id": ends["eos_token_id"]})
        return tokenizer


_FORMAT_CODE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_embedding_names = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


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


def _check_shapes(job: _Job) -> None:
    """Try each change on a tensor without memory, so that a misfit shows before anything is written."""
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
