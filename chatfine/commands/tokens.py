"""`chatfine tokens`: how a text, or a dialogue under the chat template, becomes tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.config import TokensConfig
from chatfine.errors import DataError, UsageError
from chatfine.i18n import t
from chatfine.types import Example, Message

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer


def tokens(config: TokensConfig) -> dict[str, Any]:
    """Show the tokens of a text, beside another model's if asked, or of a dialogue.

    Returns:
        For a text: `model`, `tokens` (id, piece, bytes in hex), `characters`,
        `characters_per_token`, and the same of the other model under `compare`.
        For a dialogue: `ids` and `mask`. With --explain: `ways`, and the model's own `tokens`.

    Raises:
        UsageError: neither or both of text and --messages.
        DataError: the file does not hold a list of messages.
    """
    if bool(config.text) == bool(config.messages):
        raise UsageError(
            "nothing-to-encode",
            t("give either a text or --messages FILE"),
            fix='chatfine tokens "Hello" -m smollm2-135m-instruct',
        )
    if config.messages:
        messages = read_messages(Path(config.messages))
        tokenizer = _load(config.model)
        example = tokenizer.encode_dialogue(messages, train_on=config.train_on)
        _show_dialogue(tokenizer, example)
        return {"ids": list(example.ids), "mask": list(example.mask)}
    if config.explain:
        return _explain(config.text, config.model)
    names = [config.model, config.compare] if config.compare else [config.model]
    results = [_describe(name, _load(name), config.text) for name in names]
    _show_texts(results)
    return results[0] | ({"compare": results[1]} if config.compare else {})


def _explain(text: str, model: str) -> dict[str, Any]:
    """One screen: the text cut in five ways, and by the model's own tokenizer."""
    from chatfine.data.sources import read_rows
    from chatfine.tokenizer.explain import PIECES, five_ways

    own = _describe(model, _load(model), text)
    learned_from = [str(value) for row in read_rows("dialogs") for value in row.values.values()]
    ways = five_ways(text, learned_from)
    for way in ways:
        console.say(
            t("{way}: {count} tokens, vocabulary {size}", way=way.name, count=len(way.tokens),
              size=f"{way.vocabulary:,}"), "bold",
        )  # fmt: skip
        console.say(f"  {_parted(way.tokens)}")
        console.say(f"  {way.idea}", "dim")
    console.say(t("the tokenizer of {model}: {count} tokens", model=model,
                  count=len(own["tokens"])), "bold cyan")  # fmt: skip
    console.say(f"  {_parted([_visible(entry) for entry in own['tokens']])}")
    console.say(
        t("the five learned from {n} short texts, the last three {size} pieces each; · is a space, "
          "� an unknown character, two hexadecimal digits a byte", n=len(learned_from),
          size=f"{PIECES:,}"), "dim",
    )  # fmt: skip
    named = [{"way": way.name, "tokens": list(way.tokens), "vocabulary": way.vocabulary}
             for way in ways]  # fmt: skip
    return {"ways": named, **own}


def _parted(tokens: Sequence[str]) -> str:
    """Tokens with bars between them, spaces and line ends shown."""
    return " | ".join(map(_marked, tokens))


def _load(name: str) -> ChatTokenizer:
    from chatfine.hub.download import find_model
    from chatfine.tokenizer.encode import ChatTokenizer

    return ChatTokenizer.load(find_model(name))


def read_messages(path: Path) -> list[Message]:
    """One dialogue from a JSON file: a list of {role, content}, or an object with `messages`.

    Raises:
        DataError: no such file, not JSON, or not a list of messages.
    """
    where = str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            "no-messages-file", t("can't read {path}", path=path), why=error.strerror
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            "not-utf8",
            t("{path} is not UTF-8 text", path=path),
            fix=f"iconv -f gbk -t utf-8 {path} > new.json",
        ) from None
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise DataError("bad-json", t("not valid JSON"), where=where, why=error.msg) from None
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list) or not value:
        raise DataError(
            "bad-messages",
            t("the file must hold one dialogue, a list of messages"),
            where=where,
            fix='[{"role": "user", "content": "Hello"}]',
        )
    messages = []
    for number, entry in enumerate(value, start=1):
        fields = entry if isinstance(entry, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                "bad-messages",
                t("message {number} needs a role and a content, both text", number=number),
                where=where,
            )
        messages.append(Message(role, content))
    return messages


def _describe(name: str, tokenizer: ChatTokenizer, text: str) -> dict[str, Any]:
    ids = tokenizer.encode_text(text)
    return {
        "model": name,
        "tokens": [
            {"id": i, "piece": tokenizer.piece(i), "bytes": tokenizer.token_bytes(i).hex(" ")}
            for i in ids
        ],
        "characters": len(text),
        "characters_per_token": round(len(text) / len(ids), 3) if ids else 0.0,
    }


def _show_texts(results: list[dict[str, Any]]) -> None:
    """One table; with two models their tokens side by side."""
    columns = [t("#")]
    for result in results:
        columns += [str(result["model"]), t("id"), t("bytes")]
    rows = []
    for number in range(max(len(result["tokens"]) for result in results)):
        row = [str(number)]
        for result in results:
            entry = result["tokens"][number] if number < len(result["tokens"]) else None
            row += [_visible(entry), str(entry["id"]), entry["bytes"]] if entry else ["", "", ""]
        rows.append(row)
    console.table(columns, rows)
    for result in results:
        console.say(
            t(
                "{model}: {characters} characters in {tokens} tokens, {ratio} a token",
                model=result["model"],
                characters=result["characters"],
                tokens=len(result["tokens"]),
                ratio=result["characters_per_token"],
            )
        )


def _visible(entry: dict[str, Any]) -> str:
    """A token's text, spaces and line ends shown; the piece when it is part of a character."""
    try:
        text = bytes.fromhex(entry["bytes"]).decode()
    except UnicodeDecodeError:
        return str(entry["piece"])
    return _marked(text)


def _marked(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→")


def _show_dialogue(tokenizer: ChatTokenizer, example: Example) -> None:
    """The dialogue as the model reads it, trained tokens in green."""
    from rich.text import Text

    shown = Text()
    begin = 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.mask[end] != example.mask[begin]:
            part = b"".join(map(tokenizer.token_bytes, example.ids[begin:end]))
            shown.append(
                part.decode(errors="replace"), style="bold green" if example.mask[begin] else "dim"
            )
            begin = end
    console.console().print(shown)
    console.say(
        t(
            "{tokens} tokens, {trained} of them trained on (green)",
            tokens=len(example.ids),
            trained=sum(example.mask),
        )
    )
