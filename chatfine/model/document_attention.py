"""Attention over packed documents as one operation of fixed shapes, which a compiler and a CUDA
graph can take as it is.

Where documents begin is a tensor on the device, filled up to a fixed length by repeating its last
entry (empty documents), so no shape depends on the batch. On a GPU it is torch's flash attention
for sequences of different lengths; on a CPU a loop over the documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch


@torch.library.custom_op("chatfine::document_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    full: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not query.is_cuda:
        return _looped((query, key, value), offsets, scale, window), query.new_empty(0)
    if full:
        q, k, v = (_apart(x, longest) for x in (query, key, value))
        dense = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
        return _joined(dense[0]), dense[1]
    key, value = _repeated(key, query), _repeated(value, query)
    result = torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0,
    )  # fmt: skip
    return result[0], result[1]


@_forward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    full: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape: tuple[int, ...] = (query.shape[1], query.shape[0]) if query.is_cuda else (0,)
    if query.is_cuda and full:
        shape = (query.shape[0] // longest, query.shape[1], longest, 1)
    kind = torch.float32 if query.is_cuda else query.dtype
    return query.new_empty(query.shape), query.new_empty(shape, dtype=kind)


@torch.library.custom_op("chatfine::document_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    full: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not query.is_cuda:
        return _looped_gradients(grad, (query, key, value), offsets, scale, window)
    if full:
        inputs = [_apart(x, longest) for x in (grad, query, key, value, out)]
        nothing = torch.zeros((), dtype=torch.int64, device=query.device)  # is dropped
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, norm, nothing, nothing, None, None, None, longest, longest, 0.0, True,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = (_joined(x) for x in found)
        return dq, dk, dv
    heads = key.shape[1]
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # nothing is dropped
    found = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, _repeated(key, query), _repeated(value, query), out, norm,
        offsets, offsets, longest, longest, 0.0, True, state, torch.empty_like(state[:0]),
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0,
    )  # fmt: skip
    dq, dk, dv = found
    return dq, _summed(dk, heads), _summed(dv, heads)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    full: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, offsets, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, offsets = ctx.saved_tensors
    found = torch.ops.chatfine.document_attention_backward(grad, *tensors, offsets, *ctx.settings)
    return (*found, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: float,
    window: int = 0,
    full: bool = False,
) -> torch.Tensor:
    """Causal attention inside each document.

    Args:
        query, key, value: (N, heads, head size); keys and values may have fewer heads.
        offsets: (D + 1,) int32 on the device; document d is `offsets[d] : offsets[d + 1]`, and may
            be empty.
        longest: no document has more tokens.
        scale: of the scores.
        window: how many tokens back a token sees, itself included; 0 = all.
        full: every document has exactly `longest` tokens, so that cuDNN's attention, twice as fast
            on an H100, can take them as one batch; without a window.

    Returns:
        (N, heads, head size)
    """
    output: torch.Tensor = torch.ops.chatfine.document_attention(
        query, key, value, offsets, longest, scale, window, full
    )[0]
    return output


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _looped(inputs: Three, offsets: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """One document after the other: the twin whose gradients are written out below."""
    groups = inputs[0].shape[1] // inputs[1].shape[1]
    outputs = [_weights(q, k, scale, window) @ v for q, k, v in _documents(inputs, groups, offsets)]
    return torch.cat(outputs, 1).transpose(0, 1).contiguous()


def _looped_gradients(
    grad: torch.Tensor, inputs: Three, offsets: torch.Tensor, scale: float, window: int
) -> Three:
    groups, heads = inputs[0].shape[1] // inputs[1].shape[1], inputs[1].shape[1]
    found = []
    upstream = (part for part, _, _ in _documents((grad,) * 3, 1, offsets))
    for (q, k, v), g in zip(_documents(inputs, groups, offsets), upstream, strict=True):
        weights = _weights(q, k, scale, window)
        through = g @ v.transpose(1, 2)
        scores = weights * (through - (through * weights).sum(-1, keepdim=True)) * scale
        found.append((scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g))
    dq, dk, dv = (torch.cat(parts, 1).transpose(0, 1) for parts in zip(*found, strict=True))
    return dq.contiguous(), _summed(dk, heads).contiguous(), _summed(dv, heads).contiguous()


def _documents(inputs: Three, groups: int, offsets: torch.Tensor) -> Iterator[Three]:
    """Query, key and value of each document that is not empty, as (heads, tokens, head size)."""
    query, key, value = (x.transpose(0, 1) for x in inputs)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    for begin, end in itertools.pairwise(offsets.tolist()):
        if begin < end:
            yield query[:, begin:end], key[:, begin:end], value[:, begin:end]


def _weights(q: torch.Tensor, k: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    size = q.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if window:
        seen = seen.triu(1 - window)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1)


def _apart(x: torch.Tensor, longest: int) -> torch.Tensor:
    """(N, heads, size) → (documents, heads, longest, size)."""
    return x.reshape(-1, longest, *x.shape[1:]).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """What `_apart` took apart."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // x.shape[1]
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def _summed(grad: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient of what `_repeated` repeated."""
    if grad.shape[1] == heads:
        return grad
    return grad.reshape(len(grad), heads, -1, grad.shape[2]).sum(2)
