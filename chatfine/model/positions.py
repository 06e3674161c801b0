"""Rotary positions beyond those that a model was made for.

A rotary model turns queries and keys by angles, position times frequency. Further positions bring
angles that it never saw, so the frequencies are changed until they fit again:

- linear: every frequency divided by the factor (Chen et al. 2023, position interpolation);
- yarn: only the slow ones, with a ramp between, and sharper attention (Peng et al. 2023, YaRN);
- llama3: only the slow ones, as in Llama 3.1;
- dynamic: a larger base (NTK-aware scaling). transformers chooses it anew for the longest sequence
  that is there, so that in training a document's loss would depend on its neighbours and a run on
  its past. Here it is the base for the longest sequence there may be, and stays.

What comes out are settings of config.json alone, so transformers, vLLM and others compute the same
without us. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError, UsageError
from chatfine.hub.folder import ModelFolder
from chatfine.hub.headers import read_json
from chatfine.hub.shapes import LLAMA_LIKE
from chatfine.i18n import t

KINDS = ("linear", "dynamic", "yarn", "llama3")
FACTS, FACT = "chatfine.json", "positions"
"""The entry of an adapter's file that says how its base's positions were scaled."""
FLAG = "--rope-scaling"
DEFAULT_BASE = 10000.0
"""Of the architectures in `LLAMA_LIKE`, where config.json does not name one."""
ONLY_LONGROPE = ("phi3", "phi4_multimodal")
"""Architectures whose config in transformers takes no scaling but their own; a larger base is
none."""
STEPS = 4
"""Factors are multiples of 1/4: larger than needed costs quality, and odd ones are hard to read."""
PLAIN = "default"  # transformers' word for frequencies that are not scaled


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model reads more tokens than it was made for."""

    kind: str
    factor: float
    """how many times further than unscaled"""
    own: int
    """tokens the model read before"""
    length: int
    """tokens it reads now"""
    rope: Mapping[str, Any]
    """transformers' `rope_parameters`"""

    def facts(self) -> dict[str, Any]:
        """As JSON, which `of_adapter` reads."""
        return asdict(self)

    def __str__(self) -> str:
        return t("{kind} × {factor:g}, {own:,} → {length:,} tokens", kind=self.kind,
                 factor=self.factor, own=self.own, length=self.length)  # fmt: skip


