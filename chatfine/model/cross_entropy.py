"""Product with the output embedding and cross entropy in one, without keeping the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

HEAD_CHUNK_BYTES = 64 * 2**20
"""Size of the block of float32 logits alive at one time; larger gave no speed on two CPU cores."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, labels)` without keeping the logits.

    Args:
        hidden: (S, D) states that have a label.
        weight: (V, D) output embedding, or several matrices that follow each other in it: some may
            learn while others don't, in different number formats, and none is copied.
        labels: (S,) token ids.

    The gradient with respect to the logits is known as soon as they are (softmax − one-hot), so
    both products of the backward pass are taken while a block of logits is still in the cache.
    The idea is that of Liger's fused linear cross entropy (Hsu et al., 2024).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as a linear of torch would do by itself
        hidden = hidden.to(torch.get_autocast_dtype(device))
    parts = [weight] if isinstance(weight, torch.Tensor) else weight
    result: torch.Tensor = _LinearCrossEntropy.apply(hidden, labels, *parts)  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearCrossEntropy._blocks(ctx, hidden, labels, weights)

    @staticmethod
    def _blocks(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        need_hidden, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        # what learns is float32 under half-precision states
        parts = [weight.detach().to(hidden.dtype) for weight in weights]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grads = [torch.zeros_like(part, dtype=wide) if need else None
                 for part, need in zip(parts, need_weights, strict=True)]  # fmt: skip
        total = hidden.new_zeros((), dtype=wide)
        rows = max(1, HEAD_CHUNK_BYTES // (4 * sum(len(part) for part in parts)))
        for begin in range(0, hidden.shape[0], rows):
            block = hidden[begin : begin + rows].detach()
            logits = [F.linear(block, part).to(wide) for part in parts]  # (rows, part of V) each
            wanted, inside = _places(labels[begin : begin + rows, None], parts)
            log_norm = torch.stack([one.logsumexp(1, keepdim=True) for one in logits]).logsumexp(0)
            for one, place, here in zip(logits, wanted, inside, strict=True):
                total -= torch.where(here, one.gather(1, place), 0).sum()
            total += log_norm.sum()
            if not (need_hidden or any(need_weights)):
                continue
            into = None if grad_hidden is None else grad_hidden[begin : begin + rows]
            for i, part in enumerate(parts):
                grad = logits[i].sub_(log_norm).exp_()  # softmax, in place
                grad.scatter_add_(1, wanted[i], -inside[i].to(wide))
                grad = grad.to(hidden.dtype)
                if into is not None and i == 0:
                    torch.mm(grad, part, out=into)
                elif into is not None:
                    into.addmm_(grad, part)
                if (sums := grads[i]) is not None:
                    sums += torch.mm(grad.t(), block)
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, *grads = ctx.saved_tensors
        # in place: they are as large as what learns (a second backward pass is an error of torch's)
        return (
            None if grad_hidden is None else grad_hidden.mul_(upstream.to(grad_hidden.dtype)),
            None,
            *(None if grad is None else grad.mul_(upstream) for grad in grads),
        )


def _places(
    labels: torch.Tensor, parts: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each part the column of every label (rows, 1), and whether it lies in that part at all
    (where it does not, the column is any)."""
    columns, inside, begin = [], [], 0
    for part in parts:
        columns.append((labels - begin).clamp(0, len(part) - 1))
        inside.append((labels >= begin) & (labels < begin + len(part)))
        begin += len(part)
    return columns, inside
