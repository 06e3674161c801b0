"""How a run's micro-batches are computed: as they come, compiled, or replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from chatfine import console
from chatfine.i18n import t
from chatfine.model import compiled, fast, graphs, learned_fp8
from chatfine.train.decisions import Decisions, work_of
from chatfine.train.plan import Shapes, make_plan
from chatfine.types import Batch

if TYPE_CHECKING:
    from chatfine.train.prepare import Prepared

BLOCK = 128
"""The longest document is rounded up to so many tokens: attention works in blocks of them."""
MORE_DOCUMENTS = 1.5
"""Times the usual number of documents in a micro-batch, at least: other epochs are in another
order. Beyond the room that is made, layers are compiled anew."""
LAUNCH_BOUND = 1.2e13
"""Floating-point operations of a layer's part of a micro-batch, forward and back, below which an
H100 gains from a graph: 1 to 4 % at 1e13, half of the step and more below 1e12."""
BESIDE_GRAPH = 0.75
"""Share of a card that a run may fill and still be replayed: memory of a graph is not there for
evaluations."""
CUDNN_HEAD = 128
"""The largest head that cuDNN's attention takes."""


def loss_model(
    model: Any, prepared: Prepared, decisions: Decisions, shapes: Shapes, most_documents: int = 0
) -> fast.LossModel:
    """What measures the loss of a micro-batch of this run, and learns from it; `most_documents` are
    in one."""
    if decisions.learned_fp8:
        learned_fp8.install(model)
    if not decisions.compile or not compiled.supports(model):
        return fast.LossModel(model)
    fixed = _fixed_inputs(model, prepared, decisions.rows, most_documents)
    if _replays(prepared, decisions, shapes):
        return graphs.GraphedLoss(model, fixed, adds=decisions.accumulate > 1)
    return compiled.CompiledLoss(model, fixed)


def _fixed_inputs(
    model: Any, prepared: Prepared, rows: int, most_documents: int = 0
) -> compiled.FixedInputs:
    """Room for what a micro-batch of `rows` holds; for more documents than that, it grows."""
    tokens = prepared.max_length * rows
    lengths = [part.lengths for part in prepared.data.train if len(part.lengths)]
    longest = max(int(some.max()) for some in lengths)
    full = longest == prepared.max_length and all(int(some.min()) == longest for some in lengths)
    size = min(prepared.max_length, -(-longest // BLOCK) * BLOCK)
    usual = tokens / min(float(some.mean()) for some in lengths)
    documents = compiled.MIN_DOCUMENTS
    while documents < max(most_documents, usual * (1 if full else MORE_DOCUMENTS)):
        documents *= 2
    return compiled.FixedInputs(tokens, size, full and _takes_full_rows(model), documents)


def try_out(
    measure: fast.LossModel, batch: Batch, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """A micro-batch forward and back. A compiler that fails on this machine is done without, and so
    is one whose programs take more memory than there is.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """

    def once() -> None:
        measure.train()
        with context():
            loss = measure(batch) / max(1, batch.supervised)
        loss.backward()  # type: ignore[no-untyped-call]

    if not isinstance(measure, compiled.CompiledLoss):
        once()
        return
    try:
        once()
        return
    except torch.OutOfMemoryError:
        reason = t("compiled, the longest batch does not fit into the device's memory")
    except Exception as error:  # a compiler raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # here, since until now the error held on to everything that was computed
    measure.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    console.warn(t("the layers could not be compiled here; the run goes on without, more "
                   "slowly ({reason})", reason=reason))  # fmt: skip
    measure.give_up()
    once()


def _replays(prepared: Prepared, decisions: Decisions, shapes: Shapes) -> bool:
    """Whether launching would take longer than computing, and nothing stands against replaying."""
    config = prepared.config
    if decisions.device != "cuda" or decisions.processes > 1 or decisions.recompute_layers:
        return False
    if config.rows_first or decisions.dtype == "float16":
        return False
    card = config.gpu_memory * 1e9 or torch.cuda.get_device_properties("cuda").total_memory
    if make_plan(shapes, work_of(prepared, decisions)).memory_bytes > BESIDE_GRAPH * card:
        return False
    numbers = shapes.body_parameters / shapes.layers
    return 6 * numbers * prepared.max_length * decisions.rows < LAUNCH_BOUND


def _takes_full_rows(model: Any) -> bool:
    """Whether cuDNN's attention, measured on Hopper cards, takes this model's heads."""
    causal = fast.causal_model(model)
    settings = causal.config.get_text_config()
    heads = settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    if causal.device.type != "cuda" or size > CUDNN_HEAD or size % 8:
        return False
    return torch.cuda.get_device_capability(causal.device) >= (9, 0)
