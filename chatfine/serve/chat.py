"""The terminal: a conversation of many turns, with one model or two side by side."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from chatfine import console
from chatfine.errors import ChatfineError
from chatfine.i18n import t
from chatfine.serve.speaker import Reply, Speaker
from chatfine.types import Message

COMMANDS = ("/reset", "/system", "/help", "/exit")


class Conversation:
    """What has been said so far with each speaker; they hear the same questions."""

    def __init__(self, speakers: Sequence[Speaker], system: str = "") -> None:
        self.speakers = speakers
        self.system = system
        self.said: list[list[Message]] = [[] for _ in speakers]
        self.turns = 0

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.said = [[] for _ in self.speakers]

    def ask(self, question: str) -> list[Reply]:
        """One turn: show and remember the answers. A question that can't be asked is forgotten."""
        asked = Message("user", question)
        system = [Message("system", self.system)] if self.system else []
        alone = len(self.speakers) == 1
        replies: list[Reply] = []
        for speaker, said in zip(self.speakers, self.said, strict=True):
            write = console.write if alone else None
            reply = speaker.reply([*system, *said, asked], write, self.turns)
            replies.append(reply)
            if reply.stopped:
                break
        if alone:
            console.say()
        else:
            replies += [Reply("", stopped=True)] * (len(self.speakers) - len(replies))
            names = [speaker.name for speaker in self.speakers]
            console.table(names, [[reply.text for reply in replies]])
        self._report(replies)
        for said, reply in zip(self.said, replies, strict=True):
            if reply.text:  # an answer of nothing would confuse most templates
                said += [asked, Message("assistant", reply.text)]
        self.turns += 1
        return replies

    def _report(self, replies: Sequence[Reply]) -> None:
        if any(reply.stopped for reply in replies):
            console.warn(t("(stopped)"))
        for unsafe in dict.fromkeys(reply.unsafe for reply in replies if reply.unsafe):
            console.warn(unsafe)
        forgotten = max(reply.forgotten for reply in replies)
        if forgotten:
            console.warn(
                t("(the conversation is longer than the model can read: the {n} oldest messages "
                  "were left out)", n=forgotten)
            )  # fmt: skip


def talk(speakers: Sequence[Speaker], system: str = "") -> list[dict[str, str]]:
    """Talk until /exit or the end of the input.

    On a terminal questions are asked for; otherwise each line of standard input is one.

    Returns:
        The turns: `question`, and the answer under `answer` (`answer_compare` of a second model).
    """
    conversation = Conversation(speakers, system)
    log: list[dict[str, str]] = []
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # line editing and history, where Python has them
            import readline  # noqa: F401
        console.say(t("Type a question. {commands} · Ctrl-C stops an answer",
                      commands=" ".join(COMMANDS)), "dim")  # fmt: skip
    for line in _lines(terminal):
        text = line.strip()
        if text.startswith("/") and text.split()[0] in ("/exit", "/quit"):
            break
        if not text or _command(text, conversation):
            continue
        try:
            replies = conversation.ask(text)
        except ChatfineError as error:  # such as a question that is too long: the talk goes on
            console.warn(str(error))
            continue
        names = ("answer", "answer_compare")
        answers = {name: reply.text for name, reply in zip(names, replies, strict=False)}
        log.append({"question": text} | answers)
    return log


def _lines(terminal: bool) -> Iterator[str]:
    """What the user types, to the end of the input; Ctrl-C at the prompt asks again."""
    if not terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield console.ask(t("you: "))
        except EOFError:
            console.say()
            return
        except KeyboardInterrupt:
            console.say()
            console.say(t("/exit ends the program"), "dim")


def _command(text: str, conversation: Conversation) -> bool:
    """Carry out a line that begins with a known command; False for a question."""
    word, _, rest = text.partition(" ")
    match word:
        case "/reset":
            conversation.reset()
            console.say(t("(a new conversation)"), "dim")
        case "/system":
            if rest.strip():
                conversation.system = rest.strip()
                conversation.reset()
            console.say(t("(system prompt: {text})", text=conversation.system or "-"), "dim")
        case "/help":
            console.say(t("/reset   forget the conversation"))
            console.say(t("/system TEXT   set the system prompt and begin anew"))
            console.say(t("/exit   end the program (so does the end of the input)"))
            console.say(t("Ctrl-C   stop the answer"))
        case _ if text.startswith("/") and word.isascii() and word[1:].isalpha():
            known = ", ".join(COMMANDS)
            console.warn(t("there is no command {word}; there are {known}", word=word, known=known))
        case _:
            return False
    return True
