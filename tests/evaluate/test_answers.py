"""ROUGE over both languages, and answers that come back in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatfine.errors import DataError
from chatfine.evaluate.answers import (
    RougeTokens,
    answer_dialogues,
    exact_match,
    rouge,
    split_dialogue,
)
from chatfine.types import Dialogue, Message

ENGLISH = "Anna doesn't buy milk; Ben's 2 cats sleep. It IS late!"


def test_english_tokens_are_those_of_rouge_score() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    assert RougeTokens().tokenize(ENGLISH) == DefaultTokenizer().tokenize(ENGLISH)


def test_english_scores_are_those_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    other = "Ben buys milk for Anna, it is late and the cats sleep"
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(ENGLISH, other)
    ours = rouge([other], [ENGLISH])
    assert ours == pytest.approx({name: score.fmeasure for name, score in theirs.items()})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("小明在下雨", ["小", "明", "在", "下", "雨"]),
        ("用GPT-4写,好吗？", ["用", "gpt", "4", "写", "好", "吗"]),
        ("Größe über alles", ["größe", "über", "alles"]),
        ("𠀀カ", ["𠀀", "カ"]),
        ("。！_", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert RougeTokens().tokenize(text) == tokens


def test_chinese_is_scored_over_characters() -> None:
    # 4 of 5 and 4 of 4 characters in common, in order: f = 2·(4/5·1)/(4/5+1)
    scores = rouge(["小明买牛奶"], ["小明牛奶"])
    assert scores["rouge1"] == pytest.approx(8 / 9)
    assert scores["rougeL"] == pytest.approx(8 / 9)
    assert scores["rouge2"] == pytest.approx(4 / 7)
    assert rouge(["明天见"], ["再下雨"])["rouge1"] == 0


def test_means_over_pairs_and_empty_answers() -> None:
    assert rouge(["a b", ""], ["a b", "c"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    assert exact_match(["a  b\n", "x"], ["a b", "y"]) == 0.5
    with pytest.raises(ValueError, match="zip"):
        rouge(["a"], [])


def dialogue(*texts: str) -> Dialogue:
    roles = ["user", "assistant"] * len(texts)
    return Dialogue(tuple(map(Message, roles, texts)), where="file.jsonl:3")


def test_split_takes_the_last_answer_off() -> None:
    asked, wanted = split_dialogue(dialogue("a", "b", "c", "d"))
    assert [message.content for message in asked] == ["a", "b", "c"]
    assert wanted == "d"
    plain = Dialogue((Message("user", "x"),), plain=True)
    for bad in (dialogue("a"), dialogue("a", "b", "c"), plain):
        with pytest.raises(DataError) as error:
            split_dialogue(bad)
        assert error.value.code == "no-answer-to-compare"


def test_answers_come_in_order_whatever_the_batches(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from chatfine.model.generate import Sampling
    from chatfine.tokenizer.encode import ChatTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = ChatTokenizer.load(tiny)
    asked = [dialogue("word " * count, "answer") for count in (3, 9, 1, 6, 2)]
    seen: dict[int, str] = {}
    one = answer_dialogues(model, tokenizer, asked, Sampling(8), 1, seen.__setitem__)
    assert one == answer_dialogues(model, tokenizer, asked, Sampling(8), 2)
    assert one == answer_dialogues(model, tokenizer, asked, Sampling(8), 8)
    assert [seen[index] for index in range(5)] == one
    assert len(set(one)) > 1

    with pytest.raises(DataError, match="the model reads 512") as error:
        answer_dialogues(model, tokenizer, [dialogue("word " * 300, "x")], Sampling(8))
    assert error.value.where == "file.jsonl:3"
