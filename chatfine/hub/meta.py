"""Meta's .pth files → a Hugging Face folder: weights, config.json and generation_config.json.

Streaming: one tensor at a time goes from memory-mapped .pth files into safetensors, in the child of
pth_process.py. The way back is in to_meta.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.catalog import RECORD
from chatfine.hub.headers import read_json
from chatfine.hub.llama import llama_config
from chatfine.hub.meta_layout import (
    Family,
    Joined,
    check_params,
    family_of,
    plan_join,
    read_shape,
)
from chatfine.hub.place import check_disk
from chatfine.hub.pth_process import PthProcess, check_pth
from chatfine.hub.shards import write_json
from chatfine.i18n import t

Progress = Callable[[int, int], None]

FACTS = "chatfine.json"
"""File in a Meta folder written here: what config.json says and params.json can't."""
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class MetaFolder:
    """A folder in Meta's layout. No weight has been opened."""

    path: Path
    params: dict[str, Any]
    shards: tuple[Path, ...]
    family: Family
    facts: dict[str, Any]
    """what our own way back recorded; empty for a folder from elsewhere"""

    names: str
    """what the folder, the one around it and our record of the download call it"""

    @property
    def is_chat(self) -> bool:
        """Whether its name says that this model was taught to answer."""
        return bool(re.search(r"chat|instruct", self.names))


def find_meta_folder(path: Path) -> Path | None:
    """The folder with params.json and consolidated.NN.pth: `path`, or the only one inside it.

    Raises:
        ModelError: meta-several, when it holds several models.
    """
    if not path.is_dir():
        return None
    if any(path.glob("consolidated.*.pth")):
        return path
    inside = sorted(item for item in path.iterdir() if any(item.glob("consolidated.*.pth")))
    if len(inside) > 1:
        raise ModelError(
            "meta-several", t("{path} holds several models", path=path), where=str(path),
            fix=t("name one: {names}", names=", ".join(map(str, inside))),
        )  # fmt: skip
    return inside[0] if inside else None


def read_meta_folder(path: Path) -> MetaFolder:
    """Read and check a Meta folder: params.json and the archives' lists of contents; no pickle.

    Raises:
        ModelError: meta-no-params, meta-bad-params, meta-missing-shard, meta-unsupported,
            model-lfs-pointer, pth-damaged.
    """
    numbered = {int(m[1]): f for f in path.iterdir() if (m := _SHARD.fullmatch(f.name))}
    missing = sorted(set(range(max(numbered) + 1)) - set(numbered)) if numbered else [0]
    if missing:
        raise ModelError(
            "meta-missing-shard",
            t("{n} of the weight files are missing: {files}", n=len(missing),
              files=", ".join(f"consolidated.{number:02}.pth" for number in missing[:3])),
            where=str(path), fix=t("copy or download all of them into this folder"),
        )  # fmt: skip
    if not (path / "params.json").is_file():
        raise ModelError(
            "meta-no-params", t("there is no params.json in {path}", path=path), where=str(path),
            fix=t("copy it there: it comes with consolidated.00.pth"),
        )  # fmt: skip
    params = check_params(path, read_json(path / "params.json", "meta-bad-params"))
    shards = tuple(numbered[number] for number in sorted(numbered))
    for shard in shards:
        check_pth(shard)
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    place = path.absolute()
    names = f"{record.get('name', '')} {place.parent.name} {place.name}".lower()
    facts = read_json(path / FACTS) if (path / FACTS).is_file() else {}
    kept = facts.get("config", {}) if facts.get("kind") == "meta" else {}
    return MetaFolder(path, params, shards, family_of(names, params), kept, names)


def meta_to_folder(
    meta: MetaFolder,
    output: Path,
    dtype: str = "",
    context: int = 0,
    ids: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write weights, config.json and generation_config.json of a Meta folder into `output`.

    Args:
        dtype: number format as safetensors spells it ("BF16"); "" = each tensor's own.
        context: longest sequence in tokens; 0 = by the model's family.
        ids: `bos_token_id` and so on for both configs.
        progress: receives (bytes written, bytes in all).

    Raises:
        ModelError: pth-unsafe, pth-damaged, meta-… (what does not fit), model-not-finite.
        ResourceError: disk-full, no-memory.
    """
    facts = meta.facts
    context = context or facts.get("max_position_embeddings") or meta.family.context
    with PthProcess() as child:
        answer = child.ask({"op": "open", "files": [str(file.absolute()) for file in meta.shards]})
        listings = [
            {name: (kind, tuple(size)) for name, (kind, size) in tensors.items()}
            for tensors in answer["tensors"]
        ]
        ends = [listings[0].get(name) for name in ("tok_embeddings.weight", "output.weight")]
        tied = ends[1] is None
        if ends[0] == ends[1] and ends[0] is not None:
            names = ["tok_embeddings.weight", "output.weight"]
            tied = bool(child.ask({"op": "same", "names": names})["same"])
        shape = read_shape(meta.path, meta.params, listings, context, tied)
        plan = plan_join(meta.path, shape, listings, dtype)
        total = sum(item.numel * ITEM_BYTES[item.dtype] for item in plan)
        check_disk(output, total)
        request = {"op": "join", "folder": str(output.absolute()),
                   "tensors": [asdict(item) for item in plan]}  # fmt: skip
        child.ask(request, counter(progress, total))
    config = llama_config(shape, _main_dtype(plan)) | dict(ids or {})
    if facts.get("rope_scaling"):  # its factor is not in params.json
        config["rope_scaling"] = facts["rope_scaling"]
        config["rope_parameters"] |= facts["rope_scaling"]
    config |= {name: facts[name] for name in facts if name.endswith("_token_id")}
    write_json(output / "config.json", config)
    chosen = {name: config[name] for name in config if name.endswith("_token_id")}
    write_json(output / "generation_config.json", {"_from_model_config": True, **chosen})


def _main_dtype(plan: list[Joined]) -> str:
    """The number format of most numbers, as torch spells it."""
    counts: dict[str, int] = {}
    for item in plan:
        counts[item.dtype] = counts.get(item.dtype, 0) + item.numel
    return _TORCH_NAMES[max(counts, key=lambda name: counts[name])]


def counter(progress: Progress, total: int) -> Callable[[int], None]:
    """A function that adds up bytes and passes them on to `progress`."""
    done = 0

    def count(change: int) -> None:
        nonlocal done
        done += change
        progress(done, total)

    return count
