"""The flags of finetuning.py → the settings of `chatfine train`."""

from __future__ import annotations

import os
from typing import Any

from chatfine import console
from chatfine.errors import UsageError
from chatfine.hub.catalog import find_model
from chatfine.hub.folder import check_config
from chatfine.i18n import t
from chatfine.tutorial.fields import (
    ADAPTER,
    ALPACA,
    CUSTOM,
    FSDP,
    GRAMMAR,
    LORA,
    METHODS,
    PREFIX,
    SAMSUM,
    SHARDING,
    TRAIN,
    TRAINING,
    Field,
)
from chatfine.tutorial.grammar import Values

PEFT_GROUPS = {"lora": LORA, "llama-adapter": ADAPTER, "prefix": PREFIX}
"""The group that describes each method."""
DATA_GROUPS = (SAMSUM, GRAMMAR, ALPACA, CUSTOM)


def training_settings(values: Values) -> dict[str, Any]:
    """Settings of `chatfine train` that do what the flags of finetuning.py say.

    Raises:
        UsageError: flags that contradict each other, or more frozen layers than there are.
        ModelError: --freeze_layers, and the model isn't there.
    """
    method = _method(values)
    active = {TRAIN, FSDP, _data_group(values), PEFT_GROUPS.get(str(method["method"]), "")}
    settings = direct_settings(values, TRAINING, active)
    settings |= method | _precision(values) | _processes(values) | _data(values)
    if values["train_config.quantization"]:
        settings["quantize"] = "int8"
    if values.has("llama_adapter_config.adapter_layers") and method["method"] == "llama-adapter":
        settings["adapter_layers"] = values["llama_adapter_config.adapter_layers"]
    if values.has("fsdp_config.fsdp_activation_checkpointing"):
        wanted = values["fsdp_config.fsdp_activation_checkpointing"]
        settings["checkpointing"] = "full" if wanted else "none"
    say_what_has_no_effect(values, active)
    return settings | {"overwrite": True} | values.extra


def direct_settings(
    values: Values, table: tuple[Field, ...], groups: set[str] | None = None
) -> dict[str, Any]:
    """The settings of all fields whose value is a setting; an empty text sets nothing."""
    settings: dict[str, Any] = {}
    for one in table:
        if not one.direct or (groups is not None and one.group not in groups):
            continue
        value = values[one.key]
        if one.choices:
            value = one.choices[str(value)]
        if one.kind == "list":
            assert isinstance(value, tuple)
            value = ",".join(value)
        # of two names for one setting the one that was given decides
        if value != "" and (one.settings[0] not in settings or values.has(one.key)):
            settings[one.settings[0]] = value
    return settings


def say_what_has_no_effect(values: Values, active: set[str]) -> None:
    """Name each flag that was given for nothing, and why."""
    for written, fields in values.written.items():
        here = [one for one in fields if one.group in active]
        if not here:
            why = t("it belongs to {group}, which this run does not use", group=fields[0].group)
        elif not any(one.effective for one in here):
            why = here[0].note()
        else:
            continue
        console.say(t("{flag} has no effect: {why}", flag=written, why=why), "dim")


def _method(values: Values) -> dict[str, Any]:
    if values["train_config.use_peft"]:
        return {"method": METHODS[str(values["train_config.peft_method"])]}
    if values.has("train_config.peft_method"):
        console.warn(t("--peft_method has no effect without --use_peft: all weights learn"))
    frozen = values["train_config.num_freeze_layers"]
    assert isinstance(frozen, int)
    if not values["train_config.freeze_layers"] or frozen == 0:
        return {"method": "full"}
    layers = _layers(str(values["train_config.model_name"]))
    if not 0 < frozen < layers:
        raise UsageError(
            "too-many-layers",
            t("{flag} is {n}; the model has {limit} layers, and one at least must learn",
              flag="--num_freeze_layers", n=frozen, limit=layers),
        )  # fmt: skip
    return {"method": "freeze", "freeze_layers": layers - frozen}


def _layers(model: str) -> int:
    config = check_config(find_model(model))
    text = config.get("text_config")
    return int((text if isinstance(text, dict) else config)["num_hidden_layers"])


def _precision(values: Values) -> dict[str, Any]:
    half = values["train_config.use_fp16"] or values["fsdp_config.use_fp16"]
    mixed = values["train_config.mixed_precision"] and values["fsdp_config.mixed_precision"]
    if values["fsdp_config.pure_bf16"]:
        if half:
            raise UsageError(
                "flags-disagree",
                t("{flags} can't be used together", flags="--pure_bf16, --use_fp16"),
                fix=t("choose one of them"),
            )
        return {"dtype": "bf16", "pure_bf16": True}
    if half:
        return {"dtype": "fp16"}
    return {} if mixed else {"dtype": "fp32"}


def _processes(values: Values) -> dict[str, Any]:
    """How the processes that torchrun started share the work."""
    shared_out = values["train_config.enable_fsdp"]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shared_out:
            console.warn(
                t("--enable_fsdp shares the model out among the processes that torchrun starts; "
                  "there is one, so it trains alone")
            )  # fmt: skip
        return {}
    if not shared_out:
        return {"sharding": "none"}
    settings: dict[str, Any] = {"sharding": SHARDING[str(values["fsdp_config.sharding_strategy"])]}
    if values["fsdp_config.fsdp_cpu_offload"]:
        settings["cpu_offload"] = True
    if values["train_config.low_cpu_fsdp"]:
        settings["load"] = "rank0"
    return settings


def _data_group(values: Values) -> str:
    """The group of the chosen data set; "" for one that llama-recipes has not."""
    name = str(values["train_config.dataset"]).removesuffix("_dataset")
    return next((group for group in DATA_GROUPS if group == f"{name}_dataset"), "")


def _data(values: Values) -> dict[str, Any]:
    """`dataset` and what belongs to it, as chatfine.data.sources writes data sets."""
    group = _data_group(values)
    settings: dict[str, Any] = {"dataset": values["train_config.dataset"]}
    name = group.removesuffix("_dataset")
    if group == GRAMMAR:
        settings["dataset"] = name
        if values.has(f"{group}.train_split"):
            settings["dataset"] = f"{name}:{values[f'{group}.train_split']}"
        if values.has(f"{group}.test_split"):
            settings["validation"] = f"{name}:{values[f'{group}.test_split']}"
    elif group == ALPACA:
        path = values["alpaca_dataset.data_path"]
        settings["dataset"] = f"{name}:{path}" if values.has("alpaca_dataset.data_path") else name
    elif group:
        source = name if group == SAMSUM else str(values["custom_dataset.file"])
        settings |= _splits(values, group, source)
    if group and values.has(f"{group}.input_length"):
        settings["max_length"] = values[f"{group}.input_length"]
    if not values["train_config.run_validation"]:
        settings["validation"] = "0"
    return settings


def _splits(values: Values, group: str, source: str) -> dict[str, Any]:
    """Splits are named only where they are not the usual ones, so that the source may choose."""
    train, test = values[f"{group}.train_split"], values[f"{group}.test_split"]
    if (train, test) == ("train", "validation"):
        return {"dataset": source}
    return {
        "dataset": source if train == "train" else f"{source}[{train}]",
        "validation": f"{source}[{test}]",
    }
