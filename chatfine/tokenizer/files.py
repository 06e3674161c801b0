"""Tokenizer folders, read whole and written whole: vocabulary, settings, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine.errors import TokenizerError
from chatfine.hub.folder import refuse_pointers
from chatfine.hub.place import TOKENIZER_FILES
from chatfine.i18n import t

if TYPE_CHECKING:
    from chatfine.tokenizer.encode import ChatTokenizer

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer."""

    folder: Path
    spec: dict[str, Any]
    """tokenizer.json, with tokens that only the other files name added to `added_tokens`"""
    config: dict[str, Any]
    """tokenizer_config.json"""
    special_tokens: dict[str, str]
    """`bos_token` and so on, as spelled"""
    control: frozenset[str]
    """spellings of all control (special) tokens"""
    template: str | None
    """the model's own chat template"""
    model_type: str
    """`model_type` of config.json; "" without that file"""
    end_ids: tuple[int, ...]
    """the end tokens generation_config.json (else config.json) names"""


def read_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer files of a model folder.

    Raises:
        TokenizerError: no tokenizer, or a file that is not what it should be.
        ModelError: model-lfs-pointer.
    """
    if folder.is_dir():
        refuse_pointers(folder)
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        spec = _read_json(folder / "tokenizer.json")
        if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
            raise _bad_file(folder / "tokenizer.json", t("it holds no vocabulary"))
    elif (folder / "tokenizer.model").is_file():
        from chatfine.tokenizer.convert import read_model_file

        spec, defaults = read_model_file(folder / "tokenizer.model")
        config = defaults | config
    else:
        raise TokenizerError(
            "no-tokenizer",
            t("the folder {path} has no tokenizer", path=folder),
            why=t("there is neither tokenizer.json nor tokenizer.model"),
            fix=t("copy the tokenizer's files of the original model into the folder"),
        )
    named = _read_json(folder / "special_tokens_map.json") | config
    special = {name: _content(named[name]) for name in NAMED_TOKENS if named.get(name)}
    spec["added_tokens"], control = _added_tokens(folder, spec, config, named, special)
    settings = _read_json(folder / "config.json")
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    ends = settings.get("eos_token_id") if ends is None else ends
    return TokenizerFiles(
        folder=folder,
        spec=spec,
        config=config,
        special_tokens=special,
        control=frozenset(control),
        template=_own_template(folder, config),
        model_type=str(settings.get("model_type", "")),
        end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
    )


def _added_tokens(
    folder: Path,
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    named: Mapping[str, Any],
    special: Mapping[str, str],
) -> tuple[list[dict[str, Any]], set[str]]:
    """All added tokens in the order of their ids, and the spellings of the control tokens.

    tokenizer.json rules; what only tokenizer_config.json, added_tokens.json or the map of special
    tokens name is appended, as transformers does.
    """
    added = [dict(entry) for entry in spec.get("added_tokens", [])]
    known = {entry["content"] for entry in added}
    control = {entry["content"] for entry in added if entry.get("special")} | set(special.values())
    vocab = spec["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {piece: n for n, (piece, _) in enumerate(vocab)}
    following = max([len(pieces), *(entry["id"] + 1 for entry in added)])

    extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    control |= {_content(entry) for entry in extra}
    wanted: dict[str, dict[str, Any]] = {}
    by_id = config.get("added_tokens_decoder") or {}
    for number, entry in sorted(by_id.items(), key=lambda pair: int(pair[0])):
        wanted[entry["content"]] = {**entry, "id": int(number)}
        if entry.get("special"):
            control.add(entry["content"])
    by_content = _read_json(folder / "added_tokens.json")
    for content, number in sorted(by_content.items(), key=lambda pair: int(pair[1])):
        wanted.setdefault(content, {"id": number})
    for content in sorted(control):
        wanted.setdefault(content, {})
    for content, entry in wanted.items():
        if content in known or not content:
            continue
        number = entry.get("id", pieces.get(content, following))
        following = max(following, number + 1)
        flags = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
        added.append({"id": number, "content": content, **flags, "special": content in control})
    added.sort(key=lambda entry: entry["id"])
    return added, control - {""}


def _content(token: Any) -> str:
    """A token's spelling; the files hold it as a string or as an object."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _own_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's chat template; the separate file rules, of several named ones "default" does."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if found is None:
        found = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) and found else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _bad_file(path, str(error)) from None
    if not isinstance(value, dict):
        raise _bad_file(path, t("it must hold a JSON object"))
    return value


