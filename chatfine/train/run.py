"""Config → objects → loop: the only assembly of a training run, and how it is resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.errors import Interrupted, OutputError, Refused, Stopped
from chatfine.i18n import t
from chatfine.train.prepare import (
    CONFIG_FILE,
    LOCK_FILE,
    RESULT_FILE,
    Prepared,
    check_disk,
    check_output,
    create_run,
    needed_disk_bytes,
    prepare,
    resolve_paths,
    write_json,
)

if TYPE_CHECKING:
    from chatfine.config import ResumeConfig, TrainConfig
    from chatfine.train.session import Session


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says; returns what `chatfine train --json` prints.

    Raises:
        Refused: bad input, before anything was written.
        Stopped: a non-finite loss or SIGTERM; the run can be resumed.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    began = time.perf_counter()
    check_output(Path(resolve_paths(config).output), config.overwrite)
    prepared = prepare(config)
    run = prepared.run
    check_disk(run, needed_disk_bytes(prepared))
    run.mkdir(parents=True, exist_ok=True)
    with lock(run):
        check_output(run, config.overwrite)  # another process may have come first
        create_run(prepared)
        try:
            return execute(prepared, began)
        except Refused:
            if not (run / "checkpoints").exists():  # nothing was learned: leave nothing behind
                shutil.rmtree(run, ignore_errors=True)
            raise


def resume(config: ResumeConfig) -> dict[str, Any]:
    """Go on with the run in folder `config.run` from its newest valid checkpoint.

    Raises:
        OutputError: no run there, or it is in use.
        UsageError: its config.yaml was changed in a way that alters the maths.
    """
    from chatfine.config import TrainConfig, load_yaml

    began = time.perf_counter()
    run = Path(config.run)
    if not (run / CONFIG_FILE).is_file():
        raise OutputError(
            "no-run",
            t("there is no run in {path}", path=run),
            why=t("a run folder holds a config.yaml"),
            fix=t("start one: chatfine train --help"),
        )
    with lock(run):
        finished = run / RESULT_FILE
        if finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
            console.say(t("the run in {path} is finished, nothing to do", path=run))
            return result
        settings = TrainConfig.read(load_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
        settings = settings.model_copy(update={"output": str(run.resolve())})
        return execute(prepare(settings), began)


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold the run's lock, which the system frees when the process dies.

    Raises:
        OutputError: another process works on this run.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(str(run / LOCK_FILE), timeout=0):
            yield
    except Timeout:
        raise OutputError(
            "run-in-use",
            t("another process is working on the run in {path}", path=run),
            fix=t("wait for it, or stop it"),
        ) from None


def execute(prepared: Prepared, began: float) -> dict[str, Any]:
    """Train from where the run stands to its end and write what comes out of it."""
    try:
        from chatfine.train.session import Session

        console.heading(t("Data"))
        prepared.data.report.show()
        session = Session(prepared)
        session.show_plan()
        session.restore()
        reason = session.train()
        if reason == "stopped":
            raise _stopped(session)
        return finish(session, reason, time.perf_counter() - began)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted",
            t("stopped by Ctrl-C"),
            where=str(prepared.run),
            fix=t("go on: {command}", command=f"chatfine resume {prepared.run}"),
        ) from None


def _stopped(session: Session) -> Stopped | Interrupted:
    """The error that ends a run on request; its checkpoint is written."""
    kind = Interrupted if session.stop.requested == signal.SIGINT else Stopped
    step, total = session.progress.step, session.total_steps
    return kind(
        "stopped",
        t("stopped after step {step} of {total}; everything is saved", step=step, total=total),
        where=str(session.prepared.run),
        fix=t("go on: {command}", command=f"chatfine resume {session.prepared.run}"),
    )


def finish(session: Session, reason: str, total_seconds: float) -> dict[str, Any]:
    """Write adapter or model, picture, report and result of a run whose training is over."""
    from chatfine.train import report
    from chatfine.train.metrics import plot_loss, read_metrics
    from chatfine.train.plan import peak_memory_bytes

    prepared, progress = session.prepared, session.progress
    run = prepared.run
    metrics = read_metrics(run / "metrics.jsonl")
    best = session.use_best_weights()
    _replace_folder(run / session.output_name, session.write_output)
    plot_loss(metrics, run / "loss.png", run.name)
    losses = [row["loss"] for row in metrics if "loss" in row]
    last = losses[-max(1, len(losses) // 10) :]
    val_loss = progress.best_loss
    result = {
        "run": str(run),
        "steps": progress.step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "train_loss": math.fsum(last) / len(last) if last else None,
        "val_loss": val_loss,
        "peak_memory_bytes": peak_memory_bytes(session.device),
        "seconds": progress.seconds,
        "total_seconds": total_seconds,
        "ended": reason,
        "best_step": best,
    }
    report.write(run / "report.md", prepared, result, metrics)
    write_json(run / RESULT_FILE, result)
    report.show(result, run / session.output_name)
    return result


def _replace_folder(target: Path, write: Any) -> None:
    """Let `write` fill a staged folder, then put it in the place of `target`."""
    staged = target.with_name(f".{target.name}")
    shutil.rmtree(staged, ignore_errors=True)
    write(staged)
    usual = (staged / "chatfine.json").stat().st_mode
    for file in staged.iterdir():
        file.chmod(usual)  # safetensors makes files that only their owner can read
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
