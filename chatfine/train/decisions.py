"""What `auto` comes to: number format, micro-batch, packing, recomputation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chatfine.errors import ResourceError, UsageError
from chatfine.i18n import t
from chatfine.runtime import pick_dtype
from chatfine.train import machine
from chatfine.train import plan as planning
from chatfine.train.methods import UNPACKED
from chatfine.train.prepare import Prepared, learning_layers, write_json

if TYPE_CHECKING:
    from chatfine.train.plan import Shapes, Work

EXAMPLES_A_STEP = 8
"""Examples of one optimizer step when nothing else is asked for: enough for a steady gradient, and
few enough that a small data set still gets its hundreds of updates."""
PACKED_ROWS_WORTH = 200
"""Packing pays on a GPU with at least so many full rows an epoch; below, it only makes steps
rarer."""


ASKED = ("dtype", "batch_size", "accumulate", "packing", "checkpointing")
"""The settings that the decisions follow from: where they changed before the first checkpoint, all
is decided anew."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What `auto` came to. Kept in the run folder, so that a resumed run computes the same way."""

    device: str
    dtype: str
    rows: int
    accumulate: int
    packing: bool
    checkpointing: bool
    processes: int = 1
    sharding: str = "none"

    @property
    def rows_a_step(self) -> int:
        """Units of one optimizer step over all processes, which never changes within a run."""
        return self.rows * self.accumulate * self.processes

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format of the products."""
        value = getattr(torch, self.dtype)
        assert isinstance(value, torch.dtype)
        return value


def decide(
    prepared: Prepared, shapes: Shapes, device: torch.device, processes: int = 1
) -> Decisions:
    """Fill in the automatic settings, or read what an earlier start of this run decided.

    Raises:
        ResourceError: nothing that was left open makes the run fit.
        UsageError: the run can't go on with this number of processes.
    """
    kept = prepared.run / "decisions.json"
    config = prepared.config
    asked = {name: getattr(config, name) for name in ASKED}
    if kept.is_file():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if earlier["asked"] == asked:
            return _regroup(Decisions(**earlier["decided"]), processes, prepared)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    packing = _packing(prepared, device)
    rows = config.batch_size or (1 if packing else -(-EXAMPLES_A_STEP // processes))
    checkpointing = config.checkpointing == "full"
    wanted = Decisions(
        device.type, dtype, rows, config.accumulate, packing, checkpointing, processes,
        _sharding(config.sharding, processes),
    )  # fmt: skip
    decisions = _fit(prepared, shapes, device, wanted)
    write_json(kept, {"asked": asked, "decided": dataclasses.asdict(decisions)})
    return decisions


def _sharding(wanted: str, processes: int) -> str:
    """How the weights are shared out; auto keeps them whole, which is fastest, as long as they fit
    (`_fit` goes on from there)."""
    if processes == 1 or wanted == "auto":
        return "none"
    return wanted


def _regroup(earlier: Decisions, processes: int, prepared: Prepared) -> Decisions:
    """The same optimizer steps with another number of processes.

    Raises:
        UsageError: the rows of a step can't be divided among so many.
    """
    total = earlier.rows_a_step
    if total % processes:
        possible = [str(n) for n in range(1, total + 1) if total % n == 0]
        raise UsageError(
            "processes-do-not-divide",
            t("this run learns from {n} rows a step; {m} processes can't share them evenly",
              n=total, m=processes),
            why=t("other steps would be another computation"),
            fix=t("go on with one of these numbers of processes: {numbers}",
                  numbers=", ".join(possible)),
        )  # fmt: skip
    each = total // processes
    rows = max(n for n in range(1, earlier.rows + 1) if each % n == 0)
    config = prepared.config
    sharding = _sharding(config.sharding, processes)
    if config.sharding == "auto" and processes > 1 and earlier.sharding == "full":
        sharding = "full"  # it did not fit otherwise
    return dataclasses.replace(
        earlier, rows=rows, accumulate=each // rows, processes=processes, sharding=sharding
    )


def _packing(prepared: Prepared, device: torch.device) -> bool:
    """Packed rows where there are enough of them to matter and a device that likes them."""
    if prepared.config.method in UNPACKED:
        return False
    if prepared.config.packing != "auto":
        return prepared.config.packing == "on"
    tokens = sum(int(part.lengths.sum()) for part in prepared.data.train)
    return device.type == "cuda" and tokens / prepared.max_length >= PACKED_ROWS_WORTH


def _fit(prepared: Prepared, shapes: Shapes, device: torch.device, wanted: Decisions) -> Decisions:
    """Smaller micro-batches (same global batch), then recomputation, until the plan fits."""
    config = prepared.config
    free = machine.free_memory_bytes(device, config.gpu_memory)
    options = [wanted]
    if not config.batch_size:
        rows, accumulate = wanted.rows, wanted.accumulate
        while rows > 1:
            rows, accumulate = rows // 2, accumulate * 2
            options.append(dataclasses.replace(wanted, rows=rows, accumulate=accumulate))
    if config.checkpointing == "auto" and config.method != "prefix":
        options += [dataclasses.replace(one, checkpointing=True) for one in list(options)]
    if config.sharding == "auto" and wanted.processes > 1 and wanted.sharding == "none":
        options += [dataclasses.replace(one, sharding="full") for one in list(options)]
    for option in options:
        if planning.make_plan(shapes, work_of(prepared, option)).memory_bytes <= free:
            return option
    work = work_of(prepared, options[-1])
    need = planning.make_plan(shapes, work).memory_bytes
    raise ResourceError(
        "out-of-memory",
        t("the run needs about {need:.1f} GB of memory; {free:.1f} GB can be used",
          need=need / 1e9, free=free / 1e9),
        fix=planning.remedies(shapes, work, free, options[-1].rows, options[-1].accumulate),
    )  # fmt: skip


def work_of(prepared: Prepared, decisions: Decisions) -> Work:
    """The run as the plan sees it."""
    config, data = prepared.config, prepared.data
    lengths = sorted((int(n) for part in data.train for n in part.lengths), reverse=True)
    tokens, labels = sum(lengths), sum(int(part.supervised.sum()) for part in data.train)
    micro = sum(lengths[: decisions.rows])
    if decisions.packing:
        micro = prepared.max_length * decisions.rows
    elif config.method in UNPACKED:  # padded, but to no more than twice the tokens
        micro = min(2 * micro, lengths[0] * decisions.rows)
    epochs = config.epochs
    if config.max_steps:
        units = tokens / prepared.max_length if decisions.packing else len(lengths)
        epochs = config.max_steps * decisions.rows_a_step / max(1.0, units)
    return planning.Work(
        method=config.method, rank=config.rank,
        targets=planning.targets_of(config.targets),
        layers=learning_layers(config, prepared.model),
        dtype_bytes=4 if decisions.dtype == "float32" else 2, device=decisions.device,
        checkpointing=decisions.checkpointing, micro_tokens=micro,
        micro_labels=round(micro * labels / max(1, tokens)) or 1, longest=lengths[0],
        tokens=round(tokens * epochs), labels=round(labels * epochs), keep=config.keep,
        quantize=config.quantize, virtual_tokens=config.learned_tokens,
        row_parameters=prepared.row_parameters,
        sharing=decisions.processes if decisions.sharding != "none" else 1,
        keep_gathered=decisions.sharding == "gradients", offload=config.cpu_offload,
        learning_bytes=2 if config.pure_bf16 else 4,
        moments_bytes=_moments_bytes(config.optimizer, config.pure_bf16, config.kahan),
    )  # fmt: skip


def _moments_bytes(optimizer: str, pure_bf16: bool, kahan: bool) -> int:
    """Bytes of optimizer state for each number that learns."""
    if optimizer == "anyprecision":
        return 6 if kahan else 4
    return 4 if pure_bf16 else 8


def check_sharing(prepared: Prepared, decisions: Decisions) -> None:
    """Refuse what does not work among several processes.

    Raises:
        UsageError: naming the setting.
    """
    config, kind = prepared.config, decisions.sharding
    if kind == "none":
        if config.cpu_offload:
            raise UsageError(
                "offload-alone",
                t("--cpu-offload needs a model that is shared out among several processes"),
                where="--cpu-offload",
                fix="torchrun --nproc_per_node 2 -m chatfine train … --sharding full",
            )
        return
    if decisions.dtype == "float16":
        raise UsageError(
            "sharded-fp16",
            t("--sharding {kind} does not work with fp16", kind=kind),
            why=t("its gradients need a scale that all processes agree on"),
            fix=("--dtype bf16", "--sharding none"),
        )
    if config.method in ("dora", "prefix", "llama-adapter"):
        raise UsageError(
            "sharded-method",
            t("--method {method} does not work with --sharding {kind}", method=config.method,
              kind=kind),
            fix=("--sharding none", "--method lora"),
        )  # fmt: skip
