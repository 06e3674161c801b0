"""A name → its model, tokenizer and template, checked without torch; for merge, chat and eval."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatfine import console
from chatfine.errors import ModelError, TokenizerError
from chatfine.hub.folder import (
    ModelFolder,
    Source,
    check_vocabulary,
    read_model_folder,
    resolve_source,
)
from chatfine.hub.headers import read_json
from chatfine.hub.rounded import CALIBRATED, FILE, beside
from chatfine.i18n import t
from chatfine.model.positions import Positions, of_adapter, with_positions_of
from chatfine.runtime import require_storage
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.tokenizer.files import read_files

if TYPE_CHECKING:
    import torch

FACTS = "chatfine.json"


@dataclass(frozen=True)
class Opened:
    """A run, an adapter or a model that was found sound; no weight has been loaded."""

    name: str
    source: Source
    folder: ModelFolder
    tokenizer: ChatTokenizer
    facts: dict[str, Any]
    """what chatfine.json says about the training; empty for a model from elsewhere"""
    positions: Positions | None = None
    """how the base of an adapter reads more tokens than its files say"""
    own_base: bool = True
    """whether the model is the one that an adapter was trained on"""

    @property
    def system(self) -> str:
        """The system prompt it was trained with."""
        return str(self.facts.get("system") or "")

    @property
    def trained_on(self) -> str:
        """How the base was stored when the adapter was trained: none, int8 or nf4."""
        return str(self.facts.get("quantize") or "none") if self.source.adapter else "none"

    def storage(self, quantize: str) -> str:
        """How to store the weights under the setting `quantize`; auto is as in training, if the
        weights can be had so.

        Raises:
            ResourceError: a package that it needs is not installed.
        """
        chosen = self.trained_on if quantize == "auto" else quantize
        if quantize == "auto" and self.facts.get(CALIBRATED) and not self.rounded(chosen):
            chosen = "none"
            _say_exact(self.source.adapter)
        require_storage(chosen)
        return chosen

    def rounded(self, storage: str) -> Path | None:
        """The file with the weights that the adapter was trained on, if they were stored so."""
        fitting = self.facts.get(CALIBRATED) and storage == self.trained_on and self.own_base
        return beside(self.source.adapter) if fitting else None

    def load(self, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """The model with its adapter on it, ready to answer.

        Args:
            dtype: number format of the weights, or of those that `quantize` leaves.
            device: where to compute.
            quantize: none, int8 or nf4.
        """
        from chatfine.model.adapters import load_adapter
        from chatfine.model.load import load_model

        rounded = self.rounded(quantize)
        model = load_model(self.source.model, dtype, device, quantize, self.positions, rounded)
        return load_adapter(model, self.source.adapter) if self.source.adapter else model


@lru_cache
def _say_exact(adapter: Path) -> None:
    """Say once of each adapter that the weights it was trained on are gone."""
    console.warn(
        t(
            "the weights it was trained on, {file}, are not here; it is put on the exact ones",
            file=FILE,
        )
    )


def open_source(name: str, base: str = "", template: str = "model") -> Opened:
    """Find what `name` stands for and check it.

    Args:
        name: a run, an adapter, a model folder, or a name in the cache.
        base: the base model of an adapter; "" = the one the adapter names.
        template: "model" = the template it was trained with, else as for `ChatTokenizer.load`.

    Raises:
        ModelError, TokenizerError: whatever can't be used.
    """
    source = resolve_source(name, base)
    if source.adapter:
        read_json(source.adapter / "adapter_config.json", "adapter-bad-config")
    folder = read_model_folder(source.model)
    place = (source.adapter or source.model) / FACTS
    facts = read_json(place, "adapter-bad-config") if place.is_file() else {}
    tokenizer = _tokenizer(source, facts, template)
    check_vocabulary(folder, tokenizer.size)
    _check_canaries(tokenizer, facts, place)
    if source.adapter:
        _check_base(folder, facts, explicit=bool(base), where=source.adapter)
    own_base = facts.get("base_digest") in (None, folder.digest())
    positions = of_adapter(source.adapter)
    if positions is not None:
        console.say(t("positions as in training: {positions}", positions=positions))
    folder = with_positions_of(folder, positions)
    return Opened(name, source, folder, tokenizer, facts, positions, own_base)


def _tokenizer(source: Source, facts: dict[str, Any], template: str) -> ChatTokenizer:
    adapter = source.adapter
    own = adapter is not None and (adapter / "tokenizer.json").is_file()
    home = adapter if adapter is not None and own else source.model
    trained = str(facts.get("template") or "model")
    if template == "model" and trained != "model":  # the jinja source that the run was given
        return ChatTokenizer(read_files(home), trained)
    return ChatTokenizer.load(home, template)


def _check_canaries(tokenizer: ChatTokenizer, facts: dict[str, Any], where: Path) -> None:
    """Refuse a tokenizer that encodes otherwise than when the adapter was trained (contract C5)."""
    for text, ids in (facts.get("canaries") or {}).items():
        found = tokenizer.encode_text(text)
        if found != list(ids):
            raise TokenizerError(
                "tokenizer-changed",
                t("the tokenizer encodes {text} as {now}; in training it was {then}",
                  text=repr(text), now=found, then=ids),
                where=str(where),
                why=t("the base model's tokenizer or the tokenizers library has changed"),
                fix=t("use the base model and the library version of the training"),
            )  # fmt: skip


def _check_base(folder: ModelFolder, facts: dict[str, Any], explicit: bool, where: Path) -> None:
    """An adapter works only on the base it was trained on; another is taken only if asked for."""
    known = facts.get("base_digest")
    if not known or known == folder.digest():
        return
    what = t("{path} is not the model that the adapter was trained on", path=folder.path)
    if explicit:
        console.warn(what)
        return
    raise ModelError(
        "adapter-other-base",
        what,
        where=str(where),
        why=t("its files have changed since the training"),
        fix=t("get the model again, or insist with --model {path}", path=folder.path),
    )
