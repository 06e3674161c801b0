"""What a merge is measured by: logits of base + adapter, and of the merged weights.

An adapter that was trained on a quantised base (`chatfine.json` says so) fits that base's rounding
errors too. Adding it to the exact weights takes the errors away and leaves what the adapter did
about them; adding it to the rounded weights keeps both. Which of the two comes closer to what was
trained is measured, not supposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatfine import console
from chatfine.errors import ProofError
from chatfine.export.adapter import find_parameter
from chatfine.export.merge_weights import Merging, Rounded, changed
from chatfine.hub.rounded import CALIBRATED, FILE, beside
from chatfine.i18n import t
from chatfine.model import learned_rows, lora
from chatfine.model.adapters import load_adapter
from chatfine.model.load import load_model, packed_names

NONE = "none"
Logits = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """What an adapter of a quantised base was added to, and why."""

    storage: str
    """int8 or nf4: how the base was stored in training"""
    added_to: str
    """full or dequantized: the weights that came closer"""
    gap_full: float
    """largest difference of logits to base + adapter as trained, if added to the full weights"""
    gap_dequantized: float
    """the same, if added to the weights as the quantised base held them"""


def choose(job: Merging, prompts: Sequence[Sequence[int]]) -> Choice | None:
    """Decide by measurement what an adapter of a quantised base is added to, and set `job.rounded`.

    One model at a time is in memory. In float32, before any rounding to the output's format.

    Returns:
        None for an adapter that was trained on the exact weights.
    """
    storage = str(job.adapter.facts.get("quantize") or NONE)
    if storage == NONE:
        return None
    file = kept_base(job)
    if job.adapter.facts.get(CALIBRATED) and file is None:
        console.warn(
            t("the weights it was trained on, {file}, are not here; it is added to the exact "
              "ones", file=FILE)
        )  # fmt: skip
        return None
    trained = tuned_logits(job, prompts, storage)
    rounded = Rounded(storage, packed_names(job.base.path), file)
    gaps = []
    for job.rounded in (None, rounded):
        gaps.append(largest_gap(trained, logits_of(merged_model(job), prompts)))
    full = gaps[0] <= gaps[1]
    job.rounded = None if full else rounded
    return Choice(storage, "full" if full else "dequantized", *gaps)


def kept_base(job: Merging) -> Path | None:
    """The file with the weights that the adapter was trained on, if they were rounded to texts and
    the base is still the one that they were rounded from."""
    facts = job.adapter.facts
    fitting = facts.get(CALIBRATED) and facts.get("base_digest") == job.base.digest()
    return beside(job.adapter.path) if fitting else None


def tuned_logits(job: Merging, prompts: Sequence[Sequence[int]], storage: str) -> Logits:
    """Logits of base + adapter as PEFT computes them, the base stored as `storage` says."""
    rounded = kept_base(job) if storage != NONE else None
    base = load_model(
        job.base.path, torch.float32, quantize=storage, positions=job.positions, rounded=rounded
    )
    tuned = load_adapter(base, job.adapter.path)
    lora.uninstall(tuned)  # PEFT's own forward is the judge, not our faster one
    learned_rows.uninstall(tuned)
    return logits_of(tuned, prompts)


@torch.inference_mode()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> Logits:
    """Logits (T, V) at all positions of each prompt, one after the other, so without padding."""
    rows = (torch.tensor([list(ids)]) for ids in prompts)
    return [model(input_ids=row, use_cache=False).logits[0] for row in rows]


def largest_gap(these: Logits, those: Logits) -> float:
    """The largest difference of two sets of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))


def merged_model(job: Merging) -> Any:
    """The base in memory with its changed weights in float32, as the files will hold them before
    rounding.

    Raises:
        ProofError: a weight that the model in memory has not by this name.
    """
    model = load_model(job.base.path, torch.float32, positions=job.positions)
    if job.untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rounded = job.rounded.names.keys() if job.rounded is not None else set()
    for name in sorted(job.changes.keys() | rounded):
        found = find_parameter(name, parameters)
        if found is None:
            raise ProofError(
                "proof-names",
                t("the loaded model has no parameter {name}", name=name),
                why=t("transformers names this architecture's weights otherwise than its files do"),
                fix=t("talk with it unmerged: {command}",
                      command=f"chatfine chat {job.adapter.path}"),
            )  # fmt: skip
        weight = parameters[found]
        if job.rounded is not None:
            weight.data = job.rounded.of(name, weight.data)
        if name in job.changes:
            weight.data = changed(weight.data, job.changes[name], job.tensors)
    return model
