"""Does training on an fp8 or NF4 base learn as well as on a bf16 one? Real model, real texts.

Every run is `chatfine train` in a process of its own with a time limit; table, picture and JSON are
written anew after each, so that a benchmark cut short keeps what it had. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import children
import inputs
import quality_report
from quality_report import BASE, PLAIN, STORAGES, Result
from safetensors import SafetensorError

from chatfine import console
from chatfine.train.metrics import read_metrics

GAVE_UP = "could not be compiled"
"""What a run says that goes on without its compiled layers."""
SETTINGS = ("rank", "learning_rate", "steps", "evaluations", "batch_size", "max_length", "examples",
            "validation", "compile")  # fmt: skip
"""Results with others of these are not comparable."""


@dataclass(frozen=True)
class Source:
    """A data set: the file in its folder that tells which it is, and templates over its columns."""

    name: str
    file: str
    prompt: str
    response: str

    def rows(self, folder: Path) -> list[dict[str, str]]:
        """All rows in the order of the file."""
        with (folder / self.file).open(encoding="utf-8", newline="") as stream:
            return list(map(json.loads, stream) if self.file.endswith(".jsonl")
                        else csv.DictReader(stream))  # fmt: skip


SOURCES = (
    Source("MTS-Dialog", inputs.DIALOGUES, inputs.PROMPT, inputs.RESPONSE),
    Source("toyhom", "train.jsonl", "{ask}", "{answer}"),
)


def write_data(source: Source, folder: Path, work: Path, options: Any) -> dict[str, int]:
    """Write train.jsonl and validation.jsonl, chat messages of different questions that fit.

    Returns how many examples and tokens there are.
    """
    from chatfine.tokenizer.encode import ChatTokenizer
    from chatfine.types import Message

    tokenizer = ChatTokenizer.load(options.model)
    rows = source.rows(folder)
    random.Random(0).shuffle(rows)
    lengths: list[int] = []
    kept: dict[str, str] = {}
    for row in rows:
        question, answer = source.prompt.format_map(row), source.response.format_map(row)
        example = [Message("user", question), Message("assistant", answer)]
        length = len(tokenizer.encode_dialogue(example).ids)
        if question not in kept and length <= options.max_length:
            messages = [{"role": one.role, "content": one.content} for one in example]
            kept[question] = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            lengths.append(length)
        if len(kept) == options.validation + options.examples:
            break
    lines, held = list(kept.values()), options.validation
    if len(lines) <= held:
        raise SystemExit(f"{source.name} has {len(lines)} usable examples; --validation is {held}")
    work.mkdir(parents=True, exist_ok=True)
    (work / "validation.jsonl").write_text("".join(lines[:held]), encoding="utf-8")
    (work / "train.jsonl").write_text("".join(lines[held:]), encoding="utf-8")
    return {"train": len(lines) - held, "tokens": sum(lengths[held:]), "validation": held}


def our_words(data: Path, storage: str, seed: int, output: Path, options: Any) -> list[str]:
    """`chatfine train` as a user types it."""
    quantize = quality_report.quantized(storage)
    return [
        "-m", "chatfine", "train", "--json", "-m", str(options.model),
        "-d", str(data / "train.jsonl"), "--validation", str(data / "validation.jsonl"),
        "-o", str(output), "--dtype", "bf16", "--quantize", quantize, "--rank", str(options.rank),
        "--calibrate", "off" if storage in (BASE, quantize + PLAIN) else "on",
        "--targets", "all-linear", "--packing", "on", "--compile", options.compile,
        "--max-length", str(options.max_length), "--batch-size", str(options.batch_size),
        "--learning-rate", str(options.learning_rate), "--max-steps", str(options.steps),
        "--eval-every", str(max(1, options.steps // options.evaluations)), "--seed", str(seed),
    ]  # fmt: skip


def whole_words(data: Path, output: Path, options: Any) -> list[str]:
    """`chatfine eval` of a run's adapter on the bf16 weights that its base was rounded from."""
    return [
        "-m", "chatfine", "eval", "--json", str(output), "-d", str(data / "validation.jsonl"),
        "--quantize", "none", "--dtype", "bf16", "--max-length", str(options.max_length),
    ]  # fmt: skip


