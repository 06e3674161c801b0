"""Memory, time and disk of a training run before it starts, from shapes alone.

The memory model counts what a training step keeps alive: weights, what learns with its gradient and
moments, the activations the backward pass needs, the logits of one block, and what the libraries
take themselves. Predicted against measured: see docs/LOG.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OVERHEAD_BYTES = {"cpu": 430e6, "cuda": 300e6, "mps": 300e6}
"""What Python and the libraries take before anything is loaded, beside a CUDA context (CPU:
resident memory)."""
HEAD_BLOCK_BYTES = 64 * 2**20
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
    compile: bool = False
    virtual_tokens: int = 0  # what prefix and llama-adapter learn
    row_parameters: int = 0  # numbers in rows of embedding and head that learn
    sharing: int = 1  # processes that share the weights
    keep_gathered: bool = False  # gathered weights stay until the backward pass
    weights_offload: bool = False  # this process's slices wait in the CPU's memory
    learning_bytes: int = 4  # of a number that learns; its gradient has as many
    moments_bytes: float = 8  # of its optimizer state


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


def _activations_a_token(shapes: Shapes, work: Work) -> float:
    """Bytes one token keeps alive in one decoder layer until its backward pass.

    Two norms keep their input and their normalised output; attention keeps q, k, v and its output;
    the MLP keeps gate, its activation and up. A linear keeps its input only where something on it
    learns.
    """
    if work.method in ("prefix", "llama-adapter"):  # on no linear, but attention has more to keep
        kept = 4 * shapes.hidden + 5 * shapes.query + 2 * shapes.key + 3 * shapes.intermediate
        return float(kept * work.dtype_bytes)
    everything = work.method in ("full", "freeze") or not work.targets
    targets = set(shapes.linears) if everything else set(work.targets)
    if work.method == "rows":
        targets = set()
    numbers: float = 4 * shapes.hidden + 2 * shapes.query + 2 * shapes.key + 3 * shapes.intermediate
    inputs = {"q_proj": shapes.hidden, "o_proj": shapes.query, "gate_proj": shapes.hidden,
              "down_proj": shapes.intermediate}  # fmt: skip
    aliases = {
        "q_proj": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
        "gate_proj": {"gate_proj", "up_proj"},
    }
    for name, size in inputs.items():
        if aliases.get(name, {name}) & targets:
            numbers += size
    if work.method == "dora":  # PEFT's own forward keeps the base's and the adapter's output too
        numbers *= 2.2
    return numbers * work.dtype_bytes


def layers_reached(shapes: Shapes, work: Work) -> int:
    """How many of the last layers the backward pass goes through, and so keep something for it."""
    through_all = work.method == "full" or work.row_parameters > 0
    return shapes.layers if through_all else work.layers or shapes.layers


def _alive_layers(shapes: Shapes, work: Work) -> int:
    """How many layers hold everything at the peak: those that keep it or, when these are done, the
    one that computes it again (see `model.recompute`)."""
    kept = layers_reached(shapes, work) - work.recompute_layers
    return max(kept, 1 if work.recompute_layers else 0)


def _waiting_inputs(work: Work) -> int:
    """How many inputs of recomputed layers lie on the device: all, or one in use and one on its way
    to the CPU's memory or back."""
    away = work.offload and work.device == "cuda"
    return min(work.recompute_layers, 2) if away else work.recompute_layers


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
    """How many tokens of a row go through an MLP at once; 0 = all of them."""
    return PIECE_TOKENS if work.recompute_layers and work.micro_tokens > LONG_ROW_TOKENS else 0


def _spared_bytes(shapes: Shapes, work: Work) -> float:
    """What pieces keep from being alive: of all tokens but one piece what is inside the MLPs."""
    piece = piece_tokens(work)
    if not piece or not {"gate_proj", "up_proj", "down_proj"} <= shapes.linears.keys():
        return 0.0
    outside = _activations_a_token(dataclasses.replace(shapes, intermediate=0), work)
    inside = _activations_a_token(shapes, work) - outside
    in_flight = 4 * shapes.intermediate * work.dtype_bytes
    whole = _alive_layers(shapes, work) * work.micro_tokens
    return (whole - piece) * inside + (work.micro_tokens - piece) * in_flight


def make_plan(shapes: Shapes, work: Work) -> Plan:
    """Predict what `work` on a model of these `shapes` takes."""
    learning = trained_parameters(shapes, work)
    frozen = shapes.parameters - (learning if work.method in ("full", "freeze") else 0)
    a_token = _activations_a_token(shapes, work)
    an_input = shapes.hidden * work.dtype_bytes
    kept = _waiting_inputs(work) * an_input + _alive_layers(shapes, work) * a_token
    transient = 4 * shapes.intermediate * work.dtype_bytes  # gradients in flight in one MLP
    block = min(HEAD_BLOCK_BYTES, 4 * shapes.vocab * work.micro_labels)
    states = 3 * work.micro_labels * shapes.hidden * 4
    own = 0 if work.weights_offload else 1 / work.sharing
    weights: float = frozen * work.dtype_bytes
    if work.quantize != "none":
        weights += packed_bytes(shapes, work.quantize, work.second_copy)
        weights += _unpacked_bytes(shapes, work) - shapes.body_parameters * work.dtype_bytes
    masters = work.method in ("full", "freeze")
    state = work.learning_bytes + work.moments_bytes  # gradient and moments
    if masters:
        low = work.dtype_bytes if work.sharing == 1 else 0  # autocast's copies
        weights += learning * (work.learning_bytes + (low if low < work.learning_bytes else 0))
        training = learning * state * own
    else:
        training = float(learning * (work.learning_bytes + state))
    return Plan(
        weights_bytes=weights * own + _gathered_bytes(shapes, work),
        training_bytes=training,
        activation_bytes=(kept + transient) * work.micro_tokens - _spared_bytes(shapes, work),
        logits_bytes=3 * block + states,
        overhead_bytes=OVERHEAD_BYTES[work.device],
        disk_bytes=disk_bytes(learning, work.keep),
        flop=_flop(shapes, work),
        trained_parameters=learning,
        host_bytes=(work.recompute_layers - _waiting_inputs(work)) * an_input * work.micro_tokens,
    )


def _unpacked_bytes(shapes: Shapes, work: Work) -> float:
    """One linear at a time is unpacked; of an fp8 one only a transposed copy is made."""
    largest = max((out * into for out, into, _ in shapes.linears.values()), default=0)
    if work.quantize == "fp8":
        return 0.0 if work.second_copy else largest
    return largest * work.dtype_bytes


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
