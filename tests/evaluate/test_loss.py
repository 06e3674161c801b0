"""Loss, perplexity and bits per character."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from chatfine.data.batches import collate
from chatfine.evaluate.loss import LossResult, evaluate_loss
from chatfine.model.load import load_model
from chatfine.types import Example


def test_the_numbers_follow_from_nats_and_tokens() -> None:
    result = LossResult(nats=4 * math.log(8), tokens=4)
    assert result.loss == pytest.approx(math.log(8))
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_char(6) == pytest.approx(2)  # 12 bits over 6 characters
    assert LossResult(nats=9000.0, tokens=2).perplexity == math.inf
    assert LossResult(nats=0.0, tokens=0).loss == 0


def test_the_mean_is_over_tokens_whatever_the_batches(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    rows = [Example(list(range(3, 3 + n)), [False, *[True] * (n - 1)]) for n in (2, 9, 30, 4)]
    together = evaluate_loss(model, [collate(rows)])
    apart = evaluate_loss(model, [collate([row]) for row in rows])
    assert together.tokens == apart.tokens == 41
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)
    single = [evaluate_loss(model, [collate([row])]).loss for row in rows]
    assert abs(together.loss - sum(single) / 4) > 1e-4  # not the mean of means


def test_nothing_is_learned_and_the_mode_comes_back(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    batch = collate([Example([4, 5, 6], [True] * 3)])
    for training in (True, False):
        model.train(training)
        seen: list[bool] = []
        hook = model.model.register_forward_hook(lambda m, *_, seen=seen: seen.append(m.training))
        evaluate_loss(model, [batch])
        hook.remove()
        assert model.training is training
        assert seen == [False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_an_error(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    model.train()
    broken = collate([Example([4, 10_000, 6], [True] * 3)])
    with pytest.raises(IndexError):
        evaluate_loss(model, [broken])
    assert model.training
