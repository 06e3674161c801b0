"""`chatfine expand-vocab`: a tokenizer gets the pieces it lacks, and the model their rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.commands.advise import Corpus, Costs, advise, advise_size, read_corpus
from chatfine.config import ExpandConfig
from chatfine.errors import ModelError, TokenizerError, UsageError
from chatfine.hub.catalog import find_model
from chatfine.hub.folder import ModelFolder, check_config, read_model_folder
from chatfine.hub.headers import read_json
from chatfine.hub.place import check_output, put_in_place
from chatfine.hub.vocabulary import FILE as VOCABULARY
from chatfine.hub.vocabulary import read_vocabulary
from chatfine.i18n import t
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.expand import fill
from chatfine.tokenizer.grow_files import readable, write_grown
from chatfine.tokenizer.growable import Growable, Growth
from chatfine.tokenizer.hanzi import LLAMA2_FIRST, LLAMA2_PIECES, hanzi
from chatfine.tokenizer.learn import Learned

if TYPE_CHECKING:
    from chatfine.model.rows import GrowResult

MOST_PIECES = 200_000  # more than any vocabulary of one language has
_EXAMPLES = ("学而时习之，不亦说乎？", "Hello, world!")


def expand(config: ExpandConfig) -> dict[str, Any]:
    """Grow a tokenizer, and the embedding and head of the model it lies in.

    Returns:
        `output`, `kind`, `form`, `old_size`, `new_size`; for a corpus what was measured; for a
        model its `rows` and `added_parameters`. With --advise only the measures and the verdict.

    Raises:
        Refused: what can't grow, nothing to add, a taken output folder; nothing is left behind.
    """
    if config.preset == "none" and not config.corpus and config.output:
        grown = _catch_up(config)
        if grown is not None:
            return grown
    _check(config)
    folder = find_model(config.model)
    model = _model_in(folder)
    base = Growable.load(folder)
    rows = _check_rows(folder, model, base)
    if config.output:
        check_output(Path(config.output), config.overwrite, (folder,))
    found: dict[str, Any] = {}
    if config.corpus:
        if not config.advise:
            _check_trained(folder, model)
        corpus = read_corpus(config.corpus, base, skip=config.on_bad_row == "skip")
        costs = Costs.of(model, folder)
        if config.advise:
            return advise(base, corpus, costs, config)
        size = config.size or advise_size(base, corpus, costs, config)
        growth, found = _learn(base, corpus, size)
    else:
        growth = _preset(base)
        _check_trained(folder, model)
    _say_ids(base, growth, config)
    if config.form == "added-tokens" and base.kind == "sentencepiece":
        console.warn(
            t("in this form Chinese text loses spaces (习a comes back as 习 a) and is encoded at "
              "half the speed; without --form added-tokens the new pieces become part of the "
              "tokenizer's own model")
        )  # fmt: skip
    output = Path(config.output)
    result = _write(config, base, growth, folder if model else None)
    shown = _show(base, config.form, output, result)
    if result is None and rows:
        console.say(t("there are no weights in {path}: only the tokenizer has grown", path=folder))
    return {"output": str(output), "kind": base.kind, "form": config.form} | shown | found


def _catch_up(config: ExpandConfig) -> dict[str, Any] | None:
    """Grow only the model, where its tokenizer has grown already; None where there is no need.

    That is so when a grown tokenizer was copied into a model folder by hand.
    """
    folder = find_model(config.model)
    model = _model_in(folder)
    if model is None or ChatTokenizer.load(folder).size <= model.vocab_size:
        return None
    output = Path(config.output)
    check_output(output, config.overwrite, (folder,))
    from chatfine.model.rows import grow

    console.say(t("growing embedding and head of {path} …", path=folder))
    result = grow(folder, folder, output, config.init, config.init_output,
                  overwrite=config.overwrite)  # fmt: skip
    _say_written(output, result)
    return {"output": str(output), "old_size": result.old_rows, "new_size": result.rows,
            "rows": result.rows, "added_parameters": result.added_parameters}  # fmt: skip


def _check(config: ExpandConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        UsageError: naming the flags.
    """
    way = "--corpus FILE --size 8000" if config.corpus else "--preset hanzi"
    example = f"chatfine expand-vocab -m {config.model} {way} -o NEW_FOLDER"
    wrong = ""
    if (config.preset != "none") == bool(config.corpus):
        wrong = t("give either --preset hanzi or --corpus FILE")
    elif config.size and not config.corpus:
        wrong = t("--size goes with --corpus: a preset has a size of its own")
    elif config.size > MOST_PIECES:
        wrong = t("--size is {value}; it must be {limit}", value=config.size,
                  limit=f"≤ {MOST_PIECES}")  # fmt: skip
    elif config.advise and not config.corpus:
        wrong = t("--advise goes with --corpus: it measures your text")
    elif config.form != "grown" and config.corpus:
        wrong = t("--form added-tokens goes with --preset hanzi: pieces of a corpus need merges")
    elif not config.output and not config.advise:
        wrong = t("missing: {flags}", flags="--output")
    if wrong:
        raise UsageError("bad-setting", wrong, fix=t("for example: {command}", command=example))


