"""Interrupted and resumed is bit for bit the run that was never interrupted (contract C4)."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chatfine import cli
from chatfine.config import ResumeConfig, TrainConfig, dump_yaml
from chatfine.errors import Interrupted, OutputError, Stopped, UsageError
from chatfine.train import run as run_module
from chatfine.train.checkpoint import CheckpointStore
from chatfine.train.loop import Trainer
from chatfine.train.run import resume, train
from chatfine.train.session import Session

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]


class Killed(BaseException):
    """Stands for SIGKILL where the test runs in one process: nothing of ours handles it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process die in the middle of the optimizer step after `step`."""
    original = Trainer._update

    def update(self: Trainer, loss: Any, rate: float) -> float:
        norm = original(self, loss, rate)
        if self.progress.step == step:
            raise Killed
        return norm

    monkeypatch.setattr(Trainer, "_update", update)


def assert_same_run(one: Path, other: Path, metrics: Metrics) -> None:
    assert metrics(one) == metrics(other)
    files = sorted(p.name for p in (one / "adapter").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()


@pytest.mark.parametrize("options", [
    {"dropout": 0.3, "save_every": 2},
    {"method": "dora", "save_every": 1, "scheduler": "linear", "warmup": 2},
    {"dtype": "bf16", "accumulate": 2, "batch_size": 2, "save_every": 3, "weight_decay": 0.1},
    {"dtype": "fp16", "save_every": 1},
    {"checkpointing": "full", "dropout": 0.1, "save_every": 1, "packing": "on", "max_length": 128,
     "batch_size": 1},
    {"checkpointing": "1", "optimizer": "adamw8bit", "rank": 64, "save_every": 2},
])  # fmt: skip
def test_killed_and_resumed_is_the_same_run(
    configure: Configure, metrics: Metrics, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = {"max_steps": 6, "eval_every": 3} | options
    train(configure(output=str(tmp_path / "whole"), **base))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), **base))
    assert not (tmp_path / "killed" / "adapter").exists()
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", metrics)


def test_the_loss_scale_of_fp16_goes_on_too(
    configure: Configure, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins so high that the first steps overflow and are skipped."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, 2.0**24, enabled=enabled)
    )
    base = {"dtype": "fp16", "save_every": 1, "max_steps": 12}
    train(configure(output=str(tmp_path / "whole"), **base))
    skipped = [row["step"] for row in metrics(tmp_path / "whole") if "loss" in row
               and "grad_norm" not in row]  # fmt: skip
    assert skipped[:1] == [1]
    assert len(skipped) < 10
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, len(skipped) + 1)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), **base))
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", metrics)


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_whole_models_resume_too(
    configure: Configure, metrics: Metrics, tmp_path: Path, method: str
) -> None:
    base = {"method": method, "freeze_layers": 1, "max_steps": 4, "save_every": 1}
    train(configure(output=str(tmp_path / "whole"), **base))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), **base))
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    weights = [tmp_path / n / "model" / "model.safetensors" for n in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_killed_before_any_checkpoint_starts_again_from_the_first_step(
    configure: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    train(configure(output=str(tmp_path / "whole"), dropout=0.2))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), dropout=0.2, save_every=3))
    assert len(metrics(tmp_path / "killed")) == 1
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", metrics)


def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_run(
    configure: Configure, metrics: Metrics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure(output=str(tmp_path / "whole"), dropout=0.2))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train(configure(output=str(tmp_path / "killed"), dropout=0.2, save_every=1))
    weights = tmp_path / "killed" / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    capsys.readouterr()
    resume(ResumeConfig(run=str(tmp_path / "killed")))
    output = capsys.readouterr()
    said = " ".join((output.out + output.err).split())
    assert "step-00000003 is skipped: weights.safetensors has" in said
    assert "going on after step 2" in said
    assert_same_run(tmp_path / "whole", tmp_path / "killed", metrics)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_resumable(
    configure: Configure, metrics: Metrics, tmp_path: Path, number: int
) -> None:
    """In this process; the real command gets its signals below."""
    train(configure(output=str(tmp_path / "whole"), dropout=0.2))
    original = Trainer._accumulate
    calls = 0

    def accumulate(self: Trainer, batch: Any, labels: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
        return original(self, batch, labels)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    kind = Interrupted if number == signal.SIGINT else Stopped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_accumulate", accumulate)
        with pytest.raises(kind) as caught:
            train(configure(output=str(tmp_path / "cut"), dropout=0.2))
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert caught.value.what == "stopped after step 3 of 4; everything is saved"
    assert f"chatfine resume {tmp_path / 'cut'}" in caught.value.fix[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume(ResumeConfig(run=str(tmp_path / "cut")))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", metrics)


def test_ctrl_c_outside_of_the_loop_names_resume_too(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "restore", interrupted)
    config = configure()
    with pytest.raises(Interrupted) as caught:
        train(config)
    assert f"chatfine resume {config.output}" in caught.value.fix[0]


def test_a_finished_run_says_so_and_is_not_touched(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(max_steps=1)
    result = train(config)
    times = {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*") if p.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(run_module, "execute", lambda *_: pytest.fail("it was run again"))
    assert cli.main(["resume", config.output]) == 0
    assert "is finished, nothing to do" in " ".join(capsys.readouterr().out.split())
    assert resume(ResumeConfig(run=config.output)) == result
    for path, time_ns in times.items():
        if path.name != ".lock":
            assert path.stat().st_mtime_ns == time_ns, path


def test_killed_while_writing_the_result_finishes_on_resume(
    configure: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    train(configure(output=str(tmp_path / "whole")))

    def dies(*_: Any) -> None:
        raise Killed

    rename = Path.rename

    def dies_at_the_adapter(self: Path, target: Path) -> Path:
        return rename(self, target) if self.name != ".adapter" else dies()

    for target, name in ((run_module, "write_json"), (Path, "rename")):
        output = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, dies if target is run_module else dies_at_the_adapter)
            with pytest.raises(Killed):
                train(configure(output=str(output)))
        resume(ResumeConfig(run=str(output)))
        assert_same_run(tmp_path / "whole", output, metrics)
        assert not (output / ".adapter").exists()


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(configure: Configure) -> Path:
    """A run that was killed after step 2, with a checkpoint of it."""
    config = configure(save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            train(config)
    return Path(config.output)


def change(run: Path, **changes: Any) -> None:
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | changes
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.01 → 0.5"),
        ({"seed": 1}, "seed: 42 → 1"),
        ({"max_steps": 9, "batch_size": 2}, "batch_size: 4 → 2"),
        ({"scheduler": "linear"}, "scheduler: cosine → linear"),
        ({"rank": 4}, "rank: 2 → 4"),
        ({"dtype": "bf16"}, "dtype: fp32 → bf16"),
    ],
)
def test_a_change_that_alters_the_maths_is_refused_with_a_diff(
    stopped: Path, changes: dict[str, Any], line: str
) -> None:
    change(stopped, **changes)
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError) as caught:
        resume(ResumeConfig(run=str(stopped)))
    assert caught.value.code == "config-changed"
    assert line in caught.value.what
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert CheckpointStore(stopped / "checkpoints").newest()[0] is not None


def test_a_change_that_does_not_is_allowed(stopped: Path) -> None:
    change(stopped, save_every=2, keep=3, track=[])
    assert resume(ResumeConfig(run=str(stopped)))["steps"] == 4


def test_changed_data_are_refused(stopped: Path, data: Path) -> None:
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("model 3", "model three"), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        resume(ResumeConfig(run=str(stopped)))
    assert caught.value.code == "config-changed"
    assert "data: " in caught.value.what


def test_settings_changed_before_the_first_checkpoint_are_taken(configure: Configure) -> None:
    config = configure()
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 0)
        with pytest.raises(Killed):
            train(config)
    run = Path(config.output)
    change(run, batch_size=2)
    resume(ResumeConfig(run=str(run)))
    assert json.loads((run / "decisions.json").read_text(encoding="utf-8"))["decided"]["rows"] == 2


def test_the_run_may_have_been_moved(stopped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    stopped.rename(moved)
    result = resume(ResumeConfig(run=str(moved)))
    assert result["run"] == str(moved)
    assert (moved / "adapter" / "adapter_model.safetensors").is_file()
    assert not stopped.exists()


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        resume(ResumeConfig(run=str(tmp_path / "nothing")))
    assert caught.value.code == "no-run"
    assert not (tmp_path / "nothing").exists()


# -- the real command, really killed ---------------------------------------------------------------


def run_command(words: list[str], log: str, environment: dict[str, str]) -> None:
    """In a process of its own: the command line with all output in a file."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.exit(cli.main(words))


