"""What lies where in safetensors files: headers parsed by hand, so nothing else has to be imported.

A header is 8 bytes of length (little endian) and that much JSON: name → dtype, shape and byte range
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.lfs import LFS_POINTER, is_pointer, pointer_fixes, pointer_why
from chatfine.i18n import t

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `file[begin:end]`, absolute byte offsets."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_json(path: Path, code: str = "model-bad-config") -> dict[str, Any]:
    """An object from a JSON file of a model or adapter folder."""
    raw = path.read_bytes()
    if raw.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            code, t("{file} is not valid JSON", file=path.name), where=str(path), why=str(error),
            fix=t("download the model again"),
        ) from None  # fmt: skip
    if not isinstance(value, dict):
        raise ModelError(
            code, t("{file} must hold a JSON object", file=path.name), where=str(path),
            fix=t("download the model again"),
        )  # fmt: skip
    return value


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's model.safetensors, or of the shards its index names."""
    if not (path / INDEX).is_file():
        single = path / "model.safetensors"
        if single.is_file():
            return read_header(single)
        shards = sorted(item.name for item in path.glob("*.safetensors"))
        if shards:
            raise ModelError(
                "model-missing-shard",
                t("{index} is missing, so the shards can't be put together", index=INDEX),
                where=str(path), fix=t("download the model again"),
            )  # fmt: skip
        raise ModelError(
            "model-no-weights", t("there are no weights (*.safetensors) in {path}", path=path),
            where=str(path), fix=t("see the names: {command}", command="chatfine models"),
        )  # fmt: skip
    placed = read_json(path / INDEX, "model-bad-weights").get("weight_map")
    if not isinstance(placed, dict) or not all(_plain_name(file) for file in placed.values()):
        raise _bad_weights(path / INDEX, t("its weight_map must name files of the same folder"))
    missing = sorted({file for file in placed.values() if not (path / file).is_file()})
    if missing:
        raise ModelError(
            "model-missing-shard",
            t("{n} of {total} weight files are missing: {files}", n=len(missing),
              total=len(set(placed.values())), files=", ".join(missing[:5])),
            where=str(path), fix=t("download the model again; files that are there are kept"),
        )  # fmt: skip
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(placed.values())):
        tensors.update(read_header(path / file))
    for name, file in placed.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(
                "model-missing-tensor", t("{file} has no tensor {name}", file=file, name=name),
                where=str(path / INDEX), fix=t("download the model again"),
            )  # fmt: skip
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse the header of one safetensors file and hold it against the file's size."""
    size = file.stat().st_size
    if is_pointer(file):
        raise lfs_pointer(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > MAX_HEADER_BYTES or length > size - 8:
            raise _truncated(file, size, 8 + min(length, MAX_HEADER_BYTES))
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(
                file, entry["dtype"], tuple(map(int, entry["shape"])),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _bad_weights(file, t("its header can't be read")) from None
    for name, info in tensors.items():
        bits = ITEM_BITS.get(info.dtype, 0) * info.numel
        if min(info.shape, default=0) < 0 or not 8 + length <= info.begin <= info.end:
            raise _bad_weights(file, t("tensor {name} has an impossible place", name=name))
        if bits and bits != 8 * info.bytes:
            raise _bad_weights(file, t("tensor {name} has {n} bytes; its shape needs {needed}",
                                       name=name, n=info.bytes, needed=bits // 8))  # fmt: skip
    needed = max((info.end for info in tensors.values()), default=0)
    if needed > size:
        raise _truncated(file, size, needed)
    return tensors


def _bad_weights(file: Path, why: str) -> ModelError:
    return ModelError(
        "model-bad-weights", t("{file} is damaged", file=file.name), where=str(file), why=why,
        fix=t("download the model again"),
    )  # fmt: skip


def _truncated(file: Path, size: int, needed: int) -> ModelError:
    return ModelError(
        "model-truncated", t("{file} is cut short or is not a safetensors file", file=file.name),
        where=str(file),
        why=t("it has {size} of at least {needed} bytes", size=size, needed=needed),
        fix=t("download the model again"),
    )  # fmt: skip


def lfs_pointer(file: Path) -> ModelError:
    """The error for a pointer in a model folder."""
    return ModelError(
        "model-lfs-pointer",
        t("{file} is a git-lfs pointer, not the file itself", file=file.name),
        where=str(file), why=pointer_why(),
        fix=pointer_fixes(file.parent, "chatfine download NAME"),
    )  # fmt: skip


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\\" not in name
