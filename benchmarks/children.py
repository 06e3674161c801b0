"""Processes of a benchmark: watched, timed, ended when late, dealt out to cards."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth",
             "bitsandbytes")  # fmt: skip
QUIET = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CHATFINE_LANG": "en",
    "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_DISABLED": "true", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
Job, Done = TypeVar("Job"), TypeVar("Done")
ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|^(?:error|Error): .*")


@dataclass(frozen=True)
class Ended:
    """How a process went: seconds until its log had a line (None: never), its JSON, or a reason."""

    first_step_seconds: float | None
    result: dict[str, Any]
    error: str


def watch(
    command: Sequence[str], log: Path, work: Path, timeout: float, home: Path | None = None
) -> Ended:
    """Run a process that adds a line to `log` after each step, with all that it starts.

    Args:
        command: what to run; the last JSON object it prints on a line of its own is its result.
        log: made by the process; the time of its first line is noted.
        work: where it runs and where its output is kept.
        timeout: seconds after which it is ended, its children too.
        home: chatfine's cache folder; the default is in `work`.
    """
    log.unlink(missing_ok=True)
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = QUIET | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CHATFINE_HOME": str(home or work / "cache"),
    }
    out, err = work / "stdout", work / "stderr"
    first = None
    with out.open("wb") as stdout, err.open("wb") as stderr:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=work,
                                 env=os.environ | own, start_new_session=True)  # fmt: skip
        try:
            while child.poll() is None and time.perf_counter() - began < timeout:
                if first is None and log.is_file() and log.stat().st_size:
                    first = time.perf_counter() - began
                time.sleep(0.02)
            late = child.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):  # compiler workers, and a late child
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if late:
        return Ended(first, {}, f"ended after {timeout:,.0f} s")
    text = out.read_text(encoding="utf-8", errors="replace").strip()
    if child.returncode:
        said = err.read_text(encoding="utf-8", errors="replace") + "\n" + text
        return Ended(first, {}, reason(said) or f"ended with code {child.returncode}")
    found = [one for one in text.split("\n") if one.startswith('{"')]
    return Ended(first, json.loads(found[-1]) if found else {}, "")


def reason(said: str) -> str:
    """The line of an output that says what went wrong, shortened for a table."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if lines and lines[-1].startswith('{"error"'):  # chatfine --json
        told = json.loads(lines[-1])
        return f"{told['error']}: {told['what']}"[:200]
    found = [line for line in lines if ERROR.match(line)]
    return (found or lines or [""])[-1][:200]


def on_cards(
    jobs: Sequence[Job],
    work: Callable[[Job, str | None], Done],
    cards: Sequence[str],
    each: int = 1,
) -> Iterator[Done]:
    """What comes of the jobs, as they end: `each` at a time on every card.

    Args:
        jobs: in the order in which they begin.
        work: does a job on the card of this number; None means there was no choice.
        cards: numbers; none means the first card.
    """
    slots: queue.Queue[str | None] = queue.Queue()
    for card in [*(cards or [None])] * each:
        slots.put(card)

    def one(job: Job) -> Done:
        card = slots.get()
        try:
            return work(job, card)
        finally:
            slots.put(card)

    with ThreadPoolExecutor(slots.qsize()) as pool:
        waiting = [pool.submit(one, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:  # Ctrl-C: the runs are in sessions of their own and don't see it
            pool.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children():
                child.kill()
            raise


def placed(card: str | None) -> list[str]:
    """Words before a command that let it see this card alone."""
    return [] if card is None else ["env", f"CUDA_VISIBLE_DEVICES={card}"]


def card_name() -> str:
    """The first card, or the processor where there is none."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    return f"no GPU, {os.cpu_count()} cores"


def installed() -> dict[str, str]:
    """The libraries that the numbers depend on."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
