"""GGUF → Hugging Face folder: weights in bf16 safetensors, config.json and generation_config.json.

The tokenizer's files are written by tokenizer/files.py. Names and the order of rows follow
llama.cpp's convert_hf_to_gguf.py, backwards; the file layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read by the `gguf` package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chatfine.errors import ModelError
from chatfine.hub.llama import LlamaShape, llama_config
from chatfine.hub.shards import Planned, write_json, write_shards
from chatfine.i18n import t

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    source: Any  # gguf.ReaderTensor
    heads: int  # > 0: rows are in llama.cpp's rotary order for so many heads


def gguf_to_folder(gguf: Path, output: Path) -> None:
    """Write the weights and configs of a Llama-architecture GGUF into the folder `output`.

    Quantised blocks are dequantised to float32 and rounded to bf16, one tensor at a time.

    Raises:
        ModelError: gguf-damaged, or gguf-unsupported (another architecture, tensors unknown here).
    """
    import gguf as library

    try:
        reader = library.GGUFReader(gguf)
        lists = ("tokenizer.ggml.tok", "tokenizer.ggml.merges")  # long, and not needed here
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith(lists)
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(
            "gguf-damaged", t("{file} can't be read as GGUF", file=gguf.name), where=str(gguf),
            why=str(error), fix=t("download it again"),
        ) from None  # fmt: skip
    if fields.get("general.architecture") != "llama":
        raise _unsupported(gguf, t("architecture {name}", name=fields.get("general.architecture")))
    try:
        tensors = [_place(gguf, tensor, fields) for tensor in reader.tensors]
        tensors.sort(key=lambda tensor: tensor.name)
        config = _config(fields, [tensor.name for tensor in tensors], _rows(tensors))
    except (KeyError, TypeError) as error:
        raise _unsupported(gguf, t("a file without {what}", what=error)) from None
    output.mkdir(parents=True, exist_ok=True)
    by_name = {tensor.name: tensor for tensor in tensors}
    planned = [Planned(tensor.name, "BF16", tensor.shape) for tensor in tensors]
    write_shards(output, planned, lambda name: _values(by_name[name]).astype("<u2").data)
    write_json(output / "config.json", config)
    ids = {name: config[name] for name in config if name.endswith("_token_id")}
    write_json(output / "generation_config.json", {"_from_model_config": True, **ids})


def _config(fields: dict[str, Any], names: list[str], vocabulary: int) -> dict[str, Any]:
    """The config.json of a Llama model from a GGUF's metadata."""

    def value(name: str, default: Any = None) -> Any:
        return fields.get(f"llama.{name}", default)

    heads, hidden = int(value("attention.head_count")), int(value("embedding_length"))
    shape = LlamaShape(
        hidden=hidden,
        inner=int(value("feed_forward_length")),
        layers=int(value("block_count")),
        heads=heads,
        kv_heads=int(value("attention.head_count_kv") or heads),
        head_dim=int(value("attention.key_length") or hidden // heads),
        vocabulary=vocabulary,
        context=int(value("context_length")),
        norm_eps=_short(value("attention.layer_norm_rms_epsilon", 1e-5)),
        theta=_short(value("rope.freq_base", 10000.0)),
        tied="lm_head.weight" not in names,
    )
    config = llama_config(shape, "bfloat16")
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token_id"] = int(token)
    return config


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to the nearest bf16, ties to even; returned as raw 16-bit patterns.

    Same values as torch's `.to(torch.bfloat16)` for all finite numbers and infinities.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return rounded.astype(np.uint16)


def undo_rotary_order(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key matrix from llama.cpp's order to that of Hugging Face.

    llama.cpp keeps the two numbers that are rotated together side by side, Hugging Face half a head
    apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _place(gguf: Path, tensor: Any, fields: dict[str, Any]) -> _Tensor:
    shape = tuple(int(length) for length in reversed(tensor.shape.tolist()))
    block = _BLOCK.fullmatch(tensor.name)
    outer = _OUTER.get(tensor.name.removesuffix(".weight"))
    if outer is not None:
        return _Tensor(f"{outer}.weight", shape, tensor, 0)
    if block is None or block[2] not in _INNER:
        raise _unsupported(gguf, t("tensor {name}", name=tensor.name))
    heads = fields["llama.attention.head_count"]
    rotary = {"attn_q": heads, "attn_k": fields.get("llama.attention.head_count_kv", heads)}
    name = f"model.layers.{block[1]}.{_INNER[block[2]]}.weight"
    return _Tensor(name, shape, tensor, int(rotary.get(block[2], 0)))


def _rows(tensors: list[_Tensor]) -> int:
    rows = [item.shape[0] for item in tensors if item.name == "model.embed_tokens.weight"]
    if not rows:
        raise KeyError("token_embd.weight")
    return rows[0]


def _values(tensor: _Tensor) -> npt.NDArray[np.uint16]:
    """The tensor as bf16 patterns in Hugging Face's order of rows."""
    from gguf.quants import dequantize

    values = dequantize(tensor.source.data, tensor.source.tensor_type).reshape(tensor.shape)
    if tensor.heads:
        values = undo_rotary_order(values, tensor.heads)
    if not np.isfinite(values).all():
        raise ModelError(
            "gguf-damaged", t("tensor {name} holds numbers that are not finite", name=tensor.name),
            fix=t("download it again"),
        )  # fmt: skip
    return to_bf16(values)


def _short(value: float) -> float:
    """A float32 as the shortest decimal that names it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _unsupported(gguf: Path, why: str) -> ModelError:
    return ModelError(
        "gguf-unsupported", t("{file} can't be converted", file=gguf.name), where=str(gguf),
        why=t("not known here: {what}", what=why),
        fix=t("get the model as *.safetensors: {command}", command="chatfine download NAME"),
    )  # fmt: skip
