"""benchmarks/peaks.py: its configurations are sound, its schedule has room, its table is true."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_model import write_tiny_tokenizer

from chatfine import cli
from chatfine.commands.plan import plan
from chatfine.config import PlanConfig, TrainConfig
from chatfine.train.decisions import work_of
from chatfine.train.plan import layers_reached, make_plan
from chatfine.train.prepare import prepare, shapes_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
gpu = importlib.import_module("gpu")
inputs = importlib.import_module("inputs")
peaks = importlib.import_module("peaks")
report = importlib.import_module("peaks_report")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmark needs Linux")
GIB = 2**30
PARTS = {"weights": 4.0 * GIB, "training": GIB, "activation": 3.5 * GIB, "logits": GIB,
         "overhead": 0.5 * GIB}  # fmt: skip
GOOD = report.Result("good", "", "a card", 10.0 * GIB, PARTS, int(9.5 * GIB),
                     decided={"device": "cuda"})  # fmt: skip
USUAL = [one for one in peaks.SETTINGS if not one.extra]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[argparse.Namespace]:
    """A work folder whose models are tiny and whose data is short."""
    work = tmp_path_factory.mktemp("peaks")
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    write_tiny_tokenizer(tokenizer)
    inputs.write_model(work / "models" / "tiny", "tiny", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "ROWS", 8)
        patch.setattr(gpu, "DIALOGUES", 40)
        patch.setenv("CHATFINE_HOME", str(work / "cache"))
        yield argparse.Namespace(work=work, tokenizer=tokenizer, dialog=None)


def test_the_configurations_span_what_differs() -> None:
    names = [one.name for one in peaks.SETTINGS]
    assert len(set(names)) == len(names)
    assert len(USUAL) >= 20
    words = [" ".join(peaks.train_words(one, Path("m"), Path("d"), Path("o"))) for one in USUAL]
    for needed in (
        "--method lora", "--method full", "--method freeze", "--method dora", "--method rows",
        "--quantize none", "--quantize fp8", "--quantize int8", "--quantize nf4", "--compile on",
        "--compile off", "--checkpointing none", "--checkpointing full", "--checkpointing 8",
        "--checkpointing offload", "--packing off", "--gpu-memory 24", "--optimizer adamw8bit",
        "--optimizer anyprecision", "--pure-bf16", "--targets q_proj,v_proj", "--fp8-products on",
    ):  # fmt: skip
        assert any(needed in line for line in words), needed
    assert {one.shape for one in USUAL} == {"7b", "1b", "135m"}
    assert {(one.batch, one.length) for one in USUAL} >= {
        (1, 2048), (4, 2048), (8, 2048), (1, 8192), (1, 32768)
    }  # fmt: skip


@pytest.mark.parametrize("setting", peaks.SETTINGS, ids=lambda one: one.name)
def test_chatfine_understands_every_command_line(
    setting: object, options: argparse.Namespace
) -> None:
    tiny = replace(setting, shape="tiny")
    assert tiny.compiled <= (tiny.data == "rows"), "unpacked rows are not compiled"
    words = peaks.train_words(tiny, *peaks.inputs_of(tiny, options), options.work / "run")
    assert words[:4] == ["-m", "chatfine", "train", "--json"]
    config = TrainConfig.read(*cli.settings("train", words[4:]))
    fixed = {config.batch_size, config.packing, config.compile, config.quantize}
    assert not fixed & {0, "auto"}, "room for others can't be known"
    assert config.checkpointing != "auto" or config.gpu_memory
    prepared = prepare(config)
    assert bool(prepared.rows) == setting.grown
    longest = max(int(part.lengths.max()) for part in prepared.data.train)
    assert longest == setting.length or setting.data == "dialog"


def test_every_run_is_expected_to_fit_a_card_of_80_gb(options: argparse.Namespace) -> None:
    """The tiny model's run with the shapes of 7B, the others being far smaller."""
    body = {"q_proj": (4096, 4096, 32), "k_proj": (4096, 4096, 32), "v_proj": (4096, 4096, 32),
            "o_proj": (4096, 4096, 32), "gate_proj": (11008, 4096, 32),
            "up_proj": (11008, 4096, 32), "down_proj": (4096, 11008, 32)}  # fmt: skip
    for setting in USUAL:
        if setting.shape != "7b":
            continue
        job = peaks.ready(replace(setting, shape="tiny"), options, "cuda")
        shapes = replace(shapes_of(job.prepared.model), layers=32, hidden=4096, intermediate=11008,
                         query=4096, key=4096, vocab=32000, parameters=6_738_415_616,
                         linears=body)  # fmt: skip
        work = work_of(job.prepared, job.decided)
        layers = {"none": 0, "auto": 0, "8": 8}.get(setting.checkpointing, 32)
        work = replace(work, recompute_layers=layers)
        assert make_plan(shapes, work).memory_bytes < 75e9, setting.name


