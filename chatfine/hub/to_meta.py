"""A Hugging Face folder of a Llama → Meta's consolidated.NN.pth and params.json.

One .pth at a time is in memory; the child of pth_process.py writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatfine import __version__
from chatfine.errors import ModelError
from chatfine.hub.folder import ModelFolder
from chatfine.hub.llama import LlamaShape
from chatfine.hub.meta import FACTS, ITEM_BYTES, Progress, counter
from chatfine.hub.meta_layout import CUT, hf_name, inner_params, rotary_heads, tensor_shapes
from chatfine.hub.place import check_disk
from chatfine.hub.pth_process import PthProcess
from chatfine.hub.shards import write_json
from chatfine.i18n import t

_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def folder_to_meta(
    model: ModelFolder,
    output: Path,
    shards: int = 1,
    dtype: str = "",
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a Hugging Face folder's weights as consolidated.NN.pth with params.json.

    Args:
        shards: number of files, which is the model-parallel size of Meta's programs.
        dtype: as for `meta_to_folder`.

    Raises:
        ModelError: meta-inexpressible, for what the layout has no words for; model-not-finite.
        ResourceError: disk-full, no-memory.
    """
    shape = _shape_of_folder(model)
    _check_expressible(model, shape, shards)
    plans = [_plan_file(model, shape, number, shards, dtype) for number in range(shards)]
    total = sum(item.pop("bytes") for plan in plans for item in plan)
    check_disk(output, total)
    count = counter(progress, total)
    with PthProcess() as child:
        for number, plan in enumerate(plans):
            file = output / f"consolidated.{number:02}.pth"
            child.ask({"op": "save", "file": str(file.absolute()), "tensors": plan}, count)
    write_json(output / "params.json", _meta_params(shape))
    kept = {name: model.config[name] for name in _KEPT if model.config.get(name) is not None}
    if shape.scaling:
        kept["rope_scaling"] = dict(shape.scaling)
    facts = {"chatfine": __version__, "kind": "meta", "config": kept}
    write_json(output / FACTS, facts)


def _plan_file(
    model: ModelFolder, shape: LlamaShape, number: int, shards: int, dtype: str
) -> list[dict[str, Any]]:
    """What the child has to do for each tensor of one .pth, and the bytes of each."""
    plan = []
    for name, whole in tensor_shapes(shape).items():
        tied = name == "output" and shape.tied
        source = f"{hf_name('tok_embeddings' if tied else name)}.weight"
        info = model.tensors[source]
        kind = dtype or info.dtype
        if kind not in ITEM_BYTES:
            raise _inexpressible(model, t("{name} is stored as {format}", name=source,
                                          format=kind))  # fmt: skip
        axis = _cut_axis(name, shape)
        parts = 1 if axis is None else shards
        length = whole[axis or 0] // parts
        begin = 0 if axis is None else number * length
        plan.append({
            "name": f"{name}.weight", "source": source, "file": str(info.file.absolute()),
            "dtype": kind, "axis": axis or 0, "begin": begin, "end": begin + length,
            "heads": rotary_heads(name, shape) // shards,
            "bytes": info.numel * ITEM_BYTES[kind] // parts,
        })  # fmt: skip
    return plan


def _shape_of_folder(model: ModelFolder) -> LlamaShape:
    """What the config says; whether Meta's layout can say it too comes after."""
    config = model.config
    heads, hidden = config.get("num_attention_heads", 0), config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    kind = scaling.get("rope_type") or rope.get("type") or "default"
    return LlamaShape(
        hidden=hidden,
        inner=config.get("intermediate_size", 0),
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // max(heads, 1),
        vocabulary=config["vocab_size"],
        context=model.max_positions,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        tied=model.tied,
        scaling=None if kind == "default" else scaling | {"rope_type": kind},
    )


def _check_expressible(model: ModelFolder, shape: LlamaShape, shards: int) -> None:
    config, scaling = model.config, shape.scaling or {}
    if config.get("model_type") != "llama":
        raise _inexpressible(model, t("its architecture is {name}, not llama",
                                      name=config.get("model_type")))  # fmt: skip
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise _inexpressible(model, t("it has biases"))
    if config.get("quantization_config"):
        raise _inexpressible(model, t("its weights are quantised"))
    if config.get("hidden_act", "silu") != "silu":
        raise _inexpressible(model, t("its activation is {name}, not silu",
                                      name=config["hidden_act"]))  # fmt: skip
    if shape.head_dim * shape.heads != shape.hidden:
        raise _inexpressible(model, t("its heads are not hidden_size / num_attention_heads wide"))
    as_meta = (scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0),
               scaling.get("original_max_position_embeddings", 8192))  # fmt: skip
    if scaling and (scaling["rope_type"] != "llama3" or as_meta != (1.0, 4.0, 8192)):
        raise _inexpressible(model, t("its rotary angles are stretched in another way than "
                                      "Llama 3.1's"))  # fmt: skip
    for name, size in tensor_shapes(shape).items():
        axis = _cut_axis(name, shape)
        counted = rotary_heads(name, shape) or (shape.kv_heads if name.endswith("wv") else 0)
        parts = counted or (size[axis] if axis is not None else shards)
        if parts % shards:
            raise ModelError(
                "meta-bad-shards",
                t("{name} has {n} parts, which {shards} files can't share evenly", name=name,
                  n=parts, shards=shards),
                where="--shards", fix=t("choose 1, or a power of 2 that divides it"),
            )  # fmt: skip


def _cut_axis(name: str, shape: LlamaShape) -> int | None:
    """Where `name` is cut; embeddings: along the vocabulary from Llama 3 on, else the width."""
    if name == "tok_embeddings":
        return 0 if shape.vocabulary > 100_000 else 1
    return CUT.get(name if name in CUT else name.split(".", 2)[-1])


def _meta_params(shape: LlamaShape) -> dict[str, Any]:
    params: dict[str, Any] = {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        **inner_params(shape.hidden, shape.inner),
        "norm_eps": shape.norm_eps,
    }
    # Meta's older programs stop at a key that their model does not know
    if shape.kv_heads != shape.heads:
        params["n_kv_heads"] = shape.kv_heads
    if shape.theta != 10000:
        params["rope_theta"] = shape.theta
    if shape.scaling:
        params["use_scaled_rope"] = True
    return params


def _inexpressible(model: ModelFolder, why: str) -> ModelError:
    return ModelError(
        "meta-inexpressible",
        t("{path} can't be written in Meta's layout", path=model.path), where=str(model.path),
        why=why, fix=t("only plain Llama models have one: use the Hugging Face folder as it is"),
    )  # fmt: skip
