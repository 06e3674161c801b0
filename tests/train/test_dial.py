"""What is recomputed, stored and capped: chosen so that the run fits and is as fast as can be."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine import cli, runtime
from chatfine.commands.plan import plan as plan_command
from chatfine.config import PlanConfig, ResumeConfig, TrainConfig
from chatfine.errors import ResourceError, UsageError
from chatfine.train import decisions as deciding
from chatfine.train import machine
from chatfine.train.decisions import Decisions, decide, work_of
from chatfine.train.methods import check_sharing
from chatfine.train.plan import (
    Shapes,
    Work,
    layers_reached,
    make_plan,
    piece_tokens,
    relative_time,
)
from chatfine.train.prepare import prepare
from chatfine.train.run import resume, train
from chatfine.train.session import Session

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]
LAYERS = 32
SEVEN_B = Shapes(
    layers=LAYERS, hidden=4096, intermediate=11008, query=4096, key=4096, vocab=32000,
    parameters=6_738_415_616, head_parameters=32000 * 4096,
    linears={"q_proj": (4096, 4096, 32), "k_proj": (4096, 4096, 32), "v_proj": (4096, 4096, 32),
             "o_proj": (4096, 4096, 32), "gate_proj": (11008, 4096, 32),
             "up_proj": (11008, 4096, 32), "down_proj": (4096, 11008, 32)},
)  # fmt: skip
WORK = Work(
    method="lora", rank=16, targets=(), layers=0, dtype_bytes=2, device="cuda",
    recompute_layers=0, micro_tokens=8192, micro_labels=8192, longest=2048, tokens=10**6,
    labels=10**6,
)  # fmt: skip
DEVICE = torch.device("cuda")
EVERYTHING = 1e15


def memory(**changes: Any) -> float:
    return make_plan(SEVEN_B, dataclasses.replace(WORK, **changes)).memory_bytes


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"method": "full"}, {"layers": 8}, {"micro_tokens": 65536}, {"targets": ("q_proj",)},
    {"row_parameters": 10**6},
])  # fmt: skip
@pytest.mark.parametrize("offload", [False, True])
def test_each_recomputed_layer_needs_less_memory_and_more_time(
    changes: dict[str, Any], offload: bool
) -> None:
    every = layers_reached(SEVEN_B, dataclasses.replace(WORK, **changes))
    works = [dataclasses.replace(WORK, recompute_layers=k, offload=offload, **changes)
             for k in range(every + 1)]  # fmt: skip
    plans = [make_plan(SEVEN_B, work) for work in works]
    # the last one frees nothing: while it computes again, it is there in full, if without logits
    needs = [plan.memory_bytes for plan in plans[:-1]]
    assert plans[-1].memory_bytes >= needs[-1] - plans[-2].logits_bytes
    if changes.get("method") == "full":  # whose optimizer step is the peak in the end
        assert needs == sorted(needs, reverse=True)
        assert needs[0] > needs[1] > needs[-1]
    else:
        assert all(a > b for a, b in itertools.pairwise(needs))
    flops = [plan.flop for plan in plans]
    assert all(a < b for a, b in itertools.pairwise(flops))
    whole = flops[-1] / flops[0]
    assert 1.04 < whole < 1.6 if not changes else whole > 1


def test_offloaded_inputs_need_the_cpu_s_memory_instead() -> None:
    full = dataclasses.replace(WORK, recompute_layers=LAYERS)
    away = dataclasses.replace(full, offload=True)
    here, there = make_plan(SEVEN_B, full), make_plan(SEVEN_B, away)
    an_input = 4096 * 2 * WORK.micro_tokens
    # then the peak is no longer where the logits are
    spared = here.memory_bytes - there.memory_bytes
    assert spared == pytest.approx((LAYERS - 2) * an_input, rel=0.1)
    assert (here.host_bytes, there.host_bytes) == (0, (LAYERS - 2) * an_input)
    on_cpu = dataclasses.replace(away, device="cpu")
    assert make_plan(SEVEN_B, on_cpu).host_bytes == 0
    assert relative_time(SEVEN_B, away) > relative_time(SEVEN_B, full)


def test_small_micro_batches_cost_time_on_a_gpu_alone() -> None:
    def time(tokens: int, device: str) -> float:
        return relative_time(SEVEN_B, dataclasses.replace(WORK, micro_tokens=tokens, device=device))

    assert time(8192, "cuda") == time(2048, "cuda") < time(1024, "cuda") < time(256, "cuda")
    assert time(8192, "cpu") == time(256, "cpu")


def test_weights_of_8_bit_floats() -> None:
    def weights(**changes: Any) -> float:
        return make_plan(SEVEN_B, dataclasses.replace(WORK, **changes)).weights_bytes

    linears = SEVEN_B.body_parameters
    one, two = weights(quantize="fp8"), weights(quantize="fp8", second_copy=True)
    rows = sum(out * count for out, _, count in SEVEN_B.linears.values())
    rest = (SEVEN_B.parameters - linears) * 2
    assert two == 2 * linears + 4 * rows + rest
    assert one == linears + 4 * rows + rest + 4096 * 11008, "a transposed copy of one at a time"
    assert weights(quantize="nf4") < one < two == pytest.approx(weights(), rel=1e-3)


def test_small_moments() -> None:
    def training(**changes: Any) -> float:
        work = dataclasses.replace(WORK, method="full", **changes)
        return make_plan(SEVEN_B, work).training_bytes

    from chatfine.train.plan import moments_bytes

    wanted = {("adamw", "cuda"): 8, ("anyprecision", "cuda"): 4, ("adamw8bit", "cuda"): 2.03125,
              ("paged-adamw8bit", "cuda"): 0, ("paged-adamw8bit", "cpu"): 2.03125}  # fmt: skip
    for (name, device), size in wanted.items():
        assert moments_bytes(name, device) == size
    assert moments_bytes("adamw", pure_bf16=True) == 4
    n = SEVEN_B.parameters
    assert training() - training(moments_bytes=2.03125) == pytest.approx((8 - 2.03125) * n)


# -- what auto comes to ----------------------------------------------------------------------------


@pytest.fixture
def fit(configure: Configure, more_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Decide about a 7B model in full rows, on a card with so much free memory."""
    rows = more_rows(tmp_path / "many.jsonl", 120)

    def make(limit: float, **changes: Any) -> tuple[Any, Decisions, Callable[..., float]]:
        # an explicit card of that size; nothing of the machine enters
        with_context = (limit / machine.USABLE["cuda"] + machine.CONTEXT_BYTES) / 1e9
        settings = {"dataset": str(rows), "packing": "on", "max_length": 512, "batch_size": 0,
                    "gpu_memory": with_context, "validation": "0"}  # fmt: skip
        prepared = prepare(configure(**settings | changes))
        wanted = Decisions("cuda", "bfloat16", 16, 1, True, 0)
        wanted = dataclasses.replace(wanted, compile=prepared.config.compile == "on")
        found = deciding._fit(prepared, SEVEN_B, DEVICE, wanted)

        def need(**other: Any) -> float:
            option = dataclasses.replace(wanted, **other)
            return make_plan(SEVEN_B, work_of(prepared, option)).memory_bytes

        return prepared, found, need

    return make