def test_what_a_run_will_decide(options: argparse.Namespace) -> None:
    def decided(**changes: object) -> object:
        job = peaks.ready(replace(USUAL[0], shape="tiny", **changes), options, "cuda")
        assert layers_reached(shapes_of(job.prepared.model), work_of(job.prepared, job.decided)) > 0
        return job.decided

    assert decided().recompute_layers == 0
    assert decided(checkpointing="full").recompute_layers == 2
    assert decided(checkpointing="1").recompute_layers == 1
    assert decided(checkpointing="8").recompute_layers == 2, "no more than there are"
    away = decided(checkpointing="offload")
    assert (away.recompute_layers, away.offload) == (2, True)
    fp8 = decided(storage="fp8", compiled=True, batch=4)
    assert (fp8.second_copy, fp8.compile, fp8.rows, fp8.dtype) == (True, True, 4, "bfloat16")
    assert decided(flags=("--dtype", "fp32")).dtype == "float32"


def test_a_smaller_card_bounds_the_room(options: argparse.Namespace) -> None:
    tiny = replace(USUAL[0], shape="tiny", checkpointing="auto")
    job = peaks.ready(tiny, options, "cuda")
    small = peaks.ready(replace(tiny, flags=("--gpu-memory", "0.1")), options, "cuda")
    assert small.room == peaks.MARGIN * 0.1e9 + peaks.CONTEXT_BYTES < job.room


def job(name: str, room: float, disk: float = 1.0) -> object:
    return peaks.Job(argparse.Namespace(name=name), (), None, None, room, disk)


def test_the_largest_that_fits_is_next() -> None:
    small, middle, large = job("small", 10), job("middle", 40), job("large", 60)
    waiting = [small, large, middle]

    def start(running: list[object], rooms: dict[str, float], jobs: int = 3) -> object:
        found = peaks.next_start(waiting, running, rooms, 100, jobs)
        return found and (found[0], found[1].setting.name)

    assert start([], {"0": 80}) == ("0", "large")
    assert start([("0", job("x", 30))], {"0": 80}) == ("0", "middle")
    assert start([("0", job("x", 65))], {"0": 80}) == ("0", "small")
    assert start([("0", job("x", 75))], {"0": 80}) is None
    assert start([("0", job("x", 30))], {"0": 80}, jobs=1) is None
    assert start([("0", job("x", 30))], {"0": 80, "1": 80}) == ("1", "large")
    assert start([], {"0": 50}) == ("0", "large"), "alone, and it says why it fails"
    assert start([("0", job("x", 1, disk=99.5))], {"0": 80}) is None, "no disk is left"


def test_the_schedule_never_exceeds_the_room() -> None:
    source = random.Random(0)
    together = 0
    for _ in range(200):
        rooms = {str(card): source.uniform(40, 90) for card in range(source.randint(1, 3))}
        jobs, disk = source.randint(1, 4), source.uniform(20, 90)
        waiting = [job(str(n), source.uniform(2, 95), source.uniform(0, 60)) for n in range(15)]
        running: list[tuple[str, object]] = []
        ended = 0
        while waiting or running:
            while found := peaks.next_start(waiting, running, rooms, disk, jobs):
                waiting.remove(found[1])
                running.append(found)
            assert running, "something always goes on"
            together = max(together, len(running))
            for card, room in rooms.items():
                mine = [one.room for where, one in running if where == card]
                assert len(mine) <= jobs
                assert sum(mine) <= room or len(mine) == 1
            assert sum(one.disk for _, one in running) <= disk or len(running) == 1
            running.pop(source.randrange(len(running)))
            ended += 1
        assert ended == 15
    assert together > 3


def test_all_jobs_are_run_once_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(one: object, card: str, _: object) -> object:
        seen.append((one.setting.name, card))
        return replace(GOOD, name=one.setting.name)

    monkeypatch.setattr(peaks, "measure", measure)
    jobs = [job(str(n), 10.0 * n) for n in range(1, 7)]
    found = list(peaks.measured(jobs, {"0": 80.0, "1": 80.0}, 1e9, argparse.Namespace(jobs=2)))
    assert sorted(one.name for one in found) == sorted(name for name, _ in seen) == list("123456")
    assert {card for _, card in seen} == {"0", "1"}


def test_the_goal() -> None:
    def with_plan(gib: float) -> object:
        return replace(GOOD, planned_bytes=gib * GIB, measured_bytes=10 * GIB)

    assert with_plan(11).difference == pytest.approx(0.1)
    assert [with_plan(gib).good for gib in (9.4, 9.6, 10, 10.9, 11.1)] == [
        False, True, True, True, False
    ]  # fmt: skip
    assert not replace(GOOD, measured_bytes=None).good


