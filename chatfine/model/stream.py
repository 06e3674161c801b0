"""A model without weights, and its weights one after the other out of the files.

What is in memory is what the caller keeps, and one tensor: enough to quantise while loading, or to
give each process its rows only. `transformers` itself reads whole models (`model.load`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from chatfine.errors import ModelError
from chatfine.hub.headers import TensorInfo, read_tensors
from chatfine.i18n import t
from chatfine.model.positions import Positions, library_config

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One tensor in a file, read when asked for; the file is closed again after each reading."""

    name: str  # in the file
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self.info.shape

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its number format in the file."""
        return DTYPES[self.info.dtype]

    def read(self, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor as stored, on the CPU, or only `rows` (first, last + 1) of it.

        Raises:
            ModelError: the file can't be read.
        """
        try:
            with safe_open(str(self.info.file), framework="pt") as stream:
                if rows is None:
                    tensor: torch.Tensor = stream.get_tensor(self.name)
                else:
                    tensor = stream.get_slice(self.name)[rows[0] : rows[1]]
        except SafetensorError as error:
            raise ModelError(
                "model-truncated", t("{file} can't be read", file=self.info.file.name),
                where=str(self.info.file), why=str(error), fix=t("download the model again"),
            ) from None  # fmt: skip
        return tensor


Place = Callable[[str, StoredWeight], None]
"""Puts the stored weight into the model under the given name of the model."""


def empty_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    positions: Positions | None = None,
) -> Any:
    """The model of the folder on the meta device; only buffers that no file holds are real.

    Args:
        path: a checked model folder.
        dtype: number format of its parameters.
        device: where such buffers (rotary frequencies, say) go.
        positions: how it reads more tokens than it was made for.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        config = library_config(path, positions)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise unloadable(path, error) from error
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
    model.initialize_weights()  # fills these buffers; on the meta device it does nothing
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model


def stream_weights(model: Any, path: Path, place: Place, later: Collection[str] = ()) -> None:
    """Hand every parameter and stored buffer of `model` to `place`, in the order of the files, and
    tie what the model ties.

    Args:
        model: from `empty_model`; its layers may have been replaced or sharded since, as long as
            the names of the stored weights stay.
        path: the same folder.
        place: puts a weight into the model, as `put` does.
        later: names that `place` only takes note of.

    Raises:
        ModelError: weights-missing, or one of another shape.
    """
    stored = read_tensors(path)
    names = stored_names(model, stored)
    found = [(name, StoredWeight(old, stored[old])) for name, old in names.items()]
    for name, weight in sorted(found, key=lambda one: (one[1].info.file.name, one[1].info.begin)):
        place(name, weight)
    missing = set(model.state_dict()) - set(names)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    missing = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    missing = {name for name in missing if not name.endswith(".scales")}  # of a packed weight
    missing -= set(later) & set(names)
    if missing:
        others = set(stored) - set(names.values())
        raise _stored_otherwise(path, missing, others) if others else weights_missing(path, missing)


def stored_names(model: Any, stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name in the model → name in the files, of all weights that both have.

    They differ by the model's own prefix at most (`transformer.h.0…` and `h.0…`).
    """
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in model.state_dict():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                names[name] = candidate
                break
    return names


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `model`.

    Raises:
        ModelError: it has another shape.
    """
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, last)
    require_shape(name, tensor.shape, old.shape)
    if last in module._buffers:
        module._buffers[last] = tensor
    else:
        setattr(module, last, nn.Parameter(tensor, requires_grad=old.requires_grad))


def require_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse a stored weight that does not fit the model's.

    Raises:
        ModelError: with both shapes.
    """
    if tuple(found) != tuple(wanted):
        raise ModelError(
            "model-wrong-shape",
            t("{name} has shape {found}; config.json says {wanted}", name=name, found=list(found),
              wanted=list(wanted)),
            fix=t("download the model again"),
        )  # fmt: skip


def unloadable(path: Path, error: Exception) -> ModelError:
    """The error for a folder that transformers can't make a model of."""
    return ModelError(
        "model-unloadable",
        t("transformers can't load the model in {path}", path=path),
        why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
        fix=t("check config.json, or update transformers"),
    )


def _stored_otherwise(path: Path, names: set[str], others: set[str]) -> ModelError:
    """The error for an architecture whose files need more than reading, as mixtures of experts."""
    return ModelError(
        "weights-stored-otherwise",
        t("the files in {path} hold other weights than the model computes with", path=path),
        where=min(names),
        why=t("instead there is {name}; such models can only be loaded whole", name=min(others)),
        fix="--quantize none",
    )


def weights_missing(path: Path, names: set[str]) -> ModelError:
    """The error for a folder whose files lack weights of the model."""
    return ModelError(
        "weights-missing",
        t("{n} weights of the model are not in {path}", n=len(names), path=path),
        where=min(names),
        why=t("they would be random numbers"),
        fix=t("get the model again: chatfine download NAME"),
    )
