"""`chatfine eval` against transformers' own loss, and which rows it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chatfine.commands.eval import evaluate
from chatfine.config import EvalConfig
from chatfine.errors import DataError
from chatfine.evaluate.answers import rouge
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Message

PAIRS = [("Who are you?", "I am small."), ("小明去哪儿？", "他去上学。"), ("a", "b"), ("Hi", "Hi!")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in PAIRS]
    file.write_text("\n".join(rows), encoding="utf-8")
    return file


def run_eval(model: Path, data: Path, **settings: Any) -> dict[str, Any]:
    values = {"model": str(model), "dataset": str(data), "dtype": "fp32", "device": "cpu"}
    return evaluate(EvalConfig.read(values | settings))


def test_loss_is_the_one_transformers_computes(tiny: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer.load(tiny)
    nats, tokens = 0.0, 0
    for question, answer in PAIRS:
        one = tokenizer.encode_dialogue([Message("user", question), Message("assistant", answer)])
        labels = [i if on else -100 for i, on in zip(one.ids, one.mask, strict=True)]
        count = sum(one.mask)
        with torch.inference_mode():
            loss = model(torch.tensor([list(one.ids)]), labels=torch.tensor([labels])).loss
        nats, tokens = nats + loss.item() * count, tokens + count
    result = run_eval(tiny, data)
    assert (result["examples"], result["tokens"]) == (4, tokens)
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    characters = sum(len(answer) for _, answer in PAIRS)
    assert result["bits_per_char"] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
    assert "rougeL" not in result


def test_generated_answers_are_scored(tiny: Path, data: Path) -> None:
    from chatfine.evaluate.answers import answer_prompts
    from chatfine.model.generate import Sampling
    from chatfine.model.load import load_model

    result = run_eval(tiny, data, generate=True, max_new_tokens=8, batch_size=3)
    tokenizer = ChatTokenizer.load(tiny)
    prompts = [
        list(tokenizer.encode_dialogue([Message("user", question)], prompt=True).ids)
        for question, _ in PAIRS
    ]
    model = load_model(tiny, torch.float32)
    answers = answer_prompts(model, prompts, tokenizer, Sampling(8), 1)
    wanted = rouge(answers, [answer for _, answer in PAIRS])
    assert {name: result[name] for name in wanted} == pytest.approx(wanted)
    assert result["answers"] == 4
    assert 0 <= result["exact_match"] <= 1
    json.dumps(result)


def test_limit_and_split(tiny: Path, data: Path) -> None:
    assert run_eval(tiny, data, limit=2)["examples"] == 2
    train = run_eval(tiny, data, split="train", validation="0.5")
    held = run_eval(tiny, data, split="validation", validation="0.5")
    assert train["examples"] + held["examples"] == 4
    assert held["examples"] == 2
    with pytest.raises(DataError, match="no split called nonsense"):
        run_eval(tiny, data, split="nonsense")


def test_questions_that_do_not_fit_are_left_out_and_said(
    tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatfine import console

    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)
    with data.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"question": "word " * 600, "answer": "x"}))
    result = run_eval(tiny, data, generate=True, max_new_tokens=2)
    assert (result["examples"], result["answers"]) == (4, 4)
    assert any("1 questions are longer than the 512 tokens" in line for line in warnings)


def test_text_without_answers_has_a_loss_but_no_scores(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.jsonl"
    file.write_text('{"text": "Once upon a time."}\n')
    assert run_eval(tiny, file)["loss"] > 0
    with pytest.raises(DataError, match="does not end with an answer"):
        run_eval(tiny, file, generate=True)