def _bad_file(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "bad-tokenizer-file",
        t("{name} can't be used", name=path.name),
        where=str(path),
        why=why,
        fix=t("fetch the file again from where the model came from"),
    )


def write_tokenizer(
    folder: Path,
    tokenizer_json: Mapping[str, Any] | str,
    config: Mapping[str, Any],
    template: str | None,
) -> None:
    """Write a tokenizer folder that chatfine and transformers load alike.

    Args:
        folder: made if need be.
        tokenizer_json: contents of tokenizer.json.
        config: contents of tokenizer_config.json, without the template.
        template: jinja2 source, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer_json if isinstance(tokenizer_json, str) else _dump(tokenizer_json)
    config = {name: value for name, value in config.items() if name != "chat_template"}
    names = {name: config[name] for name in NAMED_TOKENS if config.get(name)}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(_dump(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(_dump(names), encoding="utf-8")
    if template is not None:
        _write_template(folder, template)


def _write_template(folder: Path, template: str) -> None:
    """Put the template where new readers (a file) and old ones (the config) look."""
    path = folder / "tokenizer_config.json"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    path.write_text(_dump(_read_json(path) | {"chat_template": template}), encoding="utf-8")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def copy_tokenizer(
    source: Path, target: Path, template: str | None = None, length: int = 0
) -> list[str]:
    """Copy the tokenizer's files; with `template` that one takes the place of the model's own.

    A `model_max_length` below `length` tokens is raised to it: some servers cut there.

    Returns:
        The names of the files now in `target`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if template:
        _write_template(target, template)
    settings = _read_json(target / "tokenizer_config.json")
    if settings.get("model_max_length", length) < length:
        raised = _dump(settings | {"model_max_length": length})
        (target / "tokenizer_config.json").write_text(raised, encoding="utf-8")
    return [name for name in TOKENIZER_FILES if (target / name).is_file()]


def agree_on_end(folder: Path, tokenizer: ChatTokenizer) -> list[str]:
    """Make tokenizer_config.json, generation_config.json and template end an answer with one token.

    The token the template writes after an answer becomes the tokenizer's `eos_token`, and
    generation_config.json lists it first, before other end tokens. Without it a merged model would
    talk on after its answer in programs that read only one of the files.

    Args:
        folder: the model folder to change.
        tokenizer: its tokenizer, as trained with.

    Returns:
        What was changed, one sentence each; empty when all agreed.
    """
    end = tokenizer.turn_end_id if tokenizer.turn_end_id is not None else tokenizer.eos_id
    if end is None:
        return []
    changed = []
    word = tokenizer.piece(end)
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    if config and _content(config.get("eos_token") or "") != word:
        path.write_text(_dump(config | {"eos_token": word}), encoding="utf-8")
        changed.append(t("the tokenizer's end token is now {token}", token=word))
        path = folder / "special_tokens_map.json"
        if path.is_file():
            path.write_text(_dump(_read_json(path) | {"eos_token": word}), encoding="utf-8")
    path = folder / "generation_config.json"
    generation = _read_json(path)
    ends = [end, *sorted(tokenizer.stop_ids - {end})]
    before = generation.get("eos_token_id")
    if (before if isinstance(before, list) else [before]) != ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else end
        path.write_text(_dump(generation), encoding="utf-8")
        words = ", ".join(map(tokenizer.piece, ends))
        changed.append(t("generation now ends at {tokens}", tokens=words))
    return changed


def write_from_gguf(gguf: Path, folder: Path) -> None:
    """Write the tokenizer folder of a GGUF file (see `convert.read_gguf` for what is supported).

    Raises:
        TokenizerError: the file holds a kind of tokenizer that is not known.
    """
    from chatfine.tokenizer.convert import read_gguf

    spec, config, template = read_gguf(gguf)
    write_tokenizer(folder, spec, config, template)
