"""The fast paths, each beside its slow twin: attention over packed documents, and the loss.

All training and all loss evaluation here is free of padding: documents lie end to end in one row
of N tokens (`types.Batch`), attention stays inside each document and logits exist only where a
label is.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.types import IGNORE_INDEX, Batch

ATTENTION = "chatfine"
HEAD_CHUNK_BYTES = 64 * 2**20
"""Size of the block of float32 logits alive at one time; larger gave no speed on two CPU cores."""


def install(model: Any) -> None:
    """Make `model` (a transformers model) use `packed_attention`; without documents it is sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; returns (1, N, heads, head size).

    Without `document_lengths` (generation) this is transformers' own sdpa with its mask.
    """
    if document_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    window = sliding_window if sliding_window and sliding_window < max(document_lengths) else None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and not dropout and _varlen() is not None:
        return _varlen_attention(query, key, value, document_lengths, scaling, window), None
    return _looped_attention(query, key, value, document_lengths, scaling, window, dropout), None


def _looped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """One sdpa a document: the cost is the sum of squared lengths, not the square of their sum.

    `split` rather than slicing, because the backward pass of a slice writes a tensor of the whole
    row for every document.
    """
    split = (torch.split(x, list(lengths), 2) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=_banded(q.shape[2], window, q.device) if window else None,
            is_causal=window is None, scale=scaling, dropout_p=dropout, enable_gqa=True,
        )
        for q, k, v in zip(*split, strict=True)
    ]  # fmt: skip
    return torch.cat(outputs, 2).transpose(1, 2)


def _banded(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Mask of causal attention to the last `window` tokens, the own one included."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


@functools.lru_cache(maxsize=1)
def _varlen() -> Callable[..., Any] | None:
    """torch's variable-length flash attention with causal masking, over torch 2.10 and later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" in parameters:
        return functools.partial(varlen_attn, window_size=(-1, 0))
    return functools.partial(varlen_attn, is_causal=True)  # type: ignore[call-arg]


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    attend = _varlen()
    assert attend is not None
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head size)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = bounds.to(query.device, non_blocking=True)
    longest = max(lengths)
    options: dict[str, Any] = {"window_size": (window - 1, 0)} if window else {}
    if scaling is not None:
        options["scale"] = scaling
    output: torch.Tensor = attend(q, k, v, bounds, bounds, longest, longest, **options)
    return output.unsqueeze(0)


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain_head(causal: Any) -> torch.nn.Linear | None:
    """The output embedding if logits are just its product with the hidden state, else None."""
    settings = causal.config.get_text_config()
    extras = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    return None if any(getattr(settings, name, None) for name in extras) else head


def _model_inputs(batch: Batch) -> dict[str, Any]:
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
        "use_cache": False,
    }


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the cross entropies of all labels of `batch`, in nats, as a float32 scalar.

    The caller divides by the number of labels of the whole global batch (contract C3).
    """
    causal = causal_model(model)
    head = _plain_head(causal)
    where = torch.nonzero(batch.labels != IGNORE_INDEX).squeeze(1)  # (S,)
    labels = batch.labels[where]
    if head is None:
        return _loss_through_model(causal, batch, where, labels)
    hidden = causal.get_decoder()(**_model_inputs(batch)).last_hidden_state[0]  # (N, D)
    return linear_cross_entropy(hidden.index_select(0, where), head.weight, labels)


def _loss_through_model(
    causal: Any, batch: Batch, where: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The slow twin, for heads with a bias, a scale or a cap: the model's own logits."""
    logits = causal(**_model_inputs(batch), logits_to_keep=where).logits[0]
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, labels)` without keeping the logits.

    Args:
        hidden: (S, D) states that have a label.
        weight: (V, D) output embedding.
        labels: (S,) token ids.

    The gradient with respect to the logits is known as soon as they are (softmax − one-hot), so
    both products of the backward pass are taken while a block of logits is still in the cache.
    The idea is that of Liger's fused linear cross entropy (Hsu et al., 2024).
    """
    result: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        weight = weight.detach().to(hidden.dtype)  # under autocast the master weight is float32
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, HEAD_CHUNK_BYTES // (4 * weight.shape[0]))
        for begin in range(0, hidden.shape[0], rows):
            block = hidden[begin : begin + rows].detach()
            wanted = labels[begin : begin + rows, None]
            logits = F.linear(block, weight).float()  # (rows, V)
            log_norm = logits.logsumexp(1, keepdim=True)
            total += (log_norm - logits.gather(1, wanted)).sum()
            if not (need_hidden or need_weight):
                continue
            grad = logits.sub_(log_norm).exp_()  # softmax, in place
            grad.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=grad.dtype))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[begin : begin + rows])
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), block)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream.float()
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale,
            None,
        )
