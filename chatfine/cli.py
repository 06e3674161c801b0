"""The door: a command's name → its settings → its function, everything loaded only when needed.

Exit codes: 0 done, 2 refused, 75 stopped and 130 interrupted (both resumable), 70 a bug of ours.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import __version__, console, helptext
from chatfine.errors import Bug, ChatfineError, Interrupted, ResourceError, UsageError, did_you_mean
from chatfine.flags import RECIPE, Command, check_names, flags_of, missing, parse, split_switches
from chatfine.i18n import t
from chatfine.runtime import be_polite_on_cores

if TYPE_CHECKING:
    from chatfine.config import Config

COMMANDS = {
    "demo": Command("DemoConfig", "chatfine.commands.demo:demo", (), "chatfine demo"),
    "doctor": Command("DoctorConfig", "chatfine.commands.doctor:doctor", (), "chatfine doctor"),
    "models": Command("ModelsConfig", "chatfine.commands.get:models", (), "chatfine models"),
    "download": Command("DownloadConfig", "chatfine.commands.get:download", ("name",),
                        "chatfine download smollm2-135m-instruct"),
    "convert": Command("ConvertConfig", "chatfine.commands.convert:convert", ("source",),
                       "chatfine convert llama-2-7b-chat -o llama-2-7b-chat-hf"),
    "tokens": Command("TokensConfig", "chatfine.commands.tokens:tokens", ("text",),
                      'chatfine tokens "Hello, 你好" -m smollm2-135m-instruct'),
    "expand-vocab": Command("ExpandConfig", "chatfine.commands.expand:expand", (),
                            "chatfine expand-vocab -m llama-2-7b-chat --preset hanzi -o grown"),
    "data": Command("DataConfig", "chatfine.commands.check:data", ("action", "dataset"),
                    "chatfine data check my.jsonl -m smollm2-135m-instruct"),
    "plan": Command("PlanConfig", "chatfine.commands.plan:plan", (RECIPE,),
                    "chatfine plan -m smollm2-135m-instruct -d my.jsonl"),
    "train": Command("TrainConfig", "chatfine.train.run:train", (RECIPE,),
                     "chatfine train -m smollm2-135m-instruct -d my.jsonl -o my-run"),
    "resume": Command("ResumeConfig", "chatfine.train.run:resume", ("run",),
                      "chatfine resume my-run"),
    "merge": Command("MergeConfig", "chatfine.commands.merge:merge", ("run",),
                     "chatfine merge my-run -o my-model"),
    "chat": Command("ChatConfig", "chatfine.commands.chat:chat", ("model",),
                    "chatfine chat my-model"),
    "eval": Command("EvalConfig", "chatfine.commands.eval:evaluate", ("model",),
                    "chatfine eval my-model -d my.jsonl --generate"),
}  # fmt: skip
"""Every command; `chatfine --help` tells them in the same order."""

_BROKEN_PIPE = 141  # what a shell shows for a program that ended because its reader went away


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return guarded(sys.argv[1:] if argv is None else argv, _dispatch)


def guarded(words: Sequence[str], do: Callable[[set[str], list[str]], None]) -> int:
    """Run `do` with the switches of every command and the other words; returns the exit code.

    Whatever goes wrong in it becomes a sentence and a code: no door shows a bare traceback.
    """
    switches, rest = split_switches(words)
    console.set_json_mode("--json" in switches)
    console.make_streams_safe()
    try:
        try:
            do(switches, rest)
            sys.stdout.flush()
            return 0
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            error: ChatfineError = Interrupted("interrupted", t("stopped by Ctrl-C"))
        except ChatfineError as raised:
            error = raised
        except Exception as raised:  # whatever it is, the user gets a sentence and we a report
            error = _explain(raised, words)
        return _fail(error, "--debug" in switches)
    except BrokenPipeError:
        # the reader went away (`| head`); point stdout elsewhere so the final flush stays quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def call(name: str, values: dict[str, Any], where: str | None = None) -> dict[str, Any]:
    """Run the command `name` with these settings and return its result (the core of every face)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    be_polite_on_cores()
    command = COMMANDS[name]
    cls = command.config_class()
    check_names(flags_of(cls), values, where)
    config = cls.read(values, where=where)
    module, _, function = command.target.partition(":")
    run: Callable[[Config], dict[str, Any]] = getattr(importlib.import_module(module), function)
    return run(config)


