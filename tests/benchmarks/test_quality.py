"""benchmarks/quality.py: fair data, differences that follow from the logs, and it runs."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import threading
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors

from chatfine import cli
from chatfine.config import EvalConfig, TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
children = importlib.import_module("children")
quality = importlib.import_module("quality")
report = importlib.import_module("quality_report")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmark needs Linux")
RESULT = report.Result(
    data="MTS-Dialog", storage="none", seed=0, stored="none", products="bf16", compiled=True,
    points=[[10, 20_000, 3.0], [20, 40_000, 2.0]], train_seconds=5.0, tokens_per_second=8000.0,
    peak_bytes=2**30, error="", card="a card", command="-m chatfine train",
)  # fmt: skip
FACTS = {
    "settings": {"model": "small", "rank": 16, "steps": 20, "batch_size": 2, "max_length": 1024,
                 "learning_rate": 5e-4},
    "libraries": {"torch": "2.13.0"},
    "data": {"MTS-Dialog": {"train": 90, "tokens": 20_000, "validation": 10}},
}  # fmt: skip


def run(storage: str, seed: int, *losses: float, **changes: Any) -> Any:
    points = [[10 * (i + 1), 20_000 * (i + 1), loss] for i, loss in enumerate(losses)]
    stored = changes.pop("stored", storage)
    return replace(RESULT, storage=storage, stored=stored, seed=seed, points=points, **changes)


RUNS = [
    run("none", 0, 3.0, 2.0), run("none", 1, 3.0, 2.2),
    run("fp8", 0, 3.3, 2.01), run("fp8", 1, 3.0, 2.2),
    run("nf4", 0, 3.0, 2.02), run("nf4", 1, 3.0, 2.266),
]  # fmt: skip


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """A folder like MTS-Dialog's; one question comes twice, one example is too long."""
    folder = tmp_path / "mts"
    folder.mkdir()
    rows = [(f"Doctor: How are you, number {n}?", f"Patient {n} is well.") for n in range(40)]
    rows += [(rows[0][0], "Another note."), ("long " * 400, "Too long.")]
    with (folder / "MTS-Dialog-TrainingSet.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("ID", "section_header", "section_text", "dialogue"))
        writer.writerows((n, "CC", note, talk) for n, (talk, note) in enumerate(rows))
    return folder


def words(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["-m", str(model), "-d", str(data), "-o", str(out), "--max-length", "128", "--examples",
            "20", "--validation", "8", "--steps", "4", "--evaluations", "2", "--compile", "off",
            *more]  # fmt: skip


def fake(
    monkeypatch: pytest.MonkeyPatch,
    losses: dict[str, float],
    whole: float | None = None,
    best: int = 4,
) -> list[list[str]]:
    """Let every run end at once; storages without a loss fail, and evaluations without `whole`.
    Returns the commands."""
    commands: list[list[str]] = []

    def watch(command: list[str], log: Path, work: Path, timeout: float, home: Path) -> Any:
        commands.append(command)
        storage = command[command.index("--quantize") + 1]
        (work / "stderr").write_text("", encoding="utf-8")
        if "eval" in command:
            assert not log.exists()
            assert (work.parent / "run/decisions.json").is_file(), "the run is still there"
            failed = children.Ended(None, {}, "ended after 600 s")
            return failed if whole is None else children.Ended(None, {"loss": whole}, "")
        if storage not in losses:
            return children.Ended(None, {}, "ValueError: no | such thing")
        log.parent.mkdir()
        lines = [{"step": 4, "tokens": 512}, {"step": 4, "val_loss": losses[storage]}]
        log.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
        decided = {"decided": {"quantize": storage, "dtype": "bfloat16", "compile": False,
                               "fp8_products": storage == "nf4"}}  # fmt: skip
        (log.parent / "decisions.json").write_text(json.dumps(decided), encoding="utf-8")
        return children.Ended(1.0, {"seconds": 2.0, "best_step": best}, "")

    monkeypatch.setattr(children, "watch", watch)
    return commands


def test_chatfine_understands_the_command_line(tiny: Path, dialogues: Path, tmp_path: Path) -> None:
    options = quality.arguments(["-m", str(tiny), "-d", str(dialogues), "-o", str(tmp_path)])
    shown = quality.our_words(dialogues, "nf4", 2, tmp_path / "run", options)
    config = TrainConfig.read(*cli.settings("train", shown[4:]))
    assert shown[:4] == ["-m", "chatfine", "train", "--json"]
    assert (config.quantize, config.seed, config.rank, config.packing) == ("nf4", 2, 16, "on")
    assert (config.max_steps, config.eval_every, config.learning_rate) == (240, 20, 5e-4)
    assert (config.max_length, config.batch_size, config.compile) == (1024, 2, "on")
    other = quality.our_words(dialogues, "fp8", 2, tmp_path / "run", options)
    assert [one for one in shown if one not in other] == ["nf4"], "only the storage differs"
    shown = quality.whole_words(dialogues, tmp_path / "run", options)
    measured = EvalConfig.read(*cli.settings("eval", shown[4:]))
    assert shown[:4] == ["-m", "chatfine", "eval", "--json"]
    assert measured.model == str(tmp_path / "run")
    assert measured.dataset == (str(dialogues / "validation.jsonl"),)
    assert (measured.quantize, measured.dtype, measured.max_length) == ("none", "bf16", 1024)


def test_held_out_examples_are_not_learned_from(
    tiny: Path, dialogues: Path, tmp_path: Path
) -> None:
    options = Namespace(model=tiny, max_length=128, examples=1000, validation=8)
    size = quality.write_data(quality.SOURCES[0], dialogues, tmp_path / "a", options)
    held, learned = (
        [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (tmp_path / "a/validation.jsonl", tmp_path / "a/train.jsonl")
    )
    assert (len(held), len(learned)) == (8, 32) == (size["validation"], size["train"])
    assert len({one[0]["content"] for one in held + learned}) == 40
    assert held[0][0]["content"].startswith("Summarize the dialogue as a clinical note:\nDoctor: ")
    assert [one["role"] for one in held[0]] == ["user", "assistant"]
    options.examples = 5
    few = quality.write_data(quality.SOURCES[0], dialogues, tmp_path / "b", options)
    assert few["train"] == 5 < few["tokens"] < size["tokens"]
    assert (tmp_path / "a/validation.jsonl").read_bytes() == (
        tmp_path / "b/validation.jsonl"
    ).read_bytes()
    options.validation = 40
    with pytest.raises(SystemExit, match="MTS-Dialog has 40 usable examples"):
        quality.write_data(quality.SOURCES[0], dialogues, tmp_path / "c", options)


def test_the_real_data_has_the_columns(shared: Path, tiny: Path, tmp_path: Path) -> None:
    options = Namespace(model=tiny, max_length=100_000, examples=5, validation=5)
    for source, folder in zip(quality.SOURCES, ("mts_dialog", "toyhom_med_zh"), strict=True):
        size = quality.write_data(source, shared / "data" / folder, tmp_path / folder, options)
        assert size["train"] == 5


def test_points_are_the_evaluations_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "tokens": 10, "loss": 3.0}, {"step": 2, "tokens": 30, "loss": 2.5},
             {"step": 2, "val_loss": 2.6}, {"step": 3, "tokens": 45, "loss": 2.4}]  # fmt: skip
    log.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert quality.read_points(log) == [[2, 30, 2.6]]
    assert quality.read_points(tmp_path / "none") == []


def test_differences_are_to_the_same_seed_and_step() -> None:
    found = report.differences(RUNS, "MTS-Dialog", "fp8")
    assert found[0] == pytest.approx({10: 10.0, 20: 0.5})
    assert found[1] == {10: 0.0, 20: 0.0}
    assert report.differences(RUNS[1:], "MTS-Dialog", "fp8").keys() == {1}, "no bf16 of seed 0"
    assert report.differences(RUNS, "toyhom", "fp8") == {}


def test_the_summary() -> None:
    base, fp8, nf4 = report.summary(RUNS)
    assert (base["loss"], base["difference"], base["outcome"]) == (pytest.approx(2.1), 0.0, "")
    assert base["spread"] == pytest.approx(0.02**0.5)
    assert (fp8["difference"], fp8["worst"]) == pytest.approx((0.25, 0.5))
    assert (nf4["difference"], nf4["worst"]) == pytest.approx((2.0, 3.0))
    assert (fp8["outcome"], nf4["outcome"]) == ("met", "missed")


def test_a_card_without_fp8_meets_nothing() -> None:
    (_, row) = report.summary([run("none", 0, 2.0), run("fp8", 0, 2.0, stored="none")])
    assert row["outcome"] == "not measured: stored as none"
    assert row["difference"] is None


def test_the_table() -> None:
    failed = run("nf4", 2, 3.0, error="ended | after 600 s")
    page = report.table([*RUNS, failed], FACTS)
    assert "| MTS-Dialog | bf16 | bf16 | 2 | 2.1000 ± 0.1414 | – | – | – | – |  |" in page
    assert "| fp8 | bf16 | 2 | 2.1050 ± 0.1344 | +0.25 | +0.50 | 0.5 | – | met |" in page
    assert "| NF4 | bf16 | 2 | 2.1430 ± 0.1739 | +2.00 | +3.00 | 1.5 | – | missed |" in page
    assert "| NF4, seed 2 | – | – | – | – | – | – | – | failed: ended / after 600 s |" in page
    assert "- MTS-Dialog: 90 examples of 20,000 tokens, 2.0 epochs; 10 held out" in page
    assert "layers compiled" in page
    shapes = Counter(line.count("|") for line in page.splitlines() if line.startswith("|"))
    assert shapes == {11: 6}
    assert "Several cards" not in page
    mixed = report.table([*RUNS, replace(failed, card="another", compiled=False, error="")], FACTS)
    assert "Several cards" in mixed
    assert "partly compiled" in mixed


def test_the_column_of_the_bf16_weights() -> None:
    fp8 = [replace(one, whole_loss=loss) for one, loss in zip(RUNS[2:4], (2.02, 2.2), strict=True)]
    runs = [*RUNS[:2], *fp8, RUNS[4], replace(RUNS[5], whole_loss=2.222)]
    page = report.table(runs, FACTS)
    assert page.count("| goal % | on bf16 weights, mean % |  |") == 1
    assert "| +0.25 | +0.50 | 0.5 | +0.50 | met |" in page, "of 1 % and 0 %, by seed"
    assert "| +2.00 | +3.00 | 1.5 | +1.00 (1 of 2) | missed |" in page
    assert report.summary(runs[1:])[1]["whole"] == pytest.approx(0), "seed 0 has no bf16 run"
    assert report.summary(runs[2:])[0]["whole"] is None
    instead = report.summary([RUNS[0], replace(fp8[0], stored="none")])[1]
    assert (instead["whole"], instead["whole_seeds"]) == (None, 0)
    assert report.line(fp8[0]).endswith("20 steps, 5.0 s; 2.0200 on bf16 weights")
    assert report.line(RUNS[2]).endswith("20 steps, 5.0 s")
    failed = replace(RUNS[2], whole_error="ended after 600 s")
    assert report.line(failed).endswith("s; not measured on bf16 weights, ended after 600 s")


def test_files_of_before_that_column_are_read(tmp_path: Path) -> None:
    report.write(tmp_path, RUNS, FACTS)
    values = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    for one in values["results"]:
        del one["whole_loss"], one["whole_error"]
    (tmp_path / "quality.json").write_text(json.dumps(values), encoding="utf-8")
    assert report.read(tmp_path / "quality.json") == (RUNS, FACTS["settings"])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    report.write(tmp_path, [], FACTS)
    assert not (tmp_path / "quality.png").exists()
    report.write(tmp_path, [*RUNS, run("nf4", 2, error="failed")], FACTS)
    results, settings = report.read(tmp_path / "quality.json")
    assert (results[:6], settings) == (RUNS, FACTS["settings"])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_is_a_row_and_is_run_again(
    tiny: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fake(monkeypatch, {"none": 2.0, "nf4": 2.1})
    three = ("--storages", "none,fp8,nf4")
    results = quality.main(words(tiny, dialogues, out, "--seeds", "1,0", *three))
    assert [one.key[1:] for one in results] == [
        ("none", 0), ("none", 1), ("fp8", 0), ("fp8", 1), ("nf4", 0), ("nf4", 1)
    ]  # fmt: skip
    page = (out / "quality.md").read_text(encoding="utf-8")
    assert (
        "| fp8, seed 0 | – | – | – | – | – | – | – | failed: ValueError: no / such thing |" in page
    )
    assert "| NF4 | fp8 | 2 | 2.1000 ± 0.0000 | +5.00 | +5.00 | 1.5 | – | missed |" in page

    join = ("--join", str(out / "quality.json"))
    commands = fake(monkeypatch, {"fp8": 2.0}, 2.02)
    joined = quality.main(
        words(tiny, dialogues, tmp_path / "again", "--seeds", "0,1", *join, *three)
    )
    assert ["eval" in one for one in commands] == [False, True] * 2, "only the failed ones"
    assert [one.final for one in joined] == [2.0] * 4 + [2.1] * 2
    assert [one.whole_loss for one in joined] == [None] * 2 + [2.02] * 2 + [None] * 2
    with pytest.raises(SystemExit):
        quality.arguments(words(tiny, dialogues, out, "--rank", "8", *join))


def test_a_failed_evaluation_is_no_failed_run(
    tiny: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake(monkeypatch, {"none": 2.0, "nf4": 2.1})
    more = ("--storages", "none,nf4", "--seeds", "0", "--gpus", "3")
    base, nf4 = quality.main(words(tiny, dialogues, tmp_path / "a", *more))
    assert ["eval" in one for one in commands] == [False, False, True], "not the bf16 run's"
    assert commands[2][:3] == ["env", "CUDA_VISIBLE_DEVICES=3", sys.executable]
    assert (nf4.final, nf4.error, nf4.whole_loss) == (2.1, "", None)
    assert (base.whole_error, nf4.whole_error) == ("", "ended after 600 s")
    commands = fake(monkeypatch, {"nf4": 2.1}, 2.0, best=2)
    (nf4,) = quality.main(words(tiny, dialogues, tmp_path / "b", *more, "--storages", "nf4"))
    assert len(commands) == 1, "the checkpoint that it needs is not there"
    assert (nf4.final, nf4.whole_loss) == (2.1, None)
    assert nf4.whole_error.startswith("no adapter of the last step: ")


def test_the_adapter_of_the_last_step(tmp_path: Path) -> None:
    save, load = safetensors.save_file, safetensors.load_file
    checkpoint = tmp_path / "checkpoints/step-00000004"
    for folder in (checkpoint, tmp_path / "adapter"):
        folder.mkdir(parents=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save({"q.lora_A.weight": torch.zeros(2)}, file)
    save({"q.lora_A.default.weight": torch.ones(2)}, checkpoint / "weights.safetensors")
    quality.keep_last(tmp_path, 4)
    assert load(file)["q.lora_A.weight"].tolist() == [1, 1]
    save({"q.lora_B.default.weight": torch.ones(2)}, checkpoint / "weights.safetensors")
    with pytest.raises(ValueError, match="other names"):
        quality.keep_last(tmp_path, 4)


def test_runs_are_dealt_out_to_the_cards(
    tiny: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake(monkeypatch, {"none": 2.0})
    at_once, both = children.watch, threading.Barrier(2, timeout=60)

    def watch(*given: Any) -> Any:
        both.wait()  # each run has another beside it
        return at_once(*given)

    monkeypatch.setattr(children, "watch", watch)
    more = ("--storages", "none", "--seeds", "0,1,2,3", "--gpus", "0,3")
    quality.main(words(tiny, dialogues, tmp_path / "out", *more))
    places = Counter(tuple(command[:2]) for command in commands)
    assert places == {("env", f"CUDA_VISIBLE_DEVICES={card}"): 2 for card in (0, 3)}


def test_no_last_evaluation_is_a_failure(
    tiny: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, {"none": 2.0})
    more = ("--storages", "none", "--seeds", "0", "--steps", "6")
    (result,) = quality.main(words(tiny, dialogues, tmp_path / "out", *more))
    assert result.error == "no validation loss after step 6"
    assert result.final is None


def test_the_words_of_a_run_that_is_not_compiled() -> None:
    steps = Path(sys.modules["chatfine"].__file__ or "").parent / "train/steps.py"
    assert quality.GAVE_UP in steps.read_text(encoding="utf-8")


def test_a_tiny_run(tiny: Path, dialogues: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    more = ("--storages", "none,nf4", "--seeds", "0", "--jobs", "2", "--timeout", "300")
    base, nf4 = quality.main(words(tiny, dialogues, out, *more))
    assert (base.error, nf4.error) == ("", "")
    assert (base.stored, nf4.stored, nf4.products) == ("none", "nf4", "bf16")
    assert [step for step, _, _ in base.points] == [2, 4]
    assert [tokens for _, tokens, _ in base.points] == [tokens for _, tokens, _ in nf4.points]
    assert base.final != nf4.final
    assert nf4.train_seconds > 0
    assert (base.whole_loss, nf4.whole_error) == (None, "")
    assert nf4.whole_loss != nf4.final
    assert nf4.whole_loss == pytest.approx(base.final, rel=0.02)
    assert (out / "quality.png").is_file()
