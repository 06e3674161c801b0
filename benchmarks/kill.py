"""SIGKILL at random moments, resume each time: is it the same run?

    python benchmarks/kill.py [--kills 20] [--model NAME_OR_FOLDER] [--steps 200] [--work DIR]

One run is left alone; another with the same settings is killed again and again, from the first
second of the process on, and resumed. Every loss in metrics.jsonl and the bytes of the adapter must
be equal in the end (contract C4). With no --model a tiny random one is made. Exit code 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("seconds", "tokens_per_second")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="chatfine-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    model = options.model or str(tiny_model(work / "model"))
    whole, cut = work / "whole", work / "cut"
    for run in (whole, cut):
        shutil.rmtree(run, ignore_errors=True)

    began = time.perf_counter()
    process = start(train_words(model, write_rows(work), whole, options.steps))
    while process.poll() is None and not lines_of(whole):
        time.sleep(0.05)
    startup_seconds = time.perf_counter() - began
    code = process.wait()
    alone_seconds = time.perf_counter() - began
    if code != 0:
        return code
    learning_seconds = alone_seconds - startup_seconds
    print(f"uninterrupted: {options.steps} steps in {alone_seconds:.0f} s")
    print("kill  after s  metrics lines  newest checkpoint  first line after resume")
    chance = random.Random(options.seed)
    for kill in range(1, options.kills + 1):
        new = not (cut / "config.yaml").exists()
        words = train_words(model, work / "rows.jsonl", cut, options.steps)
        before = lines_of(cut)
        process = start(words if new else ["resume", str(cut)])
        # from the first second on, start-up included; spread so that all kills fit into the run
        after = 1 + chance.random() * (startup_seconds + 2 * learning_seconds / options.kills)
        try:
            code = process.wait(after)
            print(f"{kill:4}  {after:7.2f}  ended by itself with exit code {code}")
            if code:
                return code
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        stored = sorted(path.name for path in (cut / "checkpoints").glob("step-*"))
        first = next(
            (n for n, (a, b) in enumerate(zip(before, lines_of(cut), strict=False)) if a != b), None
        )
        print(f"{kill:4}  {after:7.2f}  {len(lines_of(cut)):13}  {(stored or ['none'])[-1]:17}"
              f"  {'-' if first is None else first + 1}")  # fmt: skip
    code = start(["resume", str(cut)]).wait()
    return code or compare(whole, cut)


def compare(whole: Path, cut: Path) -> int:
    """Print and count the differences."""
    a, b = metrics(whole), metrics(cut)
    losses = sum(one != other for one, other in zip(a, b, strict=False)) + abs(len(a) - len(b))
    files = [path.name for path in sorted((whole / "adapter").iterdir())]
    unequal = [name for name in files
               if (whole / "adapter" / name).read_bytes()
               != (cut / "adapter" / name).read_bytes()]  # fmt: skip
    print(f"metrics lines that differ: {losses} of {len(a)}")
    print(f"adapter files that differ: {len(unequal)} of {len(files)} {' '.join(unequal)}")
    return int(bool(losses or unequal))


def lines_of(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in lines_of(run)]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(
        [sys.executable, "-m", "chatfine", *words], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def train_words(model: str, data: Path, run: Path, steps: int) -> list[str]:
    return [
        "train", "-m", model, "-d", str(data), "-o", str(run), "--max-steps", str(steps),
        "--batch-size", "2", "--dropout", "0.1", "--save-every", "1", "--eval-every", "25",
        "--dtype", "fp32", "--device", "cpu", "--learning-rate", "1e-3",
    ]  # fmt: skip


def write_rows(work: Path) -> Path:
    rows = [
        {"question": f"What is {i} + {i + 1}?", "answer": f"It is {2 * i + 1}. " * (1 + i % 5)}
        for i in range(120)
    ]
    path = work / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_tiny_model

    return write_tiny_model(folder)


if __name__ == "__main__":
    sys.exit(main())
