"""Decoder layers of the 7B shape in several ways: adapters, attention, norm and SwiGLU, each alone.

Everything is compiled. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import children
import torch
from torch import nn

from chatfine import console
from chatfine.data.batches import collate
from chatfine.model import adapters, attention, lora, mlp
from chatfine.model.compiled import CompiledLoss, FixedInputs
from chatfine.model.document_attention import document_attention
from chatfine.model.frozen import FrozenLinear, linears_to_freeze
from chatfine.types import Batch, Example

VOCAB, WARM_RUNS = 1024, 4
ADAPTERS = {
    "ours, bf16": {},
    "PEFT's own layers, bf16": {"peft": True},
    "ours, fp8": {"storage": "fp8"},
    "ours, fp8, MLP as its linears": {"storage": "fp8", "mlp": False},
}
ATTENTION = ("cuDNN", "flash", "FlexAttention")
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of a layer, and of the rows that go through it."""

    device: str
    hidden: int
    inside: int
    heads: int
    length: int
    documents: tuple[tuple[int, int], ...]  # length of a document, tokens in all


SEVEN_B = Shape("cuda", 4096, 11008, 32, 2048, ((2048, 8192), (8192, 8192), (32768, 32768)))
TINY = Shape("cpu", 64, 160, 4, 32, ((16, 64),))


def milliseconds(run: Callable[[], Any], times: int = 10) -> float:
    """Of the median of so many runs, after warm ones."""
    taken = []
    for _ in range(WARM_RUNS + times):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken[WARM_RUNS:])


def build(shape: Shape, layers: int, storage: str = "", peft: bool = False) -> Any:
    """A random Llama with LoRA of rank 16 on all linears."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=shape.hidden, intermediate_size=shape.inside,
        num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, max_position_embeddings=shape.length,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(shape.device):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    attention.install(model)
    for name, layer in linears_to_freeze(model).items() if storage else ():
        parent, _, last = name.rpartition(".")
        frozen: Any = FrozenLinear.of(layer, storage)
        frozen.keep_turned()
        setattr(model.get_submodule(parent), last, frozen)
    model = adapters.attach(model, "lora", rank=16)
    if peft:
        lora.uninstall(model)
        for module in model.modules():
            vars(module).pop("fused_adapter", None)
    return model.train()


def batch(shape: Shape, rows: int) -> Batch:
    """Full rows, all trained on."""
    source = torch.Generator().manual_seed(0)
    drawn = torch.randint(5, VOCAB, (rows, shape.length), generator=source)
    found = collate([Example(row.tolist(), [True] * shape.length) for row in drawn])
    return found.to(torch.device(shape.device))


def adapters_rows(shape: Shape, rows: int, layers: int) -> Iterator[Row]:
    """A micro-batch forward and back through so many layers, for each way of adapters."""
    tokens = rows * shape.length
    for name, way in ADAPTERS.items():
        model = build(shape, layers, str(way.get("storage", "")), bool(way.get("peft")))
        loss = CompiledLoss(model, FixedInputs(tokens, shape.length, True, rows)).train()
        if not way.get("mlp", True):
            mlp.uninstall(model)
        cast = torch.autocast(shape.device, torch.bfloat16) if way.get("peft") else nullcontext()
        data = batch(shape, rows)

        def step(loss: Any = loss, data: Batch = data, cast: Any = cast) -> None:
            loss.accumulate(data, tokens, lambda: cast)

        yield {"what": f"{layers} layers, {rows} rows", "way": name, "ms": milliseconds(step)}
        del loss, model, step
        gc.collect()
        torch.cuda.empty_cache()


def attention_rows(shape: Shape, length: int, tokens: int) -> Iterator[Row]:
    """Documents of one length, forward and back."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, device = shape.hidden // shape.heads, shape.device
    made = [torch.randn(tokens, shape.heads, size, device=device, dtype=torch.bfloat16)
            for _ in range(4)]  # fmt: skip
    query, key, value = (one.requires_grad_() for one in made[:3])
    offsets = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    flex = torch.compile(flex_attention)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, length, shape.heads, size).transpose(1, 2)

    def run(way: str) -> None:
        if way == "FlexAttention":
            out = flex(apart(query), apart(key), apart(value), block_mask=mask)
            out = out.transpose(1, 2).flatten(0, 1)
        else:
            out = document_attention(
                query, key, value, offsets, length, size**-0.5, full=way == "cuDNN"
            )
        torch.autograd.grad(out, (query, key, value), made[3])

    for way in ATTENTION[: 3 if device == "cuda" else 2]:  # a CPU has no gradient of the third
        what = f"attention, {tokens // length} x {length:,} tokens"
        yield {"what": what, "way": way, "ms": milliseconds(lambda way=way: run(way))}


