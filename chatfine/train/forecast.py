"""What a run will take, told before it starts: memory, disk, time, and what auto came to."""

from __future__ import annotations

from typing import Any

import torch

from chatfine import console
from chatfine.hub.place import check_disk
from chatfine.i18n import t
from chatfine.train import machine
from chatfine.train import plan as planning
from chatfine.train.decisions import Decisions, work_of
from chatfine.train.prepare import Prepared


def predict(
    prepared: Prepared, decisions: Decisions, shapes: planning.Shapes, device: torch.device,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """The plan as plain data."""
    work = work_of(prepared, decisions)
    plan = planning.make_plan(shapes, work)
    rate = machine.measured_flops(device, decisions.torch_dtype, shapes) * decisions.processes
    return {
        "device": str(device),
        "dtype": decisions.dtype,
        "quantize": decisions.quantize,
        "batch_size": decisions.rows,
        "accumulate": decisions.accumulate,
        "packing": decisions.packing,
        "recompute_layers": decisions.recompute_layers,
        "offload": decisions.offload,
        "compile": decisions.compile,
        "fp8_products": decisions.fp8_products,
        "learned_fp8": decisions.learned_fp8,
        "calibrate": decisions.calibrate,
        "processes": decisions.processes,
        "sharding": decisions.sharding,
        "steps": steps,
        "tokens": work.tokens,
        "trained_parameters": plan.trained_parameters,
        "parameters": shapes.parameters,
        "memory_bytes": round(plan.memory_bytes),
        "free_memory_bytes": round(machine.free_memory_bytes(device, prepared.config.gpu_memory)),
        "disk_bytes": round(plan.disk_bytes),
        "seconds": plan.flop / (rate * machine.EFFICIENCY[device.type]),
    }


def show(
    prepared: Prepared, decisions: Decisions, shapes: planning.Shapes, device: torch.device,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Print the plan, refuse a disk that is too small, and return the prediction.

    Raises:
        ResourceError: the disk.
    """
    plan = predict(prepared, decisions, shapes, device, steps)
    console.heading(t("Plan"))
    rows = [
        [t("device"), f"{plan['device']}, {plan['dtype']}"],
        *_storage(decisions),
        *_positions(prepared),
        *_recomputed(decisions, shapes),
        *([[t("layers"), t("compiled")]] if decisions.compile else []),
        *([[t("products"), t("fp8, rounded from the weights")]] if decisions.learned_fp8 else []),
        *_processes(decisions),
        [t("learns"), t("{n:,} of {m:,} parameters ({method})", n=plan["trained_parameters"],
                        m=plan["parameters"], method=prepared.method)],
        [t("steps"), t("{steps} of {rows} × {accumulate} examples, {tokens:,} tokens in all",
                       steps=plan["steps"], rows=plan["batch_size"],
                       accumulate=plan["accumulate"], tokens=plan["tokens"])],
        [t("memory"), t("{need} of {free} that can be used",
                        need=console.size(plan["memory_bytes"]),
                        free=console.size(plan["free_memory_bytes"]))],
        [t("disk"), console.size(plan["disk_bytes"])],
        [t("time"), t("about {time}", time=console.duration(plan["seconds"]))],
    ]  # fmt: skip
    console.table([t("what"), t("prediction")], rows)
    _say_what_instead(prepared, decisions)
    check_disk(prepared.run, plan["disk_bytes"])
    return plan


def _storage(decisions: Decisions) -> list[list[str]]:
    kind = decisions.quantize
    if decisions.fp8_products:
        kind = t("{storage}, multiplied as fp8", storage=kind)
    if decisions.calibrate:
        kind = t("{storage}, calibrated on the training data", storage=kind)
    return [] if kind == "none" else [[t("frozen weights"), kind]]


def _say_what_instead(prepared: Prepared, decisions: Decisions) -> None:
    """Where 8-bit products of weights that learn were asked for and can't be had."""
    if prepared.config.fp8_products == "off" or decisions.learned_fp8:
        return
    if decisions.sharding != "none":
        why = t("--fp8-products on is ignored: each process holds only its share of a weight")
    else:
        why = t("--fp8-products on needs an NVIDIA card of compute capability 8.9 or later, and "
                "bf16; this run multiplies in {dtype} instead", dtype=decisions.dtype)  # fmt: skip
    console.warn(why)


def _recomputed(decisions: Decisions, shapes: planning.Shapes) -> list[list[str]]:
    if not decisions.recompute_layers:
        return []
    text = t("{n} of {m} layers", n=decisions.recompute_layers, m=shapes.layers)
    if decisions.offload:
        text = t("{layers}, whose inputs wait in the CPU's memory", layers=text)
    return [[t("recomputed"), text]]


def _positions(prepared: Prepared) -> list[list[str]]:
    if prepared.positions is not None:
        return [[t("positions"), str(prepared.positions)]]
    if prepared.config.rope_scaling in ("auto", "none"):
        return []
    return [[t("positions"), t("not scaled: the model reads {n:,} tokens by itself",
                               n=prepared.model.max_positions)]]  # fmt: skip


def _processes(decisions: Decisions) -> list[list[str]]:
    if decisions.processes == 1:
        return []
    kinds = {
        "none": t("each holds the whole model"),
        "full": t("each holds a share of every weight"),
        "gradients": t("each holds a share of every weight between steps"),
    }
    return [[t("processes"), f"{decisions.processes}, {kinds[decisions.sharding]}"]]
