"""What `chatfine` and `chatfine COMMAND --help` show.

Plain text, laid out here: the front page must appear in a blink, so it loads neither rich nor
pydantic.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping

from chatfine.flags import RECIPE, Command, Flag
from chatfine.i18n import t

_LEFT_COLUMNS = 34
# a run of Latin letters, or one wide character with the closing marks that may not begin a line
_PIECES = re.compile(r"\s+|[\u2e80-\uffff][，。、；：！？）》」』]*|[^\s\u2e80-\uffff]+")


def width_of(text: str) -> int:
    """Columns on a terminal: wide (Chinese) characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrap(text: str, columns: int) -> list[str]:
    """Break `text` into lines of at most `columns`; Chinese breaks between any two characters."""
    lines, line = [], ""
    for piece in _PIECES.findall(text):
        if line and width_of(line + piece.rstrip()) > columns:
            lines.append(line.rstrip())
            line = piece.lstrip()
        else:
            line += piece
    return [*lines, line.rstrip()]


def columns(rows: Iterable[tuple[str, str]], total: int) -> list[str]:
    """Two columns: what one types, and what it means."""
    lines: list[str] = []
    for left, right in rows:
        head = "  " + left
        pad = _LEFT_COLUMNS - width_of(head)
        texts = wrap(right, max(total - _LEFT_COLUMNS, 20)) if right else []
        if pad < 2 or not texts:
            lines.append(head)
        else:
            lines.append(head + " " * pad + texts.pop(0))
        lines += [" " * _LEFT_COLUMNS + text for text in texts]
    return lines


def screen_width() -> int:
    """Columns that a help text may take."""
    return min(shutil.get_terminal_size().columns, 100)


def overview(version: str) -> str:
    """The front page: the commands in the order of the story."""
    groups = [
        (t("Start here"), [
            ("demo", t("the whole story on a small model, in a few minutes")),
            ("doctor", t("what this machine can do and what to install")),
        ]),
        (t("The story"), [
            ("models", t("the models known by name")),
            ("download NAME", t("get a model")),
            ("convert DIR -o DIR", t("Meta's .pth files or a GGUF file become a model folder")),
            ("tokens TEXT -m MODEL", t("see how a text becomes tokens")),
            ("expand-vocab -m MODEL -o DIR", t("teach the vocabulary Chinese, if that pays")),
            ("data check|show DATASET -m MODEL", t("check your data, see what will be learned")),
            ("plan -m MODEL -d DATASET", t("memory, disk and time of a run before it starts")),
            ("train -m MODEL -d DATASET -o RUN", t("fine-tune; or: train recipe.yaml")),
            ("resume RUN", t("go on with an interrupted run")),
            ("merge RUN -o DIR", t("melt the adapter into the model, with proof")),
            ("chat MODEL|RUN", t("talk with it")),
            ("eval MODEL|RUN -d DATASET", t("is it better? loss, perplexity, ROUGE")),
        ]),
        (t("Every command"), [
            ("--help", t("all its flags")),
            ("--json", t("one JSON object on stdout, everything else on stderr")),
            ("--debug", t("show the traceback of an error")),
        ]),
    ]  # fmt: skip
    lines = [t("chatfine {version}: fine-tune a chat model and talk with it", version=version), ""]
    lines += [t("usage: chatfine COMMAND [flags]")]
    for title, rows in groups:
        lines += ["", title, *columns(rows, screen_width())]
    lines += ["", t("For example")]
    lines += [
        "  chatfine download smollm2-135m-instruct",
        "  chatfine data check dialogs -m smollm2-135m-instruct",
        "  chatfine train -m smollm2-135m-instruct -d dialogs -o my-run",
        "  chatfine merge my-run -o my-model",
        "  chatfine chat my-model",
        "",
        t("Language: CHATFINE_LANG=zh or CHATFINE_LANG=en"),
    ]
    return "\n".join(lines)


def command_help(name: str, command: Command, flags: Mapping[str, Flag]) -> str:
    """The help of one command: usage, what it does, every flag by group, an example."""
    places = [f"[{RECIPE}.yaml]" if place == RECIPE else _place(flags[place])
              for place in command.positional]  # fmt: skip
    lines = [t("usage: chatfine {name} [flags]", name=" ".join([name, *places])), ""]
    lines += wrap(first_line(command.config_class()), screen_width())
    positional = [flags[place] for place in command.positional if place != RECIPE]
    rows = [(_place(flag).strip("[]"), _meaning(flag)) for flag in positional]
    if RECIPE in command.positional:
        rows.append((f"{RECIPE}.yaml", t("settings, one `name: value` a line; flags come on top")))
    if rows:
        lines += ["", t("Arguments"), *columns(rows, screen_width())]
    for title, group in _groups(command, flags):
        lines += [
            "",
            title,
            *columns([(_spelling(flag), _meaning(flag)) for flag in group], screen_width()),
        ]
    switches = [
        ("--json", t("one JSON object on stdout, everything else on stderr")),
        ("--debug", t("show the traceback of an error")),
        ("-h, --help", t("this text")),
    ]
    lines += ["", t("Every command"), *columns(switches, screen_width())]
    if command.example:
        lines += ["", t("For example"), "  " + command.example]
    return "\n".join(lines)


def first_line(cls: type) -> str:
    """The first line of a settings class's docstring, translated: what the command does."""
    return t((cls.__doc__ or "").strip().partition("\n")[0])


def _groups(command: Command, flags: Mapping[str, Flag]) -> list[tuple[str, list[Flag]]]:
    """Required flags first, then the command's own, then those shared with other commands."""
    cls = command.config_class()
    named = [flag for flag in flags.values() if flag.name not in command.positional]
    groups = [(t("Required"), [flag for flag in named if flag.required])]
    rest = [flag for flag in named if not flag.required]
    groups.append((t("Flags"), [flag for flag in rest if flag.owner is cls]))
    owners = list(dict.fromkeys(flag.owner for flag in rest if flag.owner is not cls))
    groups += [
        (first_line(owner).rstrip(".。"), [f for f in rest if f.owner is owner]) for owner in owners
    ]
    return [(title, group) for title, group in groups if group]


def _place(flag: Flag) -> str:
    shown = "|".join(flag.choices) if flag.choices else flag.name.upper()
    return shown if flag.required else f"[{shown}]"


def _spelling(flag: Flag) -> str:
    if flag.kind == "switch":
        return f"--[no-]{flag.long[2:]}"
    return ", ".join([*flag.short, f"{flag.long} {flag.metavar}"])


def _meaning(flag: Flag) -> str:
    """The translated help with the default in brackets."""
    text = t(flag.help)
    if flag.required or flag.default in ("", (), None):
        return text
    if flag.kind == "switch":
        return f"{text} [{t('yes') if flag.default else t('no')}]"
    return f"{text} [{flag.default}]"
