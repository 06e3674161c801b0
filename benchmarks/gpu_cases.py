"""What gpu.py measures: each case is one kind of work, done by chatfine and by its peers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

OURS = "chatfine"
SYSTEMS = {
    OURS: "chatfine",
    "trl": "TRL",
    "trl-liger": "TRL + Liger",
    "unsloth": "Unsloth",
    "by-hand": "transformers + PEFT by hand",
}
"""Key → name in the table."""


@dataclass(frozen=True)
class Run:
    """One system's settings for a case.

    Attributes:
        system: key of SYSTEMS.
        weights: how frozen weights are stored (bf16, fp8, int8, nf4); with full fine-tuning the
            format of those that learn (fp32: products in bf16).
        batch: rows of a micro-batch; a step has one.
        checkpointing: of a peer; chatfine decides by itself unless `flags` say so.
        packing: of TRL and Unsloth; chatfine always packs.
        flags: more words for `chatfine train`.
        again: right after the run before it and on the same card, whose caches it finds.
        times: measure so many times the usual steps, where steps are short and unequal.
        thorough: only with --all.
    """

    system: str
    weights: str = "bf16"
    batch: int = 4
    checkpointing: bool = False
    packing: bool = False
    flags: tuple[str, ...] = ()
    again: bool = False
    times: int = 1
    note: str = ""
    thorough: bool = False


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        shape: of `inputs.SHAPES`.
        method: lora (rank 16 on all linears, no dropout) or full.
        data: rows (full ones, all trained on) or dialog (short ones of many lengths, answers).
        length: tokens of a row, and the longest dialogue.
        warm_up: steps that are not counted; in our fourth a graph is recorded.
        steps: steps that are, where --steps would be too many; 0 = --steps.
        extra: only if --only names it.
    """

    name: str
    title: str
    shape: str
    method: str
    data: str
    length: int
    runs: tuple[Run, ...]
    warm_up: int = 4
    steps: int = 0
    extra: bool = False


def small(batch: int, weights: str) -> tuple[Run, ...]:
    """Everybody on a model for which memory is no question; all weights also by fp8 products."""
    fp8 = Run(OURS, weights, batch, flags=("--fp8-products", "on"), note="fp8 products")
    return (
        Run(OURS, weights, batch),
        *([fp8] if weights == "fp32" else []),
        Run("trl", weights, batch, thorough=True),
        Run("trl-liger", weights, batch),
        Run("unsloth", weights, batch),
        Run("by-hand", weights, batch, thorough=True),
    )


ROWS = "every token of full 2,048-token rows"
CASES = (
    Case("7b-lora-rows", f"7B, LoRA, {ROWS}", "7b", "lora", "rows", 2048, (
        Run(OURS, "fp8"),
        Run(OURS, "fp8", again=True, note="started again"),
        Run(OURS, "bf16"),
        Run("trl", "bf16"),
        Run("trl-liger", "bf16"),
        Run("unsloth", "bf16"),
        Run("by-hand", "bf16"),
    )),
    Case("7b-lora-dialog", "7B, LoRA, answers of short dialogues", "7b", "lora", "dialog", 2048, (
        Run(OURS, "fp8"),
        Run(OURS, "bf16", thorough=True),
        # a padded batch of 8 can be as long as 8 full rows, which does not fit
        Run("trl", "bf16", times=4, thorough=True),
        Run("trl-liger", "bf16", times=4),
        Run("trl-liger", "bf16", packing=True),
        Run("unsloth", "bf16", 16, times=2),
        Run("unsloth", "bf16", packing=True),
        Run("by-hand", "bf16", times=4, thorough=True),
    )),
    Case("7b-lora-24gb", f"7B, LoRA, {ROWS}, a card of 24 GB", "7b", "lora", "rows", 2048, (
        Run(OURS, "nf4", 2, flags=("--accumulate", "2", "--gpu-memory", "24"),
            note="--gpu-memory 24"),
        Run(OURS, "fp8", 2, flags=("--accumulate", "2", "--gpu-memory", "24"),
            note="--gpu-memory 24"),
        Run(OURS, "nf4", flags=("--gpu-memory", "24"), note="--gpu-memory 24", thorough=True),
        Run(OURS, "nf4", flags=("--gpu-memory", "12"), note="--gpu-memory 12"),
        Run("trl", "nf4", 8, checkpointing=True),
        Run("trl-liger", "nf4", 8, checkpointing=True),
        Run("unsloth", "nf4", 8, checkpointing=True),
        Run("trl-liger", "bf16", 8, checkpointing=True),
        Run("trl", "bf16", 8, checkpointing=True, thorough=True),
        Run("unsloth", "bf16", 8, checkpointing=True, thorough=True),
    )),
    Case("1b-lora-rows", f"1B, LoRA, {ROWS}", "1b", "lora", "rows", 2048,
         (Run(OURS, "fp8"), *small(4, "bf16"))),
    Case("1b-full-rows", f"1B, all weights, {ROWS}", "1b", "full", "rows", 2048, small(4, "fp32")),
    Case("135m-lora-rows", f"135M, LoRA, {ROWS}", "135m", "lora", "rows", 2048, small(8, "bf16")),
    Case("135m-full-rows", f"135M, all weights, {ROWS}", "135m", "full", "rows", 2048,
         small(8, "fp32")),
    Case("7b-lora-64k", "7B, LoRA, one row of 65,536 tokens", "7b", "lora", "rows", 65536, (
        Run(OURS, "nf4", 1, flags=("--gpu-memory", "24", "--rope-scaling", "linear"),
            note="--gpu-memory 24"),
        Run("unsloth", "nf4", 1, checkpointing=True),
    ), warm_up=1, steps=2),
    Case("tiny-lora-rows", "a tiny model, LoRA, to try this script", "tiny", "lora", "rows", 64, (
        Run(OURS, "bf16", 2, flags=("--dtype", "fp32")),
        Run("trl", "bf16", 2),
        Run("by-hand", "bf16", 2),
    ), extra=True),
    Case("tiny-lora-dialog", "a tiny model, dialogues", "tiny", "lora", "dialog", 256, (
        Run(OURS, "bf16", 2, flags=("--dtype", "fp32")),
        Run("trl", "bf16", 2),
        Run("trl", "bf16", 2, packing=True),
        Run("by-hand", "bf16", 2),
    ), extra=True),
    Case("tiny-full-rows", "a tiny model, all weights", "tiny", "full", "rows", 64, (
        Run(OURS, "fp32", 2, flags=("--dtype", "fp32")),
        Run("trl", "fp32", 2),
        Run("by-hand", "fp32", 2),
    ), extra=True),
)  # fmt: skip


def choose(
    only: str, systems: Collection[str], everything: bool = False, weights: Collection[str] = ()
) -> list[tuple[Case, Sequence[Run]]]:
    """The cases whose name has the pattern `only`, with the runs of the systems and weights asked
    for; no weights are all."""
    chosen = []
    for case in CASES:
        if not re.search(only, case.name) or (case.extra and not only):
            continue
        runs = [
            run
            for run in case.runs
            if run.system in systems
            and (everything or not run.thorough)
            and (not weights or run.weights in weights)
        ]
        if runs:
            chosen.append((case, runs))
    return chosen
