"""Many processes, one run: who they are, what they sum, and how a model is shared out among them.

A launcher (torchrun, Slurm, Ray Train) starts the processes and tells each its rank through the
environment; the process groups, the sharding (FSDP2) and the transports are torch's. Two ways to
share the work:

    none    every process holds the whole model; gradients are summed once an optimizer step
    full    every process holds a slice of each frozen or learning weight (FSDP2) and gathers one
            layer at a time; `gradients` keeps what was gathered until the backward pass

An adapter is small, so it is never sliced: every process holds it whole, and its checkpoints do not
depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from chatfine.errors import ChatfineError, UsageError
from chatfine.i18n import t
from chatfine.runtime import launched
from chatfine.train.watch import Watch

T = TypeVar("T")

BUCKET_NUMBERS = 2**26
"""Gradients of so many numbers are summed in one message: large enough for full bandwidth."""


@dataclass(slots=True)
class Group:
    """The processes of one run; alone, every method is what one process would do anyway."""

    rank: int = 0
    size: int = 1
    watch: Watch | None = None
    ours: bool = False
    """whether torch's group was made here, and so ends here; not by Ray Train"""

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    def sums(self, *values: float) -> list[float]:
        """Each of `values` summed over all processes, in float64."""
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return list(total.tolist())

    def agree(self, value: Any) -> Any:
        """The first process's `value`, on all."""
        if self.alone:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, on all; only that one does it.

        Where it raises, the others end silently with the same exit code.
        """
        if self.alone:
            return work()
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = ("done", work())
            except ChatfineError as error:
                self.agree(("failed", error.exit_code))
                raise
        kind, value = self.agree(outcome)
        if kind == "failed":
            raise SystemExit(value)
        result: T = value
        return result

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value`, in the order of the ranks, on all."""
        if self.alone:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def wait(self) -> None:
        """Go on when all have come here."""
        if not self.alone:
            dist.all_reduce(torch.zeros(1))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up what every process found for the same whole `parameters`, in place, in float32.

        Slices of a sharded model are left out: FSDP2 has summed theirs in the backward pass.
        """
        if self.alone:
            return
        whole = [one for one in parameters if not is_slice(one)]
        for bucket in _buckets(whole):
            gradients = [one.grad if one.grad is not None else torch.zeros_like(one)
                         for one in bucket]  # fmt: skip
            flat = torch.cat([one.reshape(-1).float() for one in gradients])
            dist.all_reduce(flat)
            parts = torch.split(flat, [one.numel() for one in gradients])  # type: ignore[no-untyped-call]
            for parameter, gradient, part in zip(bucket, gradients, parts, strict=True):
                parameter.grad = gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def spread(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give everybody the first process's numbers of whole `parameters`."""
        if not self.alone:
            for parameter in parameters:
                if not is_slice(parameter):
                    dist.broadcast(parameter.data, 0)

    def tick(self) -> None:
        """Tell the watch that a micro-batch is done."""
        if self.watch is not None:
            self.watch.tick()

    def in_step(self) -> contextlib.AbstractContextManager[None]:
        """The time in which every process must get on."""
        return contextlib.nullcontext() if self.watch is None else self.watch.step()

    def leave(self, failure: str | None = None) -> None:
        """End the group; only after this may processes end at different times.

        Args:
            failure: why this process ends without the others; "" if they know already.
        """
        if self.watch is not None:
            if failure:
                self.watch.fail(failure)
            self.watch.close()
        if failure is None and self.ours and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    room = BUCKET_NUMBERS
    for parameter in parameters:
        if bucket and parameter.numel() > room:
            yield bucket
            bucket, room = [], BUCKET_NUMBERS
        bucket.append(parameter)
        room -= parameter.numel()
    if bucket:
        yield bucket


def join(backend: str = "auto", device: str = "auto") -> Group:
    """Meet the other processes that the launcher started; alone if there are none.

    Numbers on the CPU always travel by gloo, so that small sums need no GPU.

    Raises:
        UsageError: a backend that this machine or torch does not have.
    """
    rank, size = launched()
    if size == 1:
        return Group()
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    chosen = _backend(backend, on_gpu)
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ours = not dist.is_initialized()  # else Ray Train has done it
    if ours:
        both = f"cpu:gloo,cuda:{chosen}" if on_gpu else "gloo"
        dist.init_process_group(both, rank=rank, world_size=size)
    return Group(rank, size, Watch.start(rank, size), ours)


def _backend(wanted: str, on_gpu: bool) -> str:
    """nccl between NVIDIA GPUs on Linux, gloo elsewhere; there is no MPI and none is needed.

    Raises:
        UsageError: nccl where there is none.
    """
    there = on_gpu and platform.system() == "Linux" and dist.is_nccl_available()
    if wanted == "nccl" and not there:
        raise UsageError(
            "no-nccl",
            t("--backend nccl needs NVIDIA GPUs on Linux"),
            where="--backend",
            why=t("on {system} without them processes talk by gloo", system=platform.system()),
            fix="--backend gloo",
        )
    return wanted if wanted != "auto" else "nccl" if there else "gloo"


# -- sharding ------------------------------------------------------------------------------------


def is_slice(value: torch.Tensor) -> bool:
    """Whether `value` is one process's part of a sharded weight."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def own(value: torch.Tensor) -> torch.Tensor:
    """What of `value` lies on this process: its rows of a sharded weight, else all."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def own_rows(value: torch.Tensor, group: Group) -> tuple[int, int]:
    """First row and the row after the last that this process holds of a sharded `value`."""
    share = -(-value.shape[0] // group.size)  # FSDP2 cuts like torch.chunk
    return min(group.rank * share, value.shape[0]), min((group.rank + 1) * share, value.shape[0])


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of `value`, gathered where it is sharded; every process must ask."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def reshard(module: nn.Module) -> None:
    """Let go of what the last forward pass gathered, so that the parameters are slices again."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard(
    module: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    *,
    keep_gathered: bool,
    offload: bool,
    products: torch.dtype | None,
) -> None:
    """Slice the parameters of `layers`, and what is left of `module`, over all processes (FSDP2).

    Args:
        module: its forward is the whole step's forward, so that every parameter is gathered in it.
        layers: what is gathered together, one after the other.
        keep_gathered: do not free a layer between its forward and its backward pass.
        offload: slices wait in the CPU's memory.
        products: the format in which float32 master weights are gathered; None = as stored.

    Raises:
        UsageError: offload without a GPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    if offload and device.type == "cpu":
        raise UsageError(
            "offload-needs-gpu",
            t("--cpu-offload needs a GPU: on the CPU there is nothing to move"),
            where="--cpu-offload",
        )  # fmt: skip
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, reshard_after_forward=not keep_gathered, **settings)
    fully_shard(module, reshard_after_forward=False, **settings)
    for part in module.modules():
        if isinstance(part, FSDPModule):  # sums, not means: the loss is already divided (C3)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
