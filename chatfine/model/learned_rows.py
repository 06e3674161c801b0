"""New vocabulary rows that learn while every other row stays, behind PEFT's layers and files.

PEFT's layer (`trainable_token_indices`, peft/tuners/trainable_tokens) puts the learned rows into a
copy of the whole matrix at every step, forward, and takes the gradient of the whole copy, backward.
Here a token's row is taken from one matrix or the other, and the head is two products; nothing of
the matrix's size is written. The slow twin is PEFT's forward; it stays in charge wherever something
is not plain (rows that don't follow each other, several adapters, a scaled or biased matrix).

Between `first` and `first + rows` the frozen matrix is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.errors import UsageError
from chatfine.i18n import t


def targets(causal: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` for the rows `ids` of embedding and head (once if tied).

    Raises:
        UsageError: a head whose rows are not all that there is to it.
    """
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UsageError(
            "rows-unsupported",
            t("new rows of this model can't learn alone"),
            where="--train-rows",
            why=t("its head is more than a matrix"),
            fix=t("train everything: --method full"),
        )
    names = {module: name.rsplit(".", 1)[-1] for name, module in causal.named_modules()}
    found = {names[embedding]: list(ids)}
    if head.weight is not embedding.weight:
        found[names[head]] = list(ids)
    return found


def attach(model: Any, ids: Sequence[int]) -> Any:
    """`model` with the rows `ids` of embedding and head as all that learns.

    Raises:
        UsageError: as `targets`.
    """
    from peft import TrainableTokensConfig, get_peft_model

    found = targets(model, ids)
    config = TrainableTokensConfig(
        token_indices=list(ids), target_modules=sorted(found), task_type="CAUSAL_LM"
    )
    return wrap(lambda: get_peft_model(model, config, autocast_adapter_dtype=False))


def wrap(make: Callable[[], Any]) -> Any:
    """What `make` returns, a model with PEFT on it, also on a base that processes share (FSDP2):
    PEFT copies rows out of the matrix as it stands, and every process needs all of them whole."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return make()
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        wrapped = make()
    for layer in layers(wrapped):
        for name, value in layer.trainable_tokens_delta.items():
            if isinstance(value, DTensor):
                whole = nn.Parameter(value.full_tensor().detach(), value.requires_grad)
                layer.trainable_tokens_delta[name] = whole
                layer.trainable_tokens_original[name] = whole.detach().clone()
    return wrapped


def layers(model: nn.Module) -> list[Any]:
    """PEFT's layers of learned rows in `model`."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of the learned rows in `model`, tied ones once."""
    mark = "trainable_tokens_delta"
    return {name: value for name, value in model.named_parameters() if mark in name}


def freeze(model: nn.Module) -> None:
    """Let the learned rows of `model` stay as they are."""
    for parameter in parameters(model).values():
        parameter.requires_grad_(False)


def install(model: nn.Module) -> int:
    """Give every plain layer of learned rows the fast forward; returns how many got it."""
    count = 0
    for layer in layers(model):
        kind = _kind(layer)
        if kind is not None:
            layer.forward = kind(layer)
            # PEFT keeps what the rows were, to undo a merge that never happens here
            spare = layer.trainable_tokens_original
            spare[layer.active_adapters[0]] = spare[layer.active_adapters[0]][:0].clone()
            count += 1
    return count


def uninstall(model: nn.Module) -> None:
    """Give PEFT's own forward back."""
    for layer in layers(model):
        if isinstance(layer.__dict__.get("forward"), _Rows):
            del layer.forward


def head_parts(head: Any) -> list[torch.Tensor] | None:
    """The matrices whose products with the hidden state, one after the other, are the logits.

    None where `head` is no head of learned rows with the fast forward.
    """
    layer = getattr(head, "token_adapter", head)
    product = getattr(layer, "__dict__", {}).get("forward")
    if not isinstance(product, _Product):
        return None
    off = getattr(head, "disable_adapters", False) or not product.usable
    return [layer.base_layer.weight] if off else product.parts()


def _kind(layer: Any) -> type[_Rows] | None:
    """The fast forward for `layer`; None where only PEFT's will do."""
    base, active = layer.base_layer, layer.active_adapters
    if len(active) != 1 or base.weight.requires_grad:
        return None
    ids = list(layer.token_indices[active[0]])
    if not ids or ids != list(range(ids[0], ids[0] + len(ids))):
        return None
    if type(base) is nn.Embedding:
        return _Lookup if base.max_norm is None and not base.scale_grad_by_freq else None
    return _Product if type(base) is nn.Linear and base.bias is None else None


class _Rows:
    """A replacement forward of one layer; PEFT's takes over when the layer is switched off."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = layer.active_adapters[0]
        self.first = int(layer.token_indices[self.name][0])

    @property
    def usable(self) -> bool:
        """Whether the layer stands as it stood when the forward was put in."""
        layer = self.layer
        return not (layer.disable_adapters or layer.merged) and layer.active_adapters == [self.name]

    @property
    def rows(self) -> torch.Tensor:
        """(rows, D), as they learn."""
        value: torch.Tensor = self.layer.trainable_tokens_delta[self.name]
        return value

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.usable:
            result: torch.Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return result
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The forward where nothing is unusual."""
        raise NotImplementedError


class _Lookup(_Rows):
    """ids (…) → rows (…, D)."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        weight, rows = self.layer.base_layer.weight, self.rows
        place = x - self.first
        learned = (place >= 0) & (place < len(rows))
        own = F.embedding(place.clamp(0, len(rows) - 1), rows).to(weight.dtype)
        return torch.where(learned[..., None], own, F.embedding(x, weight))


class _Product(_Rows):
    """hidden states (…, D) → logits (…, V)."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in self.parts()], -1)

    def parts(self) -> list[torch.Tensor]:
        """Old rows, learned rows, and the padding after them if there is any."""
        weight, rows = self.layer.base_layer.weight, self.rows
        after = weight[self.first + len(rows) :]
        return [weight[: self.first], rows, *([after] if len(after) else [])]
