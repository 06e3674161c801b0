"""The same verbs from Python: `import chatfine as cf; cf.train(model=…, dataset=…, output=…)`.

Each function takes the settings of the command of the same name (`max_length` for `--max-length`),
checks them the same way and returns what the command prints with `--json`. Errors are raised as
`chatfine.errors.ChatfineError`. Prose goes to the terminal as usual.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from chatfine.cli import call

PathLike: TypeAlias = str | os.PathLike[str]
Datasets: TypeAlias = PathLike | Sequence[PathLike]
Result: TypeAlias = dict[str, Any]


def _call(command: str, /, **values: Any) -> Result:
    """Run a command; None means that a setting was not given, paths become text."""
    given = {key: _plain(value) for key, value in values.items() if value is not None}
    return call(command, given)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def demo(output: PathLike = "chatfine-demo", **settings: Any) -> Result:
    """The whole story on the embedded model; returns the scores before and after."""
    return _call("demo", output=output, **settings)


def doctor() -> Result:
    """What this machine can do and what to install."""
    return _call("doctor")


def models() -> Result:
    """The models known by name."""
    return _call("models")


def download(
    name: PathLike, *, source: str = "auto", output: PathLike | None = None, **settings: Any
) -> Result:
    """Get a model by catalog name, hub name or folder; returns where it lies.

    Raises:
        ModelError: no such model, or no source has it.
    """
    return _call("download", name=name, source=source, output=output, **settings)


def convert(source: PathLike, output: PathLike, **settings: Any) -> Result:
    """Meta's .pth files, a GGUF file or a sharded run become a model folder (or, with `to="meta"`,
    a model folder becomes Meta's layout).

    Raises:
        ModelError: files that can't be converted; nothing is left behind.
    """
    return _call("convert", source=source, output=output, **settings)


def expand_vocab(model: PathLike, output: PathLike = "", **settings: Any) -> Result:
    """Give a tokenizer pieces it lacks (`preset="hanzi"`, or `corpus=FILE, size=N`), and the model
    their rows; with `advise=True` only say whether that pays.

    Raises:
        Refused: nothing to add, or files that can't be used; nothing is written.
    """
    return _call("expand-vocab", model=model, output=output, **settings)


def tokens(text: str = "", *, model: PathLike, **settings: Any) -> Result:
    """How a text (or, with `messages=FILE`, a dialogue) becomes tokens: pieces, ids, mask."""
    return _call("tokens", text=text, model=model, **settings)


def check_data(dataset: Datasets, *, model: PathLike, **settings: Any) -> Result:
    """Read a data set as training would; returns the report.

    Raises:
        DataError: a file or row that can't be used, with file and line.
    """
    return _call("data", action="check", dataset=dataset, model=model, **settings)


def plan(*, model: PathLike, dataset: Datasets, **settings: Any) -> Result:
    """Predicted memory, disk and time of the training run with the same settings."""
    return _call("plan", model=model, dataset=dataset, **settings)


def train(
    *, model: PathLike, dataset: Datasets, output: PathLike | None = None, **settings: Any
) -> Result:
    """Fine-tune `model` on `dataset` and write the run folder `output`.

    Returns:
        run, steps, tokens, tokens_per_second, train_loss, val_loss, peak_memory_bytes, seconds,
        total_seconds.

    Raises:
        Refused: bad input; nothing was written.
        Stopped: ended early and resumable, see `resume`.
    """
    return _call("train", model=model, dataset=dataset, output=output, **settings)


def resume(run: PathLike) -> Result:
    """Go on with an interrupted run; returns what `train` returns."""
    return _call("resume", run=run)


def merge(run: PathLike, output: PathLike, **settings: Any) -> Result:
    """Merge a run's adapter into its base model, prove the result and write it to `output`.

    Raises:
        ProofError: merged model and base + adapter disagree; nothing is left behind.
    """
    return _call("merge", run=run, output=output, **settings)


def chat(model: PathLike, prompt: str = "", **settings: Any) -> Result:
    """Talk with a model, run or adapter: one `prompt`, or in the terminal without one."""
    return _call("chat", model=model, prompt=prompt, **settings)


def evaluate(model: PathLike, *, dataset: Datasets, **settings: Any) -> Result:
    """Loss, perplexity and bits per character on a data set; with `generate=True` ROUGE too."""
    return _call("eval", model=model, dataset=dataset, **settings)
