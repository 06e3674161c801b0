"""Attention over packed documents, beside its slow twin: one call of sdpa a document.

Documents lie end to end in one row of N tokens (`types.Batch`); attention stays inside each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model.document_attention import document_attention

ATTENTION = "chatfine"


def install(model: Any) -> None:
    """Make `model` (a transformers model) use `packed_attention`; without documents it is sdpa.

    Architectures with attention code of their own keep it: they generate, but
    `model.documents.check` refuses to train them on packed rows.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    if getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, N, head size)
    key: torch.Tensor,  # (1, key heads, N, head size)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    shared: int = 0,
    document_offsets: torch.Tensor | None = None,
    longest_document: int = 0,
    full_documents: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; returns (1, N, heads, head size).

    With `shared` the row begins with so many tokens that every document sees as its own beginning.
    `document_offsets` and `longest_document` stand in for lengths where shapes are fixed
    (`model.compiled`), which knows neither a shared beginning nor dropout nor a cap.

    Without documents (generation) this is transformers' own sdpa with its mask.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if document_lengths is None and document_offsets is None:
        if softcap:
            capped = _capped_attention(query, key, value, attention_mask, scaling, dropout, softcap)
            return capped.transpose(1, 2), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary tables in float32 have made it float32 again
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if document_offsets is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head size)
        near = sliding_window if sliding_window and sliding_window < longest_document else 0
        inside = document_attention(
            q, k, v, document_offsets, longest_document, scaling, near, full_documents and not near
        )
        return inside.unsqueeze(0), None
    assert document_lengths is not None
    longest = shared + max(document_lengths)
    window = sliding_window if sliding_window and sliding_window < longest else None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and not dropout and not softcap and _varlen() is not None:
        return _varlen_attention(query, key, value, document_lengths, shared, scaling, window), None
    inputs = (query, key, value)
    return _looped_attention(
        inputs, document_lengths, shared, scaling, window, dropout, softcap
    ), None


def _looped_attention(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lengths: tuple[int, ...],
    shared: int,
    scaling: float,
    window: int | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """One sdpa a document: the cost is the sum of squared lengths, not the square of their sum.

    `split` rather than slicing, because the backward pass of a slice writes a tensor of the whole
    row for every document.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        before = k.shape[2] - q.shape[2]  # keys of the shared beginning
        mask = _mask(q.shape[2], before, window, q.device) if window or before else None
        if softcap:
            return _capped_attention(q, k, v, mask, scaling, dropout, softcap)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout,
            enable_gqa=True,
        )  # fmt: skip

    sizes = [shared, *lengths] if shared else list(lengths)
    columns = [torch.split(x, sizes, 2) for x in inputs]  # type: ignore[no-untyped-call]
    documents = list(zip(*columns, strict=True))
    outputs = [attend(*documents[0])]
    for q, k, v in documents[1:]:
        if shared:
            _, k_shared, v_shared = documents[0]
            k, v = torch.cat((k_shared, k), 2), torch.cat((v_shared, v), 2)
        outputs.append(attend(q, k, v))
    return torch.cat(outputs, 2).transpose(1, 2)


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores pass through softcap · tanh(x / softcap) (Gemma 2), which sdpa lacks.

    `mask` is boolean, True where a token may look; None is causal.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if mask is None:
        mask = _mask(query.shape[2], key.shape[2] - query.shape[2], None, query.device)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(query.dtype), dropout)
    return weights @ value


# The cached tensors below are made outside of inference mode: an evaluation may be the first to
# need one, and training could not save it for its backward pass.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _mask(length: int, before: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, before + length): token i sees what is before it, of that the last `window`."""
    query = torch.arange(before, before + length, device=device)[:, None]
    distance = query - torch.arange(before + length, device=device)
    return (distance >= 0) & (distance < (window or before + length))


@functools.lru_cache(maxsize=1)
def _varlen() -> Callable[..., Any] | None:
    """torch's variable-length flash attention with causal masking; None where it lacks what is
    needed here (torch 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= parameters.keys():
        return None
    return functools.partial(varlen_attn, window_size=(-1, 0))


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    shared: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """All documents in one flash attention; a shared beginning is copied before each one's keys."""
    attend = _varlen()
    assert attend is not None
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head size)
    rows = (shared, *lengths) if shared else lengths
    columns = (shared, *(shared + n for n in lengths)) if shared else lengths
    if shared:
        order = _with_beginning(lengths, shared, q.device)
        k, v = k.index_select(0, order), v.index_select(0, order)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    options: dict[str, Any] = {"window_size": (window - 1, 0)} if window else {}
    output: torch.Tensor = attend(
        q, k, v, _offsets(rows, q.device), _offsets(columns, q.device), max(rows), max(columns),
        scale=scaling, **options,
    )  # fmt: skip
    return output.unsqueeze(0)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _with_beginning(lengths: tuple[int, ...], shared: int, device: torch.device) -> torch.Tensor:
    """Row numbers: the beginning alone, then the beginning and each document's own tokens."""
    beginning, order, start = list(range(shared)), list(range(shared)), shared
    for length in lengths:
        order += beginning + list(range(start, start + length))
        start += length
    return torch.tensor(order, device=device)