def stretch(config: Mapping[str, Any], kind: str, tokens: int) -> Positions | None:
    """How the model of a config.json reads `tokens` tokens; None if it does so by itself.

    A model that is scaled already is scaled further in its own way.

    Args:
        config: the language model's part of config.json.
        kind: one of `KINDS`.
        tokens: longest sequence wanted.

    Raises:
        ModelError: positions-unknown, positions-scaled.
    """
    own = int(config.get("max_position_embeddings") or 0)
    old = _settings(config)
    if tokens <= own:
        return None
    _check(config, old, kind)
    before = float(old.get("factor") or 1.0)
    original = int(old.get("original_max_position_embeddings") or own)
    if kind == "yarn":  # some say how far they read by the factor alone
        factor = max(before, _rounded(tokens / original))
        length = max(own, int(original * factor))
    else:
        factor = before * _rounded(tokens / own)
        length = int(own * factor / before)
    rope = {**old, "rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = original
    if kind == "llama3" and old["rope_type"] == PLAIN:
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as Llama 3.1 has them
    if kind == "dynamic":
        del rope["factor"]
        rope |= {"rope_type": PLAIN, "rope_theta": _larger_base(config, old, factor)}
    return Positions(kind, factor, own, length, rope)


def _rounded(ratio: float) -> float:
    return math.ceil(ratio * STEPS) / STEPS


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` of a config.json in its old or new form, without a base where
    it has none."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    settings = {
        name: value for name, value in found.items() if name != "type" and value is not None
    }
    settings["rope_type"] = found.get("rope_type") or found.get("type") or PLAIN
    base = found.get("rope_theta") or config.get("rope_theta")
    if base is None and config.get("model_type") in LLAMA_LIKE:
        base = DEFAULT_BASE
    if base is not None:
        settings["rope_theta"] = float(base)
    return settings


def _check(config: Mapping[str, Any], old: Mapping[str, Any], kind: str) -> None:
    """Refuse a model whose positions can't be scaled in this way.

    Raises:
        ModelError: naming what it has instead.
    """
    other = config.get("position_embedding_type") not in (None, "rope", "rotary")
    nested = any(not isinstance(value, (str, int, float)) for value in old.values())
    if "rope_theta" not in old or other or nested or config.get("alibi"):
        raise ModelError(
            "positions-unknown",
            t("{flag} does not work with a model of kind {kind}", flag=FLAG,
              kind=config.get("model_type")),
            where=FLAG,
            why=t("its layers have rotary positions of several kinds") if nested
            else t("it has no rotary positions that config.json describes"),
            fix=t("use a model such as Llama, Mistral or Qwen, or a smaller --max-length"),
        )  # fmt: skip
    had = old["rope_type"]
    if config.get("model_type") in ONLY_LONGROPE and had == PLAIN and kind != "dynamic":
        raise ModelError(
            "positions-unknown",
            t("{flag} {kind} does not work with a model of kind {name}", flag=FLAG, kind=kind,
              name=config["model_type"]),
            where=FLAG,
            fix=f"{FLAG} dynamic",
        )  # fmt: skip
    if had == PLAIN or (had == kind != "dynamic" and "attention_factor" not in old):
        return
    known = had in KINDS and had != kind and had != "dynamic"
    raise ModelError(
        "positions-scaled",
        t("the model's positions are scaled already ({kind})", kind=had),
        where=FLAG,
        why=t("it was trained with these frequencies; another kind would be another model"),
        fix=f"{FLAG} {had}" if known
        else t("--max-length up to {n}", n=config["max_position_embeddings"]),
    )  # fmt: skip


def _larger_base(config: Mapping[str, Any], old: Mapping[str, Any], factor: float) -> float:
    """The base that transformers' dynamic scaling takes for a sequence `factor` times as long."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = old.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    turned = int(size * part)
    growth: float = (factor * factor - (factor - 1)) ** (turned / (turned - 2))
    return float(old["rope_theta"] * growth)


def with_positions(config: Mapping[str, Any], positions: Positions | None) -> dict[str, Any]:
    """A config.json changed so; twice changes nothing more.

    In the new form (`rope_parameters`) and in that of other readers (`rope_theta` and
    `rope_scaling`).
    """
    if positions is None:
        return dict(config)
    if isinstance(nested := config.get("text_config"), Mapping):
        return {**config, "text_config": with_positions(nested, positions)}
    rope = dict(positions.rope)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    changed = {name: value for name, value in config.items() if name != "rope_scaling"}
    changed |= {"max_position_embeddings": positions.length, "rope_parameters": rope,
                "rope_theta": rope["rope_theta"]}  # fmt: skip
    return changed if rope["rope_type"] == PLAIN else changed | {"rope_scaling": scaling}


def with_positions_of(folder: ModelFolder, positions: Positions | None) -> ModelFolder:
    """The folder as the model is with these positions; its files stay as they are."""
    return replace(folder, config=with_positions(folder.config, positions))


def of_adapter(folder: Path | None) -> Positions | None:
    """The positions of the base that the adapter in `folder` was trained with; None for its own.

    Raises:
        ModelError: adapter-bad-config.
    """
    file = folder and folder / FACTS
    found = read_json(file, "adapter-bad-config").get(FACT) if file and file.is_file() else None
    if found is None:
        return None
    try:
        positions = Positions(**found)
        numbers = (positions.factor, positions.own, positions.length, positions.rope["rope_theta"])
        others = [value for name, value in positions.rope.items() if name != "rope_type"]
        plain = all(isinstance(value, (int, float)) for value in (*numbers, *others))
        sound = plain and min(numbers) > 0 and positions.rope["rope_type"] in (PLAIN, *KINDS)
    except (TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(
            "adapter-bad-config", t("{name} can't be understood", name=f'"{FACT}"'),
            where=str(file), fix=t("copy it again, or train again"),
        )  # fmt: skip
    return positions


def of_run(
    config: Mapping[str, Any], kind: str, tokens: int, adapter: Positions | None = None
) -> Positions | None:
    """The positions of a run.

    Args:
        config: the language model's part of config.json.
        kind: of `--rope-scaling`: auto and none never scale anew.
        tokens: longest sequence of the run.
        adapter: what the adapter that the run goes on from was trained with.

    Raises:
        UsageError: another kind than the adapter's.
        ModelError: as `stretch`.
    """
    if adapter is not None and kind not in ("auto", adapter.kind):
        raise UsageError(
            "adapter-other-positions",
            t("the adapter was trained with {flag} {kind}", flag=FLAG, kind=adapter.kind),
            where=FLAG,
            fix=f"{FLAG} {adapter.kind}",
        )
    if adapter is not None and (kind == "auto" or tokens <= adapter.length):
        return adapter
    return stretch(config, kind, tokens) if kind in KINDS else None


def library_config(path: Path, positions: Positions | None) -> Any:
    """transformers' config of the model in `path`, with these positions."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if positions is None:
        return own
    return type(own).from_dict(with_positions(read_json(path / "config.json"), positions))
