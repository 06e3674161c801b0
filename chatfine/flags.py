"""The command line of one command, read off the fields of its settings.

A field `max_length` of the config class is the flag `--max-length` (underscores work too); its
help, choices and default come from the class, so a setting is described in one place. A parser of
our own, since every message of argparse would have to be replaced anyway: did-you-mean, all missing
flags at once, both languages.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from chatfine.errors import UsageError, did_you_mean
from chatfine.i18n import t

if TYPE_CHECKING:
    from chatfine.config import Config

SWITCHES = ("--json", "--debug", "--help", "-h")
"""Flags of every command; they may stand anywhere."""

RECIPE = "recipe"
"""The positional that is a YAML file of settings rather than a setting."""

SYNONYMS = {
    "lr": "learning_rate",
    "lora_rank": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "gradient_accumulation_steps": "accumulate",
    "per_device_train_batch_size": "batch_size",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "num_train_epochs": "epochs",
    "data": "dataset",
    "base_model": "model",
    "precision": "dtype",
    "quantization": "quantize",
    "load_in_8bit": "quantize",
    "load_in_4bit": "quantize",
    "num_virtual_tokens": "virtual_tokens",
    "fsdp": "sharding",
}
"""Names other trainers use, for did-you-mean only."""

_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Command:
    """One verb: its settings class in chatfine.config, its function, its positional fields."""

    config: str
    target: str  # "module:function"
    positional: tuple[str, ...] = ()
    example: str = ""

    def config_class(self) -> type[Config]:
        """The settings class (this imports pydantic)."""
        from chatfine import config

        cls: type[Config] = getattr(config, self.config)
        return cls


@dataclass(frozen=True)
class Flag:
    """One setting as the command line shows it."""

    name: str  # the field's name
    kind: Literal["switch", "list", "value"]
    help: str  # English, to be translated
    default: Any
    required: bool
    owner: type  # the class that declares it
    type: type = str
    short: tuple[str, ...] = ()
    choices: tuple[str, ...] = field(default=())

    @property
    def long(self) -> str:
        """`--max-length` for the field max_length."""
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        if self.choices:
            return "|".join(self.choices)
        if self.type in (int, float):
            return "N" if self.type is int else "X"
        return self.name.upper() if self.name in ("model", "dataset", "output", "run") else "TEXT"


def flags_of(cls: type[Config]) -> dict[str, Flag]:
    """Field name → flag for every setting of `cls`, in the order of the class."""
    found = {}
    for name, info in cls.model_fields.items():
        inner, kind = _shape(info.annotation)
        extra = info.json_schema_extra
        found[name] = Flag(
            name=name,
            kind=kind,
            help=" ".join((info.description or "").split()),
            default=info.default,
            required=info.is_required(),
            owner=_owner(cls, name),
            type=inner if isinstance(inner, type) else str,
            short=tuple(map(str, typing.cast(list[str], extra.get("short", []))))
            if isinstance(extra, dict)
            else (),
            choices=tuple(map(str, typing.get_args(inner)))
            if typing.get_origin(inner) is Literal
            else (),
        )
    return found


def _shape(annotation: Any) -> tuple[Any, Literal["switch", "list", "value"]]:
    """The type of one value, and how the flag is written."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) in (tuple, list):
        return typing.get_args(annotation)[0], "list"
    return annotation, "switch" if annotation is bool else "value"


def _owner(cls: type, name: str) -> type:
    """The class highest in the family that declares the field: it names the group in the help."""
    return [base for base in cls.__mro__ if name in inspect.get_annotations(base)][-1]


def split_switches(words: Sequence[str]) -> tuple[set[str], list[str]]:
    """The switches every command knows, and the words without them."""
    end = words.index("--") if "--" in words else len(words)
    given = {word for word in words[:end] if word in SWITCHES}
    return given, [word for word in words[:end] if word not in SWITCHES] + list(words[end:])


