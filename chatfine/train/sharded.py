"""A folder → a model of which every process holds its share, never the whole.

The model is made without weights, shared out (FSDP2), and each process then reads the rows that are
its own from the files; what learns beside it (an adapter) is attached afterwards and stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from chatfine.errors import ModelError
from chatfine.model import attention, fast, load, stream
from chatfine.model.frozen import FrozenLinear
from chatfine.model.positions import Positions
from chatfine.train.distributed import Group, own, own_rows, shard


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a model is shared out; see the settings of the same names."""

    group: Group
    device: torch.device
    keep_gathered: bool
    offload: bool
    first_reads: bool  # only the first process reads the files
    products: torch.dtype | None  # format in which float32 master weights are gathered

    @property
    def place(self) -> torch.device:
        """Where the slices lie."""
        return torch.device("cpu") if self.offload else self.device


def load_sharded(
    path: Path,
    dtype: torch.dtype,
    quantize: str,
    learns: Callable[[Any], Any],
    sharing: Sharing,
    positions: Positions | None = None,
) -> fast.LossModel:
    """Load the causal language model in `path`, shared out.

    Args:
        path: a checked model folder.
        dtype: number format of the weights that don't learn.
        quantize: none, int8 or nf4, as for `load_model`.
        learns: marks what learns in the model itself, before it is shared out.
        sharing: among whom, and how.
        positions: as for `load_model`.

    Raises:
        ModelError: as `load_model`.
    """
    load.quiet_libraries()
    try:
        model = stream.empty_model(path, dtype, sharing.device, positions)
        packed = load.pack_linears(model, quantize, path) if quantize != "none" else {}
        attention.install(model)
        measure = _share_out(learns(model), sharing)
        _make_room(model, sharing.place)
        stream.stream_weights(model, path, _Reader(model, packed, sharing))
    except ModelError as error:
        if error.code != "weights-stored-otherwise" or quantize != "none":
            raise
        # such a model can only be read whole: each process holds all of it for a moment
        whole = load.load_model(path, dtype, "cpu", positions=positions)
        measure = _share_out(learns(whole), sharing)
    for buffer in measure.buffers():
        buffer.data = buffer.data.to(sharing.device)
    return measure


def _share_out(model: Any, sharing: Sharing) -> fast.LossModel:
    measure = fast.LossModel(model)
    shard(
        measure, fast.causal_model(model).get_decoder().layers, sharing.device,
        keep_gathered=sharing.keep_gathered, offload=sharing.offload, products=sharing.products,
    )  # fmt: skip
    return measure


def _make_room(model: nn.Module, place: torch.device) -> None:
    """Give every slice its memory. Not `to_empty`, which would also empty the buffers."""
    made: dict[int, nn.Parameter] = {}  # tied weights once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                room = torch.empty_like(parameter, device=place)
                made[id(parameter)] = nn.Parameter(room, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


class _Reader:
    """Puts the rows that belong to this process into its slices."""

    def __init__(self, model: Any, packed: dict[str, FrozenLinear], sharing: Sharing) -> None:
        self._model, self._packed, self._sharing = model, packed, sharing

    def __call__(self, name: str, weight: stream.StoredWeight) -> None:
        module = self._packed.get(name)
        target = module.weight if module is not None else stored_of(self._model, name)
        shape = (module.out_features, module.in_features) if module is not None else target.shape
        stream.require_shape(name, weight.shape, shape)
        rows = self._rows(weight, own_rows(target, self._sharing.group))
        if module is None:
            own(target.detach()).copy_(rows)
        elif len(rows):
            codes, scales = module.storage.pack(rows.to(self._sharing.device))
            own(module.weight.detach()).copy_(codes)
            own(module.scales.detach()).copy_(scales)

    def _rows(self, weight: stream.StoredWeight, mine: tuple[int, int]) -> torch.Tensor:
        """Those rows of a stored weight that are this process's."""
        if not self._sharing.first_reads:
            return weight.read(mine)
        device = self._sharing.device
        if self._sharing.group.rank == 0:
            whole = weight.read().to(device)
        else:
            whole = torch.empty(weight.shape, dtype=weight.torch_dtype, device=device)
        dist.broadcast(whole, 0)
        return whole[slice(*mine)]


def stored_of(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer `name` of `model`."""
    parent, _, last = name.rpartition(".")
    value = getattr(model.get_submodule(parent), last)
    assert isinstance(value, torch.Tensor)
    return value
