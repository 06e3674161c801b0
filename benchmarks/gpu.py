"""chatfine and its peers on the same card, model shapes and data: speed, memory, first step.

Every measurement is a process of its own with a time limit; the table, the picture and the JSON are
written anew after each, so a run that is cut short keeps what it had. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import children
import gpu_report
import inputs
from gpu_cases import OURS, SYSTEMS, Case, Run, choose
from gpu_report import Result
from tokenizers import Tokenizer

from chatfine import console

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[1] / "shared/tokenizers/llama2_hf"
ROWS, DIALOGUES = 128, 1200
"""Rows divide by every batch, so that no step is smaller."""


def read_steps(log: Path) -> list[tuple[int, float]]:
    """Tokens and seconds of each step in a log of sums; no file, no steps."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    sums = [(0, 0.0)]
    for line in map(json.loads, lines):
        if "tokens" in line:
            sums.append((line["tokens"], line["seconds"]))
    return [
        (tokens - before, seconds - then) for (before, then), (tokens, seconds) in pairwise(sums)
    ]


def speed(steps: Sequence[tuple[int, float]]) -> float | None:
    """Tokens a second: of the median step where all have as many, else of all steps together."""
    if not steps:
        return None
    if len({tokens for tokens, _ in steps}) == 1:
        return steps[0][0] / statistics.median(seconds for _, seconds in steps)
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def our_words(case: Case, run: Run, model: Path, data: Path, output: Path, steps: int) -> list[str]:
    """`chatfine train` as a user types it; compiled, which it leaves to runs that are longer."""
    method = ["--rank", "16"] if case.method == "lora" else ["--learning-rate", "1e-5"]
    rows = f"{data.with_suffix('.py')}:rows"
    compiled = "off" if case.shape == "tiny" else "on"
    stored = run.weights if run.weights in ("fp8", "int8", "nf4") else "none"
    return [
        "-m", "chatfine", "train", "--json", "-m", str(model), "-d", rows, "-o", str(output),
        "--method", case.method, *method, "--quantize", stored, "--packing", "on",
        "--max-length", str(case.length), "--batch-size", str(run.batch), "--compile", compiled,
        "--max-steps", str(steps), "--save-every", str(steps), "--validation", "0", *run.flags,
    ]  # fmt: skip


def measure(case: Case, run: Run, card: str | None, options: argparse.Namespace) -> Result:
    """One system's run and what came of it; a failure is a result too."""
    model, data = prepare(case, options)
    work = options.work / f"card-{card or 0}"
    work.mkdir(exist_ok=True)
    output, log = work / "run", work / "steps.jsonl"
    shutil.rmtree(output, ignore_errors=True)
    steps = case.warm_up + run.times * (case.steps or options.steps)
    if run.system == OURS:
        log = output / "metrics.jsonl"
        words = our_words(case, run, model, data, output, steps)
    else:
        job = {"system": run.system, "model": str(model), "data": str(data), "log": str(log),
               "output": str(output), "method": case.method, "weights": run.weights,
               "batch": run.batch, "length": case.length, "steps": steps, "packing": run.packing,
               "checkpointing": run.checkpointing, "full_rows": case.data == "rows"}  # fmt: skip
        words = [str(HERE / "gpu_peers.py"), json.dumps(job)]
    home = options.work / "cache"
    ended = children.watch(
        [*children.placed(card), sys.executable, *words], log, work, options.timeout, home
    )
    taken = read_steps(log)
    rate = speed(taken[case.warm_up :])
    decided = output / "decisions.json"
    ours = json.loads(decided.read_text(encoding="utf-8"))["decided"] if decided.is_file() else {}
    shutil.rmtree(output, ignore_errors=True)
    return Result(
        case=case.name, title=case.title, system=run.system, weights=run.weights,
        batch=run.batch, note=run.note, packing=run.packing or run.system == OURS,
        checkpointing=_recomputed(ours) if ours else run.checkpointing,
        tokens_per_second=rate, peak_bytes=ended.result.get("peak_memory_bytes"),
        first_step_seconds=ended.first_step_seconds, error=ended.error,
        shape=ended.result.get("shape"), card=options.card, steps=taken, warm_up=case.warm_up,
        command=" ".join(words),
    )  # fmt: skip


def _recomputed(decided: dict[str, Any]) -> str:
    """What a run of ours computes again, in words."""
    layers = decided["recompute_layers"]
    return f"{layers} layers{', offloaded' if decided['offload'] else ''}" if layers else "none"


