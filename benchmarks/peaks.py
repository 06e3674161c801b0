"""The memory plan against the measured peak, in more than twenty configurations.

Each is a short `chatfine train` in a process of its own on a model of random weights; what its plan
promised stands beside the most that PyTorch had allocated. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import children
import gpu
import inputs
import psutil
from gpu_cases import Case
from peaks_report import Result, line, merged, parts_of, planned_again, read, summary, write

from chatfine import cli, console
from chatfine.config import TrainConfig
from chatfine.errors import ChatfineError
from chatfine.model.graphs import WARM_RUNS
from chatfine.train.decisions import Decisions, work_of
from chatfine.train.machine import CONTEXT_BYTES, USABLE
from chatfine.train.plan import layers_reached, make_plan
from chatfine.train.prepare import Prepared, prepare, shapes_of

STEPS = 3
MARGIN = 1.15
"""Runs side by side are given so many times what their plans say, since the plans are on trial."""
POSITIONS = 4096
"""What the models of `inputs.write_model` read by themselves."""
OTHERWISE = re.compile("could not be compiled|is ignored|instead")
"""In what a run says of settings it could not follow."""


@dataclass(frozen=True)
class Setting:
    """One configuration: what `chatfine train` is asked for.

    Attributes:
        shape: of `inputs.SHAPES`.
        data: rows (full ones, all trained on, packed) or dialog (short ones, padded).
        batch: rows of a micro-batch; a step has one.
        grown: the vocabulary has thousands of new rows, which learn too.
        note: what is special about `flags`, for the name.
        extra: only if --only names it.
    """

    shape: str
    method: str
    batch: int
    length: int = 2048
    storage: str = "none"
    checkpointing: str = "none"
    compiled: bool = False
    data: str = "rows"
    grown: bool = False
    flags: tuple[str, ...] = ()
    note: str = ""
    extra: bool = False

    @property
    def name(self) -> str:
        """All that tells it from the others."""
        word = self.checkpointing
        recomputed = "" if word in ("none", "auto") else f"recompute-{word}"
        parts = (self.shape, self.method, "" if self.storage == "none" else self.storage,
                 f"{self.batch}x{self.length}", "" if self.data == "rows" else self.data,
                 "grown" if self.grown else "", recomputed, "compiled" if self.compiled else "",
                 self.note)  # fmt: skip
        return "-".join(part for part in parts if part)

    @property
    def steps(self) -> int:
        """Enough for moments and, where layers are compiled, for a recorded graph."""
        return STEPS + WARM_RUNS if self.compiled else STEPS


PURE = ("--pure-bf16", "--optimizer", "anyprecision")
EIGHT = ("--optimizer", "adamw8bit")
SETTINGS = (
    Setting("7b", "lora", 1),
    Setting("7b", "lora", 4, compiled=True),
    Setting("7b", "lora", 4, checkpointing="8"),
    Setting("7b", "lora", 4, flags=("--targets", "q_proj,v_proj"), note="qv"),
    Setting("7b", "lora", 8, checkpointing="full", compiled=True),
    Setting("7b", "lora", 8, checkpointing="offload"),
    Setting("7b", "lora", 4, data="dialog"),
    Setting("7b", "lora", 4, storage="fp8", compiled=True),
    Setting("7b", "lora", 1, 8192, storage="fp8", checkpointing="8"),
    Setting("7b", "lora", 4, storage="fp8", checkpointing="auto", flags=("--gpu-memory", "24"),
            note="24gb"),
    Setting("7b", "lora", 1, 32768, storage="fp8", checkpointing="offload", compiled=True),
    Setting("7b", "lora", 4, storage="int8", checkpointing="8"),
    Setting("7b", "lora", 4, storage="nf4", checkpointing="full", compiled=True),
    Setting("7b", "lora", 1, 32768, storage="nf4", checkpointing="full"),
    Setting("7b", "dora", 1, storage="nf4"),
    Setting("7b", "freeze", 4),
    Setting("1b", "lora", 8, compiled=True),
    Setting("1b", "lora", 1, 8192),
    Setting("1b", "lora", 4, grown=True, compiled=True),
    Setting("1b", "rows", 4, grown=True),
    Setting("1b", "full", 4, compiled=True),
    Setting("1b", "full", 4, compiled=True, flags=("--fp8-products", "on"), note="fp8-products"),
    Setting("1b", "full", 8, flags=PURE, note="pure-bf16-anyprecision"),
    Setting("1b", "full", 4, checkpointing="full", flags=EIGHT, note="adamw8bit"),
    Setting("135m", "lora", 8, compiled=True),
    Setting("135m", "full", 8),
    Setting("135m", "full", 8, compiled=True),
    Setting("135m", "full", 16, data="dialog", flags=EIGHT, note="adamw8bit"),
    Setting("tiny", "lora", 2, 64, flags=("--dtype", "fp32"), extra=True),
    Setting("tiny", "lora", 2, 256, data="dialog", flags=("--dtype", "fp32"), extra=True),
    Setting("tiny", "full", 2, 64, checkpointing="1", flags=("--dtype", "fp32"), extra=True),
    Setting("tiny", "rows", 2, 64, grown=True, flags=("--dtype", "fp32"), extra=True),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A configuration that is ready to run, and the room it is given: card and disk, in bytes."""

    setting: Setting
    words: tuple[str, ...]
    prepared: Prepared
    decided: Decisions
    room: float
    disk: float


