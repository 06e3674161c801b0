"""Two processes on the CPU (gloo) do what one does, also when they resume each other's runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import CHARACTERS, grow_tokenizer
from safetensors.torch import load_file

from chatfine.config import ResumeConfig, TrainConfig, dump_yaml
from chatfine.model.rows import grow
from chatfine.train import run as running
from chatfine.train.checkpoint import CheckpointStore

HERE = Path(__file__).parent
Job = dict[str, Any]

LOW = {"learning_rate": 1e-4}  # Adam makes a whole step of a gradient that is only rounding
RUNS: dict[str, Job] = {
    "lora": {"sharding": "none"},
    "lora sharded": {"sharding": "full", "checkpointing": "full"},
    "lora on int8, sharded": {"sharding": "gradients", "quantize": "int8", "load": "rank0"},
    "full": {"method": "full", "sharding": "none", **LOW},
    "full sharded": {"method": "full", "sharding": "full", **LOW},
    "the last layer sharded": {
        "method": "freeze",
        "freeze_layers": 1,
        "sharding": "full",
        "load": "rank0",
        **LOW,
    },
    "lora and new rows": {"rows_first": 2, "sharding": "none", **LOW},
    "lora and new rows, sharded": {"sharding": "full", "checkpointing": "full", **LOW},
    "new rows alone": {"method": "rows", "sharding": "none", **LOW},
}
"""Settings of the runs, on a model with a grown vocabulary where the name speaks of new rows."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(jobs: list[Job], folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes that do `jobs`, as a launcher would start them."""
    for job, port in zip(jobs, free_ports(len(jobs)), strict=True):
        job["port"] = port
    plan = folder / "plan.json"
    plan.write_text(json.dumps(jobs))
    base = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs[0]["port"]), "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CHATFINE_LANG": "en",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "two_processes.py"), str(plan)]
    return [
        subprocess.Popen(command, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[str]:
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def settings(tiny: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": str(tiny), "dataset": str(data), "output": str(output), "batch_size": 4,
        "max_steps": 4, "save_every": 2, "dtype": "fp32", "device": "cpu", "learning_rate": 1e-2,
        "rank": 2, "validation": "0.2",
    }  # fmt: skip
    return TrainConfig.read(values | changes)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for key, value in json.loads(line).items()
            if key in ("loss", "val_loss", "grad_norm")]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(next(run.glob("*/*model.safetensors"))))


