"""A SwiGLU MLP with adapters on plain weights as one operation.

Between its two products lies `model.swiglu_lora`, which adds the adapters' part as it computes: of
gate and up nothing is written but the base's product. Its slow twin is an MLP of the linears of
`model.lora`. `model.mlp_fp8` is the same on fp8 weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model.lora import plus
from chatfine.model.lora_fp8 import adapter_gradients, inner_gradient
from chatfine.model.swiglu_lora import swiglu_lora, swiglu_lora_back


class MlpLora(torch.autograd.Function):
    """y = down(silu(gate(x)) · up(x)) of x (N, in), each linear with its adapter.

    `first` (2 I, in) is the weight of gate and up on top of each other, `second` (out, I) that of
    down, both in the format of x; `scales` are those of their adapters. `weights` are A of gate, up
    and down, then their B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: tuple[float, float],
        first: torch.Tensor,
        second: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """See the class; kept are the inputs of both products, and what comes out of the first."""
        a_gate, a_up, a_down, *b = [one.to(x.dtype) for one in weights]
        a = torch.cat((a_gate, a_up))
        inner = F.linear(x, a)
        both = F.linear(x, first)
        h = swiglu_lora(both, inner * scales[0], b[0], b[1])
        inner_down = F.linear(h, a_down)
        y = plus(F.linear(h, second), inner_down * scales[1], b[2].t())
        ctx.save_for_backward(x, inner, both, h, inner_down, a, a_down, *b, first, second)
        ctx.scales = scales
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Those of x and of `weights`."""
        x, inner, both, h, inner_down, a, a_down, *b, first, second = ctx.saved_tensors
        scale, scale_down = ctx.scales
        back = inner_gradient(grad, b[2:], scale_down)
        of_a_down, of_b_down = adapter_gradients(grad, back, h, inner_down, b[2:], scale_down)
        grad_both = swiglu_lora_back(
            torch.mm(grad, second), back, a_down, both, inner * scale, b[0], b[1]
        )
        back = inner_gradient(grad_both, b[:2], scale)
        of_a_gate, of_a_up, *of_b = adapter_gradients(grad_both, back, x, inner, b[:2], scale)
        grad_x = None
        # as in `model.lora`: not every version of the compiler knows what needs a gradient
        if torch.compiler.is_compiling() or ctx.needs_input_grad[0]:
            grad_x = plus(torch.mm(grad_both, first), back, a)
        return (grad_x, None, None, None, of_a_gate, of_a_up, of_a_down, *of_b, of_b_down)
