"""Config → objects → loop: the only assembly of a training run, and how it is resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chatfine import console
from chatfine.console import is_main_process
from chatfine.errors import ChatfineError, Interrupted, OutputError, Refused, Stopped
from chatfine.hub.place import check_disk
from chatfine.i18n import t
from chatfine.runtime import launched, settle_torch
from chatfine.train.prepare import (
    CONFIG_FILE,
    LOCK_FILE,
    RESULT_FILE,
    Prepared,
    check_output,
    create_run,
    needed_disk_bytes,
    prepare,
    resolve_paths,
    write_json,
)

if TYPE_CHECKING:
    from chatfine.config import ResumeConfig, TrainConfig
    from chatfine.train.distributed import Group
    from chatfine.train.session import Session

T = TypeVar("T")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says; returns what `chatfine train --json` prints.

    Raises:
        Refused: bad input, before anything was written.
        Stopped: a non-finite loss or SIGTERM; the run can be resumed.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    began = time.perf_counter()
    with _processes(config.backend, config.device) as group:
        config = _agree(group, resolve_paths(config))
        _first(group, lambda: check_output(Path(config.output), config.overwrite))
        prepared = _prepare(group, config)
        run = prepared.run
        with _first_holds(group, run):

            def create() -> None:
                check_output(run, config.overwrite)  # another process may have come first
                create_run(prepared)

            _first(group, create)
            try:
                return execute(prepared, began, group)
            except Refused:
                if is_main_process() and not (run / "checkpoints").exists():
                    shutil.rmtree(run, ignore_errors=True)  # nothing was learned: leave nothing
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
    settings = TrainConfig.read(load_yaml(run / CONFIG_FILE), str(run / CONFIG_FILE))
    settings = settings.model_copy(update={"output": str(run.resolve())})
    with (
        _processes(settings.backend, settings.device) as group,
        _first_holds(group, run),
    ):
        finished = run / RESULT_FILE
        if finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
            console.say(t("the run in {path} is finished, nothing to do", path=run))
            return result
        return execute(_prepare(group, settings), began, group)


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


@contextlib.contextmanager
def _processes(backend: str, device: str) -> Iterator[Group | None]:
    """The processes of a launcher as a group; None, and no torch yet, where there is just this one.

    A process that ends with an error says so to the others, and only the first one prints.
    """
    settle_torch()
    if launched()[1] == 1:
        yield None
        return
    from chatfine.train.distributed import join

    group = join(backend, device)
    try:
        yield group
    except ChatfineError as error:
        # all stop together, so none is missed by the others
        together = isinstance(error, (Stopped, Interrupted))
        group.leave("" if together else str(error))
        if is_main_process() or group.watch is None:
            raise
        raise SystemExit(error.exit_code) from None
    except BaseException as error:
        group.leave("" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}")
        raise
    group.leave()


def _first(group: Group | None, work: Callable[[], T]) -> T:
    return work() if group is None else group.first(work)


def _agree(group: Group | None, config: TrainConfig) -> TrainConfig:
    """The first process's settings, whose folder may be named after its clock."""
    return config if group is None else type(config).read(group.agree(config.model_dump()))


def _prepare(group: Group | None, config: TrainConfig) -> Prepared:
    """Check all input; of several processes the first one does it alone and the others find its
    tokenised data."""

    prepared: list[Prepared] = []

    def check() -> None:
        prepared.append(prepare(config))
        check_disk(prepared[0].run, needed_disk_bytes(prepared[0]))

    _first(group, check)
    return prepared[0] if prepared else prepare(config)


@contextlib.contextmanager
def _first_holds(group: Group | None, run: Path) -> Iterator[None]:
    """The run's lock, held by the first process for all."""
    if not is_main_process():
        _first(group, lambda: None)
        yield
        return
    with contextlib.ExitStack() as held:

        def take() -> None:
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(run))

        _first(group, take)
        yield


def execute(prepared: Prepared, began: float, group: Group | None = None) -> dict[str, Any]:
    """Train from where the run stands to its end and write what comes out of it."""
    try:
        from chatfine.train.distributed import Group
        from chatfine.train.session import Session

        console.heading(t("Data"))
        prepared.data.report.show()
        session = Session(prepared, group or Group())
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
    from chatfine.train.machine import peak_memory_bytes
    from chatfine.train.metrics import plot_loss, read_metrics

    prepared, progress = session.prepared, session.progress
    run = prepared.run
    best = session.use_best_weights()
    write_output = session.output_writer()
    peaks = session.group.gather(peak_memory_bytes(session.device))
    if session.group.rank:
        return dict(session.group.agree(None))
    metrics = read_metrics(run / "metrics.jsonl")
    _replace_folder(run / session.output_name, write_output)
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
        "peak_memory_bytes": max(peaks),
        "seconds": progress.seconds,
        "total_seconds": total_seconds,
        "ended": reason,
        "best_step": best,
    }
    report.write(run / "report.md", prepared, result, metrics)
    write_json(run / RESULT_FILE, result)
    report.show(result, run / session.output_name)
    return dict(session.group.agree(result))


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
