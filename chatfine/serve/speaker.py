"""Someone to talk with: a model, its tokenizer, and how much of a conversation it can read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatfine import console
from chatfine.errors import UsageError
from chatfine.evaluate.answers import answer_prompts
from chatfine.i18n import t
from chatfine.model.generate import Sampling, generate, position_limit
from chatfine.serve.safety import Check, first_finding
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.stream import TextStream
from chatfine.types import Message

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; `forgotten` old messages did not fit, `stopped` = cut off by Ctrl-C.

    `unsafe` is what a safety check said about question or answer; there is no text then.
    """

    text: str
    forgotten: int = 0
    stopped: bool = False
    unsafe: str = ""


class Speaker:
    """One voice in a chat.

    Args:
        name: shown beside its answers.
        model: a loaded model.
        tokenizer: its tokenizer, with the template it was trained with.
        sampling: how it chooses words.
        adapter_off: speak as the base under the adapter (comparing without a second copy).
        checks: safety checks of each question and answer; an answer is shown when it has passed.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: ChatTokenizer,
        sampling: Sampling,
        adapter_off: bool = False,
        checks: Sequence[Check] = (),
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.adapter_off = adapter_off
        self.checks = checks
        limit = position_limit(model)
        self.room: int | None = None
        """tokens a prompt may have, so that an answer fits behind it"""
        if limit is not None:
            self.room = limit - min(sampling.max_new_tokens, limit // 2)

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Prompt ids of a conversation, and how many of its oldest messages had to be left out.

        The system prompt stays; turns go in pairs, so that the rest begins with a question.

        Raises:
            UsageError: the last question alone is too long.
        """
        system = [message for message in messages[:1] if message.role == "system"]
        turns = list(messages[len(system) :])
        forgotten = 0
        while True:
            ids = list(self.tokenizer.encode_dialogue([*system, *turns], prompt=True).ids)
            if self.room is None or len(ids) <= self.room:
                return ids, forgotten
            later = [place for place, turn in enumerate(turns) if turn.role == "user" and place]
            if not later:
                raise UsageError(
                    "prompt-too-long",
                    t("the question has {n} tokens; {limit} fit, so that an answer fits too",
                      n=len(ids), limit=self.room),
                    fix=t("shorten the question, or set a smaller --max-new-tokens"),
                )  # fmt: skip
            forgotten += later[0]
            turns = turns[later[0] :]

    def reply(
        self, messages: Sequence[Message], on_text: OnText | None = None, turn: int = 0
    ) -> Reply:
        """Answer the last message; `on_text` gets the answer piece by piece, whole characters only.

        Ctrl-C ends the answer, not the program: what was said so far is the answer. `turn` varies
        the seed, so that asking again may give another answer when sampling.
        """
        unsafe = self._finding_in_question(messages)
        if unsafe:
            return Reply("", unsafe=unsafe)
        ids, forgotten = self.encode(messages)
        stream = TextStream(self.tokenizer)
        parts: list[str] = []

        def say(text: str) -> None:
            text = text if parts else text.lstrip()
            if text:
                parts.append(text)
                if on_text and not self.checks:
                    on_text(text)

        sampling = replace(self.sampling, seed=self.sampling.seed + turn)
        stopped = False
        try:
            with self._voice():
                generate(
                    self.model, [ids], self.tokenizer.stop_ids, sampling,
                    lambda _row, token: say(stream.push(token)), self.tokenizer.size,
                )  # fmt: skip
            say(stream.finish())
        except KeyboardInterrupt:
            stopped = True
        text = "".join(parts).rstrip()
        unsafe = self._finding_in_answer(text)
        if self.checks and on_text and not unsafe:
            on_text(text)
        return Reply("" if unsafe else text, forgotten, stopped, unsafe)

    def answers(self, dialogues: Sequence[Sequence[Message]], batch_size: int) -> list[str]:
        """Answers to many conversations in batches, in their order; "" where one is unsafe."""
        found = [self._finding_in_question(messages) for messages in dialogues]
        safe = [index for index, unsafe in enumerate(found) if not unsafe]
        prompts = [self.encode(dialogues[index])[0] for index in safe]
        with self._voice():
            texts = answer_prompts(self.model, prompts, self.tokenizer, self.sampling, batch_size)
        answers = [""] * len(dialogues)
        for index, text in zip(safe, texts, strict=True):
            found[index] = self._finding_in_answer(text)
            answers[index] = "" if found[index] else text
        for unsafe in filter(None, found):
            console.warn(unsafe)
        return answers

    def _finding_in_question(self, messages: Sequence[Message]) -> str:
        finding = first_finding(self.checks, messages[-1].content)
        return finding and t("(not asked: the question is unsafe, {finding})", finding=finding)

    def _finding_in_answer(self, text: str) -> str:
        finding = first_finding(self.checks, text)
        return finding and t("(not shown: the answer is unsafe, {finding})", finding=finding)

    def _voice(self) -> contextlib.AbstractContextManager[Any]:
        off: contextlib.AbstractContextManager[Any]
        off = self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()
        return off
