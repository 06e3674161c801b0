"""Does a grown vocabulary learn faster? Bits a character on unseen text against training time.

    prepare  cut Chinese text into pieces, whole pages kept apart
    learn    continue one model on it for some seconds (one process, one device)
    compare  `learn` for several models and seeds, side by side, and the table

Every model gets the same seconds: first its step is timed alone, then it runs as many steps as fit,
so that several runs may share a device. All weights learn. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import mean, median, stdev
from typing import Any

from chatfine import console

PIECE = 400  # characters


def pieces(text: str) -> list[str]:
    """A page cut at line ends into pieces of about `PIECE` characters."""
    found, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), PIECE):
            part = line[start : start + PIECE]
            if current and len(current) + len(part) > PIECE:
                found.append(current)
                current = ""
            current += part
    return [*found, current] if current.strip() else found


def prepare(options: argparse.Namespace) -> None:
    """Pages whose hash falls in a tenth are validation; medical records count as pages."""
    train: list[str] = []
    held: list[str] = []
    for file in options.files:
        kept: list[str] = []
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row.get("text") or f"{row['ask']}\n{row['answer']}\n"
            chosen = kept if zlib.crc32(text.encode()) % 10 == 0 else train
            chosen += pieces(text)
        held += kept[:: max(1, len(kept) // options.held)]
    for name, texts in (("train", train), ("validation", held)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (options.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        console.say(f"{name}: {len(texts)} pieces, {sum(map(len, texts))} characters")


def learn(options: argparse.Namespace) -> None:
    """Train; prints a line of JSON for every evaluation, the step time first."""
    import torch

    from chatfine.data.batches import Batches, in_order
    from chatfine.data.examples import DataSettings, load_examples
    from chatfine.evaluate.loss import evaluate_loss
    from chatfine.model import adapters, compiled, fast, graphs
    from chatfine.model.load import load_model
    from chatfine.runtime import pick_device, set_seed
    from chatfine.tokenizer.encode import ChatTokenizer
    from chatfine.train.distributed import Group
    from chatfine.train.loop import Precision, Progress, Trainer
    from chatfine.train.optim import Schedule, make_optimizer
    from chatfine.types import StepReport

    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = ChatTokenizer.load(options.model, template="plain")
    texts = options.data / "validation.jsonl"
    settings = DataSettings(validation=str(texts), max_length=options.length, too_long="cut")
    cache = options.data / "cache"
    data = load_examples([str(options.data / "train.jsonl")], tokenizer, settings, cache)
    characters = sum(len(json.loads(line)["text"]) for line in texts.open(encoding="utf-8"))
    set_seed(options.seed)
    model = adapters.attach(load_model(options.model, dtype, device), "full")
    parameters = adapters.trained_parameters(model)
    batches = Batches(data.train, (), options.seed, options.rows, 1, True, options.length)
    precision = Precision(device, dtype, autocast=True)
    measure = fast.LossModel(model)
    if device.type == "cuda":
        fixed = compiled.FixedInputs(options.rows * options.length, options.length)
        measure = graphs.GraphedLoss(model, fixed)
    held = data.validation
    assert held is not None

    def evaluate() -> float:
        with precision.context():
            result = evaluate_loss(measure, in_order(held, 8192), device)
        return result.bits_per_char(characters)

    reports: list[StepReport] = []
    trainer = Trainer(
        model=measure, parameters=parameters, batches=batches,
        optimizer=make_optimizer(parameters, 0.0, device),
        schedule=Schedule("cosine", options.learning_rate, options.steps // 20 + 1, options.steps),
        precision=precision, progress=Progress(), device=device, group=Group(), clip=1.0,
        evaluate=lambda: None, save=lambda: None, report=reports.append,
        stop_requested=lambda: False, eval_every=10**9, save_every=10**9,
    )  # fmt: skip
    measure.train()
    print(json.dumps({"step": 0, "bits": evaluate()}), flush=True)
    times = []
    for step in range(1, options.steps + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if (step % max(1, options.steps // 4) == 0 and step + 4 <= options.steps) or (
            step == options.steps
        ):
            print(json.dumps({"step": step, "bits": evaluate()}), flush=True)
    tokens = trainer.progress.tokens
    print(json.dumps({"step_seconds": median(times[len(times) // 3 :]), "tokens": tokens,
                      "tokens_a_step": tokens / options.steps}), flush=True)  # fmt: skip


def one(options: argparse.Namespace, model: str, seed: int, steps: int, gpu: int) -> list[Any]:
    """`learn` in a process of its own."""
    words = [sys.executable, __file__, "learn", "--model", model, "--data", str(options.data),
             "--seed", str(seed), "--steps", str(steps), "--rows", str(options.rows),
             "--length", str(options.length),
             "--learning-rate", str(options.learning_rate)]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "4"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compare(options: argparse.Namespace) -> None:
    """Every model with every seed, several at a time."""
    models = dict(pair.split("=", 1) for pair in options.models)
    timed: dict[str, Any] = {}
    for name, folder in models.items():  # b@a is timed as a, which has the same shape
        like = name.partition("@")[2]
        timed[name] = timed[like] if like else one(options, folder, 0, options.timing_steps, 0)[-1]
    steps = {name: max(5, round(options.seconds / fact["step_seconds"]))
             for name, fact in timed.items()}  # fmt: skip
    places: Queue[int] = Queue()
    for gpu in range(options.gpus):
        for _ in range(options.beside):
            places.put(gpu)

    def job(name: str, seed: int) -> tuple[str, int, list[Any]]:
        gpu = places.get()
        try:
            lines = one(options, models[name], seed, steps[name], gpu)
            console.say(json.dumps({"model": name, "seed": seed, "lines": lines}))
            return name, seed, lines
        finally:
            places.put(gpu)

    jobs = [(name, seed) for seed in range(options.seeds) for name in models
            if not (seed and name in options.once)]  # fmt: skip
    with ThreadPoolExecutor(options.gpus * options.beside) as pool:
        results = list(pool.map(lambda pair: job(*pair), jobs))
    curves: dict[str, list[list[float]]] = {name: [] for name in models}
    for name, _, lines in results:
        curves[name].append([line["bits"] for line in lines if "bits" in line])
    rows = []
    for name, found in curves.items():
        last = [curve[-1] for curve in found]
        spread = stdev(last) if len(last) > 1 else math.nan
        middle = " ".join(f"{mean(column):.3f}" for column in zip(*found, strict=True))
        rows.append([name, f"{1000 * timed[name]['step_seconds']:.0f}", str(steps[name]),
                     f"{steps[name] * timed[name]['tokens_a_step']:,.0f}", middle,
                     f"{mean(last):.3f} ± {spread:.3f}"])  # fmt: skip
    console.table(["model", "ms a step", "steps", "tokens", "bits a character on the way", "end"],
                  rows)  # fmt: skip
    if options.output:
        facts = {"timed": timed, "steps": steps, "curves": curves, "seconds": options.seconds}
        options.output.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    cut = verbs.add_parser("prepare")
    cut.add_argument("files", nargs="+")
    cut.add_argument("-o", "--output", type=Path, required=True)
    cut.add_argument("--held", type=int, default=80, help="validation pieces of each file")
    both = [verbs.add_parser("learn"), verbs.add_parser("compare")]
    for verb in both:
        verb.add_argument("--data", type=Path, required=True)
        verb.add_argument("--rows", type=int, default=16)
        verb.add_argument("--length", type=int, default=1024)
        verb.add_argument("--learning-rate", type=float, default=5e-4)
    both[0].add_argument("--model", type=Path, required=True)
    both[0].add_argument("--seed", type=int, default=0)
    both[0].add_argument("--steps", type=int, required=True)
    both[1].add_argument("--models", nargs="+", required=True, help="NAME=FOLDER …")
    both[1].add_argument("--seconds", type=float, default=60)
    both[1].add_argument("--seeds", type=int, default=3)
    both[1].add_argument("--once", nargs="*", default=[], help="models with one seed only")
    both[1].add_argument("--gpus", type=int, default=1)
    both[1].add_argument("--beside", type=int, default=1, help="runs at a time on a device")
    both[1].add_argument("--timing-steps", type=int, default=15)
    both[1].add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    {"prepare": prepare, "learn": learn, "compare": compare}[options.verb](options)


if __name__ == "__main__":
    main()