def test_rows_are_halved_down_to_2048_tokens_and_then_layers_recompute(
    fit: Callable[..., Any],
) -> None:
    _, free, need = fit(EVERYTHING)
    assert (free.rows, free.recompute_layers, free.offload) == (16, 0, False)
    small = {"rows": 4, "accumulate": 4}
    table = [
        (need(rows=8, accumulate=2), (8, 2, 0, False)),
        (need(**small), (4, 4, 0, False)),
        (need(**small) - 1e5, (4, 4, 1, False)),
        (need(**small, recompute_layers=12), (4, 4, 12, False)),
    ]
    for limit, wanted in table:
        _, found, _ = fit(limit + 1e3)
        got = (found.rows, found.accumulate, found.recompute_layers, found.offload)
        assert got == wanted
        assert found.rows_a_step == 16
    tiny = need(rows=1, accumulate=16, recompute_layers=LAYERS, offload=True)
    _, found, _ = fit(tiny + 1)
    assert (found.rows, found.offload) == (1, True)
    with pytest.raises(ResourceError) as caught:
        fit(tiny - 1e6)
    assert caught.value.code == "out-of-memory"


def test_larger_memory_never_makes_a_run_slower(fit: Callable[..., Any]) -> None:
    times = []
    for limit in (14.2e9, 15e9, 16e9, 18e9, 21e9, 26e9, 35e9, 60e9):
        prepared, found, _ = fit(limit)
        work = work_of(prepared, found)
        assert make_plan(SEVEN_B, work).memory_bytes <= limit
        times.append(relative_time(SEVEN_B, work))
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 4


