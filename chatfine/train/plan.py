"""Memory, time and disk of a training run before it starts, from shapes alone.

The memory model counts what a training step keeps alive: weights, what learns with its gradient and
moments, the activations the backward pass needs (`plan_activations`), the logits of one block, and
what the libraries take themselves. Predicted against measured: see docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatfine.train import plan_activations as activations

OVERHEAD_BYTES = {"cpu": 480e6, "cuda": 300e6, "mps": 300e6}
"""What Python and the libraries take before anything is loaded, beside a CUDA context (CPU:
resident memory). On a card these are workspaces of its libraries, 32 MiB each for the forward and
the backward pass on every stream; recording a graph takes five streams."""
EIGHT_BIT = ("adamw8bit", "paged-adamw8bit")
"""Optimizers of bitsandbytes; the state of a paged one leaves the device when memory is short."""
LONG_ROW_TOKENS, PIECE_TOKENS = 16384, 8192
"""From more tokens on, the MLPs of a row whose layers are recomputed go through pieces of so many
(`model.chunked`): still large enough that a product keeps a card busy."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The numbers of a model that a plan needs."""

    layers: int
    hidden: int
    intermediate: int
    query: int  # heads × head size
    key: int  # key heads × head size
    vocab: int
    parameters: int
    head_parameters: int  # output embedding, whether tied or not
    linears: Mapping[str, tuple[int, int, int]]  # name → (out, in, how many)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], parameters: int
    ) -> Shapes:
        """From a model's config.json (its text part) and the shapes of its tensors."""
        hidden, heads = int(config["hidden_size"]), int(config.get("num_attention_heads", 1))
        size = int(config.get("head_dim") or hidden // heads)
        linears: dict[str, tuple[int, int, int]] = {}
        for name, shape in tensors.items():
            parts = name.split(".")
            if len(shape) == 2 and parts[-1] == "weight" and "layers" in parts:
                out, into, count = linears.get(parts[-2], (shape[0], shape[1], 0))
                linears[parts[-2]] = (out, into, count + 1)
        vocab = int(config["vocab_size"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config.get("intermediate_size") or 4 * hidden),
            query=heads * size,
            key=int(config.get("num_key_value_heads") or heads) * size,
            vocab=vocab,
            parameters=parameters,
            head_parameters=vocab * hidden,
            linears=linears,
        )

    @property
    def body_parameters(self) -> int:
        """Weights that multiply every token."""
        return sum(out * into * count for out, into, count in self.linears.values())


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done with a model."""

    method: str
    rank: int
    targets: tuple[str, ...]  # empty = all linears
    layers: int  # how many of the last layers learn; 0 = all
    dtype_bytes: int
    device: str
    recompute_layers: int  # how many of the layers that learn keep their input only
    micro_tokens: int  # tokens of the largest micro-batch
    micro_labels: int
    longest: int  # longest document in tokens
    tokens: int  # tokens of the whole run
    labels: int
    keep: int = 2
    offload: bool = False  # the inputs of those layers wait in the CPU's memory
    quantize: str = "none"  # how the frozen linears are stored
    second_copy: bool = False  # with fp8: a transposed copy of them, for the backward pass
    fp8_products: bool = False  # with nf4: unpacked to 8-bit floats
    calibrate: bool = False  # the packed linears are kept in the run folder
    learned_fp8: bool = False  # weights that learn are rounded to 8-bit floats for products
    compile: bool = False
    virtual_tokens: int = 0  # what prefix and llama-adapter learn
    row_parameters: int = 0  # numbers in rows of embedding and head that learn
    sharing: int = 1  # processes that share the weights
    keep_gathered: bool = False  # gathered weights stay until the backward pass
    weights_offload: bool = False  # this process's slices wait in the CPU's memory
    learning_bytes: int = 4  # of a number that learns; its gradient has as many
    moments_bytes: float = 8  # of its optimizer state
    accumulate: int = 1  # micro-batches of a step
    evaluated: int = 0  # tokens of a micro-batch of an evaluation; 0 = there is none


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted needs of a run, in bytes, seconds and numbers."""

    weights_bytes: float
    training_bytes: float
    activation_bytes: float
    logits_bytes: float
    overhead_bytes: float
    disk_bytes: float
    flop: float
    trained_parameters: int
    host_bytes: float = 0.0  # of the CPU's memory, beside a device's

    @property
    def memory_bytes(self) -> float:
        """Predicted peak memory."""
        parts = (self.weights_bytes, self.training_bytes, self.activation_bytes,
                 self.logits_bytes, self.overhead_bytes)  # fmt: skip
        return sum(parts)


def trained_parameters(shapes: Shapes, work: Work) -> int:
    """How many numbers learn."""
    return work.row_parameters + learning_parameters(
        shapes, work.method, work.rank, work.targets, work.layers, work.virtual_tokens
    )


def learning_parameters(
    shapes: Shapes, method: str, rank: int, targets: Sequence[str], layers: int,
    virtual_tokens: int = 0,
) -> int:  # fmt: skip
    """How many numbers learn under a method in the last `layers`; no `targets` are all linears."""
    if method == "full":
        return shapes.parameters
    if method == "rows":
        return 0
    if method == "prefix":  # a key and a value in every layer
        return virtual_tokens * shapes.layers * 2 * shapes.key
    if method == "llama-adapter":  # tokens and a gate in each
        return (layers or shapes.layers) * (virtual_tokens * shapes.hidden + 1)
    share = (layers or shapes.layers) / shapes.layers
    if method == "freeze":
        return round(shapes.body_parameters * share)
    chosen = {n: v for n, v in shapes.linears.items() if not targets or n in targets}
    extra = sum(out * count for out, _, count in chosen.values()) if method == "dora" else 0
    adapters = sum(rank * (out + into) * count for out, into, count in chosen.values())
    return round((extra + adapters) * share)


def packed_bytes(shapes: Shapes, storage: str, second_copy: bool = False) -> int:
    """What the linears take as `model.frozen` stores them, with fp8 perhaps twice."""

    def a_row(into: int) -> int:
        return -(-into // 64) * 36 if storage.startswith("nf4") else into * (1 + second_copy) + 4

    return sum(out * a_row(into) * count for out, into, count in shapes.linears.values())


def targets_of(targets: str) -> tuple[str, ...]:
    """The names in `--targets`; empty for all linears."""
    names = () if targets == "all-linear" else targets.split(",")
    return tuple(name.strip() for name in names if name.strip())


def disk_bytes(learning: int, keep: int) -> float:
    """Weights and two moments in float32 for each checkpoint that stays, the best and the one
    being written, and the result."""
    return learning * 12 * (keep + 2) + learning * 4


def layers_reached(shapes: Shapes, work: Work) -> int:
    """How many of the last layers the backward pass goes through, and so keep something for it."""
    through_all = work.method == "full" or work.row_parameters > 0
    return shapes.layers if through_all else work.layers or shapes.layers


def moments_bytes(
    optimizer: str, device: str = "cuda", pure_bf16: bool = False, kahan: bool = False
) -> float:
    """Bytes of optimizer state for each number that learns."""
    if optimizer == "anyprecision":
        return 6 if kahan else 4
    if optimizer in EIGHT_BIT:
        paged = optimizer.startswith("paged") and device == "cuda"
        return 0 if paged else 2 + 8 / 256  # two bytes, and two scales for 256 numbers
    return 4 if pure_bf16 else 8


def piece_tokens(work: Work) -> int:
    """How many tokens of a row go through an MLP at once; 0 = all of them: a compiled product of
    8-bit floats would be kept for all pieces, see docs/LOG.md."""
    if work.learned_fp8 and work.compile:
        return 0
    return PIECE_TOKENS if work.recompute_layers and work.micro_tokens > LONG_ROW_TOKENS else 0


def make_plan(shapes: Shapes, work: Work) -> Plan:
    """Predict what `work` on a model of these `shapes` takes."""
    learning = trained_parameters(shapes, work)
    masters = work.method in ("full", "freeze")
    frozen = shapes.parameters - (learning if masters else 0)
    own = 0 if work.weights_offload else 1 / work.sharing
    weights: float = frozen * work.dtype_bytes
    if work.quantize != "none":
        weights += packed_bytes(shapes, work.quantize, work.second_copy)
        weights += activations.unpacked_bytes(shapes, work)
        weights += activations.columns_bytes(shapes, work)
        weights -= shapes.body_parameters * work.dtype_bytes
    state = learning * work.moments_bytes
    if masters:
        weights += learning * work.learning_bytes + activations.rounding_bytes(shapes, work)
    else:
        state += learning * work.learning_bytes
    kept = packed_bytes(shapes, work.quantize) if work.calibrate else 0
    part = own if masters else 1  # adapters are whole in every process
    peak = activations.at_peak(
        shapes, work, learning, layers_reached(shapes, work), piece_tokens(work), part
    )
    away = work.recompute_layers - activations.waiting_inputs(work)
    return Plan(
        weights_bytes=weights * own + _gathered_bytes(shapes, work),
        training_bytes=state * part + peak.gradients,
        activation_bytes=peak.between,
        logits_bytes=peak.logits,
        overhead_bytes=OVERHEAD_BYTES[work.device],
        disk_bytes=disk_bytes(learning, work.keep) + kept,
        flop=_flop(shapes, work),
        trained_parameters=learning,
        host_bytes=away * activations.an_input(shapes, work),
    )


def _gathered_bytes(shapes: Shapes, work: Work) -> float:
    """What a process holds of the others' shares: embedding and head, and two layers (one
    computes while the next arrives) or all of them."""
    if work.sharing == 1:
        return 0.0
    body, ends = shapes.body_parameters, shapes.parameters - shapes.body_parameters
    size = body * work.dtype_bytes
    if work.quantize != "none":
        size = packed_bytes(shapes, work.quantize)
    part = 1.0 if work.keep_gathered else min(1.0, 2 / shapes.layers)
    gradients = 2 * body / shapes.layers * 4 if work.method == "full" else 0.0
    return part * size + ends * work.dtype_bytes + gradients


def _flop(shapes: Shapes, work: Work) -> float:
    """Floating-point operations of all products of the run (2 per multiply-add)."""
    reached = shapes.layers if work.row_parameters else work.layers or shapes.layers
    share = reached / shapes.layers
    backward = {"full": 2.0, "freeze": 2 * share}.get(work.method, share)
    passes = 1 + backward + work.recompute_layers / shapes.layers
    body = 2 * shapes.body_parameters * passes * work.tokens
    in_layers = trained_parameters(shapes, work) - work.row_parameters
    adapter = 6 * in_layers * work.tokens if work.method in ("lora", "dora") else 0
    head = 2 * shapes.head_parameters * (3 if work.method == "full" else 2) * work.labels
    head += 2 * work.row_parameters * work.labels
    attention = 2 * shapes.query * work.longest * shapes.layers * 3.5 * work.tokens * 0.5
    return body + adapter + head + attention


SMALL_BATCH_TOKENS, BATCH_TOKENS = 2048, 512
"""A GPU works at its rate from so many tokens a micro-batch on; a smaller one costs, beside its
tokens, as much as so many more: weights are read and operations launched for few products."""
SINGLE_COPY, OFFLOADED = 1.03, 1.05
"""Times as long: fp8 without its second copy, and with inputs that go to the CPU's memory."""


def relative_time(shapes: Shapes, work: Work) -> float:
    """How long the run takes, in a unit that two ways of doing the same run on the same device have
    in common."""
    time = _flop(shapes, work)
    if work.device == "cuda" and work.micro_tokens < SMALL_BATCH_TOKENS:
        full = 1 + BATCH_TOKENS / SMALL_BATCH_TOKENS
        time *= (1 + BATCH_TOKENS / work.micro_tokens) / full
    if work.quantize == "fp8" and not work.second_copy:
        time *= SINGLE_COPY
    return time * OFFLOADED if work.offload else time
