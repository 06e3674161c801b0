"""Trackers and signals can disturb, but never stop, a run; its log is whole."""

from __future__ import annotations

import itertools
import json
import math
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatfine.config import TrainConfig
from chatfine.train import trackers
from chatfine.train.metrics import MetricsLog, plot_loss, read_metrics, smooth
from chatfine.train.run import train
from chatfine.train.stop import StopSignal
from chatfine.train.trackers import Trackers
from chatfine.types import StepReport

Configure = Callable[..., TrainConfig]


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> list[Any]:
    """Put a tracker library of that name in the place of the real one; returns what it is given."""
    given: list[Any] = []
    module = types.ModuleType(name)
    module.init = lambda **kwargs: given.append(("init", kwargs)) or module  # type: ignore[attr-defined]
    module.log = lambda values, step: given.append((step, values))  # type: ignore[attr-defined]
    module.finish = lambda: given.append("finish")  # type: ignore[attr-defined]
    for function, replacement in functions.items():
        setattr(module, function, replacement)
    monkeypatch.setitem(sys.modules, name, module)
    return given


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("the server says no\nin two lines")


@pytest.mark.parametrize("name", ["trackio", "swanlab", "wandb"])
def test_a_tracker_gets_every_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    given = fake(monkeypatch, name)
    tracker = Trackers([name], tmp_path, {"rank": 8})
    for step in (1, 2, 3):
        tracker.show(StepReport(step=step, loss=1.0 / step))
    tracker.close()
    assert given[0][0] == "init"
    assert given[0][1]["config"] == {"rank": 8}
    assert given[1:] == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3}), "finish"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_raises_never_stops_a_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake(monkeypatch, "trackio", **{where: fail})
    good = fake(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "swanlab", None)  # not installed
    result = train(configure(track=["swanlab", "trackio", "wandb"], max_steps=2))
    assert result["steps"] == 2
    assert [one[0] for one in good if isinstance(one[0], int)] == [1, 2, 2]
    output = capsys.readouterr()
    said = " ".join((output.out + output.err).split())
    assert said.count("tracking with trackio is off, the run goes on: the server says no") == 1
    assert "in two lines" not in said
    assert "pip install swanlab" in said


def test_a_tracker_that_hangs_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release, busy = threading.Event(), threading.Event()

    def hang(values: Any, step: int) -> None:
        busy.set()
        release.wait(20)

    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 2)
    fake(monkeypatch, "trackio", log=hang)
    tracker = Trackers(["trackio"], tmp_path, {})
    assert isinstance(tracker._queue, queue.Queue)
    tracker.show(StepReport(step=1, loss=1.0))
    assert busy.wait(20)
    begin = time.perf_counter()
    for step in range(50):  # many more than the queue holds
        tracker.show(StepReport(step=step, loss=1.0))
    tracker.close()
    assert time.perf_counter() - begin < 5
    release.set()


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Trackers(["tensorboard"], tmp_path, {})
    for step in (1, 2):
        tracker.show(StepReport(step=step, loss=step / 2, learning_rate=0.1))
    tracker._queue.put(None)
    assert tracker._thread is not None
    tracker._thread.join(120)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


# -- the log ---------------------------------------------------------------------------------------


def test_the_log_is_cut_back_to_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(StepReport(step=1, loss=2.0))
    length = log.sync()
    log.write(StepReport(step=2, loss=1.0))
    log.close()
    with (tmp_path / "m.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')  # killed in the middle of a line
    again = MetricsLog(tmp_path / "m.jsonl", length)
    again.write(StepReport(step=2, loss=1.5))
    again.close()
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}
    ]  # fmt: skip


def test_a_half_line_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_every_line_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(StepReport(step=1, loss=1.0, grad_norm=math.inf, val_loss=math.nan))
    log.close()

    def refuse(name: str) -> None:
        raise ValueError(name)

    line = (tmp_path / "m.jsonl").read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": 1.0}


def test_smoothing_keeps_a_constant_and_follows_a_change() -> None:
    assert smooth([2.0] * 30) == pytest.approx([2.0] * 30)
    step = smooth([0.0] * 30 + [1.0] * 30)
    assert step[:30] == [0.0] * 30
    assert all(a < b for a, b in itertools.pairwise(step[29:]))
    assert step[-1] > 0.9
    assert smooth([]) == []


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 1}]]
)
def test_any_run_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_loss(rows, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").stat().st_size > 1000


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_the_handlers_come_back(number: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may send it twice
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_the_middle_of_a_print_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatfine.train.stop.warn", fail)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == signal.SIGTERM


def test_outside_of_the_main_thread_it_is_only_a_flag() -> None:
    found: list[int | None] = []

    def work() -> None:
        with StopSignal() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
