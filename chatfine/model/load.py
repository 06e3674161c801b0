"""A model folder → a transformers model, in the wanted number format on the wanted device.

No model code of ours: transformers' classes do the work (measured equal to a hand-written model,
see docs/LOG.md). Nothing from the folder is executed and only safetensors are opened;
`hub.folder` has checked the folder before torch was imported.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from chatfine.errors import ModelError
from chatfine.i18n import t
from chatfine.model import fast


def quiet_libraries() -> None:
    """No telemetry and no progress bars of the libraries; their warnings stay at error level."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data|peft|transformers")


def load_model(path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Load the causal language model in `path`.

    Args:
        path: a checked model folder (config.json + safetensors).
        dtype: number format of all weights.
        device: where the weights go.

    Returns:
        A `PreTrainedModel` in evaluation mode whose attention understands packed documents
        (`model.fast`).

    Raises:
        ModelError: transformers does not know the architecture, or the weights do not fit it.
    """
    quiet_libraries()
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ModelError(
            "model-unloadable",
            t("transformers can't load the model in {path}", path=path),
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix=t("check config.json, or update transformers"),
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            "weights-missing",
            t("{n} weights of the model are not in {path}", n=len(missing), path=path),
            where=missing[0],
            why=t("they would be random numbers"),
            fix=t("get the model again: chatfine download NAME"),
        )
    fast.install(model)
    return model.to(device).eval()
