"""The same LoRA run on a CPU with chatfine and with TRL's SFTTrainer: tokens per second and memory.

Each runs in a process of its own, on the same rows with the same settings: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from chatfine import console
from chatfine.errors import ChatfineError
from chatfine.hub.catalog import find_model
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Message

DATA = Path(__file__).parents[2] / "shared/data/mts_dialog/MTS-Dialog-TrainingSet.csv"
PROMPT = "Summarize the dialogue as a clinical note:\n{dialogue}"
RESPONSE = "{section_text}"
MAX_LENGTH, BATCH, RANK, ALPHA = 384, 4, 8, 16
TARGETS = ["q_proj", "v_proj"]
LEARNING_RATE, SCHEDULER, WARMUP = 2e-4, "cosine", 0.03
PEERS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-packed": {"packing": True, "max_length": 512},
    "trl-checkpointed": {"gradient_checkpointing": True},
}
"""What each peer sets beside the common settings of `train_trl`."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
COLUMNS = ("system", "dtype", "train s", "whole s", "train tok/s", "whole tok/s", "peak GiB",
           "loss", "× best peer")  # fmt: skip
Run = dict[str, Any]
"""system, dtype, train_seconds, whole_seconds (process start to end), peak_bytes, loss, and the
non-padding tokens per second of both times."""


def messages_of(row: dict[str, str]) -> list[Message]:
    """The dialogue that both sides train on."""
    question, answer = PROMPT.format_map(row), RESPONSE.format_map(row)
    return [Message("user", question), Message("assistant", answer)]


def write_rows(source: Path, model: Path, count: int, target: Path) -> int:
    """Write the first `count` rows that are short enough as JSONL; returns their tokens."""
    tokenizer = ChatTokenizer.load(model)
    kept: list[str] = []
    tokens = 0
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            length = len(tokenizer.encode_dialogue(messages_of(row)).ids)
            if length <= MAX_LENGTH and len(kept) < count:
                columns = {key: row[key] for key in ("dialogue", "section_text")}
                kept.append(json.dumps(columns, ensure_ascii=False) + "\n")
                tokens += length
    if len(kept) < count:
        sys.exit(f"{source} has only {len(kept)} rows of at most {MAX_LENGTH} tokens")
    target.write_text("".join(kept), encoding="utf-8")
    return tokens


def run_child(command: list[str], work: Path, threads: int) -> tuple[dict[str, Any], Run]:
    """Run a process; returns the JSON of its last line, and its wall seconds and peak memory."""
    own = dict.fromkeys(("CHATFINE_HOME", "HF_HOME"), str(work / "cache"))  # nothing tokenised yet
    own |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    own |= {"HF_HUB_OFFLINE": "1", "CHATFINE_LANG": "en"}
    out, log = work / "stdout", work / "stderr"
    with out.open("wb") as stdout, log.open("wb") as stderr:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ | own)
        # unlike getrusage(RUSAGE_CHILDREN), whose maximum runs over all children so far
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"{tail}\n{' '.join(command)}\nended with code {child.returncode}")
    peak = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    last = out.read_text(encoding="utf-8").strip().split("\n")[-1]
    return json.loads(last), {"whole_seconds": seconds, "peak_bytes": peak}


def measure_ours(model: Path, rows: Path, work: Path, threads: int) -> Run:
    """`chatfine train` as a user types it."""
    run = work / "run"
    command = f"""-m chatfine train --json --device cpu --validation 0 --epochs 1
        --max-length {MAX_LENGTH} --batch-size {BATCH} --rank {RANK} --alpha {ALPHA}
        --targets {",".join(TARGETS)} --learning-rate {LEARNING_RATE} --scheduler {SCHEDULER}
        --warmup {WARMUP}""".split()
    command += ["--model", str(model), "--dataset", str(rows), "--output", str(run), "--prompt",
                PROMPT, "--response", RESPONSE]  # fmt: skip
    result, facts = run_child([sys.executable, *command], work, threads)
    if not (run / "adapter/adapter_model.safetensors").is_file():
        sys.exit(f"no adapter was saved in {run}")
    decided = json.loads((run / "decisions.json").read_text(encoding="utf-8"))["decided"]
    log = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[decided["dtype"]]
    return facts | {"system": "chatfine", "dtype": dtype, "train_seconds": result["seconds"],
                    "total_seconds": result["total_seconds"], "loss": fmean(losses)}  # fmt: skip


