"""Logits → the next token: penalties, filters and the draw, in transformers' order.

Repetition penalty, n-grams that may not repeat, no early end, temperature, top-k, top-p, min-p,
typical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUCLEUS_TOKENS = 256  # top-p looks among so many likeliest tokens before it sorts them all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 42

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens of `seen` (B, V) less likely, as in CTRL (Keskar et al. 2019, section 4.1)."""
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lowered, logits)


def forbid(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Rule out these tokens in every row of `logits` (B, V), or in one row of them (V,)."""
    if not ids:
        return logits
    logits = logits.clone()
    logits[..., list(ids)] = -torch.inf
    return logits


def completions_of_ngrams(said: Sequence[int], size: int) -> list[int]:
    """The tokens that would say an n-gram of `size` tokens a second time after `said`."""
    tail = tuple(said[len(said) - size + 1 :])
    if len(tail) < size - 1:
        return []
    starts = range(len(said) - size + 1)
    return sorted({said[i + size - 1] for i in starts if tuple(said[i : i + size - 1]) == tail})


def pick(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor | None) -> torch.Tensor:
    """Choose one token a row of `logits` (B, V); `draws` (B,) are uniform in [0, 1)."""
    if draws is None:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if not sampling.filters:
        return _draw(logits.softmax(-1), draws)
    weights, ids = _likeliest(logits, sampling)
    if sampling.top_p < 1:  # drop a token when those before it already have the mass
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p:
        weights = weights.masked_fill(weights < sampling.min_p * weights[:, :1], 0)
    if sampling.typical_p < 1:
        weights = _typical(weights, sampling.typical_p)
    return ids.gather(-1, _draw(weights, draws)[:, None])[:, 0]


def _draw(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where each of `draws` (B,) falls among the cumulated `weights` (B, K)."""
    mass = weights.cumsum(-1)
    return (mass <= draws[:, None] * mass[:, -1:]).sum(-1).clamp(max=mass.shape[-1] - 1)


def _likeliest(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that the filters can choose from, descending, and their ids, both (B, K).

    A full sort of the vocabulary costs more than a small model's forward pass; the nucleus nearly
    always lies within a few hundred tokens, and where it does not the sort is done after all.
    """
    vocabulary = logits.shape[-1]
    if sampling.top_k:
        top, ids = logits.topk(min(sampling.top_k, vocabulary))
        return top.softmax(-1), ids
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(min(NUCLEUS_TOKENS, vocabulary))
    weights = (top - total).exp()
    if sampling.top_p == 1 or bool((weights.sum(-1) < sampling.top_p).any()):
        top, ids = logits.sort(descending=True)
        weights = (top - total).exp()
    return weights, ids


def _typical(weights: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the expected one until they have `mass`.

    Locally typical sampling (Meister et al. 2023, section 3). `weights` (B, K) need not sum to 1.
    """
    shares = weights / weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1, keepdim=True)
    distance = torch.where(shares > 0, (-shares.log() - entropy).abs(), torch.inf)
    ordered, order = distance.sort(-1)
    before = shares.gather(-1, order).cumsum(-1) - shares.gather(-1, order)
    last = ((before < mass) & ordered.isfinite()).sum(-1, keepdim=True) - 1
    return weights.masked_fill(distance > ordered.gather(-1, last), 0)
