"""Weights → safetensors files of a model folder, one tensor at a time in memory.

Written by hand: the library's own writer wants all tensors of a file at once, its numpy form has no
bf16, and torch would cost seconds. The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from chatfine.hub.headers import INDEX, ITEM_BITS

SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written: its name, its format as safetensors spells it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * ITEM_BITS[self.dtype] // 8


def write_shards(folder: Path, planned: Sequence[Planned], values: Callable[[str], Any]) -> int:
    """Write model.safetensors, or several files of at most about SHARD_BYTES and their index.

    Args:
        planned: every tensor, in the order of the files.
        values: name → the tensor's bytes (an object with the buffer interface), little endian.

    Returns:
        Bytes of all tensors.
    """
    shards = list(_shards(planned))
    total = sum(tensor.bytes for tensor in planned)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], values)
        return total
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, values)
        placed |= {tensor.name: name for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def _shards(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in planned:
        if shard and sum(item.bytes for item in shard) + tensor.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_file(file: Path, tensors: Sequence[Planned], values: Callable[[str], Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        offset += tensor.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            written = stream.write(values(tensor.name))
            if written != tensor.bytes:
                raise AssertionError(f"{tensor.name}: {written} bytes, planned {tensor.bytes}")
        stream.flush()
        os.fsync(stream.fileno())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON object in UTF-8, the same bytes on every system."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
