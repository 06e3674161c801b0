"""Which methods go with what; refused before torch is imported."""

from __future__ import annotations

from chatfine.errors import UsageError
from chatfine.hub.folder import ModelFolder
from chatfine.i18n import t
from chatfine.runtime import require_optimizer, require_storage
from chatfine.train.plan import EIGHT_BIT

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
    layers: int, adapter: str = "", optimizer: str = "adamw", fp8_products: str = "off",
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
    if fp8_products == "on" and method in ADAPTERS:
        raise UsageError(
            "fp8-products-and-method",
            t("--fp8-products on does not go with --method {method}", method=method),
            where="--fp8-products",
            why=t("it is for weights that learn; the base does not, so it can be stored as 8-bit "
                  "floats once"),
            fix=("--quantize fp8", "--method full"),
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


def check_sharing(
    kind: str, method: str, *, dtype: str, optimizer: str = "adamw", offload: bool = False
) -> None:
    """Refuse what does not work where the weights are shared out as `kind` among processes.

    Raises:
        UsageError: naming the setting.
    """
    if kind == "none":
        if offload:
            raise UsageError(
                "offload-alone",
                t("--cpu-offload needs a model that is shared out among several processes"),
                where="--cpu-offload",
                fix="torchrun --nproc_per_node 2 -m chatfine train … --sharding full",
            )
        return
    if dtype == "float16":
        raise UsageError(
            "sharded-fp16",
            t("--sharding {kind} does not work with fp16", kind=kind),
            why=t("its gradients need a scale that all processes agree on"),
            fix=("--dtype bf16", "--sharding none"),
        )
    if optimizer in EIGHT_BIT and method not in ADAPTERS:
        raise UsageError(
            "sharded-optimizer",
            t("--optimizer {name} does not work with --sharding {kind} and --method {method}",
              name=optimizer, kind=kind, method=method),
            why=t("its state belongs to whole weights, and each process holds slices of them"),
            fix=("--optimizer anyprecision", "--sharding none"),
        )  # fmt: skip
    if method in ("dora", "prefix", "llama-adapter"):
        raise UsageError(
            "sharded-method",
            t("--method {method} does not work with --sharding {kind}", method=method,
              kind=kind),
            fix=("--sharding none", "--method lora"),
        )  # fmt: skip
