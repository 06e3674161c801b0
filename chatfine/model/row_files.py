"""The files of a model with longer matrices: copied as bytes, one tensor at a time in memory.

A matrix that grows gets its new rows after the old ones (safetensors store rows one after the
other).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatfine.hub.folder import ModelFolder
from chatfine.hub.shards import Planned, write_shards

Growth = Mapping[str, tuple[int, torch.Tensor]]
"""Name of a matrix → how many of its rows stay, and the rows that come after them."""


def plan_weights(model: ModelFolder, growth: Growth) -> list[Planned]:
    """The tensors of the grown model, in the order of the model's files."""
    order = sorted(model.tensors.items(), key=lambda pair: (pair[1].file.name, pair[1].begin))
    planned = []
    for name, info in order:
        shape = info.shape
        if name in growth:
            keep, tail = growth[name]
            shape = (keep + len(tail), *shape[1:])
        planned.append(Planned(name, info.dtype, shape))
    return planned


def write_weights(model: ModelFolder, folder: Path, growth: Growth) -> None:
    """Write the weights of `model` into `folder`, with `growth` applied."""

    def values(name: str) -> Any:
        info = model.tensors[name]
        size = info.bytes
        if name in growth:
            size = size // info.shape[0] * growth[name][0]
        old = np.fromfile(info.file, np.uint8, size, offset=info.begin)
        if name not in growth:
            return old
        tail = growth[name][1].contiguous().view(torch.uint8).numpy()
        return np.concatenate([old, tail.reshape(-1)])

    write_shards(folder, plan_weights(model, growth), values)
