"""Attention over packed documents as one operation, against one sdpa a document."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from chatfine.model.document_attention import document_attention

# lengths of the documents; zeros are the empty ones that fill up a fixed number
PACKED = [(7,), (1, 5, 3), (4, 9, 1, 0, 0, 0), (2, 2, 2, 2, 13, 0)]


def states(tokens: int, heads: int, key_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(tokens + heads)
    return [
        torch.randn(tokens, count, 6, dtype=torch.float64, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]


def offsets_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def one_by_one(
    inputs: list[torch.Tensor], lengths: tuple[int, ...], scale: float, window: int
) -> torch.Tensor:
    outputs, begin = [], 0
    for length in filter(None, lengths):
        q, k, v = (x[begin : begin + length].transpose(0, 1)[None] for x in inputs)
        behind = torch.arange(length)[:, None] - torch.arange(length)
        mask = (behind >= 0) & (behind < (window or length))
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0]
        )
        begin += length
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_it_is_one_sdpa_a_document_forward_and_back(
    lengths: tuple[int, ...], heads: tuple[int, int], window: int
) -> None:
    inputs = states(sum(lengths), *heads)
    direction = torch.randn(sum(lengths), heads[0], 6, dtype=torch.float64)
    q, k, v = inputs
    results = []
    for y in (
        document_attention(q, k, v, offsets_of(lengths), max(lengths), 0.3, window),
        one_by_one(inputs, lengths, 0.3, window),
    ):
        results.append((y, *torch.autograd.grad((y * direction).sum(), inputs)))
    for got, wanted in zip(*results, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_the_written_out_gradient_is_that_of_differences() -> None:
    q, k, v = states(8, 4, 2)
    offsets = offsets_of((5, 3, 0))
    assert torch.autograd.gradcheck(
        lambda *x: document_attention(*x, offsets, 5, 0.4, 3), (q, k, v), fast_mode=True
    )


def test_a_document_knows_nothing_of_its_neighbour() -> None:
    q, k, v = (x.detach() for x in states(9, 2, 2))
    before = document_attention(q, k, v, offsets_of((4, 5)), 5, 0.4)
    k[:4], v[:4] = 7, 9
    after = document_attention(q, k, v, offsets_of((4, 5)), 5, 0.4)
    assert torch.equal(before[4:], after[4:])
    assert not torch.allclose(before[:4], after[:4])


@pytest.mark.parametrize("full", [False, True])
def test_it_is_an_operation_as_torch_wants_one(full: bool) -> None:
    """Shapes and formats without running, autograd and no hidden writes: what a compiler trusts."""
    lengths = (4, 4)
    inputs = states(8, 4, 2)
    settings = (offsets_of(lengths), 4, 0.5, 0, full)
    torch.library.opcheck(torch.ops.chatfine.document_attention.default, (*inputs, *settings))