class Command:
    """A `chatfine` process, forked from a server that has torch loaded, to save seconds a start."""

    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")

    def __init__(self, log: Path, *words: str) -> None:
        self.context.set_forkserver_preload(
            ["chatfine.train.session", "peft", "matplotlib.figure",
             "transformers.models.llama.modeling_llama"]
        )  # fmt: skip
        environment = {name: os.environ[name] for name in ("CHATFINE_HOME", "CHATFINE_LANG")}
        self.log = log
        self.process = self.context.Process(  # type: ignore[attr-defined]
            target=run_command, args=(list(words), str(log), environment | {"OMP_NUM_THREADS": "1"})
        )
        self.process.start()

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal if wanted and wait; exit code and output on one line."""
        if number is not None:
            os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode, " ".join(self.log.read_text(encoding="utf-8").split())


def wait_for_lines(run: Path, count: int) -> None:
    path, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.002)
    raise AssertionError("the run did not start")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
def test_the_command_survives_signals_kills_and_a_second_process(
    configure: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    """One run, cut by SIGINT, SIGTERM and three SIGKILLs at moments of chance."""
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    train(configure(output=str(whole), max_steps=60, batch_size=2, dropout=0.2, save_every=1))
    config = configure(output=str(cut), max_steps=60, batch_size=2, dropout=0.2, save_every=1)
    recipe = tmp_path / "recipe.yaml"
    dump_yaml(config, recipe)
    chance = random.Random(7)

    running = Command(log, "train", str(recipe))
    wait_for_lines(cut, 3)
    with pytest.raises(OutputError) as caught:
        resume(ResumeConfig(run=str(cut)))
    assert caught.value.code == "run-in-use"
    code, said = running.end(signal.SIGINT)
    assert code == 130, said
    assert f"chatfine resume {cut}" in said
    assert "everything is saved" in said

    for number, wanted in (
        (signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGKILL, -9)
    ):  # fmt: skip
        done = len((cut / "metrics.jsonl").read_bytes().splitlines())
        running = Command(log, "resume", str(cut))
        wait_for_lines(cut, done + chance.randrange(0, 6))
        time.sleep(chance.random() * 0.1)
        code, said = running.end(number)
        assert code == wanted, said

    code, said = Command(log, "resume", str(cut)).end()
    assert code == 0, said
    assert_same_run(whole, cut, metrics)
