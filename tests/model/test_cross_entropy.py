"""The loss and the gradient of its logits: blocks, parts, and the card's program."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from chatfine.model import cross_entropy
from chatfine.types import IGNORE_INDEX


def drawn(vocabulary: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(sum(vocabulary))
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    parts = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in vocabulary]
    labels = torch.randint(0, sum(vocabulary), (11,))
    labels[[0, 4, 10]] = torch.tensor([IGNORE_INDEX, -1, IGNORE_INDEX])
    return hidden, parts, labels


@pytest.mark.parametrize("vocabulary", [(9,), (5, 4), (3, 1, 7)])
@pytest.mark.parametrize("compiled", [False, True])
def test_labels_below_zero_count_nothing(
    vocabulary: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cross_entropy, "_compiled_gradient", lambda: cross_entropy._softmax_gradient
    )
    hidden, parts, labels = drawn(vocabulary)
    ours = cross_entropy.linear_cross_entropy(hidden, parts, labels, compiled)
    counts = labels >= 0
    slow = F.cross_entropy(hidden[counts] @ torch.cat(parts).t(), labels[counts], reduction="sum")
    torch.testing.assert_close(ours, slow)
    inputs = (hidden, *parts)
    got = torch.autograd.grad(2 * ours, inputs)
    wanted = torch.autograd.grad(2 * slow, inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not got[0][~counts].any()


def test_both_ways_to_the_gradient_of_the_logits_agree() -> None:
    hidden, (weight,), labels = drawn((9,))
    with torch.no_grad():
        loss, (gradient,) = cross_entropy._gradients(hidden, [weight], labels, True)
        other, again = cross_entropy._softmax_gradient(F.linear(hidden, weight), labels)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradient, again)
    assert not gradient[labels < 0].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [7, 100, 4096, 49152])
@pytest.mark.parametrize("ignored", [0, 5, 13])
def test_the_program_for_the_gradient_of_the_logits_is_its_twin(
    dtype: torch.dtype, vocabulary: int, ignored: int
) -> None:
    torch.manual_seed(vocabulary)
    logits = (10 * torch.randn(13, vocabulary)).to("cuda", dtype)
    labels = torch.randint(0, vocabulary, (13,), device="cuda")
    labels[torch.randperm(13)[:ignored]] = IGNORE_INDEX
    wanted_loss, wanted = cross_entropy._softmax_gradient(logits.clone(), labels)
    loss, gradient = cross_entropy.softmax_gradient(logits, labels)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=1e-5)
    assert not gradient[labels < 0].any()
    assert gradient.data_ptr() == logits.data_ptr()


def test_nothing_but_labels_that_count_nothing_is_no_loss() -> None:
    hidden, parts, labels = drawn((9,))
    loss = cross_entropy.linear_cross_entropy(hidden, parts, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
