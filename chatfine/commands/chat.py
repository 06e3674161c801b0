"""`chatfine chat`: talk in the terminal, ask one question, or answer files of questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.commands.eval import sampling_of
from chatfine.commands.opened import Opened, open_source
from chatfine.config import ChatConfig
from chatfine.errors import TokenizerError, UsageError
from chatfine.i18n import t
from chatfine.types import Message

if TYPE_CHECKING:
    from chatfine.serve.questions import Question
    from chatfine.serve.safety import Check
    from chatfine.serve.speaker import Speaker

STEP_BATCHES = 4
"""Batches between two writes of an answers file; rows are sorted by length among so many."""


def chat(config: ChatConfig) -> dict[str, Any]:
    """Talk with a model, a run or an adapter.

    Returns:
        `turns` of a talk; with --prompt `question` and `answer`; with --prompt-file the list
        `answers`; with --input `answered`, `resumed` and `output`. With --compare each answer has
        an `answer_compare` beside it.

    Raises:
        Refused: a model or file that can't be used, before torch is imported.
    """
    _check_ways(config)
    opened = [open_source(config.model, config.base)]
    if config.compare:
        opened.append(open_source(config.compare))
    for one in opened:
        one.storage(config.quantize)
        if not one.tokenizer.template:
            raise TokenizerError(
                "no-template",
                t("{name} has no chat template, so it can't chat", name=one.name),
                where=str(one.source.model),
                why=t("it is probably a base model, which was not trained to chat"),
                fix=t("train it on dialogues with a template: {command}",
                      command=f"chatfine train -m {one.name} --template plain -d DATASET"),
            )  # fmt: skip
    system = config.system or opened[0].system
    questions: list[Question] = []
    if config.prompt_file or config.input:
        from chatfine.serve.questions import check_answers_file, read_questions

        questions = read_questions(Path(config.prompt_file or config.input), system)
        if config.input:
            check_answers_file(Path(config.output))
    checks: list[Check] = []
    if config.safety:
        from chatfine.serve.safety import make_checks

        checks = make_checks(config.safety, config.safety_threshold)
    speakers = _load(opened, config, checks)
    if config.input:
        return _answer_file(config, opened, speakers, questions)
    if config.prompt_file:
        return _answer_dialogues(speakers, questions)
    if config.prompt:
        return _answer_once(speakers, config.prompt, system)
    from chatfine.serve.chat import talk

    return {"model": config.model, "turns": talk(speakers, system)}


def _check_ways(config: ChatConfig) -> None:
    ways = {"--prompt": config.prompt, "--prompt-file": config.prompt_file, "--input": config.input}
    given = [flag for flag, value in ways.items() if value]
    if len(given) > 1:
        raise UsageError(
            "too-many-questions",
            t("{flags} can't be used together", flags=", ".join(given)),
            fix=t("choose one of them"),
        )
    if bool(config.input) != bool(config.output):
        raise UsageError(
            "input-without-output",
            t("--input and --output go together"),
            fix=f"chatfine chat {config.model} --input questions.jsonl --output answers.jsonl",
        )


def _load(opened: Sequence[Opened], config: ChatConfig, checks: Sequence[Check]) -> list[Speaker]:
    """The voices; a base beside its own adapter is one model with the adapter switched off."""
    from chatfine.runtime import pick_device, pick_dtype
    from chatfine.serve.speaker import Speaker

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    sampling = sampling_of(config)
    storages = [one.storage(config.quantize) for one in opened]
    names = [one.name for one in opened]
    if len(opened) == 2:
        paths = [one.source.model.resolve() for one in opened]
        adapters = [one.source.adapter for one in opened]
        same = paths[0] == paths[1] and opened[0].positions == opened[1].positions
        if same and adapters.count(None) == 1:
            tuned = adapters.index(None) ^ 1
            model = opened[tuned].load(dtype, device, storages[tuned])
            return [
                Speaker(name, model, one.tokenizer, sampling, place != tuned, checks)
                for place, (name, one) in enumerate(zip(names, opened, strict=True))
            ]
    return [
        Speaker(one.name, one.load(dtype, device, storage), one.tokenizer, sampling, checks=checks)
        for one, storage in zip(opened, storages, strict=True)
    ]


def _answer_once(speakers: Sequence[Speaker], prompt: str, system: str) -> dict[str, Any]:
    from chatfine.serve.chat import Conversation
    from chatfine.serve.questions import ANSWER, OTHER_ANSWER

    replies = Conversation(speakers, system).ask(prompt)
    names = (ANSWER, OTHER_ANSWER)
    return {"question": prompt} | {
        name: reply.text for name, reply in zip(names, replies, strict=False)
    }


def _answers_of(
    speakers: Sequence[Speaker], batch_size: int
) -> Callable[[Sequence[Question]], list[dict[str, str]]]:
    from chatfine.serve.questions import ANSWER, OTHER_ANSWER

    def answer(questions: Sequence[Question]) -> list[dict[str, str]]:
        asked = [question.messages for question in questions]
        by_speaker = [speaker.answers(asked, batch_size) for speaker in speakers]
        return [
            dict(zip((ANSWER, OTHER_ANSWER), row, strict=False))
            for row in zip(*by_speaker, strict=True)
        ]

    return answer


def _answer_dialogues(speakers: Sequence[Speaker], questions: Sequence[Question]) -> dict[str, Any]:
    """Answer each dialogue of a prompt file and show it with its question."""
    answers = []
    for question in questions:
        found = _answers_of(speakers, 1)([question])[0]
        answers.append(found)
        for message in question.messages:
            _show(message)
        if len(speakers) == 1:
            _show(Message("assistant", found["answer"]))
        else:
            console.table([speaker.name for speaker in speakers], [list(found.values())])
        console.say()
    return {"answers": answers}


def _show(message: Message) -> None:
    style = "cyan" if message.role == "user" else "dim" if message.role == "system" else None
    console.say(f"{message.role}: {message.content}", style)


def _answer_file(
    config: ChatConfig,
    opened: Sequence[Opened],
    speakers: Sequence[Speaker],
    questions: Sequence[Question],
) -> dict[str, Any]:
    from rich.progress import Progress

    from chatfine.serve.questions import write_answers

    settings = {
        "models": [[one.folder.digest(), _adapter_digest(one)] for one in opened],
        "tokenizers": [one.tokenizer.digest for one in opened],
        "sampling": asdict(speakers[0].sampling),
        "system": config.system,
        "safety": [list(config.safety), config.safety_threshold],
        "quantize": [one.storage(config.quantize) for one in opened],
        "batch_size": config.batch_size,
    }
    with Progress(console=console.console(), transient=True) as bar:
        task = bar.add_task(t("answering"), total=len(questions))
        resumed = write_answers(
            Path(config.output), questions, settings, _answers_of(speakers, config.batch_size),
            STEP_BATCHES * config.batch_size, lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    if resumed:
        console.say(t("{n} answers were there from an interrupted call", n=resumed))
    console.say(t("{n} answers written: {path}", n=len(questions), path=config.output))
    return {"answered": len(questions), "resumed": resumed, "output": config.output}


def _adapter_digest(opened: Opened) -> str:
    """sha256 of the adapter's weights; "" without one."""
    import hashlib

    if opened.source.adapter is None:
        return ""
    content = (opened.source.adapter / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()
