"""What a training step has alive besides weights and moments, in bytes, and when that is the most.

Each formula lists what the layers' operations save; tests hold them against what PyTorch saves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatfine.train.plan import Shapes, Work

HEAD_BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits of one block, as `model.cross_entropy` takes them."""
READERS = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj"))
"""Linears that read the same normed states."""
FLOAT32 = 4
FP8_IN_FLIGHT = 14
"""Bytes for each number of a gradient that is rounded to 8-bit floats by plain operations: itself,
and in float32 scaled, divided and clamped."""
DORA_WEIGHT = 16
"""Bytes for each number of a weight whose norm DoRA takes in PEFT's forward: the weight, what is
added to it, that scaled, and the sum, in float32."""
BF16_MOMENTS = (4, 6)
"""Bytes of state of optimizers that round each number of it by themselves (`optim.store`)."""
ROUNDED_UPDATE = 28
"""Bytes they take for a moment for each number of the largest matrix: gradient, two moments and
weight in float32, random bits, and two sums with these."""


@dataclass(frozen=True, slots=True)
class Alive:
    """What is there at one time of a step, in bytes."""

    between: float  # kept for the backward pass, and what is computed just then
    gradients: float
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.between + self.gradients + self.logits


def at_peak(
    shapes: Shapes, work: Work, learning: int, reached: int, piece: int, own: float
) -> Alive:
    """What is alive when that is the most.

    Gradients come into being layer by layer in the backward pass, as activations go, so the most is
    alive before it, at one of its ends, or when the optimizer steps. Gradients are there in the
    forward pass too where several micro-batches add to them, and in an evaluation where a graph
    that is replayed writes them (`model.graphs`).

    Args:
        shapes, work: as of `plan.make_plan`.
        learning: how many numbers learn.
        reached: how many layers the backward pass goes through.
        piece: of how many tokens MLPs take pieces; 0 = whole rows.
        own: the share of the gradients that is this process's.
    """
    recomputed = work.recompute_layers
    gradients = learning * work.learning_bytes * own
    replays = work.compile and work.device == "cuda" and not recomputed
    early = gradients if work.accumulate > 1 else 0.0
    of_head = head_gradient_bytes(shapes, work) * own
    all_but_last = gradients * (1 - _learns_last(shapes, work, reached))
    a_layer = weights_kept_by_layer(shapes, work, learning)
    inputs = waiting_inputs(work) * an_input(shapes, work)
    flight = in_flight(shapes, work, piece or work.micro_tokens)
    kept = max(0, reached - recomputed)
    again = kept or min(1, recomputed)  # one that is computed again, once no other keeps anything
    # autocast's copies stay until the forward pass is over; compiled layers make their own, and
    # products of 8-bit floats do without
    cast = reached if autocasts(work) and not (work.compile or work.learned_fp8) else kept
    largest = max([shapes.head_parameters, *(out * i for out, i, _ in shapes.linears.values())])
    in_update = ROUNDED_UPDATE * largest if work.moments_bytes in BF16_MOMENTS else 0.0

    def layers(count: int) -> float:
        return kept_by_layers(shapes, work, count, piece)

    forward = inputs + layers(kept)
    times = (
        Alive(forward + kept * a_layer + dora_bytes(shapes, work), early),
        Alive(forward + cast * a_layer, early, head_bytes(shapes, work)),
        Alive(inputs + layers(again) + again * a_layer + flight, max(early, of_head)),
        Alive(an_input(shapes, work) + layers(1) + a_layer + flight, max(early, all_but_last)),
        Alive(inputs + a_layer + in_attention(shapes, work) if piece else 0.0, max(early, of_head)),
        Alive(in_update, gradients),
        _in_evaluation(shapes, work, gradients if replays else 0.0),
    )
    return max(times, key=lambda one: one.total)


def _in_evaluation(shapes: Shapes, work: Work, gradients: float) -> Alive:
    """While validation examples are measured, which keeps nothing but takes more tokens at once
    than a step of short examples."""
    if not work.evaluated:
        return Alive(0.0, 0.0)
    share = work.micro_labels / max(1, work.micro_tokens)
    labels = max(1, round(work.evaluated * share))
    forward = dataclasses.replace(
        work, micro_tokens=work.evaluated, micro_labels=labels, compile=False
    )
    flight = in_flight(shapes, forward, work.evaluated)
    return Alive(flight, gradients, head_bytes(shapes, forward))