def train_words(setting: Setting, model: Path, data: Path, output: Path) -> list[str]:
    """`chatfine train` as a user types it."""
    method = {"full": ("--learning-rate", "1e-5"), "lora": ("--rank", "16"),
              "dora": ("--rank", "16")}.get(setting.method, ())  # fmt: skip
    longer = ("--rope-scaling", "linear") if setting.length > POSITIONS else ()
    return [
        "-m", "chatfine", "train", "--json", "-m", str(model),
        "-d", f"{data.with_suffix('.py')}:rows", "-o", str(output), "--method", setting.method,
        *method, "--quantize", setting.storage, "--packing", "on" if setting.data == "rows" else
        "off", "--compile", "on" if setting.compiled else "off", "--checkpointing",
        setting.checkpointing, "--max-length", str(setting.length), *longer, "--batch-size",
        str(setting.batch), "--max-steps", str(setting.steps), "--save-every", str(setting.steps),
        "--validation", "0", *setting.flags,
    ]  # fmt: skip


def inputs_of(setting: Setting, options: argparse.Namespace) -> tuple[Path, Path]:
    """The model folder and data file of a configuration, made if they are not there yet."""
    case = Case(setting.name, setting.name, setting.shape, setting.method, setting.data,
                setting.length, ())  # fmt: skip
    plain, data = gpu.prepare(case, options)
    if not setting.grown:
        return plain, data
    own = argparse.Namespace(**vars(options) | {"work": options.work / "grown"})
    model = own.work / "models" / setting.shape
    if not (model / "config.json").is_file():
        model.parent.mkdir(parents=True, exist_ok=True)
        grow = [sys.executable, "-m", "chatfine", "expand-vocab", "--preset", "hanzi"]
        subprocess.run([*grow, "-m", plain, "-o", model], check=True, stdout=sys.stderr)
    return gpu.prepare(case, own)


def expected(prepared: Prepared, device: str) -> Decisions:
    """What the run will decide, as far as it can be known before; where something is left open
    (fp8's second copy, --gpu-memory), what takes the most."""
    config = prepared.config
    start = Decisions(
        device=device, dtype="float32" if config.dtype == "fp32" else "bfloat16",
        rows=config.batch_size, accumulate=config.accumulate, packing=config.packing == "on",
        recompute_layers=0, offload=config.checkpointing == "offload", quantize=config.quantize,
        second_copy=config.quantize == "fp8", compile=config.compile == "on",
        learned_fp8=config.fp8_products == "on",
    )  # fmt: skip
    every = layers_reached(shapes_of(prepared.model), work_of(prepared, start))
    word = config.checkpointing
    layers = int(word) if word.isdigit() else every if word in ("full", "offload") else 0
    return replace(start, recompute_layers=min(layers, every))


def ready(setting: Setting, options: argparse.Namespace, device: str) -> Job:
    """A configuration with its inputs checked and its room known."""
    output = options.work / "runs" / setting.name / "run"
    words = train_words(setting, *inputs_of(setting, options), output)
    prepared = prepare(TrainConfig.read(*cli.settings("train", words[4:])))
    decided = expected(prepared, device)
    plan = make_plan(shapes_of(prepared.model), work_of(prepared, decided))
    most = prepared.config.gpu_memory * 1e9 or plan.memory_bytes
    room = MARGIN * min(plan.memory_bytes, most) + CONTEXT_BYTES
    return Job(setting, tuple(words), prepared, decided, room, plan.disk_bytes)


def next_start(
    waiting: Sequence[Job], running: Sequence[tuple[str, Job]], rooms: Mapping[str, float],
    disk: float, jobs: int,
) -> tuple[str, Job] | None:  # fmt: skip
    """The largest job that has room now, and the card it goes to; None if there is none.

    A job that is too large even for an empty card has it to itself, and says so by failing.

    Args:
        waiting: what has not begun.
        running: what has, and on which card.
        rooms: bytes each card has for all its jobs together.
        disk: the same of the disk, which they share.
        jobs: how many a card may have at once.
    """
    used = dict.fromkeys(rooms, 0.0)
    count = dict.fromkeys(rooms, 0)
    for card, job in running:
        used[card] += job.room
        count[card] += 1
    written = sum(job.disk for _, job in running)
    for job in sorted(waiting, key=lambda one: one.room, reverse=True):
        if running and written + job.disk > disk:
            continue
        for card in sorted(rooms, key=lambda one: rooms[one] - used[one], reverse=True):
            fits = used[card] + job.room <= rooms[card]
            if not count[card] or (fits and count[card] < jobs):
                return card, job
    return None