def read_points(log: Path) -> list[list[float]]:
    """Step, tokens so far and validation loss of each evaluation in a metrics.jsonl."""
    points, tokens = [], 0
    for line in read_metrics(log):
        tokens = line.get("tokens", tokens)
        if "val_loss" in line:
            points.append([line["step"], tokens, line["val_loss"]])
    return points


def keep_last(output: Path, step: int) -> None:
    """Make the adapter of a run that of its last step.

    chatfine keeps that of the best evaluation, but compared are losses after the last step.
    """
    from safetensors.torch import load_file, save_file

    adapter = output / "adapter/adapter_model.safetensors"
    weights = load_file(output / f"checkpoints/step-{step:08d}/weights.safetensors")
    renamed = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    if renamed.keys() != load_file(adapter).keys():
        raise ValueError("checkpoint and adapter have other names")
    save_file(renamed, adapter, metadata={"format": "pt"})


def whole(
    output: Path, data: Path, place: Sequence[str], best: int, options: Any
) -> tuple[float | None, str]:
    """Loss on the bf16 weights with the adapter of the last step, or why there is none."""
    work = output.parent / "whole"  # the training's own output stays
    work.mkdir()
    try:
        if best != options.steps:
            keep_last(output, options.steps)
    except (OSError, ValueError, SafetensorError) as error:
        return None, f"no adapter of the last step: {error}"
    words = [*place, sys.executable, *whole_words(data, output, options)]
    ended = children.watch(words, work / "no-log", work, options.timeout, options.work / "cache")
    loss = ended.result.get("loss")
    return loss, ended.error or ("" if loss is not None else "eval gave no loss")


