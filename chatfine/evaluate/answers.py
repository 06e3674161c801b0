"""Answers and how close they come to the wanted ones: ROUGE, exact match.

ROUGE (Lin 2004) is counted by the `rouge-score` package; only what a token is comes from here. Its
own tokenizer keeps a–z and digits alone, so every Chinese text would score 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatfine.errors import DataError
from chatfine.i18n import t
from chatfine.types import Dialogue, Message

if TYPE_CHECKING:
    from chatfine.model.generate import Sampling
    from chatfine.tokenizer.encode import ChatTokenizer

KINDS = ("rouge1", "rouge2", "rougeL")

# Han with its extensions and kana: scripts without spaces, where a character is the natural unit
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


class RougeTokens:
    """Lower-cased words, and each Chinese or Japanese character by itself.

    On English text in ASCII this gives what rouge-score's own tokenizer gives without stemming.
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`; punctuation is dropped."""
        return _TOKEN.findall(text.lower())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L f-measure over all pairs, each 0..1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS), tokenizer=RougeTokens())
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    count = max(1, len(scores))
    return {kind: sum(score[kind].fmeasure for score in scores) / count for kind in KINDS}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to the wanted one, apart from white space."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(a.split() == b.split() for a, b in pairs) / max(1, len(pairs))


def split_dialogue(dialogue: Dialogue) -> tuple[tuple[Message, ...], str]:
    """What to ask and the answer wanted: all messages before the last answer, and that answer.

    Raises:
        DataError: running text, or a dialogue that does not end with an answer.
    """
    messages = dialogue.messages
    if dialogue.plain or len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError(
            "no-answer-to-compare",
            t("the dialogue does not end with an answer, so nothing can be asked and compared"),
            where=dialogue.where,
            fix=t("leave out --generate to measure the loss only"),
        )
    return messages[:-1], messages[-1].content


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    sampling: Sampling,
    batch_size: int = 8,
    on_answer: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The text of the answer to each encoded prompt, in the order of `prompts`.

    Prompts are answered in batches of similar length, the longest first, so that too little memory
    shows at once. `on_answer(index, text)` is called as each batch ends.
    """
    from chatfine.model.generate import generate

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        rows = generate(
            model,
            [prompts[index] for index in batch],
            tokenizer.stop_ids,
            replace(sampling, seed=sampling.seed + begin),  # or all batches would draw the same
            vocabulary=tokenizer.size,
        )
        for index, row in zip(batch, rows, strict=True):
            answers[index] = tokenizer.decode(row).strip()
            if on_answer:
                on_answer(index, answers[index])
    return answers


def answer_dialogues(
    model: Any,
    tokenizer: ChatTokenizer,
    dialogues: Sequence[Dialogue],
    sampling: Sampling,
    batch_size: int = 8,
    on_answer: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Ask the model for the last answer of each dialogue; answers in the order of `dialogues`.

    Raises:
        DataError: a dialogue without a last answer, or one longer than the model's positions.
    """
    from chatfine.model.generate import position_limit

    limit = position_limit(model)
    prompts = []
    for dialogue in dialogues:
        asked, _ = split_dialogue(dialogue)
        ids = list(tokenizer.encode_dialogue(asked, prompt=True).ids)
        if limit is not None and len(ids) >= limit:
            raise DataError(
                "prompt-too-long",
                t("the question has {n} tokens, the model reads {limit} together with the answer",
                  n=len(ids), limit=limit),
                where=dialogue.where,
                fix=t("shorten the text or leave out this row"),
            )  # fmt: skip
        prompts.append(ids)
    return answer_prompts(model, prompts, tokenizer, sampling, batch_size, on_answer)