def _learns_last(shapes: Shapes, work: Work, reached: int) -> float:
    """The share of the gradients that come last: those of the first layer, and of the embedding
    before it, while the layer's activations are still there."""
    if work.method != "full":
        return 1 / max(1, reached)
    embedding = max(0, shapes.parameters - shapes.body_parameters - shapes.head_parameters)
    return (embedding + shapes.body_parameters / shapes.layers) / shapes.parameters


def an_input(shapes: Shapes, work: Work) -> float:
    """The input of a layer."""
    return float(shapes.hidden * residual_bytes(work) * work.micro_tokens)


def waiting_inputs(work: Work) -> int:
    """How many inputs of recomputed layers lie on the device: all, or one in use and one on its way
    to the CPU's memory or back."""
    away = work.offload and work.device == "cuda"
    return min(work.recompute_layers, 2) if away else work.recompute_layers


def learning_linears(shapes: Shapes, work: Work) -> set[str]:
    """Names of the linears on which something learns, and which therefore keep their input."""
    if work.method in ("full", "freeze"):
        return set(shapes.linears)
    if work.method not in ("lora", "dora"):
        return set()
    return set(work.targets) & shapes.linears.keys() if work.targets else set(shapes.linears)


def autocasts(work: Work) -> bool:
    """Whether float32 weights are cast for every product (`loop.Precision`)."""
    masters = work.method in ("full", "freeze") and work.learning_bytes == FLOAT32
    return masters and work.dtype_bytes < FLOAT32 and work.sharing == 1


def residual_bytes(work: Work) -> int:
    """Of a number between layers: under autocast a float32 embedding makes float32 sums."""
    return FLOAT32 if work.method == "full" and autocasts(work) else work.dtype_bytes


def a_token(shapes: Shapes, work: Work) -> float:
    """Bytes one token keeps alive in one decoder layer until its backward pass."""
    if work.method in ("prefix", "llama-adapter"):  # on no linear, but attention has more to keep
        kept = 4 * shapes.hidden + 5 * shapes.query + 2 * shapes.key + 3 * shapes.intermediate
        return float(kept * work.dtype_bytes)
    inside = _compiled(shapes, work) if work.compile else _eager(shapes, work)
    if work.method == "lora":  # what comes out of A
        inside += work.dtype_bytes * work.rank * len(learning_linears(shapes, work))
    return float(inside)


def _compiled(shapes: Shapes, work: Work) -> int:
    """The compiler keeps what goes into products and computes what lies between again: the layer's
    input and what attention adds to it, rotated query and key, value, attention's output, gate and
    up; and the inputs of linears where something learns."""
    size, learning = work.dtype_bytes, learning_linears(shapes, work)
    numbers = shapes.hidden + 2 * (shapes.query + shapes.key) + 2 * shapes.intermediate
    numbers += sum(shapes.hidden for names in READERS if learning & set(names))
    numbers += shapes.intermediate if "down_proj" in learning else 0
    return residual_bytes(work) * shapes.hidden + size * numbers


def _eager(shapes: Shapes, work: Work) -> int:
    """A norm keeps its input in float32, and the normalised states where its weight learns.
    Attention keeps q, k, v and its output; the MLP keeps gate, its activation and up. A linear
    keeps its input only where something on it learns; autocast makes a copy for each linear."""
    size, learning = work.dtype_bytes, learning_linears(shapes, work)
    kept = _norms(shapes, work) + size * 3 * shapes.intermediate
    if work.device == "cuda" and size < FLOAT32:  # all documents at once: a key for every query
        kept += size * 4 * shapes.query
    else:  # one document after the other; then all outputs are joined for the linear behind them
        kept += size * 2 * (shapes.query + shapes.key)
        kept += size * shapes.query if "o_proj" in learning and work.method != "dora" else 0
    if work.method == "dora":
        # PEFT's forward keeps the output of each linear, and in float32 its input and the adapter's
        # outputs
        for out, into, _ in (shapes.linears[name] for name in learning):
            kept += size * out + FLOAT32 * (into + work.rank + out)
        return kept
    for names in READERS:
        copies = len(learning & set(names))
        kept += size * shapes.hidden * (copies if autocasts(work) else min(copies, 1))
    return kept + (size * shapes.intermediate if "down_proj" in learning else 0)


