"""A model folder → a transformers model, in the wanted number format on the wanted device.

No model code of ours: transformers' classes do the work (measured equal to a hand-written model,
see docs/LOG.md). Nothing from the folder is executed and only safetensors are opened;
`hub.folder` has checked the folder before torch was imported.
"""

from __future__ import annotations

import os
import warnings
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from chatfine.errors import ModelError
from chatfine.hub.headers import read_tensors
from chatfine.i18n import t
from chatfine.model import attention, calibrate, stream
from chatfine.model.frozen import FrozenLinear, linears_to_freeze
from chatfine.model.positions import Positions, library_config
from chatfine.model.rounded import fill_rounded
from chatfine.types import Batch


def quiet_libraries() -> None:
    """No telemetry and no progress bars of the libraries; their warnings stay at error level."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    # on CPUs it says how it moves slices of new rows, once and from every process
    getLogger("torch.distributed.tensor").setLevel("ERROR")
    # PEFT imports it for everybody, and on some processors it misses a package then
    getLogger("bitsandbytes.backends.cpu.ops").setLevel("ERROR")
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data|peft|transformers")


def load_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: str = "none",
    positions: Positions | None = None,
    rounded: Path | None = None,
    texts: Batch | None = None,
    report: calibrate.Report = lambda done, layers: None,
) -> Any:
    """Load the causal language model in `path`.

    Args:
        path: a checked model folder (config.json + safetensors).
        dtype: number format of all weights, or with `quantize` of those that are not packed.
        device: where the weights go.
        quantize: none or a storage: pack the linears (`model.frozen`) as they are read, so that
            the peak is the packed model and one tensor.
        positions: how it reads more tokens than it was made for; None = as config.json says.
        rounded: a file of `model.rounded` with the packed linears, which are not rounded again.
        texts: packed texts on `device` for whose sake the linears are rounded (`model.calibrate`).
        report: hears of every layer for which that is done, and how many there are.

    Returns:
        A `PreTrainedModel` in evaluation mode whose attention understands packed documents
        (`model.fast`).

    Raises:
        ModelError: transformers does not know the architecture, the weights do not fit it, or there
            are no linears to pack, or `rounded` does not fit.
        ResourceError: bitsandbytes is needed and missing.
    """
    quiet_libraries()
    if quantize == "none":
        model = _whole(path, dtype, positions).to(device)
    else:
        model = _quantized(
            path, dtype, torch.device(device), quantize, positions, rounded, texts, report
        )
    attention.install(model)
    return model.eval()


def _whole(path: Path, dtype: torch.dtype, positions: Positions | None) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=library_config(path, positions),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise stream.unloadable(path, error) from error
    if info["missing_keys"]:
        raise stream.weights_missing(path, set(info["missing_keys"]))
    return model


def _quantized(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    storage: str,
    positions: Positions | None,
    rounded: Path | None,
    texts: Batch | None,
    report: calibrate.Report,
) -> Any:
    model = stream.empty_model(path, dtype, device, positions)
    packed = pack_linears(model, storage, path)
    later: dict[FrozenLinear, stream.StoredWeight] = {}

    def place(name: str, stored: stream.StoredWeight) -> None:
        module = packed.get(name)
        if module is not None and (rounded or texts):
            stream.require_shape(name, stored.shape, (module.out_features, module.in_features))
            later[module] = stored
            return
        if module is not None:  # rounded from the file's own format, whatever the rest is in
            stream.require_shape(name, stored.shape, (module.out_features, module.in_features))
            module.fill(stored.read().to(device))
            return
        tensor = stored.read()
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        # a copy, or the file would stay mapped
        stream.put(model, name, tensor.to(device, wanted, copy=True))

    stream.stream_weights(model, path, place, packed if rounded or texts else ())
    if rounded:
        fill_rounded(packed, rounded, device)
    elif texts is not None:
        attention.install(model)
        calibrate.fill_calibrated(model.eval(), later, texts, report)
    return model


def pack_linears(model: Any, storage: str, path: Path) -> dict[str, FrozenLinear]:
    """Replace the linears of a model on the meta device by empty packed ones.

    Returns:
        Name of the weight → its layer, whose `fill` takes the weight.

    Raises:
        ModelError: there are none.
    """
    packed = {}
    for name, linear in linears_to_freeze(model).items():
        layer = FrozenLinear.of(linear, storage)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        packed[f"{name}.weight"] = layer
    if not packed:
        raise ModelError(
            "nothing-to-quantize",
            t("{kind} has no linear layers that could be stored smaller",
              kind=type(model).__name__),
            where=str(path),
            fix="--quantize none",
        )  # fmt: skip
    return packed


def packed_names(path: Path) -> dict[str, str]:
    """The weights that `quantize` packs: name in the folder's files → name in the model."""
    model = stream.empty_model(path, torch.float32)
    names = stream.stored_names(model, read_tensors(path))
    weights = [f"{name}.weight" for name in linears_to_freeze(model)]
    return {names[name]: name for name in weights}
