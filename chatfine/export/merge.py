"""Base + adapter → an ordinary model folder, written shard by shard and proved (contract C6).

One model at most is in memory at a time, and only for the proof. The proof has three links: logits
of base + adapter as PEFT computes them equal those of the weights merged in float32; the folder
that was written, loaded again, holds exactly these weights rounded; what the rounding costs is
measured.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chatfine import __version__
from chatfine.errors import ProofError
from chatfine.export.adapter import FACTS, find_parameter, read_adapter
from chatfine.export.merge_logits import (
    Choice,
    choose,
    largest_gap,
    logits_of,
    merged_model,
    tuned_logits,
)
from chatfine.export.merge_weights import HEAD, Merging, write_json
from chatfine.hub.folder import read_model_folder
from chatfine.hub.place import check_disk, check_output, put_in_place
from chatfine.i18n import t
from chatfine.model.load import load_model
from chatfine.model.positions import of_adapter
from chatfine.tokenizer.encode import ChatTokenizer

MAX_GAP = 1e-3
"""Largest allowed difference of logits (sizes up to about 40) in float32."""
PROOF_TOKENS = 256
"""So much of each prompt is read for the proof."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What the proof measured: logits over all positions of all prompts."""

    dtype: str
    gap: float
    """largest difference between base + adapter and the merged weights before rounding"""
    rounding_gap: float
    """largest difference that rounding to `dtype` makes"""
    top1_agreement: float
    """share of positions whose likeliest token is the same after rounding"""
    positions: int
    changed: int
    """parameters that the adapter changed"""
    untied: bool
    """whether the head had to get a weight of its own"""
    quantized: Choice | None = None
    """for an adapter trained on a quantised base: what it was added to"""


def merge(
    model: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype | None,
    prompts: Sequence[Sequence[int]],
    overwrite: bool = False,
) -> MergeResult:
    """Write `model` with `adapter` merged in as the model folder `output`, with proof.

    Args:
        model: folder of the base.
        adapter: PEFT folder (LoRA or DoRA).
        output: folder to write; it appears whole after the proof, or not at all.
        dtype: number format of the weights; None keeps the base's, tensor by tensor.
        prompts: token ids of real prompts for the proof.
        overwrite: put the new folder in the place of a model folder that is there.

    Raises:
        OutputError, ModelError, ResourceError: before anything was written.
        ProofError: the merged model does not compute what base + adapter compute.
    """
    output = output.absolute()
    check_output(output, overwrite, (model, adapter))
    job = Merging(read_model_folder(model), read_adapter(adapter), dtype, of_adapter(adapter))
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    check_disk(output, sum(size for _, _, size in job.plan))
    prompts = [list(ids[:PROOF_TOKENS]) for ids in prompts if ids]
    if rows := job.changed_rows:  # no prompt may hold them
        prompts.append(rows[:: -(-len(rows) // PROOF_TOKENS)])
    choice = choose(job, prompts)
    try:
        staged.mkdir(parents=True)
        job.write_weights(staged)
        tokenizer = job.write_rest(staged)
        result = replace(_prove(job, staged, prompts), quantized=choice)
        write_json(staged / FACTS, _facts(job, tokenizer, result))
        put_in_place(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return result


def _prove(job: Merging, staged: Path, prompts: Sequence[Sequence[int]]) -> MergeResult:
    """Hold the merged weights against base + adapter, and the written folder against the weights.

    Raises:
        ProofError: proof-gap, proof-files.
    """
    wanted = tuned_logits(job, prompts, job.rounded.storage if job.rounded else "none")
    merged = merged_model(job)
    exact = logits_of(merged, prompts)
    gap = largest_gap(wanted, exact)
    if not gap <= MAX_GAP:  # so that NaN fails too
        raise ProofError(
            "proof-gap",
            t("the merged model does not compute what base and adapter compute: logits differ by "
              "{gap:.2g}, allowed are {limit:g}", gap=gap, limit=MAX_GAP),
            where=str(job.adapter.path),
            why=t("the adapter was made for another base, or does what no weight can express"),
            fix=t("talk with it unmerged: {command}", command=f"chatfine chat {job.adapter.path}"),
        )  # fmt: skip
    prints = _prints(job, merged)
    del merged
    written = load_model(staged, torch.float32)
    if wrong := [name for name, found in _state(written) if prints.get(name) != _print(found)]:
        raise ProofError(
            "proof-files",
            t("{n} weights in the written files are not the merged ones", n=len(wrong)),
            where=wrong[0],
            why=t("the disk may be faulty"),
            fix=t("try again, perhaps on another disk"),
        )
    rounded = logits_of(written, prompts)
    pairs = list(zip(exact, rounded, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    positions = sum(len(a) for a, _ in pairs)
    return MergeResult(
        dtype=job.dtype_name,
        gap=gap,
        rounding_gap=largest_gap(exact, rounded),
        top1_agreement=same / positions,
        positions=positions,
        changed=len(job.changes),
        untied=job.untied,
    )


def _state(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()


def _prints(job: Merging, model: Any) -> dict[str, bytes]:
    """A hash of every weight as it must stand in the files, that is after rounding."""
    rounded = job.rounded.names.keys() if job.rounded is not None else set()
    formats = {name: job.out_dtype(name) for name in job.changes.keys() | rounded}
    if job.base.tied and not job.untied and job.embedding in formats:
        formats.setdefault(HEAD, formats[job.embedding])  # one weight, which has two names here
    prints = {}
    for name, tensor in _state(model):
        own = find_parameter(name, formats)
        # an unchanged weight keeps its format, in which it came: rounding it again changes nothing
        rounding = job.dtype or (formats[own] if own else None)
        if rounding is not None and tensor.is_floating_point():
            tensor = tensor.to(rounding).float()
        prints[name] = _print(tensor)
    return prints


def _print(tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).digest()


def _facts(job: Merging, tokenizer: ChatTokenizer, result: MergeResult) -> dict[str, Any]:
    """Where the merged model comes from, for its chatfine.json; no paths of this machine."""
    facts = job.adapter.facts
    base = facts.get("base") or job.adapter.settings.get("base_model_name_or_path") or ""
    return {
        "chatfine": __version__,
        "kind": "merged",
        "base": Path(str(base)).name if Path(str(base)).is_absolute() else str(base),
        "base_digest": job.base.digest(),
        "adapter_sha256": hashlib.sha256(
            (job.adapter.path / "adapter_model.safetensors").read_bytes()
        ).hexdigest(),
        "method": job.adapter.method,
        "datasets": [Path(str(name)).name for name in facts.get("datasets", [])],
        "data": facts.get("data", ""),
        "system": facts.get("system", ""),
        "template": "model",
        "tokenizer_digest": tokenizer.digest,
        "proof": asdict(result),
    }
