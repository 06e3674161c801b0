"""`chatfine data check|show`: what training would read, and how the model sees it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.config import DataConfig, DataOptions
from chatfine.data.examples import DataSettings, load_dialogues, load_examples
from chatfine.data.tokenise import encode_one
from chatfine.hub.catalog import find_model
from chatfine.hub.folder import read_model_folder
from chatfine.i18n import t
from chatfine.runtime import home
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Example

if TYPE_CHECKING:
    from rich.text import Text

DEFAULT_MAX_LENGTH = 2048


def settings_of(config: DataOptions, max_positions: int) -> DataSettings:
    """The plain data settings of a command, `max_length` filled in from the model's limit."""
    names = DataSettings.__dataclass_fields__
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    values["max_length"] = config.max_length or min(max_positions, DEFAULT_MAX_LENGTH)
    return DataSettings(**values)


def data(config: DataConfig) -> dict[str, Any]:
    """Check data sets and report on them, or show examples with the trained tokens coloured.

    Raises:
        DataError: rows that can't be used.
    """
    folder = read_model_folder(find_model(config.model))
    tokenizer = ChatTokenizer.load(folder.path, config.template)
    settings = settings_of(config, folder.max_positions)
    if config.action == "show":
        return _show(config, tokenizer, settings)
    splits = load_examples(config.dataset, tokenizer, settings, home() / "data")
    console.heading(t("Data"))
    splits.report.show()
    if not any(part.dropped_rows for part in splits.report.parts):
        console.say(t("All rows can be used."))
    return splits.report.as_dict()


def _show(config: DataConfig, tokenizer: ChatTokenizer, settings: DataSettings) -> dict[str, Any]:
    """Print the first examples of each data set."""
    shown = []
    for dataset in config.dataset:
        dialogues = load_dialogues(dataset, settings, "train", tokenizer)
        for dialogue in dialogues[: config.number]:
            example = encode_one(dialogue, tokenizer, settings.train_on)
            trained = sum(map(bool, example.mask))
            console.heading(
                t("{where}: {tokens} tokens, {trained} trained on", where=dialogue.where,
                  tokens=len(example.ids), trained=trained)
            )  # fmt: skip
            if settings.max_length and len(example.ids) > settings.max_length:
                console.warn(t("longer than --max-length {limit}", limit=settings.max_length))
            console.console().print(coloured(example, tokenizer))
            shown.append(
                {
                    "where": dialogue.where,
                    "tokens": len(example.ids),
                    "trained": trained,
                    "ids": list(map(int, example.ids)),
                    "mask": list(map(bool, example.mask)),
                }
            )
    console.say()
    console.say(t("Green, or between ⟦ and ⟧: tokens that are trained on."))
    return {"examples": shown}


def coloured(example: Example, tokenizer: ChatTokenizer) -> Text:
    """An example as text, control tokens spelled out; trained stretches are green.

    Where there is no colour (a file, a pipe, NO_COLOR) they stand between ⟦ and ⟧.
    """
    from rich.text import Text

    plain = console.console().color_system is None
    text = Text()
    pairs = zip(example.ids, example.mask, strict=True)
    for trained, stretch in groupby(pairs, key=lambda pair: bool(pair[1])):
        piece = tokenizer.decode([token for token, _ in stretch], keep_control=True)
        if trained:
            text.append(f"⟦{piece}⟧" if plain else piece, style="bold green")
        else:
            text.append(piece, style="dim")
    return text
