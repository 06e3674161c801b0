"""What to change so that a run fits into the memory there is."""

from __future__ import annotations

import dataclasses

from chatfine.errors import ResourceError
from chatfine.i18n import t
from chatfine.train.plan import Shapes, Work, layers_reached, make_plan, moments_bytes


def remedies(
    shapes: Shapes, work: Work, free_bytes: float, rows: int, accumulate: int = 1
) -> list[str]:
    """What to change so that the run fits, cheapest first; each one is checked against the plan."""
    change, every = dataclasses.replace, layers_reached(shapes, work)

    def fits(option: Work) -> bool:
        return make_plan(shapes, option).memory_bytes <= free_bytes

    options: list[tuple[Work, str]] = []
    full = change(work, recompute_layers=every)
    if work.recompute_layers < every:
        options.append((full, t("--checkpointing full (about 30 % slower)")))
    if rows > 1:
        one = change(work, micro_tokens=max(work.longest, work.micro_tokens // rows),
                   micro_labels=max(1, work.micro_labels // rows),
                   accumulate=rows * accumulate)  # fmt: skip
        smaller = f"--batch-size 1 --accumulate {rows * accumulate}"
        options.append((one, t("{flags} (same result)", flags=smaller)))
        options.append((change(one, recompute_layers=every), f"{smaller} --checkpointing full"))
    if work.device == "cuda" and not work.offload and not fits(full):
        options.append((change(full, offload=True), "--checkpointing offload"))
    if work.dtype_bytes == 4 and work.device != "cpu":
        options.append((change(work, dtype_bytes=2), "--dtype bf16"))
    if work.method not in ("full", "freeze") and work.quantize in ("none", "fp8"):
        options += [(change(work, quantize=name, second_copy=False), f"--quantize {name}")
                    for name in ("int8", "nf4")]  # fmt: skip
    if work.method in ("full", "freeze"):
        eight = moments_bytes("adamw8bit")
        if work.moments_bytes > eight and work.sharing == 1:
            small = change(work, moments_bytes=eight)
            options.append((small, "--optimizer adamw8bit"))
        options.append((change(work, method="lora", learned_fp8=False), "--method lora"))
    if work.evaluated:
        options.append((change(work, evaluated=0), "--validation 0"))
    length = work.longest // 2
    shorter = change(work, recompute_layers=every, micro_tokens=length, longest=length,
                   micro_labels=min(work.micro_labels, length))  # fmt: skip
    options.append((shorter, f"--max-length {length} --batch-size 1 --checkpointing full"))
    fitting = [
        text
        for option, text in options
        if fits(option) and not (option.method == "prefix" and option.recompute_layers)
    ]
    return fitting or [t("a smaller model, or a machine with more memory")]


def out_of_memory(what: str, fix: list[str], why: str | None = None) -> ResourceError:
    """The refusal of a run that does not fit."""
    return ResourceError("out-of-memory", what, why=why, fix=fix)
