"""Whether a model keeps packed documents apart: asked of the model itself before it is trained."""

from __future__ import annotations

from typing import Any

import torch

from chatfine.errors import ModelError
from chatfine.i18n import t
from chatfine.model.attention import ATTENTION
from chatfine.model.fast import LossModel, causal_model, model_inputs
from chatfine.types import IGNORE_INDEX, Batch

MAX_GAP = 1e-3
MAX_GAP_HALF = 0.1
"""Largest relative difference put down to rounding, in float32 and in 16 bits."""


@torch.inference_mode()
def check(model: Any) -> None:
    """Compare a document alone with the same one behind another in a packed row.

    Architectures with attention code of their own, or with layers that carry a state along the row
    (convolution, linear attention), would silently let documents see each other.

    Raises:
        ModelError: they differ by more than rounding.
    """
    causal = causal_model(model)
    if causal.config._attn_implementation != ATTENTION:
        raise _unsupported(causal)
    size = min(1000, causal.config.get_text_config().vocab_size)
    first, second = (torch.arange(a, a + 5) * 7 % size for a in (11, 3))
    try:
        alone = _hidden(causal, [second])
        packed = _hidden(causal, [first, second])[len(first) :]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unsupported(causal) from error
    gap = (alone - packed).norm() / alone.norm()
    limit = MAX_GAP if causal.dtype == torch.float32 else MAX_GAP_HALF
    if not gap <= limit and alone.isfinite().all():  # broken weights: the loss will say so
        raise _unsupported(causal)


@torch.no_grad()
def check_loss(measure: LossModel) -> None:
    """The same question asked through the loss, for a model that only computes as a whole because
    several processes share its weights.

    Raises:
        ModelError: the loss of a document depends on the one before it by more than rounding.
    """
    causal = causal_model(measure.model)
    if causal.config._attn_implementation != ATTENTION:
        raise _unsupported(causal)
    size = min(1000, causal.config.get_text_config().vocab_size)
    first, second = (torch.arange(a, a + 5) * 7 % size for a in (11, 3))
    training = measure.training
    measure.eval()
    try:
        alone = float(measure(_labelled(second, 0).to(causal.device)))
        packed = float(measure(_labelled(torch.cat([first, second]), len(first)).to(causal.device)))
    except (TypeError, ValueError) as error:
        raise _unsupported(causal) from error
    finally:
        measure.train(training)
    limit = MAX_GAP if causal.dtype == torch.float32 else MAX_GAP_HALF
    if abs(alone - packed) > limit * abs(alone):
        raise _unsupported(causal)


def _labelled(ids: torch.Tensor, begin: int) -> Batch:
    """One or two documents, of which the one from `begin` on predicts its own tokens."""
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[begin:-1] = ids[begin + 1 :]
    bounds = (0, begin, len(ids)) if begin else (0, len(ids))
    positions = torch.arange(len(ids)) - begin * (torch.arange(len(ids)) >= begin)
    return Batch(ids, labels, positions, bounds, len(ids) - begin - 1)


def _hidden(causal: Any, documents: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.cat(documents)
    positions = torch.cat([torch.arange(len(one)) for one in documents])
    bounds = [0]
    for one in documents:
        bounds.append(bounds[-1] + len(one))
    batch = Batch(ids, ids, positions, tuple(bounds), 0).to(causal.device)
    training = causal.training
    causal.eval()
    try:
        hidden: torch.Tensor = causal.get_decoder()(**model_inputs(batch)).last_hidden_state[0]
    finally:
        causal.train(training)
    return hidden.float()


def _unsupported(causal: Any) -> ModelError:
    return ModelError(
        "model-unsupported",
        t("{kind} can't be trained here: its layers don't keep documents of one row apart",
          kind=type(causal).__name__),
        fix=t("use a model with plain attention, such as Llama, Mistral, Qwen, Gemma or Phi"),
    )  # fmt: skip