def unfinished(run: Path, copy: Path, config: TrainConfig) -> Path:
    """The run as it was after step 2."""
    import shutil

    shutil.copytree(run, copy)
    for name in ("result.json", "adapter", "model", "checkpoints/step-00000004"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    dump_yaml(config.model_copy(update={"output": str(copy)}), copy / "config.yaml")
    return copy


def with_new_rows(tiny: Path, folder: Path) -> Job:
    """A model with a grown vocabulary, and questions and answers that are written with it."""
    grow_tokenizer(tiny, folder / "tokenizer")
    grow(tiny, folder / "tokenizer", folder / "grown")
    rows = [
        {"question": f"{CHARACTERS[i : i + 3]}?", "answer": CHARACTERS[i : i + 3 + i % 7]}
        for i in range(27)
    ]
    (folder / "chinese.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"model": str(folder / "grown"), "dataset": str(folder / "chinese.jsonl")}


class Together:
    """The runs of both kinds, made once."""

    def __init__(self, tiny: Path, data: Path, folder: Path) -> None:
        self.folder = folder
        jobs: list[Job] = []
        grown = with_new_rows(tiny, folder)
        for name, own in RUNS.items():
            changes = own | grown if "new rows" in name else own
            one = settings(tiny, data, folder / f"{name}, one", **changes, accumulate=2)
            running.train(one)
            two = settings(tiny, data, folder / f"{name}, two", **changes)
            jobs.append({"settings": two.model_dump(mode="json")})
            if name in ("lora", "full sharded"):
                again = unfinished(Path(one.output), folder / f"{name}, 1 then 2", one)
                jobs.append({"resume": str(again)})
        self.printed = finish(start(jobs, folder))
        for name in ("lora", "full sharded"):
            two = settings(tiny, data, folder / f"{name}, two", **RUNS[name])
            again = unfinished(Path(two.output), folder / f"{name}, 2 then 1", two)
            running.resume(ResumeConfig(run=str(again)))


@pytest.fixture(scope="module")
def together(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATFINE_HOME", str(folder / "home"))
        rows = [
            {"question": f"Who are you, number {i}?", "answer": f"I am {i}. " * (1 + i % 4)}
            for i in range(27)
        ]
        data = folder / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return Together(tiny, data, folder)


def assert_equal(one: Path, other: Path) -> None:
    assert losses(other) == pytest.approx(losses(one), rel=1e-6)
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().mean() < 1e-6, name


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(together: Together, name: str) -> None:
    """27 rows in steps of 8: the last step of an epoch gives the processes unequal shares."""
    assert_equal(together.folder / f"{name}, one", together.folder / f"{name}, two")


@pytest.mark.parametrize("name", [name for name in RUNS if "new rows" in name])
def test_new_rows_learn_in_both(together: Together, name: str) -> None:
    base = load_file(str(together.folder / "grown" / "model.safetensors"))
    first = json.loads((together.folder / "grown" / "vocabulary.json").read_text())["old_size"]
    rows = {key: value for key, value in weights(together.folder / f"{name}, two").items()
            if "trainable_tokens" in key}  # fmt: skip
    for matrix in ("embed_tokens", "lm_head"):
        (learned,) = (value for key, value in rows.items() if matrix in key)
        start = next(value for key, value in base.items() if matrix in key)
        moved = (learned != start[first : first + len(learned)]).any(1)
        assert int(moved.sum()) > len(learned) // 2


@pytest.mark.parametrize("order", ["1 then 2", "2 then 1"])
@pytest.mark.parametrize("name", ["lora", "full sharded"])
def test_a_run_goes_on_with_another_number_of_processes(
    together: Together, name: str, order: str
) -> None:
    assert_equal(together.folder / f"{name}, one", together.folder / f"{name}, {order}")


def test_only_the_first_process_speaks(together: Together) -> None:
    first, second = together.printed
    assert "2, each holds a share of every weight" in first
    assert second.strip() == ""


def test_each_process_writes_its_rows_once(together: Together) -> None:
    run = together.folder / "full sharded, two"
    checkpoint = CheckpointStore(run / "checkpoints").newest()[0]
    assert checkpoint is not None
    files = sorted(path.name for path in checkpoint.path.glob("weights*"))
    assert files == [f"weights-0000{n}-of-00002.safetensors" for n in (1, 2)]
    written = sum(sum(v.numel() for v in load_file(str(checkpoint.path / f)).values())
                  for f in files)  # fmt: skip
    assert written == sum(value.numel() for value in weights(run).values())


def test_a_sharded_run_converts_to_a_model_folder(together: Together, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from chatfine.commands.convert import convert
    from chatfine.config import ConvertConfig

    run = together.folder / "full sharded, two"
    convert(ConvertConfig(source=str(run), output=str(tmp_path / "hf")))
    expected = weights(run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, value in model.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name])


@pytest.fixture
def long_run(tiny: Path, data: Path, tmp_path: Path) -> Callable[..., Job]:
    def job(**extra: Any) -> Job:
        config = settings(tiny, data, tmp_path / "run", max_steps=100_000, save_every=50_000)
        return {"settings": config.model_dump(mode="json")} | extra

    return job


def test_a_process_that_hangs_ends_all_by_name(
    long_run: Callable[..., Job], tmp_path: Path
) -> None:
    processes = start([long_run(hang=1)], tmp_path)
    lines = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if lines.exists() and len(lines.read_text().splitlines()) >= 6:
            break
        time.sleep(0.1)
    stuck = time.monotonic()
    printed = finish(processes, seconds=60)
    assert time.monotonic() - stuck < 10
    assert "process 1 of 2" in printed[0]
    assert "hangs" in printed[0]
    assert "two_processes.py" in printed[0], "says where"
    assert processes[0].returncode == 75


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP")
def test_a_stopped_process_ends_all_by_name(long_run: Callable[..., Job], tmp_path: Path) -> None:
    import signal

    processes = start([long_run()], tmp_path)
    lines = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if lines.exists() and lines.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    stopped = time.monotonic()
    processes[1].send_signal(signal.SIGSTOP)
    printed = finish(processes, seconds=60)
    assert time.monotonic() - stopped < 10
    assert "process 1 of 2" in printed[0]
    assert "was stopped" in printed[0]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_signal_saves_and_ends_both_once(long_run: Callable[..., Job], tmp_path: Path) -> None:
    """Only one of them hears it: they agree at the end of the step."""
    import signal

    processes = start([long_run()], tmp_path)
    run = tmp_path / "run"
    lines = run / "metrics.jsonl"
    for _ in range(600):
        if lines.exists() and lines.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    printed = finish(processes, seconds=60)
    assert [process.returncode for process in processes] == [75, 75]
    assert printed[0].count("everything is saved") == 1
    assert "process-lost" not in "".join(printed)
    assert "error" not in printed[1]
    newest, skipped = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    assert skipped == []
    assert newest.step == len([line for line in lines.read_text().splitlines() if '"loss"' in line])


def test_a_refusal_is_said_once_and_ends_both(tiny: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny, data, tmp_path / "run", sharding="full", dtype="fp16")
    processes = start([{"settings": config.model_dump(mode="json")}], tmp_path)
    printed = finish(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "--sharding full does not work with fp16" in printed[0]
    assert "error" not in printed[1]
    assert not (tmp_path / "run").exists()
