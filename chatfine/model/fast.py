"""The loss of a packed micro-batch: no padding, and logits only where a label is.

All training and all loss evaluation goes through here: documents lie end to end in one row of N
tokens (`types.Batch`) and attention stays inside each document (`model.attention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model import learned_rows
from chatfine.model.cross_entropy import linear_cross_entropy
from chatfine.types import IGNORE_INDEX, Batch


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain_head(causal: Any) -> list[torch.Tensor] | None:
    """The matrix, or the matrices one after the other, whose products with the hidden state are the
    logits; None where there is more to them."""
    settings = causal.config.get_text_config()
    extras = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    head = causal.get_output_embeddings()
    if any(getattr(settings, name, None) for name in extras):
        return None
    if type(head) is not torch.nn.Linear:
        return learned_rows.head_parts(head)
    return None if head.bias is not None else [head.weight]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments that run a transformers model over the packed row of `batch`.

    A mask of four dimensions is handed through untouched by transformers; the one here only keeps
    it from building an N × N mask that `packed_attention` does not need.
    """
    bounds = batch.bounds
    return {
        "input_ids": batch.ids[None],
        "position_ids": batch.positions[None],
        "attention_mask": torch.zeros(1, 1, 1, 1, device=batch.ids.device),
        "document_lengths": tuple(b - a for a, b in itertools.pairwise(bounds)),
        "shared": batch.shared,
        "use_cache": False,
    }


class LossModel(torch.nn.Module):
    """`loss_sum` as the forward of a module: one call for what hooks into modules, as FSDP does."""

    keeps_gradients = False
    """Whether gradients are emptied in place and not thrown away between steps."""
    stale = True
    """Whether what learns may have changed since the last call; who changes it says so."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def accumulate(
        self,
        batch: Batch,
        labels: int,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaled: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    ) -> torch.Tensor:
        """Add the gradients of one micro-batch.

        Args:
            batch: the micro-batch.
            labels: of the whole global batch.
            context: of the forward pass: autocast.
            scaled: what the gradient is taken of instead of the loss: fp16 scales it.

        Returns:
            The micro-batch's part of the global mean loss, a scalar on the device.
        """
        with context():
            loss: torch.Tensor = self(batch) / labels
        scaled(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the losses of the labels of `batch`."""
        return loss_sum(self.model, batch)

    def refresh(self) -> None:
        """Bring what is derived from what learns up to date, if it is `stale`."""


def loss_sum(
    model: Any,
    batch: Batch,
    inputs: Callable[[Batch], dict[str, Any]] = model_inputs,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum of the cross entropies of all labels of `batch`, in nats, as a float32 scalar.

    The caller divides by the number of labels of the whole global batch (contract C3). `inputs`
    makes the model's arguments of a batch, `compiled` is as of `linear_cross_entropy`. A model that
    can't run over packed rows brings a function of its own (`model.unpacked`).
    """
    own = getattr(model, "own_loss_sum", None)
    if own is not None:
        total: torch.Tensor = own(model, batch)
        return total
    where = labelled(batch)
    return loss_at(model, inputs(batch), where, batch.labels[where], compiled)


def labelled(batch: Batch) -> torch.Tensor:
    """The positions (S,) with a label. How many there are is known, so no GPU is waited for."""
    wanted = batch.labels != IGNORE_INDEX
    return torch.nonzero_static(wanted, size=batch.supervised).squeeze(1)


def loss_at(
    model: Any,
    inputs: dict[str, Any],
    where: torch.Tensor,
    labels: torch.Tensor,
    compiled: bool = False,
) -> torch.Tensor:
    """The same, told what the model gets and at which of its positions `where` (S,) it must say
    `labels` (S,); IGNORE_INDEX among them counts nothing."""
    causal = causal_model(model)
    head = _plain_head(causal)
    if head is None:
        return _loss_through_model(causal, inputs, where, labels)
    hidden = causal.get_decoder()(**inputs).last_hidden_state[0]  # (N, D)
    return linear_cross_entropy(hidden.index_select(0, where), head, labels, compiled)


def _loss_through_model(
    causal: Any, inputs: dict[str, Any], where: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The slow twin, for heads with a bias, a scale or a cap: the model's own logits."""
    logits = causal(**inputs, logits_to_keep=where).logits[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE_INDEX, reduction="sum")