def parse(
    command: Command, flags: Mapping[str, Flag], words: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Read the words after the command: the settings given (still text) and the recipe file.

    Raises:
        UsageError: unknown flag, missing value, a word too many, a value not among the choices.
    """
    values: dict[str, Any] = {}
    recipe = ""
    places = deque(command.positional)
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if _FLAG.match(word):
            _take_flag(word, queue, flags, values)
            continue
        if word == "--":
            if not queue:
                break
            word = queue.popleft()
            queue.appendleft("--")
        if not places:
            raise UsageError("extra-word", t("unexpected argument {word}", word=repr(word)),
                             fix=t("put quotes around a text with spaces"))  # fmt: skip
        place = places.popleft()
        if place == RECIPE:
            recipe = word
            continue
        _store(flags[place], word, values, place.upper())
        if flags[place].kind == "list":
            places.append(place)
    return values, recipe


def _take_flag(
    word: str, queue: deque[str], flags: Mapping[str, Flag], values: dict[str, Any]
) -> None:
    """Read one flag and, where it has one, its value."""
    written, equals, value = word.partition("=")
    flag, negated = find(written, flags)
    if flag.kind == "switch":
        if negated and equals:
            raise UsageError("flag-value", t("{flag} takes no value", flag=written))
        values[flag.name] = not negated if not equals else value
        return
    if not equals:
        if not queue or queue[0] == "--" or _is_known(queue[0], flags):
            raise UsageError(
                "no-value", t("{flag} needs a value", flag=written),
                fix=t("a value that begins with - is written {flag}=VALUE", flag=flag.long),
            )  # fmt: skip
        value = queue.popleft()
    _store(flag, value, values, written)


def _store(flag: Flag, value: str, values: dict[str, Any], shown: str) -> None:
    if flag.choices and value not in flag.choices:
        raise UsageError(
            "bad-setting",
            t("{flag} is {value}; possible: {choices}", flag=shown, value=repr(value),
              choices=", ".join(flag.choices)),
            fix=did_you_mean(value, flag.choices) or (),
        )  # fmt: skip
    if flag.kind == "list":
        values.setdefault(flag.name, []).append(value)
    elif flag.name in values and not shown.startswith("-"):
        raise UsageError("given-twice", t("{name} is given twice", name=shown))
    else:
        values[flag.name] = value


def find(written: str, flags: Mapping[str, Flag]) -> tuple[Flag, bool]:
    """The flag spelled `--max-length`, `--max_length`, `-m` or `--no-overwrite`, and if negated.

    Raises:
        UsageError: there is none; with the likeliest one meant.
    """
    if not written.startswith("--"):
        for flag in flags.values():
            if written in flag.short:
                return flag, False
    else:
        name = written[2:].replace("-", "_")
        if name in flags:
            return flags[name], False
        positive = flags.get(name.removeprefix("no_"))
        if name.startswith("no_") and positive and positive.kind == "switch":
            return positive, True
    meant = _suggest(written, flags)
    raise UsageError(
        "unknown-flag",
        t("there is no flag {flag}", flag=written),
        fix=t("did you mean {word}?", word="--" + meant.replace("_", "-"))
        if meant
        else t("see chatfine COMMAND --help"),
    )


def check_names(flags: Mapping[str, Flag], names: Iterable[str], where: str | None) -> None:
    """Refuse the name of a setting that the command hasn't, with the likeliest one meant."""
    for name in names:
        if name not in flags:
            meant = _suggest(name, flags)
            raise UsageError(
                "unknown-setting",
                t("there is no setting called {name}", name=name),
                where=where,
                fix=t("did you mean {word}?", word=meant)
                if meant
                else t("see chatfine COMMAND --help"),
            )


def _is_known(word: str, flags: Mapping[str, Flag]) -> bool:
    try:
        return bool(_FLAG.match(word) and find(word.partition("=")[0], flags))
    except UsageError:
        return word.startswith("--")


def _suggest(written: str, flags: Mapping[str, Flag]) -> str | None:
    """The setting a wrong name most likely means: another trainer's word, a beginning, a typo."""
    name = written.lstrip("-").replace("-", "_")
    begins = [known for known in flags if name and known.startswith(name)]
    if SYNONYMS.get(name) in flags:
        return SYNONYMS[name]
    if len(begins) == 1:
        return begins[0]
    return next(iter(difflib.get_close_matches(name, [*flags, "json", "debug", "help"], n=1)), None)


def missing(command: Command, flags: Mapping[str, Flag], given: Iterable[str]) -> list[str]:
    """The required settings that were not given, as a person types them."""
    given = set(given)
    lacking = [flag for flag in flags.values() if flag.required and flag.name not in given]
    return [
        flag.name.upper()
        if flag.name in command.positional
        else " ".join([flag.long, *(f"({short})" for short in flag.short)])
        for flag in lacking
    ]
