"""`chatfine eval`: loss, perplexity, bits per character and, with --generate, ROUGE of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.commands.check import settings_of
from chatfine.commands.opened import Opened, open_source
from chatfine.config import EvalConfig, SamplingOptions, load_yaml
from chatfine.data.examples import DataSettings, Examples, encode_dialogues, load_dialogues
from chatfine.evaluate.answers import answer_dialogues, exact_match, rouge, split_dialogue
from chatfine.i18n import t
from chatfine.types import Dialogue

if TYPE_CHECKING:
    from chatfine.model.generate import Sampling
    from chatfine.tokenizer.encode import ChatTokenizer

CAPACITY_TOKENS = 2048
"""Tokens in one forward pass for the loss; documents in it don't see each other."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model, run or adapter on one split of the data sets.

    Returns:
        `model`, `dataset`, `split`, `examples`, `tokens`, `loss`, `perplexity`, `bits_per_char`;
        with --generate also `answers` (how many), `rouge1`, `rouge2`, `rougeL`, `exact_match`.

    Raises:
        Refused: a model or data that can't be used.
    """
    opened = open_source(config.model, template=config.template)
    storage = opened.storage(config.quantize)
    settings = _settings(config, opened)
    dialogues: list[Dialogue] = []
    for dataset in config.dataset:
        dialogues += load_dialogues(dataset, settings, config.split, opened.tokenizer)
    dialogues = dialogues[: config.limit or None]
    examples = encode_dialogues(dialogues, opened.tokenizer, settings)
    asked = _answerable(dialogues, opened) if config.generate else []

    from chatfine.data.batches import in_order
    from chatfine.evaluate.loss import evaluate_loss
    from chatfine.runtime import pick_device, pick_dtype

    device = pick_device(config.device)
    model = opened.load(pick_dtype(config.dtype, device), device, storage)
    console.say(t("measuring the loss on {n} examples …", n=len(examples)))
    loss = evaluate_loss(model, in_order(examples, CAPACITY_TOKENS, share=True), device)
    result: dict[str, Any] = {
        "model": config.model,
        "dataset": list(config.dataset),
        "split": config.split,
        "examples": len(examples),
        "tokens": loss.tokens,
        "loss": loss.loss,
        "perplexity": loss.perplexity,
        "bits_per_char": loss.bits_per_char(trained_characters(examples, opened.tokenizer)),
    }
    if config.generate:
        with _progress(len(asked)) as advance:
            answers = answer_dialogues(
                model, opened.tokenizer, asked, sampling_of(config), config.batch_size, advance
            )
        wanted = [split_dialogue(dialogue)[1] for dialogue in asked]
        result |= {"answers": len(asked), **rouge(answers, wanted)}
        result["exact_match"] = exact_match(answers, wanted)
    _show(result)
    return result


def _settings(config: EvalConfig, opened: Opened) -> DataSettings:
    """The data settings, with the run's own system prompt and held-out rows.

    Which rows a run held out depends on its seed and its --validation; with others "validation"
    would be rows that it was trained on.
    """
    settings = settings_of(config, opened.folder.max_positions)
    settings = replace(settings, system=config.system or opened.system)
    run = opened.source.run
    if run is None or not (run / "config.yaml").is_file():
        return settings
    trained = load_yaml(run / "config.yaml")
    return replace(
        settings,
        seed=int(trained.get("seed", settings.seed)),
        validation=settings.validation or str(trained.get("validation", "")),
    )


def sampling_of(config: SamplingOptions) -> Sampling:
    """The plain form of a command's sampling settings."""
    from chatfine.model.generate import Sampling

    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def trained_characters(examples: Examples, tokenizer: ChatTokenizer) -> int:
    """How many characters the labels spell; control tokens spell none."""
    return sum(
        len(tokenizer.decode(int(i) for i, on in zip(one.ids, one.mask, strict=True) if on))
        for one in examples
    )


def _answerable(dialogues: list[Dialogue], opened: Opened) -> list[Dialogue]:
    """The dialogues whose question leaves room for an answer; says how many do not.

    Raises:
        DataError: a dialogue without an answer to compare with.
    """
    limit, encode = opened.folder.max_positions, opened.tokenizer.encode_dialogue
    kept = [
        dialogue
        for dialogue in dialogues
        if len(encode(split_dialogue(dialogue)[0], prompt=True).ids) < limit
    ]
    if len(kept) < len(dialogues):
        console.warn(
            t("{n} questions are longer than the {limit} tokens the model reads: left out",
              n=len(dialogues) - len(kept), limit=limit)
        )  # fmt: skip
    return kept


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import Progress

    with Progress(console=console.console(), transient=True) as bar:
        task = bar.add_task(t("answering"), total=total)
        yield lambda _index, _answer: bar.advance(task)


def _show(result: dict[str, Any]) -> None:
    names = {
        "loss": t("loss"), "perplexity": t("perplexity"), "bits_per_char": t("bits a character"),
        "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
        "exact_match": t("exactly the wanted answer"),
    }  # fmt: skip
    rows = [[label, f"{result[key]:.4f}"] for key, label in names.items() if key in result]
    title = t("{model} on {n} examples ({tokens} trained tokens)", model=result["model"],
              n=result["examples"], tokens=result["tokens"])  # fmt: skip
    console.table([t("score"), t("value")], rows, title)