@pytest.mark.parametrize(("asked", "layers", "offload"), [
    ("none", 0, False), ("0", 0, False), ("7", 7, False), ("full", LAYERS, False),
    ("offload", LAYERS, True), ("100", LAYERS, False),
])  # fmt: skip
def test_what_was_asked_for_is_done(
    fit: Callable[..., Any], asked: str, layers: int, offload: bool
) -> None:
    _, found, _ = fit(EVERYTHING, checkpointing=asked)
    assert (found.recompute_layers, found.offload) == (layers, offload)
    _, some, _ = fit(EVERYTHING, checkpointing=asked, adapter_layers=1)
    assert (some.recompute_layers, some.offload) == (min(layers, 1), offload)


@pytest.mark.parametrize("value", ["half", "-1", "1.5", "", "²"])
def test_other_words_are_refused(configure: Configure, value: str) -> None:
    with pytest.raises(UsageError, match=f"--checkpointing is {value}; possible: auto, none, full"):
        configure(checkpointing=value)
    assert configure(checkpointing=12).checkpointing == "12", "as YAML reads it"


def test_a_prefix_is_never_recomputed(configure: Configure) -> None:
    for value in ("3", "offload"):
        with pytest.raises(UsageError, match=f"--checkpointing {value} does not go with"):
            prepare(configure(method="prefix", checkpointing=value))
    prepare(configure(method="prefix", checkpointing="0"))


