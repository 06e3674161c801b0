"""Product with the output embedding and cross entropy in one, without keeping the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model.kernels import softmax_gradient_kernel

HEAD_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of the block of float32 logits alive at one time; larger gave no speed on two CPU cores."""
PIECE = 4096
"""Logits of a row that a program has in its registers at once. Fewer leave room for more programs,
and the card's cache keeps fewer of their rows until they are read again."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, labels)` without keeping the logits.

    Args:
        hidden: (S, D) states that have a label.
        weight: (V, D) output embedding, or several matrices that follow each other in it: some may
            learn while others don't, in different number formats, and none is copied.
        labels: (S,) token ids; below zero = counts nothing.
        compiled: turn logits into their gradient by one program; only for a single matrix.

    The gradient with respect to the logits is known as soon as they are (softmax − one-hot), so
    both products of the backward pass are taken while a block of logits is still in the cache.
    The idea is that of Liger's fused linear cross entropy (Hsu et al., 2024).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as a linear of torch would do by itself
        hidden = hidden.to(torch.get_autocast_dtype(device))
    parts = [weight] if isinstance(weight, torch.Tensor) else weight
    result: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, labels, compiled and len(parts) == 1, *parts
    )  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        compiled: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearCrossEntropy._blocks(ctx, hidden, labels, compiled, weights)

    @staticmethod
    def _blocks(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        compiled: bool,
        weights: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        need_hidden, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        # what learns is float32 under half-precision states
        parts = [weight.detach().to(hidden.dtype) for weight in weights]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grads = [torch.zeros_like(part, dtype=wide) if need else None
                 for part, need in zip(parts, need_weights, strict=True)]  # fmt: skip
        total = hidden.new_zeros((), dtype=wide)
        size = HEAD_CHUNK_BYTES.get(hidden.device.type, HEAD_CHUNK_BYTES["cpu"])
        rows = max(1, size // (4 * sum(len(part) for part in parts)))
        for begin in range(0, hidden.shape[0], rows):
            block = hidden[begin : begin + rows].detach()
            wanted = labels[begin : begin + rows]
            learns = need_hidden or any(need_weights)
            if compiled and learns:
                loss, grad = softmax_gradient(F.linear(block, parts[0]), wanted)
                total += loss
                found = [grad]
            else:
                loss, found = _gradients(block, parts, wanted, learns)
                total += loss
            into = None if grad_hidden is None else grad_hidden[begin : begin + rows]
            for i, grad in enumerate(found):
                if into is not None and i == 0:
                    torch.mm(grad, parts[i], out=into)
                elif into is not None:
                    into.addmm_(grad, parts[i])
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
            None,
            *(None if grad is None else grad.mul_(upstream) for grad in grads),
        )


def _gradients(
    block: torch.Tensor, parts: Sequence[torch.Tensor], labels: torch.Tensor, learns: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of the losses of some rows, and the gradient of their logits, part by part (none if
    nothing `learns`)."""
    wide = torch.promote_types(block.dtype, torch.float32)
    logits = [F.linear(block, part).to(wide) for part in parts]  # (rows, part of V) each
    wanted, inside = _places(labels[:, None], parts)
    log_norm = torch.stack([one.logsumexp(1, keepdim=True) for one in logits]).logsumexp(0)
    counts = labels[:, None] >= 0
    total = torch.where(counts, log_norm, 0).sum()
    for one, place, here in zip(logits, wanted, inside, strict=True):
        total -= torch.where(here, one.gather(1, place), 0).sum()
    if not learns:
        return total, []
    found = []
    for one, place, here in zip(logits, wanted, inside, strict=True):
        grad = one.sub_(log_norm).exp_()  # softmax, in place
        grad.scatter_add_(1, place, -here.to(wide)).mul_(counts)
        found.append(grad.to(block.dtype))
    return total, found


def softmax_gradient(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of some rows, and the gradient of their logits.

    On a card a Triton program does it, in 0.21 ms for 2,730 rows of 49,152 logits in bfloat16 on an
    H200; the compiled twin took 0.44, and reading and writing them once takes 0.13 ms.

    Args:
        logits: (N, V), not to be used afterwards: the gradient may lie in their place.
        labels: (N,) token ids; below zero = counts nothing.

    Returns:
        The loss () in float32, or float64 of such logits, and the gradient (N, V) in their format.
    """
    program = softmax_gradient_kernel() if logits.is_cuda else None
    if program is None or logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return _compiled_gradient()(logits, labels)
    rows, size = logits.shape
    gradient = logits.contiguous()
    losses = gradient.new_empty(rows, dtype=torch.float32)
    block = min(PIECE, max(128, 1 << (size - 1).bit_length()))
    warps = max(4, block // 256)
    program[(rows,)](gradient, labels.contiguous(), losses, size, BLOCK=block, num_warps=warps)
    return losses.sum(), gradient


def _softmax_gradient(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of the program, written for a compiler: everything but the norm in one pass."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_norm = wide.logsumexp(1, keepdim=True)
    labels = labels[:, None]
    counts = labels >= 0
    loss = torch.where(counts, log_norm - wide.gather(1, labels.clamp(min=0)), 0).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (columns == labels).to(wide.dtype)
    return loss, torch.where(counts, (wide - log_norm).exp() - one_hot, 0).to(logits.dtype)


@functools.lru_cache(maxsize=1)
def _compiled_gradient() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`_softmax_gradient` for any number of rows."""
    return torch.compile(_softmax_gradient, dynamic=True)


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