def measure(job: Job, card: str, options: argparse.Namespace) -> Result:
    """Run one configuration; a failure is a result too."""
    folder = options.work / "runs" / job.setting.name
    output = folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    where = ["env", f"CUDA_VISIBLE_DEVICES={card}"] if card else []
    began = time.perf_counter()
    ended = children.watch([*where, sys.executable, *job.words], output / "metrics.jsonl", folder,
                      options.timeout)  # fmt: skip
    decided, file = job.decided, output / "decisions.json"
    if file.is_file():
        decided = Decisions(**json.loads(file.read_text(encoding="utf-8"))["decided"])
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
    shutil.rmtree(folder, ignore_errors=True)
    work, shapes = work_of(job.prepared, decided), shapes_of(job.prepared.model)
    plan = make_plan(shapes, work)
    return Result(
        name=job.setting.name, error=ended.error, card=options.card,
        planned_bytes=plan.memory_bytes, parts=parts_of(plan),
        measured_bytes=ended.result.get("peak_memory_bytes"),
        warnings=[text for text in said if OTHERWISE.search(text)],
        decided=asdict(decided), work=asdict(work), shapes=asdict(shapes),
        command=" ".join(job.words), seconds=time.perf_counter() - began,
    )  # fmt: skip


def measured(
    jobs: Sequence[Job], rooms: Mapping[str, float], disk: float, options: argparse.Namespace
) -> Iterator[Result]:
    """Run all jobs, as many side by side as have room; the results as they come."""
    waiting, running = list(jobs), dict[Future[Result], tuple[str, Job]]()
    with ThreadPoolExecutor(options.jobs * len(rooms)) as pool:
        while waiting or running:
            while found := next_start(waiting, list(running.values()), rooms, disk, options.jobs):
                card, job = found
                waiting.remove(job)
                running[pool.submit(measure, job, card, options)] = found
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                yield done.result()


def rooms_of(cards: Sequence[str]) -> dict[str, float]:
    """Bytes that runs may plan with on each card; without a GPU those of memory, under no name."""
    if not shutil.which("nvidia-smi"):
        return {"": psutil.virtual_memory().available * USABLE["cpu"]}
    rooms = {}
    for card in cards:
        asked = f"nvidia-smi -i {card} --query-gpu=memory.free --format=csv,noheader,nounits"
        done = subprocess.run(asked.split(), capture_output=True, text=True, check=True)
        rooms[card] = float(done.stdout) * 2**20 * USABLE["cuda"]
    return rooms


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder for peaks.md and peaks.json")
    add("--only", default="", help="regular expression on the names of configurations")
    add("--jobs", type=int, default=1, help="runs side by side on each card, where they fit")
    add("--gpus", default="0", help="numbers of the cards, with commas")
    add("--work", type=Path, help="folder for models and runs; the default is temporary")
    add("--timeout", type=float, default=300, help="seconds a run may take")
    add("--tokenizer", type=Path, default=gpu.TOKENIZER, help="folder of a tokenizer")
    add("--dialog", type=Path, help="folder of MTS-Dialog; without it lengths are drawn at random")
    add("--join", type=Path, action="append", default=[], help="a peaks.json to go on from")
    add("--replan", action="store_true", help="plan the joined results again; nothing is run")
    options = parser.parse_args(words)
    options.gpus = options.gpus.split(",")
    options.chosen = [] if options.replan else chosen(options.only)
    if not options.chosen and not options.join:
        parser.error(f"no configuration has {options.only!r} in its name, and nothing is joined")
    if options.chosen and not options.tokenizer.is_dir():
        parser.error(f"there is no folder {options.tokenizer}; give one with --tokenizer")
    if options.dialog and not (options.dialog / inputs.DIALOGUES).is_file():
        parser.error(f"there is no {inputs.DIALOGUES} in {options.dialog}")
    return options


def chosen(only: str) -> list[Setting]:
    """The settings whose name has the pattern."""
    return [one for one in SETTINGS if re.search(only, one.name) and (only or not one.extra)]


def main(words: Sequence[str] | None = None) -> list[Result]:
    """Measure all that was chosen; returns the results, earlier ones included."""
    options = arguments(words)
    options.card, libraries = children.card_name(), children.installed()
    results = [one for file in options.join for one in read(file)]
    if options.replan:
        results = [planned_again(one) for one in results]
    order = [one.name for one in SETTINGS]
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        os.environ["CHATFINE_HOME"] = str(options.work / "cache")
        write(options.output, results, libraries)
        rooms = rooms_of(options.gpus) if options.chosen else {}
        device = "cpu" if "" in rooms else "cuda"
        jobs = []
        for setting in options.chosen:
            try:
                jobs.append(ready(setting, options, device))
            except ChatfineError as error:
                refused = Result(setting.name, f"refused: {error.what}", options.card)
                results = merged(results, refused, order)
                write(options.output, results, libraries)
        disk = shutil.disk_usage(options.work).free
        for result in measured(jobs, rooms, disk, options) if jobs else ():
            results = merged(results, result, order)
            write(options.output, results, libraries)
            console.say(line(result))
    console.say(summary(results))
    return results


if __name__ == "__main__":
    main()
