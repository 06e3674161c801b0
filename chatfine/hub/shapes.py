"""Do the tensors of a model folder have the shapes its config promises?

Every model: embedding, head and number of layers. Llama-like ones, whose names and sizes are known:
every matrix of every layer. Found here in milliseconds instead of after a minute of loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.i18n import t

Shapes = Mapping[str, tuple[int, ...]]
LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types with these names and sizes; each has a head of its own unless the config ties it."""
_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the name of the embedding ends."""


def check_shapes(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Hold the shapes of all tensors against the config.

    Raises:
        ModelError: "model-missing-tensor" or "model-wrong-shape".
    """
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    embedding = embedding_name(shapes)
    if embedding is None:
        raise _missing(path, "model.embed_tokens.weight")
    if len(shapes[embedding]) == 2 and shapes[embedding][0] < vocabulary:
        raise _old_rows(path, embedding, shapes[embedding], (vocabulary, hidden))
    _same(path, shapes, embedding, (vocabulary, hidden), "vocab_size × hidden_size")
    head = next((name for name in shapes if name.endswith("lm_head.weight")), None)
    if head is not None:
        _same(path, shapes, head, (vocabulary, hidden), "vocab_size × hidden_size")
    _check_layer_count(path, config, shapes)
    if config.get("model_type") not in LLAMA_LIKE or config.get("quantization_config"):
        return
    if head is None and not config.get("tie_word_embeddings"):
        raise _missing(path, "lm_head.weight")
    for name, shape in _llama_shapes(config).items():
        if name not in shapes:
            raise _missing(path, name)
        _same(path, shapes, name, shape, "config.json")


def embedding_name(shapes: Mapping[str, Any]) -> str | None:
    """The name of the embedding among a model's tensors."""
    return next((name for name in shapes if name.endswith(EMBEDDINGS)), None)


def _check_layer_count(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    found = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    extra = config.get("num_nextn_predict_layers") or 0  # layers that only predict further tokens
    wanted = config["num_hidden_layers"]
    if not wanted <= len(found) <= wanted + extra:
        raise ModelError(
            "model-wrong-shape",
            t("config.json says num_hidden_layers = {wanted}, the weights have {found} layers",
              wanted=wanted, found=len(found)),
            where=str(path),
            fix=t("config.json and the weights are of different models: download the model again"),
        )  # fmt: skip


def _llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    inner = config["intermediate_size"]
    width = config.get("head_dim") or hidden // heads
    shared = (config.get("num_key_value_heads") or heads) * width
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    wanted = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    return {"model.norm.weight": (hidden,), **wanted}


def _old_rows(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> ModelError:
    command = f"chatfine expand-vocab -m {path} -o NEW_FOLDER"
    return ModelError(
        "model-wrong-shape",
        t("{name} has shape {found}; {source} says {wanted}", name=name, found=list(found),
          source="vocab_size × hidden_size", wanted=list(wanted)),
        where=str(path),
        why=t("the weights have fewer rows than config.json says; editing it adds none"),
        fix=[t("give the model more rows: {command}", command=command),
             t("or write vocab_size = {rows} into config.json again", rows=found[0])],
    )  # fmt: skip


def _same(path: Path, shapes: Shapes, name: str, wanted: tuple[int, ...], source: str) -> None:
    if shapes[name] != wanted:
        raise ModelError(
            "model-wrong-shape",
            t("{name} has shape {found}; {source} says {wanted}",
              name=name, found=list(shapes[name]), source=source, wanted=list(wanted)),
            where=str(path),
            fix=t("config.json and the weights are of different models: download the model again"),
        )  # fmt: skip


def _missing(path: Path, name: str) -> ModelError:
    return ModelError(
        "model-missing-tensor", t("the weights have no tensor {name}", name=name), where=str(path),
        why=t("the folder is incomplete, or not a decoder model"),
        fix=t("download the model again, or use one of: {command}", command="chatfine models"),
    )  # fmt: skip