def _norms(shapes: Shapes, work: Work) -> int:
    """Of the two norms of a layer that is not compiled."""
    learns = work.method in ("full", "freeze")
    return 2 * shapes.hidden * (FLOAT32 + (residual_bytes(work) if learns else 0))


def kept_by_layers(shapes: Shapes, work: Work, layers: int, piece: int) -> float:
    """Bytes of so many layers at once. Where MLPs and norms go through pieces of so many tokens
    (`model.chunked`; 0 = whole rows), they keep what they read, and a piece of the rest."""
    inside = _in_pieces(shapes, work) if piece else 0.0
    bare = (a_token(shapes, work) - inside) * work.micro_tokens
    return layers * bare + (piece * inside if layers else 0)


def _in_pieces(shapes: Shapes, work: Work) -> float:
    """What of `a_token` lies within MLP and norms that go through pieces."""
    if not {"gate_proj", "up_proj", "down_proj"} <= shapes.linears.keys():
        return 0.0
    inside = a_token(shapes, work) - a_token(dataclasses.replace(shapes, intermediate=0), work)
    if not work.compile:  # the layer's input is there anyway, the second norm's is not
        inside += _norms(shapes, work) - residual_bytes(work) * shapes.hidden
    return inside


def in_attention(shapes: Shapes, work: Work) -> float:
    """What a layer has alive within its attention's backward pass, where that is more than what its
    MLP takes: MLP and norms go through pieces. What the MLP read is gone by then; there are the
    gradients of the layer's output, of attention's, and of query, key and value, and on a card that
    of the query summed up in float32."""
    size, learning = work.dtype_bytes, learning_linears(shapes, work)
    inside = _in_pieces(shapes, work)
    if not inside:  # an MLP of another build, which is not cut and takes more
        return 0.0
    bare = a_token(shapes, work) - inside
    bare -= size * shapes.hidden if learning & set(READERS[1]) else 0
    flight = residual_bytes(work) * shapes.hidden + size * 2 * (shapes.query + shapes.key)
    flight += FLOAT32 * shapes.query if work.device == "cuda" else 0
    if work.compile:  # one program: rotated gradients are written anew, the MLP's states stay
        flight += size * (shapes.query + shapes.key + 2 * shapes.hidden)
        fp8 = work.quantize == "fp8" or work.fp8_products
        flight += shapes.query + 2 * shapes.key if fp8 else 0  # codes of these gradients
    return (bare + flight) * work.micro_tokens


def weights_kept_by_layer(shapes: Shapes, work: Work, learning: int) -> float:
    """Bytes that a layer keeps of its weights in another format for its backward pass."""
    if work.learned_fp8:  # codes and a scale each row; a compiler rounds again, by the same scales
        scales = FLOAT32 * sum(out * count for out, _, count in shapes.linears.values())
        codes = 0 if work.compile else shapes.body_parameters
        return (codes + scales) / shapes.layers
    if autocasts(work):
        return shapes.body_parameters / shapes.layers * work.dtype_bytes
    if work.method == "lora" and work.dtype_bytes < FLOAT32:
        return (learning - work.row_parameters) / shapes.layers * work.dtype_bytes
    return 0.0


def in_flight(shapes: Shapes, work: Work, tokens: int) -> float:
    """Gradients and what they are made of, within one MLP of so many tokens."""
    each = 4 * work.dtype_bytes
    if (work.quantize == "fp8" or work.learned_fp8) and not work.compile:
        each = max(each, FP8_IN_FLIGHT)
    if work.method == "dora":
        each = 4 * FLOAT32
    return float(each * shapes.intermediate * tokens)


