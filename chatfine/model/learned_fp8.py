"""Products of 8-bit floats with weights that learn.

The weight stays what it is, float32 or bf16, and so does what the optimizer does with it. For a
product in training its rows are rounded to e4m3 with a scale each, straight from its own format, as
those of the other factor are (`model.fp8`):

    y = x Wᵀ           both rounded; twice the rate of a bf16 product
    grad_x = grad W    the same codes of W; its scales are folded into grad before that is rounded
    grad_W = gradᵀ x   exact, in the format of the products: a third of the work, and what the
                       weight becomes

It is rounded anew for each micro-batch: that reads the weight once or twice, where its products
read thousands of tokens for each row. So no copy can be out of date, whoever changes the weight,
and a graph that is replayed (`model.graphs`) rounds what lies there at the time.

What is measured and answered is the weight itself, multiplied exactly; so it is too where the
device has no such product, or a dimension is no multiple of 16. The slow twin is `nn.Linear`.
Compiled, rounding becomes part of what is computed before; as plain operations it takes longer than
a product of 8-bit floats saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chatfine.model.fp8 import multiplies_fp8, multiply_back, multiply_fp8, round_rows
from chatfine.model.frozen import linears_to_freeze


def install(model: Any) -> int:
    """Let the linears of `model`, all plain ones but the head, be multiplied in fp8 in training;
    returns how many are. Their names and parameters stay, and so do saved weights."""
    linears = linears_to_freeze(model)
    for linear in linears.values():
        # the class and not the method: layers of equal code share a compiled program
        linear.__class__ = LearnedFp8Linear
    return len(linears)


class LearnedFp8Linear(nn.Linear):
    """An `nn.Linear` whose products are those of 8-bit floats while it learns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b of x (…, in), in its format or that of autocast."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if not (self.training and multiplies_fp8(x, self.out_features, self.in_features)):
            return super().forward(x)
        y: torch.Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """x Wᵀ (N, out) of x (N, in) and W (out, in), see above. Kept for the backward pass are x and
    the codes of W, one byte a weight; a compiler keeps their scales and rounds W a second time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        codes, scales = round_rows(weight)
        rounded, own = round_rows(x)
        ctx.save_for_backward(x, codes, scales)
        ctx.dtype = weight.dtype
        return multiply_fp8(rounded, codes, own, scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, codes, scales = ctx.saved_tensors
        # not every version of the compiler knows what needs a gradient; it drops what is unused
        of_x, of_weight = (torch.compiler.is_compiling() or one for one in ctx.needs_input_grad)
        return (
            multiply_back(grad, codes.t().contiguous(), scales) if of_x else None,
            torch.mm(grad.t(), x).to(ctx.dtype) if of_weight else None,
        )
