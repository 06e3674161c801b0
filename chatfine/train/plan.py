"""Memory, time and disk of a training run before it starts, from shapes alone.

The memory model counts what a training step keeps alive: weights, what learns with its gradient and
moments, the activations the backward pass needs, the logits of one block, and what the libraries
take themselves. Predicted against measured: see docs/LOG.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatfine.i18n import t

if TYPE_CHECKING:
    pass

OVERHEAD_BYTES = {"cpu": 430e6, "cuda": 300e6, "mps": 300e6}
"""What Python, torch and the context take before anything is loaded (CPU: resident memory)."""
HEAD_BLOCK_BYTES = 64 * 2**20
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
    checkpointing: bool
    micro_tokens: int  # tokens of the largest micro-batch
    micro_labels: int
    longest: int  # longest document in tokens
    tokens: int  # tokens of the whole run
    labels: int
    keep: int = 2
    quantize: str = "none"  # how the frozen linears are stored
    virtual_tokens: int = 0  # what prefix and llama-adapter learn
    row_parameters: int = 0  # numbers in rows of embedding and head that learn
    sharing: int = 1  # processes that share the weights
    keep_gathered: bool = False  # gathered weights stay until the backward pass
    offload: bool = False  # this process's slices wait in the CPU's memory
    learning_bytes: int = 4  # of a number that learns; its gradient has as many
    moments_bytes: int = 8  # of its optimizer state


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


def packed_bytes(shapes: Shapes, storage: str) -> int:
    """What the linears take as `model.frozen` stores them."""

    def a_row(into: int) -> int:
        return into + 4 if storage == "int8" else -(-into // 64) * 36

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


def piece_tokens(work: Work) -> int:
    """How many tokens of a row go through an MLP at once; 0 = all of them."""
    return PIECE_TOKENS if work.checkpointing and work.micro_tokens > LONG_ROW_TOKENS else 0


def _spared_bytes(shapes: Shapes, work: Work) -> float:
    """What pieces keep from being alive: of all tokens but one piece what is inside an MLP."""
    piece = piece_tokens(work)
    if not piece or not {"gate_proj", "up_proj", "down_proj"} <= shapes.linears.keys():
        return 0.0
    outside = _activations_a_token(dataclasses.replace(shapes, intermediate=0), work)
    inside = _activations_a_token(shapes, work) - outside
    in_flight = 4 * shapes.intermediate * work.dtype_bytes
    return (work.micro_tokens - piece) * (inside + in_flight)


def make_plan(shapes: Shapes, work: Work) -> Plan:
    """Predict what `work` on a model of these `shapes` takes."""
    learning = trained_parameters(shapes, work)
    frozen = shapes.parameters - (learning if work.method in ("full", "freeze") else 0)
    a_token = _activations_a_token(shapes, work)
    through_all = work.method == "full" or work.row_parameters > 0
    active_layers = shapes.layers if through_all else work.layers or shapes.layers
    if work.checkpointing:  # each layer keeps its input; one layer is alive in full
        kept = shapes.hidden * work.dtype_bytes * active_layers + a_token
    else:
        kept = a_token * active_layers
    transient = 4 * shapes.intermediate * work.dtype_bytes  # gradients in flight in one MLP
    block = min(HEAD_BLOCK_BYTES, 4 * shapes.vocab * work.micro_labels)
    states = 3 * work.micro_labels * shapes.hidden * 4
    own = 0 if work.offload else 1 / work.sharing
    weights: float = frozen * work.dtype_bytes
    if work.quantize != "none":  # one linear at a time is unpacked
        largest = max((out * into for out, into, _ in shapes.linears.values()), default=0)
        weights += packed_bytes(shapes, work.quantize)
        weights += (largest - shapes.body_parameters) * work.dtype_bytes
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
    passes = 1 + backward + (1 if work.checkpointing else 0)
    body = 2 * shapes.body_parameters * passes * work.tokens
    in_layers = trained_parameters(shapes, work) - work.row_parameters
    adapter = 6 * in_layers * work.tokens if work.method in ("lora", "dora") else 0
    head = 2 * shapes.head_parameters * (3 if work.method == "full" else 2) * work.labels
    head += 2 * work.row_parameters * work.labels
    attention = 2 * shapes.query * work.longest * shapes.layers * 3.5 * work.tokens * 0.5
    return body + adapter + head + attention


def remedies(
    shapes: Shapes, work: Work, free_bytes: float, rows: int, accumulate: int = 1
) -> list[str]:
    """What to change so that the run fits, cheapest first; each one is checked against the plan."""
    change = dataclasses.replace
    options: list[tuple[Work, str]] = []
    if not work.checkpointing:
        options.append(
            (change(work, checkpointing=True), t("--checkpointing full (about 30 % slower)"))
        )
    if rows > 1:
        one = change(work, micro_tokens=max(work.longest, work.micro_tokens // rows),
                   micro_labels=max(1, work.micro_labels // rows))  # fmt: skip
        smaller = f"--batch-size 1 --accumulate {rows * accumulate}"
        options.append((one, t("{flags} (same result)", flags=smaller)))
        options.append((change(one, checkpointing=True), f"{smaller} --checkpointing full"))
    if work.dtype_bytes == 4 and work.device != "cpu":
        options.append((change(work, dtype_bytes=2), "--dtype bf16"))
    if work.method not in ("full", "freeze") and work.quantize == "none":
        options += [(change(work, quantize=name), f"--quantize {name}") for name in ("int8", "nf4")]
    if work.method in ("full", "freeze"):
        options.append((change(work, method="lora"), "--method lora"))
    length = work.longest // 2
    shorter = change(work, checkpointing=True, micro_tokens=length, longest=length,
                   micro_labels=min(work.micro_labels, length))  # fmt: skip
    options.append((shorter, f"--max-length {length} --batch-size 1 --checkpointing full"))
    fitting = [
        text
        for option, text in options
        if make_plan(shapes, option).memory_bytes <= free_bytes
        and not (option.method == "prefix" and option.checkpointing)
    ]
    return fitting or [t("a smaller model, or a machine with more memory")]
