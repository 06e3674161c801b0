"""Decoder layers of the 7B shape in several ways: adapters, attention, norm and SwiGLU, each alone.

Everything is compiled. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu
import torch
from torch import nn

from chatfine import console
from chatfine.data.batches import collate
from chatfine.model import adapters, attention, lora
from chatfine.model.compiled import CompiledLoss, FixedInputs
from chatfine.model.document_attention import document_attention
from chatfine.model.fast import causal_model
from chatfine.model.frozen import FrozenLinear, linears_to_freeze
from chatfine.types import Batch, Example

HIDDEN, INSIDE, HEADS, VOCAB, LENGTH = 4096, 11008, 32, 1024, 2048
ADAPTERS = {
    "ours, bf16": {},
    "PEFT's own layers, bf16": {"peft": True},
    "ours, fp8": {"storage": "fp8"},
    "ours, fp8, MLP as its linears": {"storage": "fp8", "mlp": False},
}
ATTENTION = ("cuDNN", "flash", "FlexAttention")
Row = dict[str, Any]


def milliseconds(run: Callable[[], Any], times: int = 10) -> float:
    """Of the median of so many runs, after warm ones."""
    for _ in range(4):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[times // 2]


def build(layers: int, storage: str = "", peft: bool = False, mlp: bool = True) -> Any:
    """A random Llama with LoRA of rank 16 on all linears, on the card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INSIDE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
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


def batch(rows: int) -> Batch:
    """Full rows, all trained on."""
    drawn = torch.randint(5, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return collate([Example(row.tolist(), [True] * LENGTH) for row in drawn]).to("cuda")


def adapters_rows(rows: int, layers: int) -> Iterator[Row]:
    """A micro-batch forward and back through so many layers, for each way of adapters."""
    for name, way in ADAPTERS.items():
        model = build(layers, **way)  # type: ignore[arg-type]
        loss = CompiledLoss(model, FixedInputs(rows * LENGTH, LENGTH, True, rows)).train()
        if not way.get("mlp", True):
            for module in causal_model(model).modules():
                if type(module).__name__.startswith("Whole"):
                    module.__class__ = type(module).__bases__[1]
        cast = torch.autocast("cuda", torch.bfloat16) if way.get("peft") else nullcontext()
        data = batch(rows)

        def step(loss: Any = loss, data: Batch = data, cast: Any = cast) -> None:
            loss.accumulate(data, rows * LENGTH, lambda: cast)

        yield {"what": f"{layers} layers, {rows} rows", "way": name, "ms": milliseconds(step)}
        del loss, model, step
        gc.collect()
        torch.cuda.empty_cache()


def attention_rows(length: int, tokens: int) -> Iterator[Row]:
    """Documents of one length, forward and back."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = HIDDEN // HEADS
    made = [torch.randn(tokens, HEADS, size, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    query, key, value = (one.requires_grad_() for one in made[:3])
    offsets = torch.arange(0, tokens + 1, length, device="cuda", dtype=torch.int32)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda")
    flex = torch.compile(flex_attention)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, length, HEADS, size).transpose(1, 2)

    def run(way: str) -> None:
        if way == "FlexAttention":
            out = flex(apart(query), apart(key), apart(value), block_mask=mask)
            out = out.transpose(1, 2).flatten(0, 1)
        else:
            out = document_attention(
                query, key, value, offsets, length, size**-0.5, full=way == "cuDNN"
            )
        torch.autograd.grad(out, (query, key, value), made[3])

    for way in ATTENTION:
        what = f"attention, {tokens // length} x {length:,} tokens"
        yield {"what": what, "way": way, "ms": milliseconds(lambda way=way: run(way))}


def small_rows(tokens: int) -> Iterator[Row]:
    """Norm and SwiGLU, forward and back: the compiler's and Liger's."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(HIDDEN).to("cuda", torch.bfloat16)
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
        width, count = (HIDDEN, 1) if kind == "norm" else (INSIDE, 2)
        made = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                for _ in range(count + 1)]  # fmt: skip
        inputs = [one.requires_grad_() for one in made[:count]]
        for way, call in ways.items():

            def run(call: Any = call, inputs: Any = inputs, grad: Any = made[-1]) -> None:
                torch.autograd.grad(call(*inputs), inputs, grad)

            yield {"what": f"{kind}, {tokens:,} tokens", "way": way, "ms": milliseconds(run)}


def write(folder: Path, rows: Sequence[Row], card: str) -> None:
    """layers.md and layers.json."""
    folder.mkdir(parents=True, exist_ok=True)
    best: dict[str, float] = {}
    for row in rows:
        best[row["what"]] = min(row["ms"], best.get(row["what"], row["ms"]))
    lines = [f"# Layers of the 7B shape on {card}", "", "| what | way | ms | × the fastest |",
             "| --- | --- | --: | --: |"]  # fmt: skip
    for row in rows:
        ratio = row["ms"] / best[row["what"]]
        lines.append(f"| {row['what']} | {row['way']} | {row['ms']:.2f} | {ratio:.2f} |")
    (folder / "layers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {"card": card, "libraries": gpu.installed(), "rows": list(rows)}
    (folder / "layers.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> list[Row]:
    """Measure all of it; returns the rows of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for layers.md")
    parser.add_argument("--layers", type=int, default=4, help="how many at once")
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH:,} tokens")
    parser.add_argument("--only", default="adapters,attention,small", help="which, with commas")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    kinds: dict[str, Callable[[], list[Iterator[Row]]]] = {
        "adapters": lambda: [adapters_rows(options.rows, options.layers)],
        "attention": lambda: [attention_rows(2048, 8192), attention_rows(8192, 8192),
                              attention_rows(32768, 32768)],
        "small": lambda: [small_rows(8192)],
    }  # fmt: skip
    rows: list[Row] = []
    for kind in options.only.split(","):
        for part in kinds[kind]():
            for row in part:
                rows.append(row)
                console.say(f"{row['what']}: {row['way']} {row['ms']:.2f} ms")
                write(options.output, rows, gpu.card_name())
    return rows


if __name__ == "__main__":
    main()
