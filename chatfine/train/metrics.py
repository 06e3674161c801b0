"""StepReport → progress bar, metrics.jsonl, loss.png."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from typing_extensions import Self

from chatfine import console
from chatfine.i18n import t
from chatfine.types import StepReport


class MetricsLog:
    """`metrics.jsonl`: one object a line, in the order of time.

    A checkpoint remembers how long the file was; resuming cuts it back to there, so that a step
    that is done again is not logged twice.
    """

    def __init__(self, path: Path | None, length_bytes: int = 0) -> None:
        """`path` None writes nothing: of several processes only the first has a log."""
        if path is not None and path.exists():
            os.truncate(path, min(length_bytes, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8", newline="\n") if path is not None else None

    def write(self, report: StepReport) -> None:
        """Append one line; numbers that JSON can't hold (a gradient norm that overflowed in fp16)
        are left out."""
        if self._file is None:
            return
        values = {
            name: value
            for name, value in report.as_dict().items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the file to disk and return its length in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class ProgressBar:
    """The bar of a run: step, loss, validation loss, tokens/s, time left."""

    def __init__(self, total: int, done: int = 0, seconds: float = 0.0) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.total, self._from_step, self._from_seconds = total, done, seconds
        self._last: dict[str, Any] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            console=console.console(),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(t("training"), total=total, completed=done, text="")
        self._live = console.console().is_terminal

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live:
            self._bar.stop()

    def show(self, report: StepReport) -> None:
        """Take in one report; without a terminal, print about twenty lines a run instead."""
        self._last |= report.as_dict()
        text = self._text(report.step)
        self._bar.update(self._task, completed=report.step, text=text)
        every = max(1, self.total // 20)
        if not self._live and (report.step % every == 0 or report.val_loss is not None):
            console.say(f"  {report.step}/{self.total}  {text}")

    def _text(self, step: int) -> str:
        last = self._last
        parts = []
        if "loss" in last:
            parts.append(t("loss {value:.3f}", value=last["loss"]))
        if "val_loss" in last:
            parts.append(t("validation {value:.3f}", value=last["val_loss"]))
        if "tokens_per_second" in last:
            parts.append(t("{value:,.0f} tokens/s", value=last["tokens_per_second"]))
        done, spent = step - self._from_step, last.get("seconds", 0.0) - self._from_seconds
        if done > 0 and step < self.total:
            left = spent / done * (self.total - step)
            parts.append(t("{time} left", time=console.duration(left)))
        return "  ".join(parts)


def plot_loss(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss (each step and smoothed) and validation loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    steps = [row["step"] for row in metrics if "loss" in row]
    losses = [row["loss"] for row in metrics if "loss" in row]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="training, smoothed")
    points = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color="#d94801", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Exponential moving average over about `share` of the run, corrected for its start."""
    weight = 2 / (max(2.0, share * len(values)) + 1)
    average, norm, result = 0.0, 0.0, []
    for value in values:
        average = (1 - weight) * average + weight * value
        norm = (1 - weight) * norm + weight
        result.append(average / norm)
    return result
