"""benchmarks/gpu.py: its cases are sound, its figures follow from the steps, and it runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import psutil
import pytest
from tiny_model import write_tiny_tokenizer

from chatfine import cli
from chatfine.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
children = importlib.import_module("children")
gpu = importlib.import_module("gpu")
gpu_cases = importlib.import_module("gpu_cases")
gpu_report = importlib.import_module("gpu_report")
inputs = importlib.import_module("inputs")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmark needs Linux")
RESULT = gpu_report.Result(
    case="7b-lora-rows", title="7B, LoRA", system="chatfine", weights="fp8", batch=4, note="",
    packing=True, checkpointing="False", tokens_per_second=3000.0, peak_bytes=3 * 2**30,
    first_step_seconds=9.5, error="", shape=None, card="a card", steps=[[8192, 2.7]], warm_up=0,
    command="-m chatfine train",
)  # fmt: skip
PEER = replace(RESULT, system="trl", weights="nf4", packing=False, tokens_per_second=1000.0,
               shape=[4, 2048])  # fmt: skip
FACTS = {"libraries": {"torch": "2.11.0"}, "dialogues": "MTS-Dialog"}


def every_run() -> list[tuple[object, object]]:
    return [(case, run) for case in gpu_cases.CASES for run in case.runs]


def test_the_cases_are_sound() -> None:
    names = [case.name for case in gpu_cases.CASES]
    assert len(set(names)) == len(names)
    for case in gpu_cases.CASES:
        assert case.shape in inputs.SHAPES
        usual = {run.system for run in case.runs if not run.thorough}
        assert usual > {gpu_cases.OURS}, f"{case.name} compares nothing"
    for case, run in every_run():
        assert run.system in gpu_cases.SYSTEMS
        assert case.data == "dialog" or gpu.ROWS % run.batch == 0, "a smaller step at the end"


def test_chatfine_understands_every_command_line(tmp_path: Path) -> None:
    known = get_args(TrainConfig.model_fields["quantize"].annotation)
    for case, run in every_run():
        if run.system != gpu_cases.OURS:
            continue
        words = gpu.our_words(case, run, tmp_path, tmp_path / "rows.jsonl", tmp_path / "run", 11)
        assert words[:4] == ["-m", "chatfine", "train", "--json"]
        place = words.index("--quantize") + 1
        if words[place] not in known:
            words[place] = "none"
        config = TrainConfig.read(*cli.settings("train", words[4:]))
        assert config.max_steps == 11
        assert (config.method, config.batch_size) == (case.method, run.batch)


def test_choosing() -> None:
    def names(*words: object) -> list[str]:
        return [case.name for case, _ in gpu_cases.choose(*words)]

    assert "tiny-lora-rows" not in names("", gpu_cases.SYSTEMS)
    assert names("tiny-lora-r", gpu_cases.SYSTEMS) == ["tiny-lora-rows"]
    assert names("1b|135m", ["unsloth"]) == [
        "1b-lora-rows", "1b-full-rows", "135m-lora-rows", "135m-full-rows"
    ]  # fmt: skip
    assert names("64k", ["trl"]) == [], "no run of this system"
    few, many = (gpu_cases.choose("1b-full", gpu_cases.SYSTEMS, more) for more in (False, True))
    assert len(few[0][1]) < len(many[0][1])


def test_steps_are_the_differences_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    lines = [{"tokens": 10, "seconds": 2.0}, {"val_loss": 1.0}, {"tokens": 30, "seconds": 3.0}]
    log.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert gpu.read_steps(log) == [(10, 2.0), (20, 1.0)]
    assert gpu.read_steps(tmp_path / "none") == []


def test_speed() -> None:
    assert gpu.speed([]) is None
    assert gpu.speed([(100, 1.0), (100, 2.0), (100, 50.0)]) == 50.0  # the median step
    assert gpu.speed([(10, 1.0), (90, 4.0)]) == 20.0  # unequal steps: all of them


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("warming up\nValueError: no such thing\nsee the docs", "ValueError: no such thing"),
        ("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried", "torch.OutOfMemoryError: CUDA "
         "out of memory. Tried"),
        ('note\n{"error": "data-empty", "what": "no rows"}', "data-empty: no rows"),
        ("killed by something\n", "killed by something"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure(said: str, found: str) -> None:
    assert children.reason(said) == found


def test_watching_a_process(tmp_path: Path) -> None:
    script = """if 1:
        import pathlib, sys, time
        time.sleep(0.3)
        pathlib.Path("log").write_text("{}")
        time.sleep(0.3)
        print('{"peak_memory_bytes": 5}', 'bye', sep=chr(10))
    """
    ended = children.watch([sys.executable, "-c", script], tmp_path / "log", tmp_path, 30)
    assert (ended.result, ended.error) == ({"peak_memory_bytes": 5}, "")
    assert 0.3 <= ended.first_step_seconds < 30


def test_a_late_process_ends_with_its_children(tmp_path: Path) -> None:
    script = """if 1:
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path("child").write_text(str(child.pid))
        time.sleep(60)
    """
    ended = children.watch([sys.executable, "-c", script], tmp_path / "log", tmp_path, 2)
    assert ended == children.Ended(None, {}, "ended after 2 s")
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_new_measurement_replaces_its_older_self_only() -> None:
    other = replace(PEER, case="7b-lora-24gb")
    faster = replace(PEER, tokens_per_second=1500.0)
    kept = gpu_report.merged([other, RESULT, PEER], faster)
    assert [one.tokens_per_second for one in kept] == [3000.0, 1500.0, 1000.0]
    padded = replace(PEER, checkpointing="True")
    assert len(gpu_report.merged([PEER], padded)) == 2


def test_the_table() -> None:
    failed = replace(PEER, system="unsloth", tokens_per_second=None, peak_bytes=None,
                     first_step_seconds=None, error="ended | after 180 s")  # fmt: skip
    page = gpu_report.table([RESULT, PEER, failed], FACTS)
    assert "| 7B, LoRA | 3,000 | fp8 | 1,000 | TRL, NF4 | **3.00** |" in page
    assert "| **chatfine** | fp8 | 4 | – | **3,000** | 3.00 | 3.0 | 9.5 |" in page
    assert "| TRL | NF4 | 4 | – | 1,000 | 1.00 | 3.0 | 9.5 |" in page
    assert "| Unsloth | NF4 | 4 | – | failed: ended / after 180 s | – | – | – |" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert Counter(line.count("|") for line in tables) == {7: 3, 9: 5}
    assert "Several cards" not in page
    assert "Several cards" in gpu_report.table([RESULT, replace(PEER, card="another")], FACTS)


def test_names_tell_how_a_peer_laid_its_rows() -> None:
    flat = replace(PEER, shape=[1, 9000])
    assert flat.name == "TRL (padding-free)"
    assert replace(flat, packing=True, note="again").name == "TRL (packed, again)"
    assert replace(PEER, packing=True).name == "TRL (asked to pack, padded)"
    assert replace(flat, batch=1).name == "TRL"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    gpu_report.write(tmp_path, [], FACTS)
    gpu_report.write(tmp_path, [RESULT, replace(PEER, tokens_per_second=None)], FACTS)
    assert gpu_report.read(tmp_path / "gpu.json")[0] == RESULT
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "Speed on a card" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_rows_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "rows-16.jsonl"
    assert inputs.write_token_rows(file, inputs.full_rows(3, 16, 400)) == [16, 16, 16]
    module = importlib.util.spec_from_file_location("reader", file.with_suffix(".py"))
    assert module
    assert module.loader
    reader = importlib.util.module_from_spec(module)
    module.loader.exec_module(reader)
    rows = reader.rows(None, None, "train")
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert max(max(row["input_ids"]) for row in rows) < 400


def test_random_dialogues_are_short_and_end_in_an_answer() -> None:
    found = list(inputs.random_dialogues(300, 2048, 400))
    lengths = sorted(len(ids) for ids, _ in found)
    assert 100 < lengths[150] < 260
    assert lengths[-1] <= 2048
    assert all(not mask[0] and mask[-1] for _, mask in found)


def test_real_dialogues(shared: Path, tiny: Path) -> None:
    ids, mask = next(iter(inputs.real_dialogues(shared / "data/mts_dialog", tiny, 100_000)))
    assert len(ids) == len(mask)
    assert 0 < sum(mask) < len(mask)


def test_results_are_in_the_order_of_the_list_whichever_ended_first() -> None:
    again = replace(RESULT, note="started again")
    bf16 = replace(RESULT, weights="bf16")
    unknown = replace(RESULT, note="no longer there")
    results: list[object] = []
    for one in (unknown, PEER, bf16, again, RESULT):
        results = gpu_report.merged(results, one)
    assert results[:3] == [RESULT, again, bf16]
    assert {one.note for one in results[3:]} == {"", "no longer there"}, "no such peer either"
    packed = gpu_cases.Run("unsloth", packing=True)
    (dialogues,) = (case for case in gpu_cases.CASES if case.name == "7b-lora-dialog")
    found = replace(PEER, case=dialogues.name, system="unsloth", weights="bf16", packing=True)
    assert dialogues.runs[gpu_report.place(found)[1]] == packed


def test_measurements_share_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as there are cards, the longest rows first, and what is started again
    follows what it starts again on the same card."""
    order: list[tuple[str, str]] = []
    both = threading.Barrier(2, timeout=60)

    def watch(command: list[str], log: Path, work: Path, timeout: float, home: Path) -> object:
        order.append((command[1][-1], command[command.index("--max-length") + 1]))
        if len(order) <= 2:
            both.wait()  # the first has another beside it
        return children.Ended(None, {}, "as if late")

    def prepare(case: object, options: object) -> tuple[Path, Path]:
        return tmp_path, tmp_path / "rows.jsonl"

    monkeypatch.setattr(children, "watch", watch)
    monkeypatch.setattr(gpu, "write_model", lambda shape, card, options: tmp_path)
    monkeypatch.setattr(gpu, "prepare", prepare)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    words = ["-o", tmp_path / "out", "--only", "7b-lora-(rows|64k)", "--systems", "chatfine",
             "--gpus", "0,3", "--tokenizer", tokenizer, "--work", tmp_path / "work"]  # fmt: skip
    results = gpu.main([str(word) for word in words])
    assert {card for card, _ in order[:2]} == {"0", "3"}
    assert {length for _, length in order[:2]} == {"65536", "2048"}
    assert [(one.weights, one.note) for one in results[:3]] == [
        ("fp8", ""), ("fp8", "started again"), ("bf16", "")
    ]  # fmt: skip
    (fp8, *_) = (job for job in gpu.jobs_of(gpu.arguments([str(word) for word in words]))
                 if job[0][1].weights == "fp8")  # fmt: skip
    assert [run.note for _, run in fp8] == ["", "started again"]


def test_a_tiny_run_of_ours(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_tiny_tokenizer(tokenizer)
    out = tmp_path / "out"
    words = ["-o", out, "--only", "tiny-lora-rows", "--systems", "chatfine", "--steps", "2",
             "--work", tmp_path / "work", "--tokenizer", tokenizer, "--timeout", "120"]  # fmt: skip
    (result,) = gpu.main([str(word) for word in words])
    assert result.error == ""
    steps = result.warm_up + 2
    assert [tokens for tokens, _ in result.steps] == [128] * steps, "two full rows of 64 tokens"
    assert result.tokens_per_second > 0
    assert result.peak_bytes > 0
    assert 0 < result.first_step_seconds < 120
    joined = gpu.main(["-o", str(out), "--only", "no such case", "--join", str(out / "gpu.json"),
                       "--tokenizer", str(tokenizer)])  # fmt: skip
    assert [one.tokens_per_second for one in joined] == [result.tokens_per_second]