def _model_in(folder: Path) -> ModelFolder | None:
    """The model the tokenizer lies in; None where there are no weights.

    Raises:
        ModelError: weights that can't be used.
    """
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.pt")
    if not any(any(folder.glob(pattern)) for pattern in weights):
        return None
    return read_model_folder(folder, allow_old_rows=True)


def _check_rows(folder: Path, model: ModelFolder | None, base: Growable) -> int:
    """Rows of the model's embedding, 0 where nothing says so.

    Raises:
        ModelError: model-small-embedding: the tokenizer has more pieces than the model has rows.
    """
    if model is not None:
        rows = model.vocab_size
    elif (folder / "config.json").is_file():
        config = check_config(folder)
        rows = int((config.get("text_config") or config)["vocab_size"])
    else:
        return 0
    if base.first_new > rows:
        raise ModelError(
            "model-small-embedding",
            t("the tokenizer has {pieces} pieces, the model's embedding only {rows} rows",
              pieces=base.first_new, rows=rows),
            where=str(folder),
            why=t("they do not belong together, or this tokenizer has grown and the model has not"),
            fix=[t("give the embedding more rows: {command}",
                   command=f"chatfine expand-vocab -m {folder} -o NEW_FOLDER"),
                 t("put the model's own tokenizer files back, then grow that one"),
                 t("a tokenizer that chatfine grew: start again from the folder it was grown "
                   "from")],
        )  # fmt: skip
    return rows


def _preset(base: Growable) -> Growth:
    growth = hanzi(base)
    if not growth.pieces:
        raise TokenizerError(
            "nothing-to-add",
            t("every Chinese character is a piece of this tokenizer already"),
            where=str(base.files.folder),
            why=t("it has grown before, or was made with them: {pieces} pieces",
                  pieces=base.first_new),
            fix=t("use it as it is, or learn longer pieces from your text: --corpus FILE"),
        )  # fmt: skip
    return growth


def _learn(base: Growable, corpus: Corpus, size: int) -> tuple[Growth, dict[str, Any]]:
    """Pieces from a corpus, with the advice on that one size."""
    console.say(
        t("learning {size} pieces from {characters} characters …", size=f"{size:,}",
          characters=f"{corpus.characters:,}")
    )  # fmt: skip
    growth = fill(base, Learned(base, corpus.texts, size), size)
    return growth, corpus.report(base, growth)


def _check_trained(folder: Path, model: ModelFolder | None) -> None:
    """Refuse to grow again what has grown and not been trained since.

    The new vocabulary.json would name the newest pieces only, and the rows of those before would
    never learn.

    Raises:
        TokenizerError: grown-twice.
    """
    facts = folder / "chatfine.json"
    if not (folder / VOCABULARY).is_file():
        return
    if model and not (facts.is_file() and read_json(facts).get("kind") == "grown"):
        return
    raise TokenizerError(
        "grown-twice",
        t("the vocabulary in {path} has grown before, and its new rows have not been trained",
          path=folder),
        where=str(folder / VOCABULARY),
        why=t("training would know the newest pieces only; the rows of those before would stay as "
              "they are"),
        fix=[t("start from the folder it was grown from"),
             t("or train and merge it, then grow the merged model: {command}",
               command=f"chatfine train -m {folder} -d DATASET -o my-run")],
    )  # fmt: skip


