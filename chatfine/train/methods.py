"""Which methods go with what; refused before torch is imported."""

from __future__ import annotations

from chatfine.errors import UsageError
from chatfine.hub.folder import ModelFolder
from chatfine.i18n import t
from chatfine.runtime import require_optimizer, require_storage

ADAPTERS = ("lora", "dora", "rows", "prefix", "llama-adapter")
"""Methods whose result is an adapter beside the model."""
UNPACKED = ("prefix", "llama-adapter")
"""Methods that need one document a row."""
ATTENTIONS = ("llama", "mistral")
"""Architectures that PEFT's LLaMA-Adapter knows."""
LLAMA_ADAPTER_LAYERS = 30
"""The last so many layers get a LLaMA-Adapter if nothing else is asked for: the paper's choice."""


def check_method(
    method: str, model: ModelFolder, *, quantize: str, packing: str, checkpointing: str,
    layers: int, adapter: str = "", optimizer: str = "adamw",
) -> None:  # fmt: skip
    """Refuse settings that don't go with `method`, or a method that the model can't have.

    Raises:
        UsageError: naming the setting.
        ResourceError: a package that `quantize` or `optimizer` needs is missing.
    """
    if adapter and method not in ADAPTERS:
        raise UsageError(
            "adapter-and-method",
            t("--adapter goes on with an adapter; --method {method} has none", method=method),
            where="--adapter",
            fix="--method lora",
        )
    if quantize not in ("none", "auto") and method not in ADAPTERS:
        why = t("all weights learn; only weights that never learn can be stored rounded")
        if method == "freeze":
            why = t("the run writes a whole model, whose frozen layers would be the rounded ones")
        raise UsageError(
            "quantize-and-method",
            t("--quantize {kind} does not go with --method {method}", kind=quantize, method=method),
            where="--quantize", why=why, fix=("--method lora", "--quantize none"),
        )  # fmt: skip
    require_storage(quantize)
    require_optimizer(optimizer)
    if method not in UNPACKED:
        return
    if packing == "on":
        raise UsageError(
            "packing-and-method",
            t("--packing on does not go with --method {method}", method=method),
            where="--packing", why=t("it needs every example in a row of its own"),
            fix="--packing off",
        )  # fmt: skip
    if method == "prefix" and checkpointing not in ("auto", "none", "0"):
        raise UsageError(
            "checkpointing-and-method",
            t("--checkpointing {value} does not go with --method prefix", value=checkpointing),
            where="--checkpointing",
            why=t("a prefix is a cache of keys and values, which recomputing would fill twice"),
            fix=("--checkpointing none", "--batch-size 1"),
        )  # fmt: skip
    if method == "llama-adapter":
        _check_llama_adapter(model, layers)


def _check_llama_adapter(model: ModelFolder, layers: int) -> None:
    kind = model.text_config.get("model_type")
    if kind not in ATTENTIONS:
        raise UsageError(
            "method-unsupported",
            t("--method llama-adapter does not work with a model of kind {kind}", kind=kind),
            where="--method",
            why=t("it is known for: {names}", names=", ".join(ATTENTIONS)),
            fix=("--method lora", "--method prefix"),
        )
    if layers > model.layers:
        raise UsageError(
            "too-many-layers",
            t("{flag} is {n}; the model has {limit} layers", flag="--adapter-layers", n=layers,
              limit=model.layers),
            where="--adapter-layers",
            fix=f"--adapter-layers {model.layers}",
        )  # fmt: skip
