"""What learns: a PEFT adapter, all weights, or the last layers.

Adapter folders are PEFT's own (contract C5), written in a fixed order so that two equal runs give
equal bytes. The adapter's numbers stay in float32 whatever the base is in: they are small, and
updates of 1e-4 vanish in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from chatfine.errors import ModelError, UsageError
from chatfine.i18n import t
from chatfine.model import learned_rows, lora, unpacked
from chatfine.model.fast import causal_model
from chatfine.model.frozen import frozen_linears
from chatfine.model.positions import Positions, with_positions


def linear_names(model: nn.Module) -> list[str]:
    """The distinct last names of the model's linears that an adapter can sit on (not the head)."""
    head = causal_model(model).get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )


def attach(
    model: Any,
    method: str,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: str = "all-linear",
    adapter_layers: int = 0,
    freeze_layers: int = 2,
    virtual_tokens: int = 10,
    rows: Sequence[int] = (),
) -> Any:
    """Mark what learns and return the model to train.

    Args:
        method: lora, dora, rows, prefix, llama-adapter, full or freeze.
        targets: all-linear, or names such as `q_proj,v_proj`.
        adapter_layers: adapters on so many of the last layers only, 0 = all. The backward pass ends
            at the first of them.
        freeze_layers: for `freeze`, how many of the last layers learn.
        virtual_tokens: length of what prefix and llama-adapter learn.
        rows: ids whose rows of embedding and head learn too (lora, dora), or alone (rows).

    Raises:
        UsageError: a target that the model does not have, more layers than there are, a method that
            does not fit this architecture.
    """
    if method == "rows":
        return _prepare(learned_rows.attach(model, rows))
    if method in ("lora", "dora"):
        return _prepare(
            _attach_lora(
                model, rows, r=rank, lora_alpha=alpha, lora_dropout=dropout,
                target_modules=_targets(model, targets, every_name=adapter_layers > 0),
                layers_to_transform=_last_layers(model, adapter_layers),
                use_dora=method == "dora",
            )
        )  # fmt: skip
    if method in unpacked.METHODS:
        count = len(causal_model(model).get_decoder().layers)
        layers = adapter_layers or count
        if method == "llama-adapter" and layers > count:
            raise _too_many_layers("--adapter-layers", layers, count)
        return _prepare(unpacked.attach(model, method, virtual_tokens, layers))
    model.requires_grad_(method == "full")
    if method == "freeze":
        layers = causal_model(model).get_decoder().layers
        if freeze_layers > len(layers):
            raise _too_many_layers("--freeze-layers", freeze_layers, len(layers))
        for layer in layers[-freeze_layers:]:
            layer.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _attach_lora(model: Any, rows: Sequence[int], **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    learning = learned_rows.targets(model, rows) if rows else None
    config = LoraConfig(trainable_token_indices=learning, task_type="CAUSAL_LM", **settings)
    return learned_rows.wrap(lambda: get_peft_model(model, config, autocast_adapter_dtype=False))


def _last_layers(model: Any, wanted: int) -> list[int] | None:
    """The numbers of the last `wanted` layers; None = all of them.

    Raises:
        UsageError: more than the model has.
    """
    if not wanted:
        return None
    count = len(causal_model(model).get_decoder().layers)
    if wanted > count:
        raise _too_many_layers("--adapter-layers", wanted, count)
    return list(range(count - wanted, count))


def _too_many_layers(flag: str, wanted: int, count: int) -> UsageError:
    return UsageError(
        "too-many-layers",
        t("{flag} is {n}; the model has {limit} layers", flag=flag, n=wanted, limit=count),
    )


def _targets(model: nn.Module, targets: str, every_name: bool) -> str | list[str]:
    """PEFT's `target_modules`; with `every_name` a list also for all linears."""
    if targets == "all-linear":
        return linear_names(model) if every_name else targets
    wanted = [name.strip() for name in targets.split(",") if name.strip()]
    known = linear_names(model)
    for name in wanted:
        if name not in known:
            raise UsageError(
                "no-such-target",
                t("the model has no linear called {name}", name=name),
                where="--targets",
                fix=t("possible: all-linear or {names}", names=", ".join(known)),
            )
    return sorted(wanted)


def _prepare(model: Any) -> Any:
    """Adapter weights in float32 and, where they apply, our forward and loss."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lora.install(model)
    learned_rows.install(model)
    unpacked.install(model)
    return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that learns, in the model's order (tied ones once)."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters."""
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    every = sum(value.numel() for value in model.parameters())
    for linear in frozen_linears(model):  # whose stored numbers are fewer than its weights
        every += linear.in_features * linear.out_features
        every -= sum(part.numel() for part in linear.packed)
    return trained, every


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """Put the PEFT adapter in `folder` on `model`.

    Raises:
        ModelError: the adapter does not fit this model, is of another kind, or is damaged.
    """
    from peft import PeftConfig, PeftModel

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise _unusable(folder, t("there is no adapter_model.safetensors in {path}", path=folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if trainable and config.peft_type in unpacked.KINDS:
            wrapped = unpacked.reopen(_prepare, model, config, weights)
        else:
            wrapped = learned_rows.wrap(
                lambda: PeftModel.from_pretrained(
                    model,
                    str(folder),
                    is_trainable=trainable,
                    autocast_adapter_dtype=trainable,  # what goes on learning must not be rounded
                    local_files_only=True,
                )
            )
    except (ValueError, OSError, RuntimeError, LookupError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _unusable(folder, why) from error
    if wrapped.peft_config["default"].is_prompt_learning and not unpacked.kind_of(wrapped):
        raise _unusable(folder, t("it is no LoRA adapter"))
    odd = _adapter_state(wrapped).keys() ^ _names_in(weights)
    odd -= wrapped.state_dict().keys()  # an adapter on the embedding brings the embedding along
    if odd:  # PEFT would leave out what does not match, without a word
        raise _unusable(folder, t("{name} is not in both of them", name=min(odd)))
    if trainable:
        return _prepare(wrapped)
    return _prepare(wrapped.requires_grad_(False)).eval()


def require_method(model: Any, method: str) -> None:
    """Refuse to go on with an adapter of another kind than `method` makes.

    Raises:
        UsageError: naming the method that the adapter is of.
    """
    kind = unpacked.kind_of(model)
    if kind != (method if method in unpacked.METHODS else ""):
        raise UsageError(
            "adapter-and-method",
            t("the adapter was not made by --method {method}", method=method),
            where="--adapter",
            fix=f"--method {kind or 'lora'}",
        )


def _unusable(folder: Path, why: str) -> ModelError:
    return ModelError(
        "adapter-unusable",
        t("the adapter in {folder} does not fit this model", folder=folder),
        why=why,
        fix=t("use the model that the adapter was trained on"),
    )


def _names_in(weights: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(str(weights), "pt") as file:
        return set(file.keys())


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of its file, without a look at the hub."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def save_adapter(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the adapter as a PEFT folder plus `chatfine.json` (`facts`: base, template, digests).

    Tensors and lists are written in sorted order, so equal weights give equal bytes.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = _adapter_state(model)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        # rows of a tied head stand in PEFT's files twice, and a file may not hold one tensor twice
        shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = tensor.clone() if shared else tensor
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = str(facts.get("base", ""))
    config = {key: _plain(value) for key, value in sorted(config.items())}
    _write_json(folder / "adapter_config.json", config)
    _write_json(folder / "chatfine.json", dict(facts))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def model_state(
    model: Any, dtype: torch.dtype, whole: Callable[[torch.Tensor], torch.Tensor] = lambda one: one
) -> dict[str, torch.Tensor]:
    """The weights of a fully trained model in `dtype` on the CPU, tied ones once.

    Args:
        model: the model.
        dtype: number format of the result.
        whole: gathers a weight that is shared out among several processes.
    """
    causal = causal_model(model)
    kept = dict(causal.named_parameters()) | dict(causal.named_buffers())
    names = [name for name in causal.state_dict() if name in kept]
    return {name: whole(kept[name].detach()).to(dtype).cpu() for name in names}


def save_model(
    model: Any,
    folder: Path,
    facts: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    positions: Positions | None = None,
) -> None:
    """Write a fully trained model, whose weights are `state`, as an ordinary model folder."""
    causal = causal_model(model)
    dtype = next(iter(state.values())).dtype
    with torch.device("meta"):  # transformers can't write a model whose weights are shared out
        empty = type(causal)(causal.config)
    empty.generation_config = causal.generation_config
    empty.save_pretrained(str(folder), state_dict=dict(state))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")  # transformers wrote that of the masters
    _write_json(path, with_positions(config, positions))
    _write_json(folder / "chatfine.json", dict(facts))