def train(name: str, storage: str, seed: int, card: str | None, options: Any) -> Result:
    """One run, on a card of this number if there are several; a failure is a result too."""
    work = options.work / f"{name}-{storage}-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    output = work / "run"
    words = our_words(options.work / name, storage, seed, output, options)
    place = children.placed(card)
    log = output / "metrics.jsonl"
    # what is compiled and tokenised serves all seeds
    home = options.work / "cache"
    ended = children.watch([*place, sys.executable, *words], log, work, options.timeout, home)
    points, error = read_points(log), ended.error
    if not error and (not points or points[-1][0] != options.steps):
        error = f"no validation loss after step {options.steps}"
    decided: dict[str, Any] = {"quantize": "", "dtype": "", "compile": False}
    if (output / "decisions.json").is_file():
        decided = json.loads((output / "decisions.json").read_text(encoding="utf-8"))["decided"]
    fp8 = decided["quantize"] == "fp8" or decided.get("fp8_products")
    said = (work / "stderr").read_text(encoding="utf-8", errors="replace")
    whole_loss, whole_error = None, ""
    if not error and decided["quantize"] != BASE:
        best = ended.result.get("best_step", options.steps)
        whole_loss, whole_error = whole(output, options.work / name, place, best, options)
    shutil.rmtree(output, ignore_errors=True)
    return Result(
        data=name, storage=storage, seed=seed, stored=decided["quantize"],
        products="fp8" if fp8 else decided["dtype"].replace("bfloat16", "bf16"),
        compiled=decided["compile"] and GAVE_UP not in said, points=points,
        train_seconds=ended.result.get("seconds"),
        tokens_per_second=ended.result.get("tokens_per_second"),
        peak_bytes=ended.result.get("peak_memory_bytes"), error=error, card=options.card,
        command=" ".join(words), whole_loss=whole_loss, whole_error=whole_error,
    )  # fmt: skip


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, help="model folder")
    add("-d", "--data", type=Path, action="append", required=True,
        help="folder of MTS-Dialog or of toyhom's questions; repeat for both")  # fmt: skip
    add("-o", "--output", type=Path, required=True, help="folder for quality.md, .png and .json")
    add("--storages", default=",".join(STORAGES), help="which of these, with commas")
    add("--seeds", default="0,1,2", help="whole numbers with commas")
    add("--examples", type=int, default=2400, help="most training examples of a data set")
    add("--validation", type=int, default=200, help="examples held out, the same ones for all runs")
    add("--max-length", type=int, default=1024, help="tokens of a packed row; longer examples stay"
        " away")  # fmt: skip
    add("--batch-size", type=int, default=2, help="packed rows a step")
    add("--steps", type=int, default=240, help="optimizer steps")
    add("--evaluations", type=int, default=12, help="how often a run is evaluated")
    add("--learning-rate", type=float, default=5e-4, help="at its peak")
    add("--rank", type=int, default=16, help="of the adapter")
    add("--compile", default="on", choices=("auto", "on", "off"), help="as for chatfine train")
    add("--jobs", type=int, default=1, help="runs at the same time on one card")
    add("--gpus", default="", help="numbers of cards with commas; the default is the first")
    add("--work", type=Path, help="folder for data and runs; the default is temporary")
    add("--timeout", type=float, default=600, help="seconds a run may take, and the eval after it")
    add("--join", type=Path, action="append", default=[],
        help="a quality.json to go on from: what succeeded there is not run again")  # fmt: skip
    options = parser.parse_args(words)
    options.storages, options.seeds, options.gpus = (
        [name for name in text.split(",") if name]
        for text in (options.storages, options.seeds, options.gpus)
    )
    options.seeds = [int(seed) for seed in options.seeds]
    if wrong := set(options.storages) - set(STORAGES):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; storages: {', '.join(STORAGES)}")
    options.model = options.model.resolve()
    if not (options.model / "config.json").is_file():
        parser.error(f"there is no model in {options.model}")
    options.sources = {}
    for folder in options.data:
        found = [source for source in SOURCES if (folder / source.file).is_file()]
        if not found:
            files = ", ".join(source.file for source in SOURCES)
            parser.error(f"{folder} holds none of {files}")
        options.sources[found[0]] = folder
    options.settings = {name: getattr(options, name) for name in SETTINGS}
    options.settings["model"] = options.model.name
    options.earlier = []
    for file in options.join:
        results, made = quality_report.read(file)
        if made != options.settings:
            parser.error(f"{file} was made with other settings: {made}")
        options.earlier += results
    return options


def main(words: Sequence[str] | None = None) -> list[Result]:
    """Run all that is not there yet; returns the results, earlier ones included."""
    options = arguments(words)
    options.card = children.card_name()
    jobs = [
        (source.name, storage, seed)
        for seed in options.seeds  # first, so that a benchmark cut short can still compare
        for source in options.sources
        for storage in options.storages
    ]
    results = sorted_results(options.earlier)
    done = {one.key for one in results if not one.error}
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).resolve()
        facts = {
            "settings": options.settings,
            "libraries": children.installed(),
            "data": {
                source.name: write_data(source, data, options.work / source.name, options)
                for source, data in options.sources.items()
            },
        }
        quality_report.write(options.output, results, facts)
        left = [job for job in jobs if job not in done]

        def run(job: tuple[str, str, int], card: str | None) -> Result:
            return train(*job, card, options)

        for result in children.on_cards(left, run, options.gpus, options.jobs):
            results = sorted_results([*results, result])
            quality_report.write(options.output, results, facts)
            console.say(quality_report.line(result))
    return results


def sorted_results(results: Iterable[Result]) -> list[Result]:
    """Results by data set, storage and seed; of the same run the last one."""
    last = {one.key: one for one in results}
    names, storages = [source.name for source in SOURCES], list(STORAGES)
    return sorted(
        last.values(),
        key=lambda one: (names.index(one.data), storages.index(one.storage), one.seed),
    )


if __name__ == "__main__":
    main()
