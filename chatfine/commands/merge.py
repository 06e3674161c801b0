"""`chatfine merge`: a run or adapter becomes an ordinary model folder, with proof."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.commands.opened import Opened, open_source
from chatfine.config import MergeConfig
from chatfine.errors import ModelError
from chatfine.export.adapter import read_adapter
from chatfine.export.card import write_card
from chatfine.hub.catalog import lookup
from chatfine.hub.place import check_output
from chatfine.i18n import t
from chatfine.runtime import pick_dtype
from chatfine.types import Message

if TYPE_CHECKING:
    from chatfine.export.merge import MergeResult

PROOF_PROMPTS = 4


def merge(config: MergeConfig) -> dict[str, Any]:
    """Merge, prove, write a card.

    Returns:
        `output` and the fields of `export.merge.MergeResult`.

    Raises:
        Refused: no adapter there, one that can't be merged, a taken output folder; nothing written.
        ProofError: the merged model does not compute what base and adapter compute.
    """
    output = Path(config.output)
    opened = open_source(config.run, config.model)
    if opened.source.adapter is None:
        raise ModelError(
            "nothing-to-merge",
            t("{name} has no adapter: it is a whole model already", name=config.run),
            where=str(opened.source.model),
            fix=t("talk with it: {command}", command=f"chatfine chat {config.run}"),
        )
    read_adapter(opened.source.adapter)
    check_output(output, config.overwrite, (opened.source.model, opened.source.adapter))
    import torch

    from chatfine.export.merge import merge as merge_folders

    names = {"adapter": opened.source.adapter, "base": opened.source.model}
    console.say(t("merging {adapter} into {base} …", **names))
    dtype = None if config.dtype == "auto" else pick_dtype(config.dtype, torch.device("cpu"))
    result = merge_folders(
        opened.source.model, opened.source.adapter, output, dtype, proof_prompts(opened),
        overwrite=config.overwrite,
    )  # fmt: skip
    _write_card(opened, output, result)
    _show(output, result)
    return {"output": str(output)} | asdict(result)


def proof_prompts(opened: Opened) -> list[list[int]]:
    """Encoded dialogues for the proof: whole ones from the built-in test split, both languages."""
    from chatfine.data.examples import DataSettings, load_dialogues

    dialogues = load_dialogues("dialogs", DataSettings(), "test")[:PROOF_PROMPTS]
    tokenizer = opened.tokenizer
    system = [Message("system", opened.system)] if opened.system else []
    if not tokenizer.template:
        return [list(tokenizer.encode_plain(one.messages[-2].content).ids) for one in dialogues]
    return [list(tokenizer.encode_dialogue([*system, *one.messages]).ids) for one in dialogues]


def _write_card(opened: Opened, output: Path, result: MergeResult) -> None:
    facts = json.loads((output / "chatfine.json").read_text(encoding="utf-8"))
    entry = lookup(facts["base"]) if facts["base"] else None
    losses: dict[str, Any] = {}
    run = opened.source.run
    if run and (run / "result.json").is_file():
        losses = json.loads((run / "result.json").read_text(encoding="utf-8"))
    write_card(
        output,
        base=facts["base"],
        licence=entry.licence if entry else "",
        method=facts["method"],
        datasets=facts["datasets"],
        losses=losses,
        proof=asdict(result),
    )


def _show(output: Path, result: MergeResult) -> None:
    choice = result.quantized
    if choice is not None:
        weights = {"full": t("the exact weights"), "dequantized": t("the rounded weights")}
        console.say(
            t("trained on a base in {storage}; added to {weights}, which come closer to it: logits "
              "differ by {near:.2g} at most, with the others by {far:.2g}",
              storage=choice.storage, weights=weights[choice.added_to],
              near=min(choice.gap_full, choice.gap_dequantized),
              far=max(choice.gap_full, choice.gap_dequantized))
        )  # fmt: skip
    console.say(
        t("proved: logits of base + adapter and of the merged model differ by {gap:.1e} at most, "
          "before rounding", gap=result.gap)
    )  # fmt: skip
    console.say(
        t("rounding to {dtype}: difference {gap:.2g} at most; the likeliest token stays the same "
          "at {share:.1%} of {n} positions", dtype=result.dtype, gap=result.rounding_gap,
          share=result.top1_agreement, n=result.positions)
    )  # fmt: skip
    if result.untied:
        console.say(
            t("embedding and head shared one weight; the adapter changed them apart, so the merged "
              "model keeps two")
        )  # fmt: skip
    console.say(t("written: {path}", path=output))
    console.say(t("talk with it: {command}", command=f"chatfine chat {output}"), "bold")
