"""Decoder layers compiled once, for micro-batches that all have the same shapes.

All layers of a model run the same code, so one of them is compiled and its program serves the
others. That holds as long as nothing in their inputs changes its shape: a micro-batch is filled up
to a fixed number of tokens, and where documents begin is a tensor of fixed length
(`model.document_attention`). The fill is a document of its own without a label: it costs time,
and changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from chatfine.model import joined, lora, mlp
from chatfine.model.fast import LossModel, causal_model, loss_sum
from chatfine.model.lora_fp8 import Groups
from chatfine.types import Batch

MIN_DOCUMENTS = 4
WARM_CALLS = 2


class FixedInputs:
    """Micro-batch → the model's arguments, always of the same shapes.

    Args:
        tokens: the most tokens of a micro-batch.
        longest: the most tokens of a document.
        full: every document of every micro-batch has that many, and every micro-batch is full.
        documents: how many of them there is room for at first.
    """

    def __init__(
        self, tokens: int, longest: int, full: bool = False, documents: int = MIN_DOCUMENTS
    ) -> None:
        self.tokens, self.longest, self.full = tokens, longest, full
        self.documents = documents

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """As `fast.model_inputs`.

        Raises:
            ValueError: more tokens than fit, or a shared beginning.
        """
        device, size = batch.ids.device, len(batch.ids)
        if batch.shared or size > self.tokens:
            raise ValueError(f"{size} tokens ({batch.shared} shared) don't fit into {self.tokens}")
        fill = self.tokens - size
        bounds = [*batch.bounds, *range(size + self.longest, self.tokens, self.longest)]
        bounds += [self.tokens] if fill else []
        while len(bounds) > self.documents + 1:  # rare: each growth is compiled anew
            self.documents *= 2
        bounds += [self.tokens] * (self.documents + 1 - len(bounds))
        offsets = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
        return {
            "input_ids": F.pad(batch.ids, (0, fill))[None],
            "position_ids": F.pad(batch.positions, (0, fill))[None],
            "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
            "document_offsets": offsets,
            "longest_document": self.longest,
            "full_documents": self.full,
            "use_cache": False,
        }


def supports(model: Any) -> bool:
    """Whether the layers of `model` can be compiled: plain attention without dropout or cap."""
    causal = causal_model(model)
    settings = causal.config.get_text_config()
    extras = ("attention_dropout", "attn_logit_softcapping")
    plain = not any(getattr(settings, name, None) for name in extras)
    return plain and hasattr(causal.get_decoder(), "layers") and not hasattr(model, "own_loss_sum")


class CompiledLoss(LossModel):
    """`fast.LossModel` whose decoder layers are compiled, for training; an evaluation, whose
    micro-batches have other shapes, runs them as they are.

    Args:
        model: which `supports` says yes to.
        fixed: to what shapes micro-batches are brought.
    """

    def __init__(self, model: Any, fixed: FixedInputs) -> None:
        super().__init__(model)
        self.fixed: FixedInputs | None = fixed
        self.groups = Groups(model, lora.on_fp8(model))
        joined.join(model)
        mlp.install(model)
        self.calls = 0  # since the shapes last changed
        self.checked = False  # whether the adapter as it is fits into 8-bit floats
        _keep_programs()
        decoder = causal_model(model).get_decoder()
        for layer in decoder.layers:
            layer.compile(dynamic=False, fullgraph=True)
        # the first layer's input would be the only one without a gradient: another program
        if any(one.requires_grad for one in decoder.layers[0].parameters()):
            decoder.get_input_embeddings().register_forward_hook(_wants_gradient)

    def give_up(self) -> None:
        """Go on without compilation, where the compiler failed."""
        self.fixed = None
        for layer in causal_model(self.model).get_decoder().layers:
            layer._compiled_call_impl = None

    def drop_groups(self) -> None:
        """Go on with adapters beside the product, where one holds too large a number."""
        self.groups.drop()
        self.calls = 0

    def refresh(self) -> None:
        """As of `LossModel`: the adapter's columns."""
        if self.stale:
            self.groups.refresh()
            self.stale, self.checked = False, False

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the losses of the labels of `batch`."""
        self.refresh()
        if not self.training and not self.checked:
            self.checked = True
            if not self.groups.fits():
                self.drop_groups()
        if self.fixed is None or not self.training:
            with torch.compiler.set_stance("force_eager"):
                return loss_sum(self.model, batch)
        documents = self.fixed.documents
        inputs = self.fixed(batch)
        self.calls = 0 if documents != self.fixed.documents else self.calls + 1
        # compiled for these shapes, the layers need not be asked again whether anything has changed
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self.calls > WARM_CALLS):
            return loss_sum(self.model, batch, lambda _: inputs, compiled=True)


def _keep_programs() -> None:
    """Let programs be kept though operations in them write their gradients themselves; these are
    ours, and always compute alike."""
    import torch._functorch.config as settings

    if hasattr(settings, "autograd_cache_allow_custom_autograd_functions"):
        settings.autograd_cache_allow_custom_autograd_functions = True


def _wants_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    wanted = module.training and torch.is_grad_enabled() and output.is_leaf
    return output.requires_grad_() if wanted else output
