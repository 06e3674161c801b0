"""Decoder layers that keep only their input and compute the rest again in the backward pass.

The first layers of a model are taken. The backward pass goes from the last layer to the first, and
frees what a layer kept as it leaves it. When it reaches the first layers, what the others kept is
gone, and there is room for what one layer computes again; were the last layers taken, it would come
on top of everything that the others keep. So of n layers of which k are recomputed, at most
n - k are alive in full at any time, and one if k = n.

With `offload` the inputs of those layers wait in the CPU's memory: each is copied there while its
layer and the next compute, and is fetched back while the layer behind it goes through its backward
pass. Two of them at most are on the card.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

DROPOUTS = ("attention_dropout", "activation_dropout", "dropout", "hidden_dropout")
"""Names under which transformers' modules keep a rate that is no module of its own."""


def install(causal: Any, layers: int, offload: bool = False) -> int:
    """Let the first `layers` decoder layers of `causal` recompute their activations when training;
    the others keep them. A second call replaces the first. Returns how many layers do.

    Layers before the first one that learns keep nothing anyway and don't count. It works on layers
    that are compiled (`nn.Module.compile`), before or after, and shared out by FSDP2: the whole
    call of a layer is repeated, its hooks included, as FSDP2 expects of it.

    Args:
        causal: a transformers model, perhaps with adapters in its layers.
        layers: how many; more than there are means all.
        offload: their inputs wait in the CPU's memory. Without effect but on a CUDA device.
    """
    decoder = causal.get_decoder()
    shelf = _Shelf() if offload else None
    chosen = list(decoder.layers)[_first_learning(decoder) :][:layers]
    for layer in decoder.layers:
        # all of them become of one class, as the compiler asks of layers that share a program
        if not isinstance(layer, _Recomputed):
            layer.__class__ = _recomputed(layer.__class__)
        layer.recomputation = None
    for layer in chosen:
        layer.recomputation = _Recomputation(
            _draws_random_numbers(layer), shelf, begins=layer is chosen[0]
        )
    return len(chosen)


def _first_learning(decoder: Any) -> int:
    """Where the backward pass ends: no layer before it needs a gradient."""
    if any(one.requires_grad for one in decoder.get_input_embeddings().parameters()):
        return 0
    learning = (
        index
        for index, layer in enumerate(decoder.layers)
        if any(one.requires_grad for one in layer.parameters())
    )
    return next(learning, 0)


def _draws_random_numbers(layer: nn.Module) -> bool:
    """Whether there is a dropout, whose numbers must come again. Keeping the state of a card's
    random numbers makes the CPU wait for the card."""
    for module in layer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        rates = (getattr(module, name, None) for name in DROPOUTS)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


class _Recomputed:
    """Comes before a layer's own class.

    transformers' own switch would not do for compiled layers: since 5.24 it lies inside `forward`,
    and so inside the compiled program.
    """

    recomputation: _Recomputation | None
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        if self.recomputation is None or not self.training or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        with self.recomputation.inputs():
            return checkpoint(
                call, *args, use_reentrant=False,
                preserve_rng_state=self.recomputation.random, **kwargs,
            )  # fmt: skip


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})


@dataclass(frozen=True, slots=True)
class _Recomputation:
    """How one layer does it."""

    random: bool
    shelf: _Shelf | None
    begins: bool  # the first one in a forward pass

    def inputs(self) -> AbstractContextManager[Any]:
        """Where `checkpoint` keeps the layer's tensor arguments: it saves them for the backward
        pass before its own hooks begin, so hooks around it see these and nothing else."""
        if self.shelf is None:
            return nullcontext()
        if self.begins:
            self.shelf.last = None
        return saved_tensors_hooks(self.shelf.put, self.shelf.take)


@dataclass(eq=False)
class _Waiting:
    """A tensor on the shelf."""

    before: _Waiting | None  # put there before it, so needed after it
    device: torch.device
    here: torch.Tensor | None  # on the device: not yet gone, or fetched
    host: torch.Tensor | None = None  # in pinned memory; None where nothing is ever moved
    copied: torch.cuda.Event | None = None


class _Shelf:
    """Keeps tensors of one forward pass for its backward pass, which takes them in reverse order.

    Memory on the device is allocated and freed in the order of the computing stream, never of the
    copying one, so that the allocator may reuse it at once: what is copied away is held until the
    computing stream has been told to wait for the copy.
    """

    def __init__(self) -> None:
        self.last: _Waiting | None = None
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensor: torch.Tensor) -> _Waiting | torch.Tensor:
        """Begin to copy `tensor` away; the one before it has gone by now."""
        if not tensor.numel():  # with an argument torch 2.11 saves an empty tensor of its own
            return tensor
        tensor, leaving = tensor.detach(), self.last
        waiting = self.last = _Waiting(leaving, tensor.device, tensor)
        if not tensor.is_cuda:
            return waiting
        if leaving is not None:
            self._wait(leaving)
            leaving.here = None
        waiting.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        waiting.copied = self._copy(waiting.host, tensor, tensor.device)
        return waiting

    def take(self, waiting: _Waiting | torch.Tensor) -> torch.Tensor:
        """The tensor again; the one needed next is sent for."""
        if isinstance(waiting, torch.Tensor):
            return waiting
        if waiting is self.last:
            self.last = None
        self._fetch(waiting)
        self._wait(waiting)
        tensor = waiting.here
        assert tensor is not None
        if waiting.host is not None:
            waiting.here = None  # a second backward pass fetches it again
        if waiting.before is not None:
            self._fetch(waiting.before)
        return tensor

    def _fetch(self, waiting: _Waiting) -> None:
        if waiting.here is None and waiting.host is not None:
            waiting.here = torch.empty_like(waiting.host, device=waiting.device)
            waiting.copied = self._copy(waiting.here, waiting.host, waiting.device)

    def _copy(
        self, target: torch.Tensor, source: torch.Tensor, device: torch.device
    ) -> torch.cuda.Event:
        """Copy beside the computation, after what it has been told to do so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        return copied

    @staticmethod
    def _wait(waiting: _Waiting) -> None:
        if waiting.copied is not None:
            torch.cuda.current_stream(waiting.device).wait_event(waiting.copied)