# -- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_only_cards_multiply_8_bit_floats(device: str) -> None:
    assert not runtime.fp8_works(torch.device(device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_this_card_multiplies_8_bit_floats_or_not() -> None:
    large = torch.ones(32, 32, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.ones((), device="cuda")
    try:
        torch._scaled_mm(large, large.t(), scale_a=scale, scale_b=scale)
        works = True
    except RuntimeError:
        works = False
    assert runtime.fp8_works(torch.device("cuda", 0)) == works


def test_without_8_bit_floats_it_says_what_it_does_instead(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(quantize="fp8", max_steps=1)
    train(config)
    said = " ".join("".join(capsys.readouterr()).replace("│", "").split())
    assert "--quantize fp8 needs an NVIDIA card of compute capability 8.9 or later" in said
    assert "stores the frozen weights as float32 instead" in said
    facts = json.loads((tmp_path / "run/adapter/chatfine.json").read_text(encoding="utf-8"))
    assert facts["quantize"] == "none"
    decided = json.loads((tmp_path / "run/decisions.json").read_text(encoding="utf-8"))
    assert (decided["asked"]["quantize"], decided["decided"]["quantize"]) == ("fp8", "none")


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_auto_stores_nothing_rounded_on_a_cpu(configure: Configure, method: str) -> None:
    prepared = prepare(configure(quantize="auto", method=method))
    prepared.run.mkdir()
    found = decide(prepared, SEVEN_B_SMALL, torch.device("cpu"))
    assert found.quantize == "none"


SEVEN_B_SMALL = dataclasses.replace(
    SEVEN_B, layers=2, linears={name: (a // 64, b // 64, 2) for name, (a, b, _) in
                                SEVEN_B.linears.items()}, parameters=10**7, vocab=448,
)  # fmt: skip


def cards() -> tuple[bool, str]:
    """Whether there is a card with 8-bit floats here, and what stands after the plain weights."""
    fp8 = torch.cuda.is_available() and runtime.fp8_works(torch.device("cuda", 0))
    return fp8, "nf4" if runtime.has_bitsandbytes() else "int8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a CUDA device")
def test_auto_rounds_weights_only_where_plain_ones_do_not_fit(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    _, found, need = fit(EVERYTHING, quantize="auto")
    assert found.quantize == "none"
    least = need(rows=1, accumulate=16, recompute_layers=LAYERS, offload=True)
    assert fit(least + 1, quantize="auto")[1].quantize == "none"
    assert fit(least - 1e7, quantize="auto")[1].quantize == cards()[1]
    assert fit(EVERYTHING, quantize="auto", method="full", dtype="bf16")[1].quantize == "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a CUDA device")
def test_auto_takes_8_bit_floats_where_the_card_has_them(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fit(EVERYTHING, quantize="auto", compile="off")[1].quantize == "none"
    fit = functools.partial(fit, compile="on")
    _, found, plain = fit(EVERYTHING, quantize="auto")
    need = functools.partial(plain, compile=True)
    assert (found.quantize, found.second_copy, found.recompute_layers) == ("fp8", True, 0)
    store = {"quantize": "fp8", "rows": 4, "accumulate": 4}
    # a second copy of all weights saves less than the layers it would make compute again
    _, found, _ = fit(need(**store) + 1, quantize="auto")
    assert (found.quantize, found.second_copy, found.recompute_layers) == ("fp8", False, 0)
    _, found, _ = fit(need(**store, second_copy=True) + 1, quantize="auto")
    assert (found.second_copy, found.recompute_layers) == (True, 0)
    assert fit(EVERYTHING, quantize="auto", method="dora")[1].quantize == "none"
    least = need(quantize="fp8", rows=1, accumulate=16, recompute_layers=LAYERS, offload=True)
    assert fit(least + 1, quantize="auto")[1].quantize == "fp8"
    assert fit(least - 1e7, quantize="auto")[1].quantize == cards()[1]


@pytest.mark.parametrize(("steps", "changes", "wanted"), [
    (120, {}, False), (130, {}, True), (60, {"accumulate": 2}, False),
    (65, {"accumulate": 2}, True), (130, {"compile": "off"}, False),
    (1, {"compile": "on"}, True), (1, {"quantize": "fp8"}, True),
    (1, {"method": "full", "fp8_products": "on"}, True), (1, {"method": "full"}, False),
    (130, {"method": "dora"}, False),
])  # fmt: skip
def test_what_repays_it_is_compiled(
    configure: Configure, more_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, steps: int, changes: dict[str, Any], wanted: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(deciding, "has_compiler", lambda: True)
    monkeypatch.setattr(deciding, "fp8_works", lambda device: True)
    rows = more_rows(tmp_path / "many.jsonl", 20)
    settings = {"dataset": str(rows), "packing": "on", "max_length": 512, "max_steps": steps}
    prepared = prepare(configure(**settings | changes))
    start = Decisions("cuda", "bfloat16", 1, prepared.config.accumulate, True, 0)
    assert deciding._compiles(prepared, SEVEN_B, start) == wanted
    assert not deciding._compiles(prepared, SEVEN_B, dataclasses.replace(start, packing=False))
    monkeypatch.setattr(deciding, "fp8_works", lambda device: False)  # then it is stored as bf16
    plain = wanted and not {"quantize", "fp8_products"} & changes.keys()
    assert deciding._compiles(prepared, SEVEN_B, start) == plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a CUDA device")
def test_compiled_nf4_is_multiplied_as_8_bit_floats_where_the_card_has_them(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, compiled in itertools.product([(8, 0), (9, 0)], ["on", "off"]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        _, found, _ = fit(EVERYTHING, compile=compiled, quantize="nf4")
        assert (found.quantize, found.compile) == ("nf4", compiled == "on")
        assert found.fp8_products == (found.compile and capability == (9, 0))


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"method": "full"}, True), ({"method": "freeze"}, True),
    ({"method": "full", "pure_bf16": True}, True), ({"method": "full", "compile": "off"}, True),
    ({"method": "full", "dtype": "fp32"}, False), ({"method": "full", "dtype": "fp16"}, False),
    ({"method": "full", "sharding": "full"}, False), ({"method": "full", "old": True}, False),
])  # fmt: skip
def test_weights_that_learn_are_multiplied_as_8_bit_floats_where_that_can_be_done(
    configure: Configure, more_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, changes: dict[str, Any], wanted: bool,
) -> None:  # fmt: skip
    changes = dict(changes)
    old = changes.pop("old", False)
    monkeypatch.setattr(deciding, "fp8_works", lambda device: not old)
    monkeypatch.setattr(deciding, "has_compiler", lambda: True)
    shared = "sharding" in changes
    rows = more_rows(tmp_path / "many.jsonl", 120)
    settings = {"dataset": str(rows), "packing": "on", "max_length": 512, "batch_size": 0,
                "gpu_memory": 1000, "dtype": "bf16", "validation": "0"}  # fmt: skip
    for choice in ("on", "off"):
        asked = settings | changes | {"fp8_products": choice, "output": str(tmp_path / choice)}
        prepared = prepare(configure(**asked))
        prepared.run.mkdir()
        found = decide(prepared, SEVEN_B, DEVICE, 2 if shared else 1)
        assert found.learned_fp8 == (wanted and choice == "on")
        assert not found.fp8_products, "which is of frozen weights"
        work = work_of(prepared, found)
        assert work.learned_fp8 == found.learned_fp8
        again = decide(prepared, SEVEN_B, torch.device("cpu"), 2 if shared else 1)
        assert again == found, "a run goes on as it began"
        assert found.compile == (choice == "on" and wanted and "compile" not in changes)
        with monkeypatch.context() as patch:  # on another card, or shared out: another computation
            patch.setattr(deciding, "fp8_works", lambda device: False)
            again = decide(prepared, SEVEN_B, DEVICE, 2 if shared else 1)
            assert again == dataclasses.replace(found, learned_fp8=False)
        shares = dataclasses.replace(
            prepared, config=prepared.config.model_copy(update={"sharding": "full"})
        )
        assert not deciding._regroup(dataclasses.replace(found, rows=2), 2, shares).learned_fp8


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_what_8_bit_products_of_weights_that_learn_take(method: str) -> None:
    """Compiled, no bf16 copy of a weight is kept; by plain operations, half of one."""
    less = {}
    for compiled in (True, False):
        change: dict[str, Any] = {"method": method, "layers": 0, "compile": compiled}
        exact, ours = memory(**change), memory(**change, learned_fp8=True)
        less[compiled] = exact - ours
        assert memory(**change, learned_fp8=True, micro_tokens=16384) > ours
    linears = SEVEN_B.body_parameters
    assert less[True] == pytest.approx(2 * linears, rel=0.05)
    assert less[True] > less[False]
    long = dataclasses.replace(WORK, method=method, recompute_layers=1, micro_tokens=65536)
    assert piece_tokens(long)
    assert piece_tokens(dataclasses.replace(long, learned_fp8=True))
    assert not piece_tokens(dataclasses.replace(long, learned_fp8=True, compile=True))


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["none", "int8"])
def test_the_dial_changes_no_number_of_a_run(
    configure: Configure, metrics: Metrics, tmp_path: Path, storage: str
) -> None:
    found = []
    for value in ("none", "1", "full", "offload"):
        config = configure(checkpointing=value, quantize=storage, output=str(tmp_path / value))
        train(config)
        weights = (tmp_path / value / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append((metrics(tmp_path / value), weights))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(("every", "storage"), [(True, "int8"), (False, "none")])
def test_a_run_of_an_older_version_goes_on(
    configure: Configure, metrics: Metrics, tmp_path: Path, every: bool, storage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from chatfine.errors import Stopped
    from chatfine.train.loop import Trainer

    settings = {"checkpointing": "full" if every else "none", "quantize": storage, "save_every": 1}
    train(configure(output=str(tmp_path / "whole"), **settings))
    original = Trainer.step

    def step(self: Any) -> bool:
        if self.progress.step == 2:
            raise Stopped("test", "stopped")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped):
            train(configure(output=str(tmp_path / "parts"), **settings))
    old = {
        "asked": {"dtype": "fp32", "batch_size": 4, "accumulate": 1, "packing": "auto",
                  "checkpointing": settings["checkpointing"]},
        "decided": {"device": "cpu", "dtype": "float32", "rows": 4, "accumulate": 1,
                    "packing": False, "checkpointing": every, "processes": 1, "sharding": "none"},
    }  # fmt: skip
    (tmp_path / "parts" / "decisions.json").write_text(json.dumps(old), encoding="utf-8")
    seen: list[Decisions] = []
    restore = Session.restore
    monkeypatch.setattr(
        Session, "restore", lambda self: (seen.append(self.decisions), restore(self))[1]
    )
    resume(ResumeConfig(run=str(tmp_path / "parts")))
    assert (seen[0].recompute_layers, seen[0].quantize) == (2 if every else 0, storage)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_changed_storage_is_decided_anew_before_the_first_checkpoint(
    configure: Configure,
) -> None:
    def decided(**changes: Any) -> Decisions:
        prepared = prepare(configure(**changes))
        prepared.run.mkdir(exist_ok=True)
        return decide(prepared, SEVEN_B_SMALL, torch.device("cpu"))

    assert decided(quantize="int8").quantize == "int8"
    assert decided(quantize="nf4").quantize == "nf4"
    assert decided(quantize="nf4", checkpointing="1").recompute_layers == 1


def test_the_forecast_says_it_in_words(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(value: str) -> tuple[dict[str, Any], str]:
        config = configure(checkpointing=value)
        result = plan_command(PlanConfig.read(config.model_dump()))
        return result, " ".join("".join(capsys.readouterr()).replace("│", "").split())

    result, text = said("1")
    assert (result["recompute_layers"], result["offload"]) == (1, False)
    assert "recomputed 1 of 2 layers" in text
    result, text = said("offload")
    assert (result["recompute_layers"], result["offload"]) == (2, True)
    assert "2 of 2 layers, whose inputs wait in the CPU's memory" in text
    assert "recomputed" not in said("none")[1]


# -- caps and refusals -----------------------------------------------------------------------------


def test_a_card_of_that_size_has_its_context_too() -> None:
    free = machine.free_memory_bytes(torch.device("cuda"), 24)
    assert free == pytest.approx((24e9 - machine.CONTEXT_BYTES) * machine.USABLE["cuda"])
    machine.cap_memory(torch.device("cpu"), 24)  # nothing to cap


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_more_than_the_cap_does_not_fit() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device)  # by earlier tests of this process
    fits, too_large = int(6e9) - held, int(8e9)  # the context takes up to 1.5 GB
    machine.cap_memory(device, 8)
    try:
        torch.empty(fits, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(too_large, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.empty_cache()
        machine.cap_memory(device, 0)
    torch.empty(too_large, dtype=torch.uint8, device=device)


def test_8_bit_moments_of_slices_are_refused() -> None:
    with pytest.raises(UsageError, match="--optimizer adamw8bit does not work with") as caught:
        check_sharing("full", "full", dtype="float32", optimizer="adamw8bit")
    assert caught.value.fix == ("--optimizer anyprecision", "--sharding none")
    check_sharing("full", "lora", dtype="float32", optimizer="adamw8bit")


def test_an_optimizer_without_its_package_is_refused(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match="--optimizer paged-adamw8bit needs the package"):
        train(configure(optimizer="paged-adamw8bit"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_8_bit_moments_by_the_command_line(configure: Configure, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = configure()
    words = ["train", "-m", config.model, "-d", config.dataset[0], "-o", config.output,
             "--optimizer", "adamw8bit", "--rank", "64", "--max-steps", "2", "--device", "cpu",
             "--dtype", "fp32", "--checkpointing", "1", "--method", "lora"]  # fmt: skip
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["steps"] == 2
