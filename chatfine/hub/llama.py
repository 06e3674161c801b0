"""config.json of a Llama model, whatever format its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """What determines the network: lengths of its tensors and how positions are turned."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    """longest sequence in tokens"""
    norm_eps: float
    theta: float
    """base of the rotary angles"""
    tied: bool
    """head and embedding are one weight"""
    scaling: Mapping[str, Any] | None = None
    """stretched rotary angles, in Hugging Face's words; None = not stretched"""


def llama_config(shape: LlamaShape, dtype: str) -> dict[str, Any]:
    """The config.json for `shape` with weights in `dtype` (as torch spells it: "bfloat16").

    The rotary base is written both as `rope_theta` (with `rope_scaling`) and as `rope_parameters`:
    transformers 5 writes the second, many other readers know only the first.
    """
    scaling = dict(shape.scaling or {})
    old = {"rope_scaling": scaling} if scaling else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.theta, "rope_type": "default", **scaling},
        **old,
        "rope_theta": shape.theta,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
        "dtype": dtype,
    }