def settings(name: str, words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The settings that the words after the command give, and where they come from.

    Raises:
        UsageError: a flag or value that can't be used, or required ones that are missing.
    """
    command = COMMANDS[name]
    cls = command.config_class()
    flags = flags_of(cls)
    given, recipe = parse(command, flags, words)
    values, where = given, None
    if recipe:
        from chatfine.config import load_yaml

        values = load_yaml(recipe) | given
        where = t("{recipe} and the command line", recipe=recipe) if given else recipe
        check_names(flags, values, where=recipe)
    lacking = missing(command, flags, values)
    if lacking:
        raise UsageError(
            "missing-setting", t("missing: {flags}", flags=", ".join(lacking)), where=where,
            fix=[t("for example: {command}", command=command.example),
                 t("all flags: chatfine {name} --help", name=name)],
        )  # fmt: skip
    return values, where


def _dispatch(switches: set[str], words: list[str]) -> None:
    helping = bool(switches & {"--help", "-h"})
    if words[:1] == ["help"]:
        helping, words = True, words[1:]
    if words[:1] == ["--version"]:
        print(f"chatfine {__version__}")
        return
    if not words:
        print(helptext.overview(__version__))
        return
    name = words[0]
    if name not in COMMANDS:
        kind = t("there is no flag {flag}", flag=name) if name.startswith("-") else t(
            "there is no command {name}", name=name)  # fmt: skip
        raise UsageError("unknown-command", kind,
                         fix=did_you_mean(name, COMMANDS) or t("see chatfine --help"))  # fmt: skip
    if helping:
        command = COMMANDS[name]
        print(helptext.command_help(name, command, flags_of(command.config_class())))
        return
    values, where = settings(name, words[1:])
    console.emit(call(name, values, where))


def _explain(error: Exception, words: Sequence[str]) -> ChatfineError:
    """The error to show for an exception that nobody foresaw, a full disk aside."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = ResourceError("disk-full", t("the disk is full"), where=error.filename,
                             fix=t("free some space, then run the same command again"))  # fmt: skip
        full.__cause__ = error
        return full
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("chatfine"):
        lacking = ResourceError(
            "missing-package", t("the Python package {name} is not installed", name=error.name),
            where=sys.executable,
            fix=[t("install chatfine with what it needs: {command}",
                   command="python -m pip install -e ."),
                 t("what is there and what is missing: {command}", command="chatfine doctor")],
        )  # fmt: skip
        lacking.__cause__ = error
        return lacking
    bug = Bug(
        "bug",
        t("an error of ours: {kind}: {text}", kind=type(error).__name__, text=str(error)[:300]),
        where=_write_report(error, words),
        fix=t("please report it with that file (it holds no settings of your environment); --debug "
              "shows more"),
    )  # fmt: skip
    bug.__cause__ = error
    return bug


def _write_report(error: Exception, words: Sequence[str]) -> str | None:
    """Traceback, versions and the command line in a file; None where none can be written."""
    from importlib import metadata

    versions = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in ("chatfine", "torch", "transformers", "peft", "tokenizers", "pydantic"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} -")
    trace = "".join(traceback.format_exception(error))
    text = "\n".join(["chatfine " + " ".join(map(repr, words)), "", *versions, "", trace])
    name = f"chatfine-report-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path = Path(tempfile.gettempdir()) / name
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return str(path)


def _fail(error: ChatfineError, debug: bool) -> int:
    """Show the error on stderr (and with --json on stdout); returns its exit code."""
    if debug:
        traceback.print_exception(error)
    console.error(error.code, str(error))
    console.emit(error.as_dict())
    sys.stdout.flush()
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
