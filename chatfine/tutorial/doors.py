"""What the tutorial's four scripts do: read flags, call the command of chatfine, show errors."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.cli import COMMANDS, call, guarded
from chatfine.errors import UsageError
from chatfine.flags import Flag, flags_of
from chatfine.hub.catalog import find_model
from chatfine.hub.folder import read_model_folder
from chatfine.i18n import t
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tutorial.fields import CUSTOM_FILE, EXPANDING, MERGING, Field
from chatfine.tutorial.grammar import Values, parse
from chatfine.tutorial.show import DOORS, help_text
from chatfine.tutorial.talking import chat_settings
from chatfine.tutorial.training import direct_settings, training_settings

HOME = Path(__file__).resolve().parents[2]
"""The folder of the doors."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

EXAMPLES = {
    "finetuning.py": "python -m finetuning --use_peft --peft_method lora --quantization "
    "--model_name chat_7b_hf --output_dir PEFT_model",
    "chat_completion.py": "python chat_completion.py --model_name chat_7b_hf "
    "--prompt_file chat.json",
    "merge.py": "python merge.py --model_name chat_7b_hf --peft_model PEFT_model "
    "--output_dir new_model",
    "expand_token.py": "python expand_token.py --model_name chat_7b_hf --output_dir new_token",
}


def finetuning(argv: Sequence[str] | None = None) -> int:
    """finetuning.py: train; the output folder is a run and a PEFT folder at once."""

    def run(values: Values) -> dict[str, Any]:
        if not values.has("custom_dataset.file"):
            values.given["custom_dataset.file"] = _here_or_beside_the_doors(CUSTOM_FILE)
        settings = training_settings(values)
        _require(settings, "finetuning.py")
        output = Path(str(settings["output"]))
        with _old_adapter_aside(output):
            result = call("train", _with_rows(settings, "model"))
        if console.is_main_process():
            _be_a_peft_folder(output)
        return result

    return _door(argv, "finetuning.py", "train", run)


def chat_completion(argv: Sequence[str] | None = None) -> int:
    """chat_completion.py: answer a prompt file, a piped question, or what is typed."""

    def run(values: Values) -> dict[str, Any]:
        if not values["chat.model_name"] and "model" not in values.extra:
            _require({}, "chat_completion.py")  # before a pipe is read to its end
        settings = chat_settings(values)
        return call("chat", _with_rows(settings, "base" if settings.get("base") else "model"))

    return _door(argv, "chat_completion.py", "chat", run, "chat.model_name")


def merge(argv: Sequence[str] | None = None) -> int:
    """merge.py: base and adapter become an ordinary model folder, proved."""

    def run(values: Values) -> dict[str, Any]:
        settings = direct_settings(values, MERGING)
        if not values.has("merge.model_name") and not values.has("merge.base_model"):
            settings["model"] = _here_or_beside_the_doors(settings["model"])
            if not Path(settings["model"]).is_dir():
                del settings["model"]  # the adapter names its base
        settings |= {"overwrite": True} | values.extra
        return call("merge", _with_rows(settings, "model"))

    return _door(argv, "merge.py", "merge", run)


def expand_token(argv: Sequence[str] | None = None) -> int:
    """expand_token.py: every Chinese character becomes a piece of the vocabulary."""

    def run(values: Values) -> dict[str, Any]:
        settings = direct_settings(values, EXPANDING)
        if not values.has("expand_token.model_name"):
            settings["model"] = _here_or_beside_the_doors(settings["model"])
        if "corpus" not in values.extra:
            settings["preset"] = "hanzi"
        return call("expand-vocab", settings | {"overwrite": True} | values.extra)

    return _door(argv, "expand_token.py", "expand-vocab", run)


def _door(
    argv: Sequence[str] | None,
    script: str,
    command: str,
    run: Callable[[Values], dict[str, Any]],
    positional: str = "",
) -> int:
    """Read the flags of one script and run it; returns the exit code."""

    table = DOORS[script]

    def do(switches: set[str], words: list[str]) -> None:
        if switches & {"--help", "-h"}:
            console.say(help_text(script, command, table, EXAMPLES[script]))
            return
        console.emit(run(parse(words, table, _own_flags(command, table), positional)))

    return guarded(sys.argv[1:] if argv is None else argv, do)


def _own_flags(command: str, table: tuple[Field, ...]) -> dict[str, Flag]:
    """The settings of chatfine's command that no field of the tutorial is called like."""
    taken = {one.name for one in table}
    flags = flags_of(COMMANDS[command].config_class())
    return {name: flag for name, flag in flags.items() if name not in taken}


def _require(settings: dict[str, Any], script: str) -> None:
    if not settings.get("model"):
        raise UsageError(
            "missing-setting", t("missing: {flags}", flags="--model_name"),
            fix=[t("for example: {command}", command=EXAMPLES[script]),
                 t("all flags: {command}", command=f"python {script} --help")],
        )  # fmt: skip


def _here_or_beside_the_doors(name: str) -> str:
    """A default path: in the working folder, else where the doors lie."""
    beside = HOME / name
    return str(beside) if not Path(name).exists() and beside.exists() else name


def _with_rows(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings with a grown copy as model `name` where its tokenizer has outgrown its rows.

    That is how the tutorial's readers leave a model folder: the grown tokenizer copied into it, and
    perhaps vocab_size edited, over the old weights.
    """
    if not settings.get(name):
        return settings
    folder = find_model(str(settings[name]))
    if not (folder / "config.json").is_file() or (folder / "config.yaml").is_file():
        return settings  # a run or an adapter names its own base
    rows = read_model_folder(folder, allow_old_rows=True).vocab_size
    pieces = ChatTokenizer.load(folder).size
    if pieces <= rows:
        return settings
    console.say(
        t("the tokenizer in {path} has {pieces} pieces, the weights {rows} rows: a copy of the "
          "model gets the rows that lack", path=folder, pieces=pieces, rows=rows)
    )  # fmt: skip
    from chatfine.model.rows import grown_folder

    return settings | {name: str(grown_folder(folder))}


@contextlib.contextmanager
def _old_adapter_aside(output: Path) -> Iterator[None]:
    """Make way for a run where PEFT's own files lie; put them back if the run is refused."""
    aside = output.with_name(f".{output.name}.old")
    ours = (
        console.is_main_process()
        and (output / "adapter_config.json").is_file()
        and not (output / "config.yaml").exists()
        and all(entry.is_file() for entry in output.iterdir())
    )
    if ours:
        shutil.rmtree(aside, ignore_errors=True)
        output.rename(aside)
    try:
        yield
    finally:
        if ours and output.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif ours:
            aside.rename(output)


def _be_a_peft_folder(run: Path) -> None:
    """Put the adapter's two files at the top of a run as well, where PEFT looks for them."""
    for name in ADAPTER_FILES:
        if (run / "adapter" / name).is_file():
            shutil.copyfile(run / "adapter" / name, run / name)
