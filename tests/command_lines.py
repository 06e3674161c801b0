"""Command lines of the documents, read by the parsers that would read them; nothing is run."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatfine import cli
from chatfine.flags import split_switches
from chatfine.tutorial import doors
from chatfine.tutorial.grammar import parse
from chatfine.tutorial.show import DOORS
from chatfine.tutorial.training import direct_settings, training_settings

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("chatfine", "python", "torchrun", "sbatch")
OTHERS = ("git", "hf", "pytest", "$env:HF_ENDPOINT")
"""Programs of others, whose flags are not held here."""
COMMANDS = {
    "finetuning.py": "train", "chat_completion.py": "chat", "merge.py": "merge",
    "expand_token.py": "expand-vocab",
}  # fmt: skip
FENCED = re.compile(r"```(?:bash|powershell)\n(.*?)```", re.DOTALL)
INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]*)`")
INDENTED = re.compile(rf"^(?:#   |    )((?:{'|'.join(PROGRAMS)}) .*)", re.MULTILINE)


def in_blocks(text: str) -> list[str]:
    """The lines of fenced blocks, one command each."""
    lines = [line for block in FENCED.findall(text) for line in block.strip().splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def in_prose(text: str) -> list[str]:
    """Whole commands between backticks; "…" stands for what a reader has to fill in."""
    found = INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in found if "…" not in line]


def in_header(text: str) -> list[str]:
    """The commands in a recipe's comments, a docstring or an indented block."""
    joined = re.sub(r"\\\n(?:#| ) +", "", text)
    return [line for line in INDENTED.findall(joined) if "…" not in line]


def check(line: str) -> None:
    """Read a command line as its program would.

    Raises:
        UsageError, SystemExit, AssertionError: it would not be understood.
    """
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program in OTHERS:
        return
    assert program in PROGRAMS, f"what is {program}?"
    if program == "chatfine":
        _chatfine(rest)
    elif program == "python":
        _python(rest)
    elif program == "torchrun":
        _torchrun(rest)
    else:
        script, run, recipe, *more = rest
        assert (ROOT / script).is_file()
        _chatfine(["train", recipe, "--output", run, *more])


def _chatfine(words: Sequence[str]) -> None:
    switches, (name, *rest) = split_switches(words)
    command = cli.COMMANDS[name]
    if rest in ([], ["check"], ["show"]) or switches & {"--help", "-h"}:
        return  # a command named in a sentence
    command.config_class().read(*cli.settings(name, rest))


def _python(words: Sequence[str]) -> None:
    program, *rest = words
    if program == "-m":
        program, *rest = rest
        if program == "pip":
            return
        if program == "chatfine":
            _chatfine(rest)
            return
        program += ".py"
    assert (ROOT / program).is_file()
    if program == "recipes/ray_train.py":
        _, train = ray_train().read(list(rest))
        _chatfine(["train", *train])
    elif Path(program).name in DOORS:
        _door(Path(program).name, rest)


def _torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(list(words))
    module = ["-m"] if given.module else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        _python([*module, given.training_script, *given.training_script_args])


def _door(script: str, words: Sequence[str]) -> None:
    table, command = DOORS[script], COMMANDS[script]
    switches, rest = split_switches(words)
    if switches & {"--help", "-h"}:
        return
    positional = "chat.model_name" if command == "chat" else ""
    values = parse(rest, table, doors._own_flags(command, table), positional)
    settings: dict[str, Any]
    if command == "train":
        settings = training_settings(values)
    else:
        settings = direct_settings(values, table) | values.extra
    if command == "chat":
        settings["model"] = values["chat.model_name"]
    if command in ("train", "chat"):
        doors._require(settings, script)
    cli.COMMANDS[command].config_class().read(settings)


def ray_train() -> ModuleType:
    """recipes/ray_train.py as a module; Ray itself need not be there."""
    spec = importlib.util.spec_from_file_location("ray_train", ROOT / "recipes" / "ray_train.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
