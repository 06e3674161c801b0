"""One process against several: tokens a second and memory of the same run, shared out.

A model of random weights is written to a folder, then `chatfine train` runs on it alone and under
torchrun, with as many rows on each card (weak scaling). See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from inputs import SHAPES, write_model, write_texts

from chatfine import console


def run(options: argparse.Namespace, model: Path, data: Path, case: dict[str, Any]) -> Any:
    """One training run; its result with the median speed of the steps after the first three."""
    output = options.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    processes = case["processes"]
    flags = {
        "-m": model, "-d": data, "-o": output, "--max-steps": options.steps, "--packing": "on",
        "--max-length": options.length, "--batch-size": options.rows, "--validation": "0",
        "--save-every": options.steps, "--seed": 0,
    } | case["flags"]  # fmt: skip
    words = ["-m", "chatfine", "train", *(str(word) for pair in flags.items() for word in pair)]
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", str(processes)]  # fmt: skip
    environment = dict(os.environ)
    if processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run([*start, *words, "--json"], env=environment, capture_output=True,
                          text=True, timeout=options.timeout)  # fmt: skip
    if done.returncode:
        console.say((done.stdout + done.stderr)[-3000:])
        return None
    result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    result["speed"] = statistics.median(speeds[3:] or speeds)
    shutil.rmtree(output, ignore_errors=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lora", default="7b", choices=SHAPES)
    parser.add_argument("--full", default="1b", choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--timeout", type=float, default=300)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "rows.jsonl"
    write_texts(data, 2000, options.length // 8)
    lora = {"--method": "lora", "--rank": 16}
    full = {"--method": "full", "--learning-rate": 1e-5}
    n = options.processes
    cases = [
        (options.lora, 1, lora), (options.lora, n, lora | {"--sharding": "none"}),
        (options.lora, n, lora | {"--sharding": "full"}),
        (options.full, 1, full), (options.full, n, full | {"--sharding": "full"}),
        (options.full, n, full | {"--sharding": "gradients"}),
        (options.full, n, full | {"--sharding": "none"}),
    ]  # fmt: skip
    alone: dict[str, float] = {}
    rows = []
    for shape, processes, flags in cases:
        if flags["--method"] not in options.methods:
            continue
        model = options.work / shape
        if not model.exists():
            write_model(model, shape, options.tokenizer)
        result = run(options, model, data, {"processes": processes, "flags": flags})
        name = f"{shape} {flags['--method']}, {flags.get('--sharding', 'alone')}"
        if result is None:
            rows.append([name, str(processes), "failed", "", ""])
            continue
        speed = result["speed"]
        base = alone.setdefault(f"{shape} {flags['--method']}", speed)
        rows.append([name, str(processes), f"{speed:,.0f}", f"{speed / base:.2f} ×",
                     f"{result['peak_memory_bytes'] / 2**30:.1f}"])  # fmt: skip
        console.say(" ".join(rows[-1]))
    console.table(["run", "processes", "tok/s", "of one", "peak GiB a process"], rows)


if __name__ == "__main__":
    main()
