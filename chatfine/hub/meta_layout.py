"""Meta's layout as plain facts: params.json, names of tensors, along which axis they are cut.

After the models' own code, https://github.com/meta-llama/llama-models, and the conversion script of
the transformers library. Nothing here reads a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.llama import LlamaShape
from chatfine.i18n import t

Listing = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor → its number format and shape."""

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
CUT = {"output": 0, "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
       "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0}  # fmt: skip
"""The axis along which a tensor is cut into shards; norms are whole in each."""
_DERIVED = "rope.freqs"  # the rotary angles, which everybody computes
_FOREIGN = ("moe_args", "vision_chunk_size", "vision_args", "quantization_args", "lora_args")


@dataclass(frozen=True, slots=True)
class Family:
    """A generation of Llama: its name, and the longest sequence its models were made for."""

    name: str
    context: int


LLAMA1, LLAMA2 = Family("Llama 1", 2048), Family("Llama 2", 4096)
CODE_LLAMA = Family("Code Llama", 16384)
LLAMA3, LLAMA31 = Family("Llama 3", 8192), Family("Llama 3.1", 131072)


@dataclass(frozen=True, slots=True)
class Joined:
    """One tensor of the Hugging Face folder: from which of Meta's, how put together."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None
    """the pieces are joined along it; None = each shard holds the whole"""
    heads: int
    """> 0: rows are brought into Hugging Face's rotary order, for so many heads"""

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def check_params(where: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The model's part of params.json, with whole numbers where they belong.

    Raises:
        ModelError: meta-bad-params, or meta-unsupported for what is no plain text model.
    """
    params = dict(values.get("model", values))
    foreign = next((name for name in _FOREIGN if params.get(name)), None)
    if foreign is not None:
        raise ModelError(
            "meta-unsupported", t("models with {name} in params.json can't be converted",
                                  name=foreign), where=str(where),
            why=t("only plain Llama text models (1, 2, 3, 3.1 to 3.3) are known here"),
            fix=t("get it as *.safetensors: {command}", command="chatfine download OWNER/NAME"),
        )  # fmt: skip
    params["n_kv_heads"] = params.get("n_kv_heads") or params.get("n_heads")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        value = params.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise bad_params(where, t("{name} is {value}; a whole number above 0 is needed",
                                      name=name, value=repr(value)))  # fmt: skip
    if params["dim"] % params["n_heads"] or params["n_heads"] % params["n_kv_heads"]:
        raise bad_params(where, t("dim, n_heads and n_kv_heads do not fit each other"))
    return params


def family_of(names: str, params: Mapping[str, Any]) -> Family:
    """Which Llama this is: by params.json where that tells, else by what the folder is called.

    Llama 1 and 2 have equal keys. Where the name says nothing, Llama 1 is known by its norm_eps
    (1e-6; its 65B has 1e-5, but no shared key heads at that width) and by its 60 layers (30B).
    """
    theta = float(params.get("rope_theta") or 10000.0)
    if params.get("use_scaled_rope"):
        return LLAMA31
    if theta == 1_000_000:
        return CODE_LLAMA
    if theta > 10000 or params.get("vocab_size", -1) > 100_000:
        return LLAMA3
    if re.search(r"llama-?2", names):
        return LLAMA2
    if params["n_kv_heads"] != params["n_heads"]:
        return LLAMA2
    first = float(params.get("norm_eps", 1e-5)) < 5e-6 or params["n_layers"] == 60
    return LLAMA1 if first or params["dim"] == 8192 else LLAMA2


def inner_width(params: Mapping[str, Any]) -> int | None:
    """Width of the feed-forward layer that params.json stands for; None if it does not say."""
    step = params.get("multiple_of")
    if not step:
        return None
    width = int(2 * (4 * params["dim"]) / 3)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None:
        width = int(factor * width)
    return int(step) * -(-width // int(step))


def inner_params(hidden: int, inner: int) -> dict[str, Any]:
    """`multiple_of` and, where it is needed, `ffn_dim_multiplier` for a feed-forward width."""
    plain = {"dim": hidden}
    for factor in (None, 1.3, 1.5, 1.0):
        for step in (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            found: dict[str, Any] = {"multiple_of": step}
            if factor is not None:
                found["ffn_dim_multiplier"] = factor
            if inner_width(plain | found) == inner:
                return found
    # half a unit above, so that cutting off the fraction gives the width itself
    return {"multiple_of": 1, "ffn_dim_multiplier": (inner + 0.5) / int(2 * (4 * hidden) / 3)}


def read_shape(
    where: Path, params: Mapping[str, Any], listings: Sequence[Listing], context: int, tied: bool
) -> LlamaShape:
    """The network's lengths, from params.json and from the tensors themselves.

    Raises:
        ModelError: meta-bad-params, meta-missing-tensor.
    """
    shards, first = len(listings), listings[0]
    inner = _shape_of(first, "layers.0.feed_forward.w1.weight", where)[0] * shards
    embedding = _shape_of(first, "tok_embeddings.weight", where)
    if "output.weight" in first:
        vocabulary = first["output.weight"][1][0] * shards
    else:
        vocabulary = embedding[0] * (shards if embedding[1] == params["dim"] else 1)
    said = params.get("vocab_size", -1)
    if said > 0 and said != vocabulary:
        raise bad_params(where, t("it says vocab_size = {said}, the weights have {found} rows",
                                  said=said, found=vocabulary))  # fmt: skip
    if inner_width(params) not in (None, inner):
        raise bad_params(where, t("it stands for a feed-forward width of {said}, the weights have "
                                  "{found}", said=inner_width(params), found=inner))  # fmt: skip
    return LlamaShape(
        hidden=params["dim"],
        inner=inner,
        layers=params["n_layers"],
        heads=params["n_heads"],
        kv_heads=params["n_kv_heads"],
        head_dim=params["dim"] // params["n_heads"],
        vocabulary=vocabulary,
        context=context,
        norm_eps=float(params.get("norm_eps", 1e-5)),
        theta=float(params.get("rope_theta") or 10000.0),
        tied=tied,
        scaling=_scaling(params, tied),
    )


def _scaling(params: Mapping[str, Any], tied: bool) -> dict[str, Any] | None:
    """Llama 3.1's stretched angles; the small models of 3.2, which tie their head, stretch more."""
    if not params.get("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": float(params.get("rope_scaling_factor") or (32.0 if tied else 8.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
        "original_max_position_embeddings": 8192,
    }


def tensor_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor, under Meta's names without `.weight`."""
    hidden, shared = shape.hidden, shape.kv_heads * shape.head_dim
    layer = {
        "attention_norm": (hidden,),
        "attention.wq": (shape.heads * shape.head_dim, hidden),
        "attention.wk": (shared, hidden),
        "attention.wv": (shared, hidden),
        "attention.wo": (hidden, shape.heads * shape.head_dim),
        "ffn_norm": (hidden,),
        "feed_forward.w1": (shape.inner, hidden),
        "feed_forward.w2": (hidden, shape.inner),
        "feed_forward.w3": (shape.inner, hidden),
    }
    outer = {"tok_embeddings": (shape.vocabulary, hidden), "norm": (hidden,),
             "output": (shape.vocabulary, hidden)}  # fmt: skip
    inner = {
        f"layers.{n}.{name}": size for n in range(shape.layers) for name, size in layer.items()
    }
    return outer | inner


def hf_name(name: str) -> str:
    """Meta's name of a tensor in Hugging Face's words; both without `.weight`."""
    if name in OUTER:
        return OUTER[name]
    _, number, inner = name.split(".", 2)
    return f"model.layers.{number}.{INNER[inner]}"


def rotary_heads(name: str, shape: LlamaShape) -> int:
    """How many heads the rows of a tensor are rotated in; 0 for one without rotary order."""
    kind = name.split(".", 2)[-1]
    return {"attention.wq": shape.heads, "attention.wk": shape.kv_heads}.get(kind, 0)


def plan_join(
    where: Path, shape: LlamaShape, listings: Sequence[Listing], dtype: str
) -> list[Joined]:
    """What to do for each tensor of the Hugging Face folder, sorted by name.

    Args:
        dtype: number format to write; "" = each tensor's own.

    Raises:
        ModelError: meta-missing-tensor, meta-wrong-shape, or meta-unsupported (unknown tensors).
    """
    plan = []
    wanted = tensor_shapes(shape)
    for name, whole in wanted.items():
        source = f"{name}.weight"
        if name == "output" and shape.tied:
            continue
        pieces = [_shape_of(listing, source, where) for listing in listings]
        own = listings[0][source][0]
        if own not in ("F32", "F16", "BF16"):
            raise _unsupported(where, t("{name} is stored as {format}", name=source, format=own))
        axis = _axis(where, source, pieces, whole)
        heads = rotary_heads(name, shape)
        plan.append(Joined(f"{hf_name(name)}.weight", source, dtype or own, whole, axis, heads))
    known = {f"{name}.weight" for name in wanted} | {_DERIVED}
    unknown = sorted({name for listing in listings for name in listing} - known)
    if unknown:
        raise _unsupported(where, t("unknown tensors: {names}", names=", ".join(unknown[:3])))
    return sorted(plan, key=lambda item: item.name)


def _axis(
    where: Path, name: str, pieces: Sequence[tuple[int, ...]], whole: tuple[int, ...]
) -> int | None:
    """The axis along which these pieces make the whole; Llama 2 and 3 cut embeddings otherwise."""
    if all(piece == whole for piece in pieces):
        return None
    for axis in range(len(whole)):
        part = [piece[axis] if len(piece) == len(whole) else -1 for piece in pieces]
        rest = {(*piece[:axis], *piece[axis + 1 :]) for piece in pieces}
        if sum(part) == whole[axis] and rest == {(*whole[:axis], *whole[axis + 1 :])}:
            return axis
    raise ModelError(
        "meta-wrong-shape",
        t("{name} has the shapes {found} in the {n} files; together they should be {whole}",
          name=name, found=" ".join(str(list(piece)) for piece in pieces), n=len(pieces),
          whole=list(whole)),
        where=str(where), why=t("the files, or params.json, are of different models"),
        fix=t("download the model again into a new folder"),
    )  # fmt: skip


def _shape_of(listing: Listing, name: str, where: Path) -> tuple[int, ...]:
    if name not in listing or not listing[name][1]:
        raise ModelError(
            "meta-missing-tensor", t("the weights have no tensor {name}", name=name),
            where=str(where), why=t("this is not a Llama model in Meta's layout, or not all of it"),
            fix=t("name the folder with consolidated.00.pth and its own params.json"),
        )  # fmt: skip
    return listing[name][1]


def bad_params(where: Path, why: str) -> ModelError:
    """The error for a params.json that does not fit."""
    return ModelError(
        "meta-bad-params", t("params.json can't be used"), where=str(where / "params.json"),
        why=why, fix=t("download params.json of this very model again"),
    )  # fmt: skip


def _unsupported(where: Path, why: str) -> ModelError:
    return ModelError(
        "meta-unsupported", t("{path} can't be converted", path=where), where=str(where), why=why,
        fix=t("get the model as *.safetensors: {command}", command="chatfine download OWNER/NAME"),
    )  # fmt: skip
