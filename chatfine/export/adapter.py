"""Read a PEFT adapter folder as a list of changes to named weights. Headers only, no torch.

The names in `adapter_model.safetensors` are those of PEFT: `base_model.model.` + the module + a
suffix that says what the tensor is to the module's weight (peft/utils/save_and_load.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatfine.errors import ModelError
from chatfine.hub.headers import TensorInfo, read_header, read_json
from chatfine.i18n import t

PREFIX = "base_model.model."
FACTS = "chatfine.json"
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".trainable_tokens_delta": "rows",
}
_NOT_PLAIN = (
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "megatron_config", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings that make the adapter more, or other, than scale·B·A on a weight."""
_REWRITE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the adapter fits a changed base, not the one on disk."""


@dataclass
class Change:
    """What happens to one parameter of the base; the fields name tensors of the adapter file."""

    a: str = ""
    """A, (rank, in); for an embedding (rank, vocabulary)"""
    b: str = ""
    """B, (out, rank); for an embedding (width, rank)"""
    magnitude: str = ""
    """DoRA's magnitude of each output, (out,)"""
    rows: str = ""
    """replacement of the rows `row_ids`, (rows, width)"""
    row_ids: tuple[int, ...] = ()
    whole: str = ""
    """a tensor that takes the parameter's place before all else"""
    added: str = ""
    """a tensor to add, times `scale` (bias of B)"""
    scale: float = 1.0
    transposed: bool = False
    """whether the weight is stored (in, out)"""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that can be merged."""

    path: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    """chatfine.json; empty for an adapter of another program"""
    tensors: dict[str, TensorInfo] = field(repr=False)
    changes: dict[str, Change] = field(repr=False)
    """parameter of the base → what happens to it"""

    @property
    def method(self) -> str:
        """lora, dora or rows."""
        if "token_indices" in self.settings:
            return "rows"
        return "dora" if self.settings.get("use_dora") else "lora"


def read_adapter(path: Path) -> Adapter:
    """Read an adapter folder and refuse what can't be merged.

    Raises:
        ModelError: adapter-bad-config, adapter-no-weights, adapter-pickle, adapter-unmergeable,
            adapter-damaged, or what `hub.headers` says about the file.
    """
    settings = read_json(path / "adapter_config.json", "adapter-bad-config")
    _refuse_unmergeable(path, settings)
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise ModelError(
            "adapter-pickle" if pickled else "adapter-no-weights",
            t("there is no adapter_model.safetensors in {path}", path=path),
            where=str(path),
            why=t("adapter_model.bin is a pickle; it is never opened") if pickled else None,
            fix=t("save the adapter again with a current version of peft"),
        )
    tensors = read_header(weights)
    facts = read_json(path / FACTS, "adapter-bad-config") if (path / FACTS).is_file() else {}
    return Adapter(path, settings, facts, tensors, _changes(path, settings, tensors))


def _refuse_unmergeable(path: Path, settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type", "")).upper()
    start = str(settings.get("init_lora_weights", "")).lower()
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        why = t("it is not added to weights but works beside them while the model runs")
        name = kind or "?"
    elif odd := [key for key in _NOT_PLAIN if settings.get(key)]:
        why = t("merging is known for scale·B·A and DoRA only")
        name = ", ".join(odd)
    elif start.startswith(_REWRITE_BASE):
        why = t("it was trained on a base whose weights this start had changed")
        name = f"init_lora_weights={start}"
    else:
        return
    raise ModelError(
        "adapter-unmergeable",
        t("an adapter with {kind} can't be merged", kind=name),
        where=str(path),
        why=why,
        fix=t("talk with it as it is: {command}", command=f"chatfine chat {path}"),
    )


def _changes(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for key in sorted(tensors):
        name = key.removeprefix(PREFIX)
        suffix = next((end for end in _SUFFIXES if name.endswith(end)), "")
        if not suffix:  # a module saved whole, or an embedding that PEFT saves beside its adapter
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            changes.setdefault(plain, Change()).whole = key
            continue
        module, role = name.removesuffix(suffix), _SUFFIXES[suffix]
        change = changes.setdefault(module + ".weight", Change())
        change.scale = _scale(settings, module, tensors, change, key, role)
        if role == "b_bias":
            bias = changes.setdefault(module + ".bias", Change())
            bias.added, bias.scale = key, _module_scale(settings, module, _rank(tensors, key))
            continue
        setattr(change, role, key)
        change.transposed |= bool(settings.get("fan_in_fan_out")) or "embedding" in suffix
        if role == "rows":
            change.row_ids = _row_ids(settings, module)
    for name, change in changes.items():
        rows = tensors[change.rows].shape[0] if change.rows else 0
        if bool(change.a) != bool(change.b) or (change.magnitude and not change.a):
            raise _damaged(path, t("{name} has only one half of its pair", name=name))
        if rows != len(change.row_ids):
            raise _damaged(path, t("{name} has {n} rows for {m} token ids", name=name, n=rows,
                                   m=len(change.row_ids)))  # fmt: skip
    if not changes:
        raise _damaged(path, t("it changes nothing"))
    return changes


def _scale(
    settings: Mapping[str, Any],
    module: str,
    tensors: Mapping[str, TensorInfo],
    change: Change,
    key: str,
    role: str,
) -> float:
    """The module's scale, known once its A (whose first side is the rank) has come by."""
    return _module_scale(settings, module, tensors[key].shape[0]) if role == "a" else change.scale


def _rank(tensors: Mapping[str, TensorInfo], bias_key: str) -> int:
    return tensors[bias_key.removesuffix("bias") + "weight"].shape[1]


def _module_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank with rsLoRA (Kalajdzievski 2023)."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _row_ids(settings: Mapping[str, Any], module: str) -> tuple[int, ...]:
    ids = settings.get("token_indices") or settings.get("trainable_token_indices") or ()
    if isinstance(ids, Mapping):  # by the end of the module's name
        ids = next((value for name, value in ids.items() if module.endswith(name)), ())
    return tuple(ids)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        "adapter-damaged",
        t("the adapter in {path} is damaged", path=path),
        where=str(path),
        why=why,
        fix=t("copy it again, or train again"),
    )


def find_parameter(name: str, known: Mapping[str, Any]) -> str | None:
    """The key of `known` that means parameter `name`: equal, or one is the other with a prefix.

    Files and models name the same weight with and without the model's own prefix
    (`transformer.h.0…` and `h.0…`).
    """
    if name in known:
        return name
    found = [key for key in known if key.endswith("." + name) or name.endswith("." + key)]
    return found[0] if len(found) == 1 else None
