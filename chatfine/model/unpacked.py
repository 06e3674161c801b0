"""What learns beside the weights: prefixes and LLaMA-Adapter, through PEFT's own code.

Both work on one document a row, so their batches are padded and nothing is packed. A prefix (Li &
Liang 2021) is learned keys and values before every document, which transformers takes as a cache
already filled; so it can't go with recomputed activations. LLaMA-Adapter (Zhang et al. 2023) adds
to each attention a second one over learned tokens, behind a gate that starts at zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chatfine.errors import UsageError
from chatfine.i18n import t
from chatfine.model import fast
from chatfine.model.cross_entropy import linear_cross_entropy
from chatfine.types import IGNORE_INDEX, Batch

KINDS = {"PREFIX_TUNING": "prefix", "ADAPTION_PROMPT": "llama-adapter"}
METHODS = tuple(KINDS.values())


def attach(model: Any, method: str, virtual_tokens: int, layers: int) -> Any:
    """`model` with a new prefix or LLaMA-Adapter on it.

    Args:
        model: a transformers model.
        method: one of `METHODS`.
        virtual_tokens: length of what is learned.
        layers: for llama-adapter, how many of the last layers get one.

    Raises:
        UsageError: PEFT has no such adapter for this architecture.
    """
    from peft import AdaptionPromptConfig, PrefixTuningConfig, get_peft_model

    config: Any
    if method == "prefix":
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    else:
        config = AdaptionPromptConfig(
            task_type="CAUSAL_LM", adapter_len=virtual_tokens,
            adapter_layers=layers,
        )  # fmt: skip
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UsageError(
            "method-unsupported",
            t("--method {method} does not work with {kind}", method=method,
              kind=type(model).__name__),
            where="--method",
            why=str(error),
            fix="--method lora",
        ) from error  # fmt: skip


def reopen(prepare: Callable[[Any], Any], model: Any, config: Any, weights: Path) -> Any:
    """The adapter in the file `weights` on `model`, to go on learning: PEFT itself refuses to load
    a prefix for that, and would round the numbers of both to the base's format."""
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config.inference_mode = False
    wrapped = prepare(get_peft_model(model, config, autocast_adapter_dtype=False))
    set_peft_model_state_dict(wrapped, load_file(str(weights)))
    return wrapped


def kind_of(model: Any) -> str:
    """prefix, llama-adapter, or "" for any other model."""
    config = getattr(model, "active_peft_config", None)
    return KINDS.get(getattr(config, "peft_type", ""), "")


def install(model: Any) -> None:
    """Where `model` is a PEFT model of one of `METHODS`: make `fast.loss_sum` use the one here, and
    let learned numbers in float32 meet a base in 16 bits, for which PEFT's forward has no cast."""
    if not kind_of(model):
        return
    model.own_loss_sum = padded_loss_sum
    from peft.tuners.adaption_prompt.layer import AdaptedAttention

    for module in model.modules():
        if isinstance(module, AdaptedAttention):
            module.forward = _Cast(module)


class _Cast:
    """PEFT's forward of an adapted attention on its learned numbers in the states' format."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(self, **kwargs: Any) -> Any:
        attention, dtype = self.attention, kwargs["hidden_states"].dtype
        learned = dict(attention.named_parameters(recurse=False))
        if all(one.dtype == dtype for one in learned.values()):
            return type(attention).forward(attention, **kwargs)
        cast = {name: one.to(dtype) for name, one in learned.items()}
        return torch.func.functional_call(attention, cast, (), kwargs)


# -- the prefix ----------------------------------------------------------------------------------


def prefix_tokens(model: Any) -> int:
    """How many learned tokens stand before everything; 0 without a prefix, or if it is off."""
    if kind_of(model) != "prefix" or model._adapters_disabled:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def prefix_cache(model: Any, rows: int) -> Any:
    """A cache that holds the prefix for so many rows, as PEFT makes it."""
    return model.get_prompt(rows)


def cache_argument(causal: Any) -> str:
    """How this version of transformers calls a model's cache (renamed in 5.24)."""
    return "cache" if "cache" in inspect.signature(causal.forward).parameters else "past_key_values"


# -- the loss ------------------------------------------------------------------------------------


def padded_loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """As `fast.loss_sum`, over documents in rows of their own, padded on the right."""
    causal = fast.causal_model(model)
    head = fast._plain_head(causal)
    total = torch.zeros((), device=batch.ids.device)
    for ids, labels, mask in padded(batch):
        where = labels != IGNORE_INDEX
        inputs = _inputs(model, causal, ids, mask)
        if head is None:
            logits = causal(**inputs).logits[where]
            wide = torch.promote_types(logits.dtype, torch.float32)
            total = total + F.cross_entropy(logits.to(wide), labels[where], reduction="sum")
        else:
            hidden = causal.get_decoder()(**inputs).last_hidden_state[where]
            total = total + linear_cross_entropy(hidden, head, labels[where])
    return total


def _inputs(model: Any, causal: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    prefix = prefix_tokens(model)
    if prefix:
        inputs["attention_mask"] = F.pad(mask, (prefix, 0), value=1)
        inputs[cache_argument(causal)] = prefix_cache(model, len(ids))
    return inputs


def padded(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The documents of `batch` as rows: ids, labels and mask (1 = real), each (B, T).

    Documents of similar length go together, the shortest at least half as long as the longest, so
    that padding at most doubles the work.
    """
    cuts = list(zip(batch.bounds, batch.bounds[1:], strict=False))
    head = slice(0, batch.shared)
    rows = []
    for begin, end in sorted(cuts, key=lambda cut: cut[0] - cut[1]):
        ids = torch.cat((batch.ids[head], batch.ids[begin:end]))
        rows.append((ids, torch.cat((batch.labels[head], batch.labels[begin:end]))))
    while rows:
        longest = len(rows[0][0])
        group = [row for row in rows if 2 * len(row[0]) >= longest]
        rows = rows[len(group) :]
        yield (
            torch.stack([F.pad(ids, (0, longest - len(ids))) for ids, _ in group]),
            torch.stack([F.pad(labels, (0, longest - len(labels)), value=IGNORE_INDEX)
                         for _, labels in group]),
            torch.stack([F.pad(torch.ones_like(ids), (0, longest - len(ids))) for ids, _ in group]),
        )  # fmt: skip
