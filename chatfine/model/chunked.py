"""Modules that treat every token by itself, piece by piece over a long row.

A decoder layer's MLP makes several numbers of its width out of each number of the model's, and its
norms compute in float32: for a row of 65,536 tokens of a 7B model that is gigabytes each, all alive
at once while the layer is recomputed for its backward pass. Cut into pieces, each of which is
recomputed in its own backward pass, only what the module reads is kept, and a piece of the rest.
The price is one more forward pass of these modules. The results are the same: no token sees
another here. (The loss has pieces of its own, `model.cross_entropy`.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from chatfine.model.fast import causal_model

MLPS = (
    {"gate_proj", "up_proj", "down_proj"},
    {"gate_up_proj", "down_proj"},
    {"up_proj", "down_proj"},
)
"""Linears of an MLP without routing or dropout."""
ACTIVATIONS = {"act_fn", "activation_fn", "act"}


def install(model: Any, tokens: int) -> int:
    """Let the MLPs and norms of the decoder layers of `model`, and its last norm, go through pieces
    of `tokens` tokens; returns how many modules do. What is built in another way is left as it is.

    Args:
        model: a causal model, perhaps with an adapter on it.
        tokens: of a piece; 0 = no pieces.
    """
    decoder = causal_model(model).get_decoder()
    count = 0
    for part in (decoder, *getattr(decoder, "layers", ())) if tokens else ():
        for name, module in part.named_children():
            if _sees_one_token(name, module) and not isinstance(module, _Piecewise):
                module.__class__ = _in_pieces(module.__class__)
                module.piece_tokens = tokens
                count += 1
    return count


def _sees_one_token(name: str, module: Any) -> bool:
    """Whether this child of a decoder or of a layer is a norm, or an MLP without more to it."""
    inner = {name for name, _ in module.named_children()}
    return inner - ACTIVATIONS in MLPS if name == "mlp" else name.endswith("norm") and not inner


class _Piecewise:
    """Comes before a module's own class, whose forward maps one tensor (…, N, D)."""

    piece_tokens: int

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        """The same as a whole, piece by piece where the row is longer than a piece."""
        whole = super().forward  # type: ignore[misc]
        if x.shape[-2] <= self.piece_tokens or more or named:
            return whole(x, *more, **named)
        if torch.is_grad_enabled():
            whole = functools.partial(checkpoint, whole, use_reentrant=False)
        # a split and not slices: its backward pass joins the pieces without adding up whole rows
        return torch.cat([whole(piece) for piece in torch.split(x, self.piece_tokens, -2)], -2)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Its class, without the pieces."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, _Piecewise) else kind


def give_class(module: nn.Module, kind: Any) -> None:
    """Make `kind` its class; if it goes through pieces, it still does."""
    module.__class__ = _in_pieces(kind) if isinstance(module, _Piecewise) else kind


def in_pieces(module: nn.Module) -> bool:
    """Whether it was given pieces."""
    return isinstance(module, _Piecewise)


@functools.cache
def _in_pieces(kind: type[nn.Module]) -> type[nn.Module]:
    """The class `kind` in pieces. Modules of one class stay of one class, see `model.lora`."""
    return type(f"Piecewise{kind.__name__}", (_Piecewise, kind), {})
