"""What `auto` comes to: number format, storage, micro-batch, packing, recomputation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chatfine import console
from chatfine.errors import UsageError
from chatfine.i18n import t
from chatfine.runtime import fp8_works, has_bitsandbytes, has_compiler, pick_dtype
from chatfine.train import machine
from chatfine.train import plan as planning
from chatfine.train.calibration import calibrates
from chatfine.train.methods import ADAPTERS, UNPACKED, check_sharing
from chatfine.train.prepare import Prepared, learning_layers, write_json
from chatfine.train.remedies import out_of_memory, remedies

if TYPE_CHECKING:
    from chatfine.train.plan import Shapes, Work

EXAMPLES_A_STEP = 8
"""Examples of one optimizer step when nothing else is asked for: enough for a steady gradient, and
few enough that a small data set still gets its hundreds of updates."""
PACKED_ROWS_WORTH = 200
"""Packing pays on a GPU with at least so many full rows an epoch; below, it only makes steps
rarer."""
COMPILED = ("lora", "rows", "full", "freeze")
"""Methods whose layers can be compiled."""
WORTH_COMPILING = 4000
"""Passes of a layer, forward and back, over a micro-batch from which on compiling (8 to 10 s on an
H100) pays: each saved 4.5 to 6.6 ms there, with 135M as with 7B, 8,192 tokens or twice as many."""
EVALUATED = 2048
"""An evaluation takes rows of --max-length, or of so many tokens if that is less."""
WITHOUT_FP8 = {"fp8": "none"}
"""What is stored instead where the device can't multiply 8-bit floats."""

