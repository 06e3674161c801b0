"""Meta's layout written out independently: a Llama in plain torch, and checkpoints cut into shards.

Complex rotary numbers over neighbouring pairs, shared key and value heads, RMSNorm, SwiGLU, as the
papers and Meta's own programs define them. Nothing of chatfine is used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

LLAMA2 = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1,
          "multiple_of": 8, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}  # fmt: skip
VOCABULARY = 64
Tensors = dict[str, torch.Tensor]


def inner_of(params: dict[str, Any]) -> int:
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * math.ceil(width / params["multiple_of"])


def random_weights(params: dict[str, Any], vocabulary: int = VOCABULARY, seed: int = 0) -> Tensors:
    """The whole model's tensors under Meta's names."""
    generator = torch.Generator().manual_seed(seed)
    dim, inner = params["dim"], inner_of(params)
    shared = dim // params["n_heads"] * (params.get("n_kv_heads") or params["n_heads"])

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(dim, generator=generator)

    weights = {"tok_embeddings.weight": matrix(vocabulary, dim), "norm.weight": norm(),
               "output.weight": matrix(vocabulary, dim)}  # fmt: skip
    for number in range(params["n_layers"]):
        layer = {
            "attention.wq": matrix(dim, dim), "attention.wk": matrix(shared, dim),
            "attention.wv": matrix(shared, dim), "attention.wo": matrix(dim, dim),
            "feed_forward.w1": matrix(inner, dim), "feed_forward.w2": matrix(dim, inner),
            "feed_forward.w3": matrix(inner, dim), "attention_norm": norm(), "ffn_norm": norm(),
        }  # fmt: skip
        weights |= {f"layers.{number}.{name}.weight": value for name, value in layer.items()}
    return weights


def cut(weights: Tensors, shards: int, embedding_axis: int = 1) -> list[Tensors]:
    """Model-parallel shards: column-parallel matrices by rows, row-parallel ones by columns."""
    parts: list[Tensors] = [{} for _ in range(shards)]
    for name, value in weights.items():
        kind = name.split(".")[-2]
        if kind in ("wo", "w2"):
            pieces = value.chunk(shards, 1)
        elif kind == "tok_embeddings":
            pieces = value.chunk(shards, embedding_axis)
        elif "norm" in kind:
            pieces = (value,) * shards
        else:
            pieces = value.chunk(shards, 0)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def write_meta(
    folder: Path, params: dict[str, Any], weights: Tensors, shards: int = 1, axis: int = 1
) -> Path:
    """A folder as Meta's download.sh leaves it (without the tokenizer)."""
    folder.mkdir(parents=True)
    for number, part in enumerate(cut(weights, shards, axis)):
        angles = {"rope.freqs": torch.rand(params["dim"] // params["n_heads"] // 2)}
        torch.save(part | angles, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return folder


def logits(params: dict[str, Any], weights: Tensors, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of Meta's network in float32."""
    dim, heads = params["dim"], params["n_heads"]
    shared, width = params.get("n_kv_heads") or heads, dim // heads
    steps = torch.arange(0, width, 2)[: width // 2].float()
    frequencies = stretched(params, params.get("rope_theta", 10000.0) ** (-steps / width))
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]  # (T, 1, width / 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"])
        return x * scale * weights[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (T, heads, width)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    h = weights["tok_embeddings.weight"][ids]
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for number in range(params["n_layers"]):

        def linear(x: torch.Tensor, name: str, layer: int = number) -> torch.Tensor:
            return x @ weights[f"layers.{layer}.{name}.weight"].T

        x = norm(h, f"layers.{number}.attention_norm")
        q = rotate(linear(x, "attention.wq").view(-1, heads, width))
        k = rotate(linear(x, "attention.wk").view(-1, shared, width))
        v = linear(x, "attention.wv").view(-1, shared, width)
        k, v = (part.repeat_interleave(heads // shared, 1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width) + future
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        h = h + linear(mixed, "attention.wo")
        x = norm(h, f"layers.{number}.ffn_norm")
        gated = F.silu(linear(x, "feed_forward.w1")) * linear(x, "feed_forward.w3")
        h = h + linear(gated, "feed_forward.w2")
    return norm(h, "norm") @ weights["output.weight"].T


def stretched(params: dict[str, Any], frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's angles: slow waves 8 times slower, fast ones as they are, a ramp between."""
    if not params.get("use_scaled_rope"):
        return frequencies
    found = []
    for frequency in frequencies.tolist():
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            found.append(frequency)
        elif wave > 8192:
            found.append(frequency / 8)
        else:
            share = (8192 / wave - 1) / (4 - 1)
            found.append((1 - share) * frequency / 8 + share * frequency)
    return torch.tensor(found)