def measure_peer(job: dict[str, str], tokens: int, work: Path, threads: int) -> Run:
    """One peer's run; refused if it saw other tokens or used other threads than ours."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    result, facts = run_child(command, work, threads)
    if (result["tokens"], result["threads"]) != (tokens, threads):
        sys.exit(f"not the same work: {result}, chatfine has {tokens} tokens, {threads} threads")
    return {"system": job["system"], "dtype": job["dtype"]} | result | facts


def train_trl(job: dict[str, str]) -> dict[str, Any]:
    """The peer's process: one epoch with SFTTrainer; only `trainer.train()` is timed."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    bf16 = job["dtype"] == "bf16"
    with open(job["rows"], encoding="utf-8") as file:
        dialogues = [[one.as_dict() for one in messages_of(json.loads(line))] for line in file]
    examples = [{"prompt": one[:-1], "completion": one[-1:]} for one in dialogues]
    settings: dict[str, Any] = {
        "output_dir": job["output"], "per_device_train_batch_size": BATCH, "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": SCHEDULER, "warmup_steps": WARMUP,
        "max_length": MAX_LENGTH, "completion_only_loss": True, "gradient_checkpointing": False,
        "use_cpu": True, "bf16": bf16, "optim": "adamw_torch_fused", "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 42,
        "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
    }  # fmt: skip
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**(settings | PEERS[job["system"]])),
        train_dataset=Dataset.from_list(examples),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS,
                               task_type="CAUSAL_LM"),
    )  # fmt: skip
    began = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model()
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    return {"train_seconds": seconds, "loss": result.training_loss, "tokens": tokens,
            "threads": torch.get_num_threads()}  # fmt: skip


def describe_machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file() and "model name" in (text := facts.read_text(encoding="utf-8")):
        cpu = text.split("model name", 1)[1].split("\n")[0].strip(": \t")
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads,
            "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            "libraries": {name: version(name) for name in installed}}  # fmt: skip


def show(runs: list[Run], machine: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns our rates over the best peer's rate of training alone."""
    best = max((run["train_tok_s"] for run in runs[1:]), default=0.0)
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    console.say(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
                f"load {machine['load_before']} before; {libraries}")  # fmt: skip
    line = "| {:16} | {:>5} | {:>8} | {:>8} | {:>11} | {:>11} | {:>8} | {:>6} | {:>11} |"
    console.say(line.format(*COLUMNS))
    console.say(line.format("---", *["--:"] * 8))
    for run in runs:
        share = f"{run['train_tok_s'] / best:.2f}" if best else "-"
        console.say(line.format(
            run["system"], run["dtype"], f"{run['train_seconds']:.1f}",
            f"{run['whole_seconds']:.1f}", f"{run['train_tok_s']:.0f}",
            f"{run['whole_tok_s']:.0f}", f"{run['peak_bytes'] / 2**30:.2f}",
            f"{run['loss']:.3f}", share))  # fmt: skip
    if not best:
        return {}
    ratios = {name: runs[0][f"{name}_tok_s"] / best for name in ("whole", "train")}
    console.say("chatfine over the best peer's training alone: {whole:.2f} × with start-up and "
                "saving, {train:.2f} × training alone".format(**ratios))  # fmt: skip
    return ratios


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, default=DATA, help="MTS-Dialog CSV file")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--peers", default="trl,trl-packed", help=", ".join(PEERS) + "; '' = none")
    parser.add_argument("--dtypes", default="bf16,fp32", help="number formats of the peers")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return options
    options.peers = [name for name in options.peers.split(",") if name]
    options.dtypes = options.dtypes.split(",")
    if wrong := ({*options.peers} - {*PEERS}) | ({*options.dtypes} - {"bf16", "fp32"}):
        parser.error(f"unknown: {', '.join(wrong)}; peers: {', '.join(PEERS)}; dtypes: bf16, fp32")
    if options.peers and importlib.util.find_spec("trl") is None:
        parser.error("the peers need TRL: python -m pip install trl==1.16.0")
    if not options.data.is_file():
        parser.error(f"there is no file {options.data}; give the path of the MTS-Dialog CSV")
    return options


def main() -> None:
    """Measure ours and each peer in each number format, and compare."""
    options = arguments()
    if options.child:
        return print(json.dumps(train_trl(json.loads(options.child))), flush=True)
    try:
        model = find_model(options.model).resolve()
    except ChatfineError as error:
        sys.exit(str(error))
    machine = describe_machine(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work, rows = Path(folder), Path(folder, "rows.jsonl")
        tokens = write_rows(options.data, model, options.rows, rows)
        runs = [measure_ours(model, rows, work, options.threads)]
        for system, dtype in product(options.peers, options.dtypes):
            job = {"system": system, "dtype": dtype, "model": str(model), "rows": str(rows),
                   "output": str(work / "trl")}  # fmt: skip
            runs.append(measure_peer(job, tokens, work, options.threads))
    for run in runs:
        run |= {f"{name}_tok_s": tokens / run[f"{name}_seconds"] for name in ("train", "whole")}
    values = {"machine": machine, "rows": options.rows, "tokens": tokens, "runs": runs}
    values["ratios_to_best_peer"] = show(runs, machine)
    if options.output:
        options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
