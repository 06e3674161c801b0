"""The only program that opens a .pth, run by pth_process.py as a child without secrets.

A .pth is a pickle, which can run any program while it is read. So it is opened with `weights_only`,
which builds nothing but tensors, and in a process that has nothing to give away. One JSON object a
line comes on stdin and is answered on stdout: {"op": "open" | "same" | "join" | "save", …} by
{"error": …, "about": …} or the result, after any number of {"bytes": n} that tell progress.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine.hub.shards import Planned, write_shards

if TYPE_CHECKING:
    import torch

Request = dict[str, Any]
Say = Callable[[dict[str, Any]], None]


class Refusal(Exception):
    """What the parent has to tell: a short code, and the thing it is about."""

    def __init__(self, code: str, about: str) -> None:
        super().__init__(code)
        self.code, self.about = code, about


class Checkpoint:
    """The files of one checkpoint, memory mapped.

    Pages that were read count as memory in use, so the files are mapped anew after half of the
    largest one was read: that, and a few copies of one tensor, is all that is ever in memory.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._budget = max(file.stat().st_size for file in files) // 2
        self._map()

    def _map(self) -> None:
        self.shards: list[dict[str, torch.Tensor]] = []  # the old mapping goes first
        self.shards = [_load(file) for file in self.files]
        self._read_bytes = 0

    def pieces(self, name: str) -> list[torch.Tensor]:
        """The tensor `name` of every file, in their order."""
        if self._read_bytes > self._budget:
            self._map()
        found = [shard[name] for shard in self.shards]
        self._read_bytes += sum(piece.nbytes for piece in found)
        return found


def _load(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        wanted = re.search(r"GLOBAL (\S+)", text)
        about = f"{file.name}\n{wanted[1] if wanted else text.strip()[:200]}"
        raise Refusal("unsafe" if wanted else "damaged", about) from None
    except Exception as error:  # torch raises whatever the damage leads to
        raise Refusal("damaged", f"{file.name}\n{str(error)[:200]}") from None
    if not isinstance(tensors, dict):
        raise Refusal("damaged", f"{file.name}\nit is not a table of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refusal("damaged", f"{file.name}\nit is not a table of tensors")
        # a stride of 0 makes a tensor of any size out of one number
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Refusal("damaged", f"{file.name}\n{name} has more numbers than the file")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def formats() -> dict[str, torch.dtype]:
    """Number formats as safetensors spells them → torch's."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads·d, columns) of wq or wk from Meta's order to Hugging Face's.

    Meta keeps the two numbers that are rotated together side by side, Hugging Face half a head
    apart.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back from `pairs_to_halves`."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def describe(checkpoint: Checkpoint) -> Request:
    """Name → [format, shape] of the tensors of each file."""
    spelled = {dtype: code for code, dtype in formats().items()}
    return {
        "tensors": [
            {
                name: [spelled.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)]
                for name, tensor in shard.items()
            }
            for shard in checkpoint.shards
        ]
    }


def same(checkpoint: Checkpoint, names: list[str]) -> Request:
    """Whether two tensors hold equal numbers in every file."""
    import torch

    one, other = (checkpoint.pieces(name) for name in names)
    return {"same": all(torch.equal(a, b) for a, b in zip(one, other, strict=True))}


def join(checkpoint: Checkpoint, request: Request, say: Say) -> Request:
    """Write the safetensors files of the request's folder, each tensor put together and cast."""
    import torch

    items = {item["name"]: item for item in request["tensors"]}

    def value(name: str) -> Any:
        item = items[name]
        pieces = checkpoint.pieces(item["source"])
        tensor = pieces[0] if item["axis"] is None else torch.cat(pieces, item["axis"])
        if item["heads"]:
            tensor = pairs_to_halves(tensor, item["heads"])
        tensor = _cast(tensor, item)
        say({"bytes": tensor.nbytes})
        return tensor.contiguous().view(torch.uint8).flatten().numpy().data

    planned = [Planned(item["name"], item["dtype"], tuple(item["shape"]))
               for item in request["tensors"]]  # fmt: skip
    return {"bytes_written": write_shards(Path(request["folder"]), planned, value)}


def save(request: Request, say: Say) -> Request:
    """Write one .pth out of slices of safetensors files; one such file is in memory at a time."""
    import torch
    from safetensors import safe_open

    tensors = {}
    for item in request["tensors"]:
        with safe_open(item["file"], framework="pt") as stream:
            part = stream.get_slice(item["source"])
            begin, end = item["begin"], item["end"]
            found = part[:, begin:end] if item["axis"] == 1 else part[begin:end]
            if item["heads"]:
                found = halves_to_pairs(found, item["heads"])
            tensors[item["name"]] = _cast(found, item).clone().contiguous()
        say({"bytes": tensors[item["name"]].nbytes})
    with open(request["file"], "wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return {}


def _cast(tensor: torch.Tensor, item: Request) -> torch.Tensor:
    import torch

    tensor = tensor.to(formats()[item["dtype"]])
    if not torch.isfinite(tensor).all():
        raise Refusal("not-finite", item["source"])
    return tensor


def serve(say: Say) -> None:
    """Answer requests until stdin ends."""
    checkpoint: Checkpoint | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "open":
                checkpoint = Checkpoint([Path(file) for file in request["files"]])
                answer = describe(checkpoint)
            elif request["op"] == "save":
                answer = save(request, say)
            else:
                assert checkpoint is not None
                if request["op"] == "same":
                    answer = same(checkpoint, request["names"])
                else:
                    answer = join(checkpoint, request, say)
        except Refusal as refusal:
            answer = {"error": refusal.code, "about": refusal.about}
        except MemoryError:
            answer = {"error": "memory", "about": ""}
        except OSError as error:
            answer = {"error": "disk", "about": str(error), "errno": error.errno}
        say({"answer": answer})


def main() -> None:
    """Keep stdout for the answers: what a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    serve(say)


if __name__ == "__main__":
    main()
