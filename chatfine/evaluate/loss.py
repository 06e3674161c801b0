"""How surprised a model is by a data set: loss, perplexity, bits per character."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from chatfine.model.fast import LossModel
from chatfine.types import Batch


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss over `tokens` labels; `nats` is the sum that `loss` is the mean of."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean cross entropy of a label, in nats."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_char(self, characters: int) -> float:
        """Bits for each of the `characters` that the labels spell.

        Comparable across vocabularies, which loss and perplexity a token are not.
        """
        return self.nats / math.log(2) / max(1, characters)


@torch.no_grad()  # not inference_mode: a sharded model's gathered weights outlive this
def evaluate_loss(
    model: Any, batches: Iterable[Batch], device: torch.device | str = "cpu"
) -> LossResult:
    """Sum the loss of `model`, or of a `LossModel`, over `batches`; the mode of the model is put
    back afterwards."""
    measure = model if isinstance(model, LossModel) else LossModel(model)
    training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in batches:
            nats += measure(batch.to(device)).item()
            tokens += batch.supervised
    finally:
        model.train(training)
    return LossResult(nats, tokens)
