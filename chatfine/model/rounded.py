"""The packed linears of a model in a file of their own: what can't be rounded alike again.

Weights rounded to texts (`model.calibrate`) depend on these and, by a little, on the machine. A run
keeps them, so that going on, talking, merging and measuring all use the model that was trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chatfine.errors import ModelError
from chatfine.i18n import t
from chatfine.model.frozen import FrozenLinear, frozen_linears
from chatfine.model.storages import STORAGES


def write_rounded(model: Any, file: Path, made_of: str = "") -> None:
    """Write the codes and scales of all packed linears; the file is whole or not there. `made_of`
    tells which weights were rounded to which texts."""
    from safetensors.torch import save_file

    names = {module: name for name, module in model.named_modules()}
    tensors, storage = {}, ""
    for linear in frozen_linears(model):
        storage = linear.storage.name
        tensors[f"{names[linear]}.weight"] = linear.weight.detach().contiguous()
        tensors[f"{names[linear]}.scales"] = linear.scales.detach().contiguous()
    staged = file.with_name(f".{file.name}")
    save_file(tensors, staged, metadata={"format": "pt", "storage": storage, "made_of": made_of})
    staged.chmod(file.parent.stat().st_mode & 0o666)  # safetensors writes for its owner alone
    os.replace(staged, file)


def made_of(file: Path) -> str:
    """What `write_rounded` was told.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(str(file), framework="pt") as stream:
            return str((stream.metadata() or {}).get("made_of", ""))
    except (SafetensorError, OSError) as error:
        raise _unfit(file, str(error)) from None


def fill_rounded(packed: Mapping[str, FrozenLinear], file: Path, device: torch.device) -> None:
    """Fill empty packed linears from a file.

    Args:
        packed: name of each weight in the model → its layer.
        file: from `write_rounded`.
        device: where codes and scales go.

    Raises:
        ModelError: the file is damaged, or of another model or storage.
    """
    try:
        with safe_open(str(file), framework="pt") as stream:
            stored = (stream.metadata() or {}).get("storage")
            storage = STORAGES.get(str(stored))
            for name, linear in packed.items():
                both = (name, f"{name.removesuffix('weight')}scales")
                found = tuple(stream.get_tensor(one).to(device, copy=True) for one in both)
                alike = tuple(one.shape for one in found) == (
                    linear.weight.shape, linear.scales.shape
                )  # fmt: skip
                if storage is None or storage.layout != linear.storage.layout or not alike:
                    raise _unfit(file, t("it holds another model, or the model stored as {storage}",
                                         storage=stored))  # fmt: skip
                linear.storage = storage
                linear.take(found)
    except (SafetensorError, OSError) as error:
        raise _unfit(file, str(error)) from None


def read_rounded(file: Path, name: str, columns: int) -> torch.Tensor:
    """The rounded weight `name` (out, columns) of the model as float32 numbers."""
    with safe_open(str(file), framework="pt") as stream:
        storage = STORAGES[stream.metadata()["storage"]]
        scales = stream.get_tensor(f"{name.removesuffix('weight')}scales")
        return storage.unpack((stream.get_tensor(name), scales), columns, torch.float32)


def _unfit(file: Path, why: str) -> ModelError:
    return ModelError(
        "rounded-unfit",
        t("the rounded weights in {file} can't be used", file=file.name),
        where=str(file),
        why=why,
        fix=t("delete the file: they are rounded again where the run goes on"),
    )