def test_the_table() -> None:
    high = replace(GOOD, name="high", planned_bytes=12.0 * GIB, measured_bytes=10 * GIB)
    low = replace(high, name="low", planned_bytes=9.3 * GIB, warnings=["it is ignored"])
    failed = replace(GOOD, name="failed", measured_bytes=None, error="ended | after 300 s")
    refused = report.Result("refused", "no such package", "a card")
    page = report.table([GOOD, high, low, failed, refused], {"torch": "2.11.0"})
    lines = page.splitlines()
    assert ("| configuration | planned | measured | difference | weights | training | activation "
            "| logits | overhead |") in lines  # fmt: skip
    assert "| good | 10.00 | 9.50 | +5.3% | 4.00 | 1.00 | 3.50 | 1.00 | 0.50 |" in lines
    assert "| high | 12.00 | 10.00 | **+20.0%** | 4.00 | 1.00 | 3.50 | 1.00 | 0.50 |" in lines
    assert "| low | 9.30 | 10.00 | **-7.0%** | 4.00 | 1.00 | 3.50 | 1.00 | 0.50 |" in lines
    assert any(line.startswith("| failed | 10.00 | failed: ended / after 300 s | – |")
               for line in lines)  # fmt: skip
    assert "| refused | – | failed: no such package | – | – | – | – | – | – |" in lines
    assert ("2 of 3 plans within 10% of the measured peak, 1 of them no more than 5% below it; 2 "
            "failed. Lowest: -7.0% (low); highest: +20.0% (high).") in lines  # fmt: skip
    assert "- low: it is ignored" in lines
    assert "resident memory" not in page
    here = replace(GOOD, decided={"device": "cpu"})
    assert "resident memory" in report.table([here], {})
    assert report.summary([failed]) == "Nothing measured; 1 failed."


def test_a_new_result_replaces_its_older_self_only() -> None:
    other = replace(GOOD, name="other")
    gone = replace(GOOD, name="no longer there")
    again = replace(GOOD, measured_bytes=5)
    found = report.merged([gone, other, GOOD], again, ["good", "other"])
    assert [(one.name, one.measured_bytes) for one in found] == [
        ("good", 5), ("other", GOOD.measured_bytes), ("no longer there", GOOD.measured_bytes)
    ]  # fmt: skip


def test_a_result_is_planned_again(options: argparse.Namespace, tmp_path: Path) -> None:
    ready = peaks.ready(replace(USUAL[0], shape="tiny"), options, "cuda")
    shapes, work = shapes_of(ready.prepared.model), work_of(ready.prepared, ready.decided)
    true = make_plan(shapes, work)
    stale = replace(GOOD, planned_bytes=1.0, parts={}, work=asdict(work), shapes=asdict(shapes),
                    decided=asdict(ready.decided))  # fmt: skip
    report.write(tmp_path, [stale], {})
    (again,) = peaks.main(["-o", str(tmp_path / "new"), "--replan", "--join",
                           str(tmp_path / "peaks.json")])  # fmt: skip
    assert again.planned_bytes == true.memory_bytes == pytest.approx(sum(again.parts.values()))
    assert again.measured_bytes == stale.measured_bytes
    old = {name: value for name, value in stale.work.items() if name != "second_copy"}
    decided = stale.decided | {"second_copy": True, "quantize": "fp8"}
    copied = report.planned_again(replace(stale, work=old | {"quantize": "fp8"}, decided=decided))
    single = report.planned_again(replace(stale, work=stale.work | {"quantize": "fp8"}))
    assert copied.parts["weights"] > single.parts["weights"], "taken from what was decided"


def test_words_that_are_refused_are_a_row(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(USUAL[0], shape="tiny", method="full", storage="int8", note="wrong")
    monkeypatch.setattr(peaks, "SETTINGS", (wrong,))
    (row,) = peaks.main(["-o", str(tmp_path), "--work", str(options.work), "--only", "wrong",
                         "--tokenizer", str(options.tokenizer)])  # fmt: skip
    assert "--quantize int8 does not go with --method full" in row.error
    assert "refused" in (tmp_path / "peaks.md").read_text(encoding="utf-8")


def test_choosing() -> None:
    assert peaks.chosen("") == USUAL
    assert [one.name for one in peaks.chosen("^tiny-lora-2x64$")] == ["tiny-lora-2x64"]
    with pytest.raises(SystemExit):
        peaks.arguments(["-o", "x", "--only", "no such thing"])


def test_a_tiny_run(options: argparse.Namespace, tmp_path: Path) -> None:
    words = ["-o", str(tmp_path), "--only", "^tiny-full", "--work", str(options.work),
             "--tokenizer", str(options.tokenizer), "--timeout", "120"]  # fmt: skip
    (result,) = peaks.main(words)
    assert result.error == ""
    assert result.decided["recompute_layers"] == 1
    # the plan is the one that chatfine itself makes
    given = cli.settings("plan", result.command.split(" ")[4:])
    assert plan(PlanConfig.read(*given))["memory_bytes"] == round(result.planned_bytes)
    assert 50e6 < result.measured_bytes < 5e9
    assert not (options.work / "runs" / result.name).exists()
    (kept,) = json.loads((tmp_path / "peaks.json").read_text(encoding="utf-8"))["results"]
    assert kept["measured_bytes"] == result.measured_bytes
    joined = peaks.main(["-o", str(tmp_path / "two"), "--replan", "--join",
                         str(tmp_path / "peaks.json")])  # fmt: skip
    assert json.dumps([asdict(one) for one in joined]) == json.dumps([asdict(result)])