def unpacked_bytes(shapes: Shapes, work: Work) -> float:
    """What is unpacked for a product: one linear at a time, in compiled layers all that read the
    same states (`model.joined`). Of fp8 weights only a transposed copy is made; to codes of 8-bit
    floats come those with the adapters' columns behind them."""
    if work.quantize == "none":
        return 0.0
    largest = max((out * into for out, into, _ in shapes.linears.values()), default=0)
    together = max([largest, *(sum(outs) * into for outs, into, _ in _groups(shapes))])
    if work.quantize == "fp8":
        joined = work.compile and work.method == "lora"
        return 0.0 if work.second_copy else together if joined else largest
    return 2 * together if work.fp8_products else largest * work.dtype_bytes


def rounding_bytes(shapes: Shapes, work: Work) -> float:
    """What rounding a weight that learns takes beside what is kept of it (`model.learned_fp8`): its
    codes in the other order; and by plain operations, in float32, twice the weight, and itself if
    it is bf16."""
    if not work.learned_fp8:
        return 0.0
    largest = max((out * into for out, into, _ in shapes.linears.values()), default=0)
    if work.compile:
        return float(largest)
    return float(largest * FLOAT32 * (2 if work.learning_bytes == FLOAT32 else 3))


def columns_bytes(shapes: Shapes, work: Work) -> float:
    """The columns of adapters inside products of 8-bit floats (`model.lora_fp8`): three for each of
    their rank, beside the weights and beside what is transposed of them."""
    fp8 = work.quantize == "fp8" or work.fp8_products
    if not (work.compile and fp8 and work.method == "lora"):
        return 0.0
    return float(sum(3 * work.rank * len(outs) * (sum(outs) + into) * count
                     for outs, into, count in _groups(shapes)))  # fmt: skip


def _groups(shapes: Shapes) -> list[tuple[list[int], int, int]]:
    """Linears that read the same states: their outputs, their input, and how many such there
    are."""
    rest = dict(shapes.linears)
    found = []
    for names in READERS:
        some = [rest.pop(name) for name in names if name in rest]
        if some:
            found.append(([out for out, _, _ in some], some[0][1], some[0][2]))
    return found + [([out], into, count) for out, into, count in rest.values()]


def dora_bytes(shapes: Shapes, work: Work) -> float:
    """What PEFT's forward needs for a moment to take a weight's norm, with a unit matrix of the
    linear's inputs."""
    if work.method != "dora":
        return 0.0
    chosen = [shapes.linears[name] for name in learning_linears(shapes, work)]
    sizes = [DORA_WEIGHT * out * into + FLOAT32 * into**2 for out, into, _ in chosen]
    return float(max(sizes, default=0))


def head_gradient_bytes(shapes: Shapes, work: Work) -> float:
    """The float32 gradient of the head, or of its new rows, which the forward pass makes."""
    return float(FLOAT32 * _head_learns(shapes, work))


def _head_learns(shapes: Shapes, work: Work) -> float:
    if work.method == "full":
        return shapes.head_parameters
    return min(work.row_parameters / 2, shapes.head_parameters)  # the others are the embedding's


def head_bytes(shapes: Shapes, work: Work) -> float:
    """What the loss takes on top of the layers: blocks of logits, what learns of the head in the
    products' format, and the states around the last norm."""
    size, residual = work.dtype_bytes, residual_bytes(work)
    rows = HEAD_BLOCK_BYTES.get(work.device, HEAD_BLOCK_BYTES["cpu"]) // (FLOAT32 * shapes.vocab)
    block = shapes.vocab * min(max(1, rows), work.micro_labels)
    before = size if work.micro_labels > rows else 0  # the gradient of the block before
    if work.compile and not work.row_parameters:
        logits = block * (2 * size + before)  # logits, their gradient
    else:
        logits = block * (2 * FLOAT32 + before)  # in float32 twice, for the sum of exponentials
    copy = size * _head_learns(shapes, work) if work.learning_bytes > size else 0.0
    last = FLOAT32 + (residual if work.method == "full" else 0) + residual  # norm, and its output
    states = shapes.hidden * (work.micro_tokens * last + work.micro_labels * 2 * size)
    return logits + copy + head_gradient_bytes(shapes, work) + states