def write_model(shape: str, card: str | None, options: argparse.Namespace) -> Path:
    """The model folder of a shape, made on this card if it is not there yet."""
    model: Path = options.work / "models" / shape
    if not (model / "config.json").is_file():
        # in another process, which gives the card's memory back
        words = [str(HERE / "inputs.py"), str(model), shape, str(options.tokenizer)]
        command = [*children.placed(card), sys.executable, *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return model


def prepare(case: Case, options: argparse.Namespace) -> tuple[Path, Path]:
    """The model folder and data file of a case, made if they are not there yet."""
    model = write_model(case.shape, None, options)
    data = options.work / f"{case.data}-{case.length}.jsonl"
    if not data.is_file():
        size = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
        if case.data == "rows":
            count = max(8, min(ROWS, ROWS * 2048 // case.length))
            rows = inputs.full_rows(count, case.length, size)
        elif options.dialog:
            rows = islice(inputs.real_dialogues(options.dialog, model, case.length), DIALOGUES)
        else:
            rows = inputs.random_dialogues(DIALOGUES, case.length, size)
        lengths = inputs.write_token_rows(data, rows)
        console.say(f"{data.name}: {len(lengths):,} rows, {sum(lengths):,} tokens, "
                    f"median {statistics.median(lengths):,.0f}")  # fmt: skip
    return model, data


def jobs_of(options: argparse.Namespace) -> list[list[tuple[Case, Run]]]:
    """What is measured one after the other on one card; the longest rows first, so that no card
    waits for another at the end."""
    jobs: list[list[tuple[Case, Run]]] = []
    for case, runs in options.chosen:
        for run in runs:
            if run.again and jobs and jobs[-1][-1][0] is case:
                jobs[-1].append((case, run))
            else:
                jobs.append([(case, run)])
    return sorted(jobs, key=lambda job: -job[0][0].length)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder for gpu.md, gpu.png and gpu.json")
    add("--only", default="", help="regular expression on the names of cases")
    add("--systems", default=",".join(SYSTEMS), help="which of these, with commas")
    add("--weights", default="", help="only with frozen weights in these formats, with commas")
    add("--all", action="store_true", dest="everything", help="the less important runs too")
    add("--steps", type=int, default=8, help="measured steps")
    add(
        "--gpus",
        default="",
        help="numbers of cards with commas, one measurement at a time on each;"
        " the default is the first",
    )
    add("--work", type=Path, help="folder for models and runs; the default is temporary")
    add("--timeout", type=float, default=180, help="seconds a measurement may take")
    add("--tokenizer", type=Path, default=TOKENIZER, help="folder of a tokenizer")
    add("--dialog", type=Path, help="folder of MTS-Dialog; without it lengths are drawn at random")
    add("--join", type=Path, action="append", default=[], help="a gpu.json to go on from")
    options = parser.parse_args(words)
    options.systems, options.gpus, weights = (
        [name for name in text.split(",") if name]
        for text in (options.systems, options.gpus, options.weights)
    )
    if wrong := set(options.systems) - set(SYSTEMS):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; systems: {', '.join(SYSTEMS)}")
    if not options.tokenizer.is_dir():
        parser.error(f"there is no folder {options.tokenizer}; give one with --tokenizer")
    if options.dialog and not (options.dialog / inputs.DIALOGUES).is_file():
        parser.error(f"there is no {inputs.DIALOGUES} in {options.dialog}")
    options.chosen = choose(options.only, options.systems, options.everything, weights)
    if not options.chosen and not options.join:
        parser.error(f"no case has {options.only!r} in its name")
    return options


def main(words: Sequence[str] | None = None) -> list[Result]:
    """Measure all that was chosen; returns the results, earlier ones included."""
    options = arguments(words)
    options.card = children.card_name()
    earlier = [one for file in options.join for one in gpu_report.read(file)]
    facts = {
        "libraries": children.installed(),
        "dialogues": "MTS-Dialog" if options.dialog else "random tokens, lognormal lengths",
    }
    results = earlier
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        gpu_report.write(options.output, results, facts)
        # before anything is measured, the models as many at a time as there are cards
        shapes = list(dict.fromkeys(case.shape for case, _ in options.chosen))

        def made(shape: str, card: str | None) -> Path:
            return write_model(shape, card, options)

        list(children.on_cards(shapes, made, options.gpus))
        for case, _ in options.chosen:
            prepare(case, options)

        def measured(job: Sequence[tuple[Case, Run]], card: str | None) -> list[Result]:
            return [measure(case, run, card, options) for case, run in job]

        for several in children.on_cards(jobs_of(options), measured, options.gpus):
            for result in several:
                results = gpu_report.merged(results, result)
                console.say(gpu_report.line(result))
            gpu_report.write(options.output, results, facts)
    return results


if __name__ == "__main__":
    main()
