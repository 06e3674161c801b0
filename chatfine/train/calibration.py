"""Texts to which a run's frozen weights are rounded, and the base that comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chatfine import console
from chatfine.data.batches import collate, permutation
from chatfine.errors import ResourceError
from chatfine.hub.rounded import FILE
from chatfine.i18n import t
from chatfine.model import frozen
from chatfine.model.load import load_model
from chatfine.model.rounded import made_of, write_rounded
from chatfine.model.rounding import CALIBRATED
from chatfine.runtime import fp8_works
from chatfine.train.prepare import shapes_of

if TYPE_CHECKING:
    from chatfine.train.decisions import Decisions
    from chatfine.train.plan import Shapes
    from chatfine.train.prepare import Prepared
    from chatfine.types import Batch, Example

TOKENS = 131_072
"""Tokens of the texts, at most."""
INPUT_BYTES = 3 * 2**30
"""What the inputs of a layer's linears may take, those of the exact and of the rounded model: so a
7B model is rounded to some 34,000 tokens."""
CPU_TOKENS = 8_192
"""On a CPU: more would take longer than a beginner waits."""
FEWER = (1, 4, 16)
"""If that does not fit into the memory: parts of these tokens, tried in turn."""
WORTH = 8_000_000
"""Tokens of a run from which calibrating pays: 7B reads as many in five minutes on an H200, and is
rounded in less than one."""


def calibrates(prepared: Prepared, decisions: Decisions, tokens: float) -> bool:
    """Whether the frozen weights are rounded to the training's texts.

    Args:
        prepared: the run.
        decisions: all else is decided.
        tokens: the run reads in all.
    """
    wanted = prepared.config.calibrate
    possible = decisions.quantize in CALIBRATED and decisions.processes == 1
    if wanted == "on" and not possible:
        console.warn(
            t("--calibrate on is ignored: it needs one process and --quantize fp8 or nf4")
        )  # fmt: skip
    if wanted != "auto":
        return possible and wanted == "on"
    return possible and decisions.device == "cuda" and tokens >= WORTH


def load_base(prepared: Prepared, decisions: Decisions, device: torch.device) -> Any:
    """The run's model with its frozen weights stored and multiplied as decided."""
    model = _stored(prepared, decisions, device)
    frozen.choose_products(model, decisions.fp8_products)
    if device.type == "cuda" and not fp8_works(device):
        # a run that began on another card goes on with the weights it had
        if decisions.quantize == "fp8":
            console.warn(
                t("this card does not multiply 8-bit floats: the fp8 weights are unpacked for "
                  "every product, which is slower")
            )  # fmt: skip
        frozen.multiply_exactly(model)
    if decisions.second_copy:
        frozen.keep_turned(model)
    return model


def _stored(prepared: Prepared, decisions: Decisions, device: torch.device) -> Any:
    """The model; rounded to texts its weights are kept in the run folder, so that every start goes
    on with the same ones."""
    file = prepared.run / FILE
    path, dtype = prepared.model.path, decisions.torch_dtype
    if not decisions.calibrate:
        return load_model(path, dtype, device, decisions.quantize, prepared.positions)
    # settings may change before the first checkpoint, and with them the texts
    key = f"{prepared.model.digest()} {prepared.data.report.fingerprint}"
    if file.is_file() and made_of(file) == key:
        return load_model(path, dtype, device, decisions.quantize, prepared.positions, rounded=file)
    most = tokens_of(shapes_of(prepared.model)) if device.type == "cuda" else CPU_TOKENS
    model = None
    for part in FEWER:
        model = _calibrated(prepared, decisions, device, most // part)
        if model is not None:
            break
        torch.cuda.empty_cache()  # what it held is free again
    if model is None:
        raise ResourceError(
            "calibration-memory",
            t("rounding the weights to the training's texts does not fit into the device's memory"),
            why=t("for that one layer is computed exactly, over thousands of tokens"),
            fix="--calibrate off",
        )
    write_rounded(model, file, key)
    return model


def tokens_of(shapes: Shapes) -> int:
    """Of how many tokens a GPU reads the texts."""
    inputs = 2 * shapes.hidden + shapes.query + shapes.intermediate  # of a layer, a token's numbers
    return min(TOKENS, INPUT_BYTES // (2 * 2 * inputs))


def _calibrated(
    prepared: Prepared, decisions: Decisions, device: torch.device, tokens: int
) -> Any | None:
    """The model rounded to so many tokens; None if that does not fit."""
    texts = calibration_texts(prepared, tokens).to(device)
    console.say(t("rounding the frozen weights to {n:,} tokens of the training data",
                  n=len(texts.ids)))  # fmt: skip

    def report(done: int, layers: int) -> None:
        if done * 5 // layers > (done - 1) * 5 // layers:  # about five lines
            console.say(t("  layer {n} of {m}", n=done, m=layers))

    path, kind = prepared.model.path, decisions.torch_dtype
    # where products take NF4 weights as 8-bit floats, these are what they are rounded to
    storage = "nf4-e4m3" if decisions.fp8_products else decisions.quantize
    try:
        return load_model(path, kind, device, storage, prepared.positions, texts=texts,
                          report=report)  # fmt: skip
    except torch.OutOfMemoryError:
        return None


def calibration_texts(prepared: Prepared, tokens: int) -> Batch:
    """Examples from all over the training data, end to end: at most so many tokens, or one example.

    The same ones whatever the seed, so that runs with other seeds share a base.
    """
    parts = prepared.data.train
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    chosen: list[Example] = []
    room = tokens
    for number in permutation(int(firsts[-1]), 0):
        place = int(np.searchsorted(firsts, number, side="right")) - 1
        example = parts[place][int(number - firsts[place])]
        room -= len(example.ids)
        if chosen and room < 0:
            break
        chosen.append(example)
    return collate(chosen)
