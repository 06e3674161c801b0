"""A run's checkpoint → an ordinary model folder, also of a run that was sharded or never ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from chatfine.errors import OutputError
from chatfine.hub.folder import ModelFolder
from chatfine.hub.shards import Planned, write_json, write_shards
from chatfine.i18n import t
from chatfine.model.stream import DTYPES, StoredWeight
from chatfine.train.checkpoint import Checkpoint, CheckpointStore


def run_to_folder(run: Path, base: ModelFolder, output: Path, dtype: str = "") -> int:
    """Write the best weights of the full or freeze run in `run` into the folder `output`.

    One tensor is in memory at a time. What did not learn comes from the base model.

    Args:
        run: run folder with at least one valid checkpoint.
        base: the model that the run began with.
        output: an empty folder; gets the weights and config.json.
        dtype: number format as safetensors spells it (BF16); "" = the base's own.

    Returns:
        The optimizer step that the weights are of.

    Raises:
        OutputError: no valid checkpoint there.
    """
    checkpoint = _best(run)
    learned = set(checkpoint.names("weights"))
    names = {name: _learned_name(name, learned) for name in base.tensors}

    def format_of(name: str) -> str:
        own = base.tensors[name].dtype
        return dtype if dtype and DTYPES[own].is_floating_point else own

    def value(name: str) -> object:
        source = names[name]
        if source:
            tensor = checkpoint.tensors("weights", names=(source,))[source]
        else:
            tensor = StoredWeight(name, base.tensors[name]).read()
        return tensor.to(DTYPES[format_of(name)]).contiguous().view(torch.uint8).numpy()

    planned = [Planned(name, format_of(name), base.tensors[name].shape) for name in base.tensors]
    write_shards(output, planned, value)
    write_json(output / "config.json", base.config)
    if (base.path / "generation_config.json").is_file():
        shutil.copyfile(base.path / "generation_config.json", output / "generation_config.json")
    return checkpoint.step


def _learned_name(name: str, learned: set[str]) -> str:
    """The name in a checkpoint of a stored weight; "" if it did not learn."""
    without = name.partition(".")[2]
    return next((one for one in (name, without, f"model.{name}") if one in learned), "")


def _best(run: Path) -> Checkpoint:
    store = CheckpointStore(run / "checkpoints")
    newest, skipped = store.newest()
    if newest is None:
        raise OutputError(
            "no-checkpoint",
            t("there is no valid checkpoint in {path}", path=run),
            why="\n".join(f"{name}: {fault}" for name, fault in skipped) or None,
            fix=f"chatfine resume {run}",
        )
    best = newest.state.get("best_step")
    return (store.at(int(best)) if best else None) or newest
