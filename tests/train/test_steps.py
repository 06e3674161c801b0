"""Compiled runs against plain ones, and a compiler that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chatfine.config import TrainConfig
from chatfine.data.batches import collate
from chatfine.model import adapters, compiled, fast
from chatfine.model.load import load_model
from chatfine.train import steps
from chatfine.train.decisions import Decisions
from chatfine.train.run import train
from chatfine.train.steps import _fixed_inputs, try_out
from chatfine.types import Example


def write_dialogues(path: Path, count: int = 12) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i} {'and ' * (i % 4)}stop"},
                      {"role": "assistant", "content": f"{i} {'again ' * (i % 3)}done"}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row.get("loss", row.get("val_loss")) for row in map(json.loads, lines)]


def test_a_compiled_run_learns_what_a_plain_one_learns(tiny: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl")
    found = {}
    for choice in ("off", "on"):
        settings: dict[str, Any] = {
            "model": str(tiny), "dataset": (str(data),), "output": str(tmp_path / choice),
            "max_steps": 4, "max_length": 128, "batch_size": 1, "packing": "on",
            "compile": choice, "device": "cpu", "rank": 2, "learning_rate": 1e-2, "dtype": "fp32",
        }  # fmt: skip
        train(TrainConfig(**settings))
        decided = json.loads((tmp_path / choice / "decisions.json").read_text(encoding="utf-8"))
        assert decided["decided"]["compile"] == (choice == "on")
        found[choice] = losses(tmp_path / choice)
    assert found["on"] == pytest.approx(found["off"], rel=1e-4)
    assert found["on"][0] > found["on"][-2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no compiler\nhere"), "no compiler"),
        (torch.OutOfMemoryError("too much"), "does not fit"),
    ],
)
def test_a_compiler_that_fails_is_done_without(
    tiny: Path, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    batch = collate([Example([5, 6, 7, 8], [True] * 4), Example([9, 10, 11], [True] * 3)])
    model = adapters.attach(load_model(tiny, torch.float32), "lora", rank=2)
    plain = fast.LossModel(model)(batch).item()
    measure = compiled.CompiledLoss(model, compiled.FixedInputs(64, 64))

    def broken(*_: Any, **__: Any) -> None:
        raise error

    for layer in fast.causal_model(model).get_decoder().layers:
        layer._compiled_call_impl = broken
    try_out(measure, batch, torch.enable_grad)
    assert said in "".join(capsys.readouterr())
    assert measure.fixed is None
    assert measure(batch).item() == pytest.approx(plain, rel=1e-6)


def test_what_does_not_fit_without_a_compiler_is_an_error(tiny: Path) -> None:
    class Full(fast.LossModel):
        def forward(self, batch: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("too much")

    batch = collate([Example([5, 6, 7, 8], [True] * 4)])
    with pytest.raises(torch.OutOfMemoryError):
        try_out(Full(load_model(tiny, torch.float32)), batch, torch.enable_grad)


def prepared(*parts: list[int], length: int = 128) -> Any:
    """As far as shapes need it: the lengths of the examples of each data set."""
    train = [SimpleNamespace(lengths=np.array(part)) for part in parts]
    return SimpleNamespace(max_length=length, data=SimpleNamespace(train=train))


def test_there_is_room_for_more_documents_than_usual_from_the_start(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    full = _fixed_inputs(model, prepared([128] * 8), rows=16)
    assert (full.tokens, full.longest, full.documents) == (2048, 128, 16)
    mixed = _fixed_inputs(model, prepared([10, 30], [100], [], length=256), rows=2)
    assert mixed.longest == 128
    assert 512 / 20 * 1.5 <= mixed.documents == 64
    assert _fixed_inputs(model, prepared([100]), rows=1).documents == compiled.MIN_DOCUMENTS
    assert _fixed_inputs(model, prepared([100]), 1, most_documents=33).documents == 64


def test_what_fills_a_card_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph uses would be missing at the next evaluation."""
    monkeypatch.setattr(steps, "work_of", lambda *_: None)
    shapes: Any = SimpleNamespace(body_parameters=10**8, layers=10)
    decisions = Decisions("cuda", "bfloat16", 1, 1, True, 0)
    run = SimpleNamespace(max_length=128, config=SimpleNamespace(gpu_memory=24, rows_first=0))
    for filled, wanted in ((17e9, True), (19e9, False)):
        plan = SimpleNamespace(memory_bytes=filled)
        monkeypatch.setattr(steps, "make_plan", lambda *_, plan=plan: plan)
        assert steps._replays(run, decisions, shapes) == wanted  # type: ignore[arg-type]
        assert not steps._replays(run, replace(decisions, recompute_layers=1), shapes)  # type: ignore[arg-type]