ASKED = ("dtype", "batch_size", "accumulate", "packing", "checkpointing", "quantize", "calibrate",
         "compile", "fp8_products")  # fmt: skip
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
    recompute_layers: int
    offload: bool = False
    processes: int = 1
    sharding: str = "none"
    quantize: str = "none"
    second_copy: bool = False
    compile: bool = False
    fp8_products: bool = False  # of frozen weights that are stored otherwise
    learned_fp8: bool = False  # of weights that learn
    calibrate: bool = False

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
        UsageError: the run can't go on with this number of processes, or something in it does not
            go with shared weights.
    """
    decisions = _decide(prepared, shapes, device, processes)
    config = prepared.config
    check_sharing(
        decisions.sharding, config.method, dtype=decisions.dtype, optimizer=config.optimizer,
        offload=config.cpu_offload,
    )  # fmt: skip
    return decisions


def _decide(prepared: Prepared, shapes: Shapes, device: torch.device, processes: int) -> Decisions:
    kept = prepared.run / "decisions.json"
    config = prepared.config
    asked = {name: getattr(config, name) for name in ASKED}
    if kept.is_file():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if asked | earlier["asked"] == asked:
            decided = _read(earlier["decided"], config.quantize, shapes)
            if not _has_fp8(device, decided.dtype):  # a checkpoint's fingerprint will tell
                decided = dataclasses.replace(decided, learned_fp8=False)
            return _regroup(decided, processes, prepared)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    packing = _packing(prepared, device)
    rows = config.batch_size or (1 if packing else -(-EXAMPLES_A_STEP // processes))
    wanted = Decisions(
        device.type, dtype, rows, config.accumulate, packing, recompute_layers=0,
        processes=processes, sharding=_sharding(config.sharding, processes),
        learned_fp8=config.fp8_products == "on" and _has_fp8(device, dtype),
    )  # fmt: skip
    wanted = dataclasses.replace(wanted, compile=_compiles(prepared, shapes, wanted))
    decisions = _fit(prepared, shapes, device, wanted)
    calibrate = calibrates(prepared, decisions, work_of(prepared, decisions).tokens)
    decisions = dataclasses.replace(decisions, calibrate=calibrate)
    if config.compile == "on" and not decisions.compile:
        console.warn(
            t("--compile on is ignored: it needs packed rows, a model that is not shared out, "
              "and the method lora, rows, full or freeze")
        )  # fmt: skip
    write_json(kept, {"asked": asked, "decided": dataclasses.asdict(decisions)})
    return decisions


def _read(decided: dict[str, Any], quantize: str, shapes: Shapes) -> Decisions:
    """What an earlier start decided. At first all layers were recomputed or none, and the storage
    was the one asked for."""
    if "checkpointing" in decided:
        every = decided.pop("checkpointing")
        decided |= {"recompute_layers": shapes.layers if every else 0, "quantize": quantize}
    return Decisions(**decided)


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
        earlier, rows=rows, accumulate=each // rows, processes=processes, sharding=sharding,
        second_copy=earlier.second_copy and sharding == "none",
        calibrate=earlier.calibrate and sharding == "none",
        learned_fp8=earlier.learned_fp8 and sharding == "none",
    )  # fmt: skip


def _packing(prepared: Prepared, device: torch.device) -> bool:
    """Packed rows where there are enough of them to matter and a device that likes them."""
    if prepared.config.method in UNPACKED:
        return False
    if prepared.config.packing != "auto":
        return prepared.config.packing == "on"
    if prepared.config.compile == "on":  # which wants rows of one length
        return True
    tokens = sum(int(part.lengths.sum()) for part in prepared.data.train)
    return device.type == "cuda" and tokens / prepared.max_length >= PACKED_ROWS_WORTH


def _compiles(prepared: Prepared, shapes: Shapes, decisions: Decisions) -> bool:
    """Whether the layers are compiled: where all micro-batches have one shape and each process
    holds whole weights; by itself only where that takes less time than it saves."""
    wanted, method = prepared.config.compile, prepared.config.method
    possible = decisions.packing and decisions.sharding == "none" and method in COMPILED
    if wanted != "auto":
        return possible and wanted == "on"
    if decisions.device != "cuda" or not has_compiler():
        return False
    work = work_of(prepared, decisions)
    passes = shapes.layers * work.tokens / max(1, work.micro_tokens) / decisions.processes
    # rounded to 8-bit floats by plain operations, products would take longer than in bf16
    asked = prepared.config.quantize == "fp8" or prepared.config.fp8_products == "on"
    fp8 = asked and _has_fp8(torch.device("cuda"), decisions.dtype)
    return possible and (fp8 or passes >= WORTH_COMPILING)


def _has_fp8(device: torch.device, dtype: str) -> bool:
    """Whether weights can be multiplied as 8-bit floats."""
    return fp8_works(device) and dtype == "bfloat16"


def _storages(prepared: Prepared, device: torch.device, wanted: Decisions) -> list[str]:
    """How the frozen weights may be stored, fastest first."""
    config, method, dtype = prepared.config, prepared.config.method, wanted.dtype
    fp8 = _has_fp8(device, dtype)
    if config.quantize in WITHOUT_FP8 and not fp8:
        instead = WITHOUT_FP8[config.quantize]
        console.warn(
            t("--quantize {wanted} needs an NVIDIA card of compute capability 8.9 or later, and "
              "bf16; this run stores the frozen weights as {instead} instead",
              wanted=config.quantize, instead=dtype if instead == "none" else instead)
        )  # fmt: skip
        return [instead]
    if config.quantize != "auto":
        return [config.quantize]
    if device.type != "cuda" or method not in ADAPTERS:
        return ["none"]
    first = ["fp8"] if fp8 and wanted.compile and method in ("lora", "rows") else []
    return [*first, "none", "nf4" if has_bitsandbytes() else "int8"]


def _fit(prepared: Prepared, shapes: Shapes, device: torch.device, wanted: Decisions) -> Decisions:
    """The way to do the run that the plan expects to be the fastest of those that fit.

    Whole weights in every process come before shared ones, and one storage before the next.

    Raises:
        ResourceError: none fits.
    """
    config = prepared.config
    free = machine.free_memory_bytes(device, config.gpu_memory)
    host = machine.free_memory_bytes(torch.device("cpu"))
    shardings = [wanted.sharding]
    if config.sharding == "auto" and wanted.processes > 1:
        shardings.append("full")
    last = (wanted, work_of(prepared, wanted))
    for storage in _storages(prepared, device, wanted):
        for sharding in shardings:
            compiles = wanted.compile and sharding == "none"
            # in one pass only where that is compiled
            fp8 = compiles and storage == "nf4" and _has_fp8(device, wanted.dtype)
            start = dataclasses.replace(
                wanted, sharding=sharding, quantize=storage, compile=compiles, fp8_products=fp8,
                learned_fp8=wanted.learned_fp8 and sharding == "none",
            )  # fmt: skip
            options = _options(prepared, shapes, start)
            fitting = []
            for option, work in options:
                plan = planning.make_plan(shapes, work)
                if plan.memory_bytes <= free and (not plan.host_bytes or plan.host_bytes <= host):
                    fitting.append((option, planning.relative_time(shapes, work)))
            if fitting:
                return min(fitting, key=lambda one: one[1])[0]
            last = options[-1]
    option, work = last
    need = planning.make_plan(shapes, work).memory_bytes
    raise out_of_memory(
        t("the run needs about {need:.1f} GB of memory; {free:.1f} GB can be used",
          need=need / 1e9, free=free / 1e9),
        remedies(shapes, work, free, option.rows, option.accumulate),
    )  # fmt: skip


def _options(prepared: Prepared, shapes: Shapes, start: Decisions) -> list[tuple[Decisions, Work]]:
    """The ways to do a run: micro-batches, larger ones first (the global batch stays), and then how
    much is computed again; the last one needs the least memory."""
    rows, accumulate = start.rows, start.accumulate
    batches = [start]
    while rows > 1 and not prepared.config.batch_size:
        rows, accumulate = rows // 2, accumulate * 2
        batches.append(dataclasses.replace(start, rows=rows, accumulate=accumulate))
    # a second copy can't be sliced
    copies = (True, False) if start.quantize == "fp8" and start.sharding == "none" else (False,)
    options = []
    for batch in batches:
        work = work_of(prepared, batch)
        every = planning.layers_reached(shapes, work)
        dial = _dial(prepared.config.checkpointing, prepared.config.method, work.device, every)
        for layers, offload in dial:
            for copy in copies:
                option = dataclasses.replace(
                    batch, recompute_layers=layers, offload=offload, second_copy=copy
                )
                same = dataclasses.replace(
                    work, recompute_layers=layers, offload=offload, second_copy=copy
                )
                options.append((option, same))
    return options


def _dial(wanted: str, method: str, device: str, every: int) -> list[tuple[int, bool]]:
    """Numbers of recomputed layers, and whether their inputs leave the device, that `wanted`
    (auto, none, full, offload or a number) allows; less memory later."""
    if wanted == "auto":
        if method == "prefix":  # see methods.check_method
            return [(0, False)]
        away = [(every, True)] if device == "cuda" else []
        return [*((layers, False) for layers in range(every + 1)), *away]
    layers = {"none": 0, "full": every, "offload": every}.get(wanted)
    return [(min(int(wanted), every) if layers is None else layers, wanted == "offload")]


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
        recompute_layers=decisions.recompute_layers, offload=decisions.offload, micro_tokens=micro,
        micro_labels=round(micro * labels / max(1, tokens)) or 1, longest=lengths[0],
        tokens=round(tokens * epochs), labels=round(labels * epochs), keep=config.keep,
        quantize=decisions.quantize, second_copy=decisions.second_copy,
        fp8_products=decisions.fp8_products, learned_fp8=decisions.learned_fp8,
        calibrate=decisions.calibrate, compile=decisions.compile, accumulate=decisions.accumulate,
        evaluated=max(prepared.max_length, EVALUATED) if data.validation is not None else 0,
        virtual_tokens=config.learned_tokens,
        row_parameters=prepared.row_parameters,
        sharing=decisions.processes if decisions.sharding != "none" else 1,
        keep_gathered=decisions.sharding == "gradients", weights_offload=config.cpu_offload,
        learning_bytes=2 if config.pure_bf16 else 4,
        moments_bytes=planning.moments_bytes(
            config.optimizer, decisions.device, config.pure_bf16, config.kahan
        ),
    )  # fmt: skip