def small_rows(shape: Shape, tokens: int) -> Iterator[Row]:
    """Norm and SwiGLU, forward and back: the compiler's and Liger's."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(shape.hidden).to(shape.device, torch.bfloat16)
    kinds: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
        "norm": {"compiler": torch.compile(norm, dynamic=False)},
        "SwiGLU": {"compiler": torch.compile(lambda a, b: nn.functional.silu(a) * b)},
    }
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    except ImportError:
        console.say("liger-kernel is not installed")
    else:
        kinds["norm"]["Liger"] = lambda x: LigerRMSNormFunction.apply(x, norm.weight, 1e-6)
        kinds["SwiGLU"]["Liger"] = LigerSiLUMulFunction.apply
    for kind, ways in kinds.items():
        width, count = (shape.hidden, 1) if kind == "norm" else (shape.inside, 2)
        made = [torch.randn(tokens, width, device=shape.device, dtype=torch.bfloat16)
                for _ in range(count + 1)]  # fmt: skip
        inputs = [one.requires_grad_() for one in made[:count]]
        for way, call in ways.items():

            def run(call: Any = call, inputs: Any = inputs, grad: Any = made[-1]) -> None:
                torch.autograd.grad(call(*inputs), inputs, grad)

            yield {"what": f"{kind}, {tokens:,} tokens", "way": way, "ms": milliseconds(run)}


KINDS: dict[str, Callable[[Shape, argparse.Namespace], Iterator[Row]]] = {
    "adapters": lambda shape, options: adapters_rows(shape, options.rows, options.layers),
    "attention": lambda shape, _: chain.from_iterable(
        attention_rows(shape, *one) for one in shape.documents
    ),
    "small": lambda shape, options: small_rows(shape, options.rows * shape.length),
}


def write(folder: Path, rows: Sequence[Row], card: str) -> None:
    """layers.md and layers.json."""
    folder.mkdir(parents=True, exist_ok=True)
    best: dict[str, float] = {}
    for row in rows:
        best[row["what"]] = min(row["ms"], best.get(row["what"], row["ms"]))
    lines = [f"# Layers on {card}", "", "| what | way | ms | × the fastest |",
             "| --- | --- | --: | --: |"]  # fmt: skip
    for row in rows:
        ratio = row["ms"] / best[row["what"]]
        lines.append(f"| {row['what']} | {row['way']} | {row['ms']:.2f} | {ratio:.2f} |")
    (folder / "layers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {"card": card, "libraries": children.installed(), "rows": list(rows)}
    (folder / "layers.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> list[Row]:
    """Measure all of it; returns the rows of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for layers.md")
    parser.add_argument("--layers", type=int, default=4, help="how many at once")
    parser.add_argument("--rows", type=int, default=4, help=f"of {SEVEN_B.length:,} tokens")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try this on a CPU")
    parser.add_argument("--only", default=",".join(KINDS), help="which, with commas")
    options = parser.parse_args(words)
    kinds = options.only.split(",")
    if wrong := set(kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; there are {', '.join(KINDS)}")
    shape = TINY if options.tiny else SEVEN_B
    if shape.device == "cuda" and not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny tries it without")
    rows: list[Row] = []
    for kind in kinds:
        for row in KINDS[kind](shape, options):
            rows.append(row)
            console.say(f"{row['what']}: {row['way']} {row['ms']:.2f} ms")
            write(options.output, rows, children.card_name())
    return rows


if __name__ == "__main__":
    main()