def _say_ids(base: Growable, growth: Growth, config: ExpandConfig) -> None:
    """Say where new ids begin when special tokens stand in the way.

    Raises:
        TokenizerError: special-token-in-the-way: the table of ids that hanzi promises on Llama-2
            can't be kept.
    """
    beyond = len(base.vocab)
    names = [str(entry["content"]) for entry in base.files.spec["added_tokens"]
             if int(entry["id"]) >= beyond]  # fmt: skip
    if not names:
        return
    if config.preset == "hanzi" and (beyond, len(growth.pieces)) == (LLAMA2_FIRST, LLAMA2_PIECES):
        raise TokenizerError(
            "special-token-in-the-way",
            t("special tokens ({names}) hold ids from {first} on, where the pieces of hanzi begin",
              names=", ".join(names[:3]), first=beyond),
            where=str(base.files.folder),
            why=t("习 would be {id} and not 32069, and no id would be that of the tutorial's table",
                  id=32069 + base.first_new - beyond),
            fix=[t("start from the model's original tokenizer, which has no such token"),
                 t("or learn pieces from your text, whose ids stand in no table: {command}",
                   command=f"chatfine expand-vocab -m {config.model} --corpus FILE -o NEW_FOLDER")],
        )  # fmt: skip
    console.say(
        t("special tokens ({names}) hold ids from {first} on and keep them: new pieces begin at "
          "{new}", names=", ".join(names[:3]) + (", …" if len(names) > 3 else ""), first=beyond,
          new=base.first_new)
    )  # fmt: skip


def _write(
    config: ExpandConfig, base: Growable, growth: Growth, model: Path | None
) -> GrowResult | None:
    """Write the folder whole: the tokenizer's files alone, or the grown model with them."""
    output = Path(config.output).absolute()
    staged = output.with_name(f".{output.name}.tokenizer")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        write_grown(base, growth, staged, config.form)
        if model is None:
            put_in_place(staged, output)
            return None
        from chatfine.model.rows import grow

        console.say(t("growing embedding and head of {path} …", path=model))
        return grow(model, staged, output, config.init, config.init_output,
                    overwrite=config.overwrite)  # fmt: skip
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _show(base: Growable, form: str, output: Path, result: GrowResult | None) -> dict[str, Any]:
    """Sizes and examples, as the folder that was written has them."""
    old, new = ChatTokenizer.load(base.files.folder), ChatTokenizer.load(output)
    found: dict[str, Any] = {"old_size": old.size, "new_size": new.size}
    console.say(t("vocabulary: {old} → {new} pieces", old=f"{old.size:,}",
                  new=f"{new.size:,}"), "bold")  # fmt: skip
    vocabulary = read_vocabulary(output)
    assert vocabulary is not None
    numbered = list(zip(vocabulary.ids, vocabulary.pieces, strict=True))
    picked = numbered[:3] + numbered[max(3, len(numbered) - 3) :]
    console.say(t("new: {pieces}", pieces="  ".join(
        f"{readable(base, piece) if form == 'grown' else piece} {number}"
        for number, piece in picked)))  # fmt: skip
    for text in _EXAMPLES:
        before, now = old.encode_text(text), new.encode_text(text)
        console.say(f"{text}  {len(before)} → {len(now)}: {' '.join(map(str, now))}")
    _say_written(output, result)
    if result is not None:
        found |= {"rows": result.rows, "added_parameters": result.added_parameters}
    return found


def _say_written(output: Path, result: GrowResult | None) -> None:
    """The model's rows, where they have grown, the folder, and what to do next."""
    if result is not None:
        console.say(
            t("rows: {old} → {new} (a multiple of 64), {weights} weights more",
              old=f"{result.old_rows:,}", new=f"{result.rows:,}",
              weights=f"{result.added_parameters:,}")
        )  # fmt: skip
    console.say(t("written: {path}", path=output))
    if result is not None:
        console.say(
            t("the new rows know nothing yet; train them: {command}",
              command=f"chatfine train -m {output} -d DATASET -o my-run"), "bold"
        )  # fmt: skip
