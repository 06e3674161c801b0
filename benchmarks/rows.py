"""What learning new vocabulary rows costs: step time and peak memory with and without them.

A random model of the given shape (no files are read) takes optimizer steps on packed documents, in
cases: nothing but 64 rows, all new rows, LoRA, LoRA and all new rows, and the last two of the rows
through PEFT's own forward. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from chatfine import console
from chatfine.data.batches import collate
from chatfine.model import adapters, attention, fast, learned_rows, recompute
from chatfine.runtime import pick_device
from chatfine.train.machine import peak_memory_bytes
from chatfine.train.optim import make_optimizer
from chatfine.types import Batch, Example

FEW = 64
CASES: dict[str, dict[str, Any]] = {
    "rows, 64 of them": {"method": "rows", "few": True},
    "rows": {"method": "rows"},
    "lora": {"method": "lora", "none": True},
    "lora + rows": {"method": "lora"},
    "rows (PEFT)": {"method": "rows", "peft": True},
    "lora + rows (PEFT)": {"method": "lora", "peft": True},
}
"""Case → method and which rows; `peft`: PEFT's forward and the model's own logits."""
BASELINE = {"rows": "rows, 64 of them", "lora + rows": "lora", "rows (PEFT)": "rows, 64 of them",
            "lora + rows (PEFT)": "lora"}  # fmt: skip


def build(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """A random Llama of the shape asked for, with room for the new rows and padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-(options.old_rows + options.rows) // 64) * 64,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    attention.install(model)
    return model


def make_batch(options: argparse.Namespace) -> Batch:
    """Documents of `--length` tokens, half of them new ids, all trained on."""
    torch.manual_seed(1)
    lengths = [options.length] * max(1, options.tokens // options.length)
    documents = []
    for length in lengths:
        old = torch.randint(3, options.old_rows, (length,))
        new = torch.randint(options.old_rows, options.old_rows + options.rows, (length,))
        ids = torch.where(torch.rand(length) < 0.5, old, new)
        documents.append(Example(ids.tolist(), [True] * length))
    return collate(documents)


def measure(
    case: Mapping[str, Any], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median seconds of a step, tokens a second and peak memory of one case."""
    count = FEW if case.get("few") else options.rows
    ids = () if case.get("none") else range(options.old_rows, options.old_rows + count)
    model = adapters.attach(build(options, device, dtype), case["method"], rows=ids,
                            rank=options.rank, alpha=2 * options.rank)  # fmt: skip
    if case.get("peft"):
        learned_rows.uninstall(model)
    if options.checkpointing:
        recompute.install(fast.causal_model(model), 99)
    batch = make_batch(options).to(device)
    learning = adapters.trained_parameters(model)
    optimizer = make_optimizer(learning, 0.0, device)
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(options.warmup + options.steps):
        begin = time.perf_counter()
        loss = fast.loss_sum(model, batch) / batch.supervised
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learning.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - begin)
    taken = median(seconds[options.warmup :])
    return {
        "seconds": taken,
        "tokens_per_second": batch.tokens / taken,
        "peak_bytes": float(peak_memory_bytes(device)),
        "learning": float(sum(one.numel() for one in learning.values())),
        "loss": float(loss.detach()),
    }


def main() -> None:
    """Run the cases and print a table."""
    options = arguments()
    device = pick_device(options.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    console.say(f"{device}, {torch.__version__}, {vars(options)}")
    results: dict[str, dict[str, float]] = {}
    for name in options.cases.split(";"):
        results[name] = measure(CASES[name], options, device, dtype)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = []
    for name, one in results.items():
        base = results.get(BASELINE.get(name, ""))
        extra = f"{one['seconds'] / base['seconds'] - 1:+.1%}" if base else "–"
        memory = one["peak_bytes"] - base["peak_bytes"] if base else 0.0
        own = 16 * (one["learning"] - base["learning"]) if base else 0.0
        rows.append([name, f"{1000 * one['seconds']:.1f}", f"{one['tokens_per_second']:,.0f}",
                     extra, f"{one['peak_bytes'] / 2**30:.2f}", f"{memory / 2**30:+.2f}",
                     f"{own / 2**30:.2f}", f"{one['loss']:.4f}"])  # fmt: skip
    console.table(["case", "ms a step", "tok/s", "time", "peak GiB", "more GiB", "rows' own GiB",
                   "loss"], rows)  # fmt: skip
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "results": results}, file, indent=1)


def arguments() -> argparse.Namespace:
    """The command line; the defaults are a Llama-2-7B with the tutorial's 20,339 characters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--old-rows", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=20339)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by ;")
    parser.add_argument("-o", "--output", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
