"""A Llama of two layers with adapters, and micro-batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chatfine.data.batches import collate
from chatfine.model import adapters, attention
from chatfine.model.frozen import FrozenLinear, linears_to_freeze
from chatfine.types import Batch, Example

TOKENS, LONGEST = 64, 32
"""Room of a micro-batch, and of a document."""


def build(storage: str | None = None, b: float = 0.1) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        )
    )  # fmt: skip
    attention.install(model)
    for name, layer in linears_to_freeze(model).items() if storage else ():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FrozenLinear.of(layer, storage))
    model = adapters.attach(model, "lora", rank=4)
    for name, parameter in adapters.trained_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=b)
    return model


def batch_of(*lengths: int) -> Batch:
    drawn = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 96, (length,), generator=drawn).tolist() for length in lengths]
    return collate([Example(row, [i > 1 for i in range(len(row))]) for row in rows])
