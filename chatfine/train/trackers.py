"""TensorBoard, trackio, SwanLab and wandb, none of which can stop or slow a run.

Reports go through a queue to one thread; whatever a tracker raises there is said once and ends that
tracker only. All four are extras: `pip install "chatfine[track]"`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.i18n import t
from chatfine.types import StepReport

Log = Callable[[int, dict[str, float]], None]
QUEUE_SIZE = 10_000
CLOSE_SECONDS = 10.0


def _tensorboard(run: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _trackio(run: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import trackio

    trackio.init(project="chatfine", name=run.name, config=config)
    return lambda step, values: trackio.log(values, step=step), trackio.finish


def _swanlab(run: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import swanlab

    swanlab.init(project="chatfine", experiment_name=run.name, config=config)
    return lambda step, values: swanlab.log(values, step=step), swanlab.finish


def _wandb(run: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import wandb

    session = wandb.init(project="chatfine", name=run.name, config=config, dir=str(run))
    return lambda step, values: session.log(values, step=step), session.finish


OPENERS: dict[str, Callable[[Path, dict[str, Any]], tuple[Log, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "swanlab": _swanlab,
    "wandb": _wandb,
}


class Trackers:
    """Hands reports to the trackers named in `names`, from a thread of its own."""

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any]) -> None:
        self._queue: queue.Queue[StepReport | None] = queue.Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None
        if names:
            arguments = (list(names), run, config)
            self._thread = threading.Thread(target=self._work, args=arguments, daemon=True)
            self._thread.start()

    def show(self, report: StepReport) -> None:
        """Queue one report; dropped if the trackers are hopelessly behind."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(report)

    def close(self) -> None:
        """Let the trackers finish, but not for longer than CLOSE_SECONDS."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=CLOSE_SECONDS)
                self._thread.join(CLOSE_SECONDS)

    def _work(self, names: list[str], run: Path, config: dict[str, Any]) -> None:
        open_trackers: dict[str, tuple[Log, Callable[[], None]]] = {}
        for name in names:
            try:
                open_trackers[name] = OPENERS[name](run, config)
            except Exception as error:
                _give_up(name, error)
        while (report := self._queue.get()) is not None:
            values = {k: float(v) for k, v in report.as_dict().items() if k != "step"}
            for name, (log, _) in list(open_trackers.items()):
                try:
                    log(report.step, values)
                except Exception as error:
                    _give_up(name, error)
                    del open_trackers[name]
        for name, (_, close) in open_trackers.items():
            try:
                close()
            except Exception as error:
                _give_up(name, error)


def _give_up(name: str, error: Exception) -> None:
    hint = ""
    if isinstance(error, ImportError):
        hint = t(" (install it: pip install {name})", name=name)
    console.warn(
        t("tracking with {name} is off, the run goes on: {error}{hint}", name=name,
          error=str(error).splitlines()[0] if str(error) else type(error).__name__, hint=hint)
    )  # fmt: skip
