"""The plan grows with what costs, counts what learns exactly, and its remedies fit."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from chatfine.commands.plan import plan as plan_command
from chatfine.config import PlanConfig, TrainConfig
from chatfine.errors import ResourceError, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.model import adapters, cross_entropy, fp8, joined, learned_fp8
from chatfine.model.load import load_model
from chatfine.train import machine
from chatfine.train import plan as planning
from chatfine.train import plan_activations as planned
from chatfine.train.decisions import decide, work_of
from chatfine.train.loop import Precision
from chatfine.train.plan import Shapes, Work, make_plan
from chatfine.train.prepare import prepare
from chatfine.train.remedies import remedies

Configure = Callable[..., TrainConfig]

LLAMA_8B = Shapes(
    layers=32, hidden=4096, intermediate=14336, query=4096, key=1024, vocab=128256,
    parameters=8_030_261_248, head_parameters=128256 * 4096,
    linears={"q_proj": (4096, 4096, 32), "k_proj": (1024, 4096, 32), "v_proj": (1024, 4096, 32),
             "o_proj": (4096, 4096, 32), "gate_proj": (14336, 4096, 32),
             "up_proj": (14336, 4096, 32), "down_proj": (4096, 14336, 32)},
)  # fmt: skip
WORK = Work(
    method="lora", rank=8, targets=(), layers=0, dtype_bytes=2, device="cuda",
    recompute_layers=0, micro_tokens=4096, micro_labels=2000, longest=2048, tokens=10**6,
    labels=5 * 10**5,
)  # fmt: skip


def memory(**changes: Any) -> float:
    return make_plan(LLAMA_8B, dataclasses.replace(WORK, **changes)).memory_bytes


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("micro_tokens", [128, 1024, 4096, 16384]),
        ("micro_labels", [16, 512, 2000, 8192]),
        ("rank", [1, 8, 64, 256]),
        ("dtype_bytes", [2, 4]),
        ("recompute_layers", [31, 16, 8, 1, 0]),
        ("method", ["lora", "dora"]),
        ("method", ["freeze", "full"]),
        ("layers", [2, 8, 32]),
        ("targets", [("q_proj",), ("q_proj", "v_proj"), ()]),
    ],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_of_it_needs_more_memory(name: str, values: list[Any], method: str) -> None:
    if name == "layers":
        method = "freeze"
    elif method == "full" and name in ("rank", "method", "targets"):
        pytest.skip("does not enter full fine-tuning")
    needs = [memory(**({"method": method} | {name: value})) for value in values]
    assert needs == sorted(needs)
    if (method, name) == ("full", "micro_tokens"):  # few tokens matter less than the optimizer
        needs = needs[1:]
    assert len(set(needs)) == len(needs)


def test_orders_of_magnitude_of_a_known_model() -> None:
    """An 8B model: about 16 GB of bf16 weights; full fine-tuning in float32 about 16 bytes a
    parameter and more."""
    plan = make_plan(LLAMA_8B, WORK)
    assert plan.trained_parameters == 20_971_520  # the known number for rank 8 on all linears
    assert 16e9 < plan.weights_bytes < 16.2e9
    assert 18e9 < memory(recompute_layers=32) < 24e9
    assert memory(method="full", recompute_layers=32) > 16 * 8e9
    flop = plan.flop / WORK.tokens / LLAMA_8B.parameters
    assert 3.5 < flop < 6  # forward and one of two backward products: 2 + 2, and the rest


@pytest.mark.parametrize(
    ("method", "layers"),
    [("lora", 0), ("lora", 1), ("dora", 0), ("dora", 1), ("full", 0), ("freeze", 1)],
)
def test_it_counts_what_really_learns(
    tiny: Path, configure: Configure, method: str, layers: int
) -> None:
    settings = {"method": method, "targets": "q_proj, v_proj"}
    chosen = {"freeze_layers" if method == "freeze" else "adapter_layers": layers}
    prepared = prepare(configure(**settings, **chosen))
    shapes = Shapes.of(
        prepared.model.text_config,
        {name: info.shape for name, info in prepared.model.tensors.items()},
        prepared.model.parameters,
    )
    targets = planning.targets_of("q_proj, v_proj")
    predicted = planning.learning_parameters(shapes, method, 2, targets, layers)
    model = adapters.attach(load_model(tiny, torch.float32), rank=2, **settings, **chosen)
    real, _ = adapters.count_parameters(model)
    assert predicted == pytest.approx(real, abs=4 * 64)  # the norms of a layer


def test_adapters_on_the_last_layers_learn_there_alone(tiny: Path) -> None:
    model = adapters.attach(load_model(tiny, torch.float32), "lora", adapter_layers=1)
    names = adapters.trained_parameters(model)
    assert names
    assert all(".layers.1." in name for name in names)
    with pytest.raises(UsageError, match="--adapter-layers is 3; the model has 2 layers"):
        adapters.attach(load_model(tiny, torch.float32), "lora", adapter_layers=3)


def test_the_disk_holds_every_checkpoint_there_can_be() -> None:
    """Those kept, the best, the one being written, each of weights and two moments, and the
    result."""
    assert planning.disk_bytes(1000, keep=2) == 1000 * (12 * 4 + 4)


@pytest.mark.parametrize("free_gb", [17, 20, 25, 40])
def test_each_remedy_fits(free_gb: int) -> None:
    work = dataclasses.replace(WORK, micro_tokens=16384, micro_labels=8000)
    assert make_plan(LLAMA_8B, work).memory_bytes > free_gb * 1e9
    found = remedies(LLAMA_8B, work, free_gb * 1e9, rows=8, accumulate=3)
    assert found
    for text in found:
        if "smaller model" in text:
            assert found == [text]
            continue
        changed = work
        if "--batch-size 1" in text and "--max-length" not in text:
            assert "--accumulate 24" in text
            changed = dataclasses.replace(changed, micro_tokens=2048, micro_labels=1000)
        if "--checkpointing full" in text:
            changed = dataclasses.replace(changed, recompute_layers=32)
        if "--checkpointing offload" in text:
            changed = dataclasses.replace(changed, recompute_layers=32, offload=True)
        if length := re.search(r"--max-length (\d+)", text):
            n = int(length[1])
            changed = dataclasses.replace(changed, micro_tokens=n, longest=n, micro_labels=n)
        assert changed != work, text
        assert make_plan(LLAMA_8B, changed).memory_bytes <= free_gb * 1e9, text


def test_an_evaluation_that_does_not_fit_can_be_left_out() -> None:
    work = dataclasses.replace(WORK, micro_tokens=64, micro_labels=64, longest=64, evaluated=65536)
    room = make_plan(LLAMA_8B, dataclasses.replace(work, evaluated=0)).memory_bytes + 1e8
    assert make_plan(LLAMA_8B, work).memory_bytes > room
    assert "--validation 0" in remedies(LLAMA_8B, work, room, rows=1)


def test_where_nothing_helps_it_says_so() -> None:
    assert remedies(LLAMA_8B, WORK, 1e9, rows=1) == [
        "a smaller model, or a machine with more memory"
    ]


# -- what PyTorch keeps and what was measured ------------------------------------------------------


class Watched(torch.nn.Module):
    """A decoder layer that notes what it keeps for its backward pass."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.kept = layer, 0

    def forward(self, x: torch.Tensor, **named: Any) -> Any:
        given = [*self.parameters(), *self.buffers(), *named["position_embeddings"]]
        known = {one.untyped_storage().data_ptr() for one in given}
        found: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage  # held, so that no other gets its address
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.layer(x, **named)
        self.kept = sum(storage.nbytes() for storage in found.values())
        return output


def kept_by_a_layer(folder: Path, tokens: int, work: Work, compiled: bool, **chosen: Any) -> int:
    """Bytes that the second layer keeps of two documents of so many tokens together."""
    torch._dynamo.reset()
    model = load_model(folder, torch.bfloat16)
    model = adapters.attach(model, work.method, rank=work.rank, **chosen)
    if work.learning_bytes == 2:
        model.bfloat16()
    decoder = model.train().get_decoder()
    if work.learned_fp8:
        learned_fp8.install(model)
    if compiled:  # partitioned as the compiler does, but nothing is translated
        joined.join(model)
        decoder.layers[1].compile(
            dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition"
        )
    watched = decoder.layers[1] = Watched(decoder.layers[1])
    half = tokens // 2
    documents: dict[str, Any] = {"document_lengths": (half, half)}
    if compiled:
        documents = {"document_offsets": torch.tensor([0, half, tokens], dtype=torch.int32),
                     "longest_document": half}  # fmt: skip
    ids, positions = torch.ones(1, tokens, dtype=torch.int64), torch.arange(half).repeat(2)[None]
    with Precision(torch.device("cpu"), torch.bfloat16, planned.autocasts(work)).context():
        decoder(input_ids=ids, position_ids=positions, use_cache=False,
                attention_mask=torch.zeros(1, 1, 1, 1), **documents)  # fmt: skip
    return watched.kept


@torch.library.custom_op("chatfine_tests::multiply_fp8", mutates_args=())
def as_the_card(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """`fp8.multiply_fp8` as one operation, which a compiler does not look into, as on a card."""
    return MULTIPLY(a, b, scale_a, scale_b, dtype)


@as_the_card.register_fake
def _(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return a.new_empty((len(a), len(b)), dtype=dtype)


MULTIPLY = fp8.multiply_fp8
KEPT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "lora"}, {}),
    ({"method": "lora", "targets": ("q_proj", "v_proj")}, {"targets": "q_proj,v_proj"}),
    ({"method": "dora"}, {}),
    ({"method": "rows"}, {"rows": range(400, 420)}),
    ({"method": "freeze", "layers": 2}, {"freeze_layers": 2}),
    ({"method": "full"}, {}),
    ({"method": "full", "learning_bytes": 2}, {}),
    ({"method": "full", "learned_fp8": True}, {}),
    ({"method": "full", "learned_fp8": True, "learning_bytes": 2}, {}),
    ({"method": "freeze", "layers": 2, "learned_fp8": True}, {"freeze_layers": 2}),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("changes", "chosen"), KEPT)
def test_a_token_keeps_what_autograd_keeps(
    tiny: Path, changes: dict[str, Any], chosen: dict[str, Any], compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As found on a CPU, whose attention goes from document to document."""
    for module in (fp8, learned_fp8):
        monkeypatch.setattr(module, "multiply_fp8", as_the_card)
    monkeypatch.setattr(learned_fp8, "multiplies_fp8", lambda *_: True)
    work = dataclasses.replace(WORK, device="cpu", compile=compiled, **changes)
    if compiled and work.method == "dora":
        pytest.skip("is never compiled")
    folder = read_model_folder(tiny)
    tensors = {name: info.shape for name, info in folder.tensors.items()}
    shapes = Shapes.of(folder.text_config, tensors, folder.parameters)
    few, many = (kept_by_a_layer(tiny, n, work, compiled, **chosen) for n in (64, 128))
    # the rest are sums of whole rows: of a norm's squares, of a softmax's exponentials
    assert planned.a_token(shapes, work) == pytest.approx((many - few) / 64, rel=0.03)
    if work.method == "full":  # and what it keeps of its weights, whatever the tokens
        kept = planned.weights_kept_by_layer(shapes, work, shapes.parameters)
        assert 2 * few - many == pytest.approx(kept, rel=0.01, abs=20)


def test_compiled_layers_keep_less() -> None:
    for method in ("lora", "rows", "freeze", "full"):
        eager = dataclasses.replace(WORK, method=method)
        compiled = dataclasses.replace(eager, compile=True)
        assert planned.a_token(LLAMA_8B, compiled) < planned.a_token(LLAMA_8B, eager), method
    held = memory(method="full", recompute_layers=1, accumulate=2, compile=True)
    assert held > memory(method="full", recompute_layers=1, compile=True), "gradients of the first"


def test_an_evaluation_is_the_most_where_steps_are_small() -> None:
    small = {"micro_tokens": 128, "micro_labels": 64, "recompute_layers": 32}
    assert memory(evaluated=2048, **small) > memory(**small)
    assert memory(evaluated=2048, micro_tokens=16384) == memory(micro_tokens=16384)


def test_blocks_of_logits_are_those_of_the_loss() -> None:
    assert planned.HEAD_BLOCK_BYTES == cross_entropy.HEAD_CHUNK_BYTES


def llama(
    layers: int, hidden: int, intermediate: int, key: int, vocab: int, tied: bool = False
) -> Shapes:
    sizes = {"q_proj": (hidden, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden),
             "o_proj": (hidden, hidden), "gate_proj": (intermediate, hidden),
             "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}  # fmt: skip
    linears = {name: (*size, layers) for name, size in sizes.items()}
    body = sum(out * into * layers for out, into in sizes.values())
    norms = (2 * layers + 1) * hidden
    ends = vocab * hidden * (1 if tied else 2)
    return Shapes(layers, hidden, intermediate, hidden, key, vocab, body + norms + ends,
                  vocab * hidden, linears)  # fmt: skip


LLAMA_2_7B = llama(32, 4096, 11008, 4096, 32000)
TINYLLAMA = llama(22, 2048, 5632, 256, 32000)
SMOLLM2 = llama(30, 576, 1536, 192, 49152, tied=True)
FULL_ROWS = dataclasses.replace(WORK, rank=16, micro_tokens=8192, micro_labels=8188)
TWICE = {"micro_tokens": 16384, "micro_labels": 16376}


@pytest.mark.parametrize(("shapes", "changes", "measured"), [
    (LLAMA_2_7B, {"recompute_layers": 8}, 49_742_807_040),
    (LLAMA_2_7B, {"targets": ("q_proj", "v_proj")}, 51_852_152_832),
    (llama(22, 2048, 5632, 256, 52352), {"method": "rows", "row_parameters": 83_308_544},
     17_007_325_696),
    (TINYLLAMA, {"method": "full", "recompute_layers": 22, "moments_bytes": 2 + 8 / 256},
     12_123_374_080),
    (SMOLLM2, {"method": "full", **TWICE}, 19_302_319_616),
])  # fmt: skip
def test_the_plan_is_near_a_measured_peak(
    shapes: Shapes, changes: dict[str, Any], measured: int
) -> None:
    """`benchmarks/peaks.py` on an NVIDIA H100 with torch 2.11."""
    plan = make_plan(shapes, dataclasses.replace(FULL_ROWS, **changes))
    assert -0.05 <= plan.memory_bytes / measured - 1 <= 0.10


# -- what auto comes to ----------------------------------------------------------------------------


def decide_with(
    configure: Configure, tmp_path: Path, free: float, monkeypatch: pytest.MonkeyPatch,
    **changes: Any
) -> Any:  # fmt: skip
    monkeypatch.setattr(machine, "free_memory_bytes", lambda *_: free)
    prepared = prepare(configure(**changes))
    prepared.run.mkdir(exist_ok=True)
    return prepared, decide(prepared, BIG, torch.device("cpu"))


BIG = dataclasses.replace(LLAMA_8B, layers=4, vocab=448)


def test_auto_takes_smaller_micro_batches_before_recomputation(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: Any = {"batch_size": 0, "validation": "0"}  # an evaluation would be the most
    prepared, wanted = decide_with(configure, tmp_path, 1e15, monkeypatch, **alone)
    assert (wanted.rows, wanted.accumulate, wanted.recompute_layers) == (8, 1, 0)

    def need(**changes: Any) -> float:
        option = dataclasses.replace(wanted, **changes)
        return make_plan(BIG, work_of(prepared, option)).memory_bytes

    cases = [(need(rows=2, accumulate=4), (2, 4, 0)),
             (need(rows=1, accumulate=8, recompute_layers=2), (1, 8, 2))]  # fmt: skip
    for free, chosen in cases:
        (prepared.run / "decisions.json").unlink()
        _, found = decide_with(configure, tmp_path, free + 1, monkeypatch, **alone)
        assert (found.rows, found.accumulate, found.recompute_layers) == chosen
        assert found.rows * found.accumulate == 8


def test_what_was_asked_for_is_never_changed(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError) as caught:
        decide_with(configure, tmp_path, 1e9, monkeypatch, batch_size=8, checkpointing="none")
    assert caught.value.code == "out-of-memory"
    assert caught.value.fix
    assert not (tmp_path / "run" / "decisions.json").exists()


def test_a_resumed_run_keeps_the_decisions_when_memory_is_scarcer(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = decide_with(configure, tmp_path, 1e15, monkeypatch, batch_size=0)
    _, again = decide_with(configure, tmp_path, 1.0, monkeypatch, batch_size=0)
    assert again == first


# -- the command -----------------------------------------------------------------------------------


def test_the_command_predicts_and_writes_nothing(configure: Configure, tmp_path: Path) -> None:
    config = configure(max_steps=6, accumulate=2)
    result = plan_command(PlanConfig.read(config.model_dump()))
    assert json.loads(json.dumps(result)) == result
    assert (result["steps"], result["batch_size"], result["accumulate"]) == (6, 4, 2)
    assert result["trained_parameters"] == 2 * 2 * (128 + 96 + 96 + 128 + 224 * 3)
    assert result["parameters"] > result["trained_parameters"]
    assert 0 < result["memory_bytes"] < result["free_memory_bytes"]
    assert result["seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_with_remedies_what_does_not_fit(configure: Configure) -> None:
    config = configure(gpu_memory=0.2)
    with pytest.raises(ResourceError) as caught:
        plan_command(PlanConfig.read(config.model_dump()))
    assert caught.value.code == "out-of-memory"
    assert "0.2 GB can be used" in caught.value.what
    assert caught.value.fix


def test_a_share_of_the_weights_takes_a_share_of_the_memory() -> None:
    from dataclasses import replace

    full = replace(WORK, method="full", targets=(), dtype_bytes=2)
    alone, four = make_plan(LLAMA_8B, full), make_plan(LLAMA_8B, replace(full, sharing=4))
    assert four.training_bytes == alone.training_bytes / 4
    assert four.weights_bytes < alone.weights_bytes / 2, "two layers and the embedding are gathered"
    kept = make_plan(LLAMA_8B, replace(full, sharing=4, keep_gathered=True))
    assert kept.weights_bytes > four.weights_bytes
    assert make_plan(LLAMA_8B, replace(full, sharing=4, weights_offload=True)).training_bytes == 0
    small = replace(full, learning_bytes=2, moments_bytes=4)
    assert make_plan(LLAMA_8B, small).training_bytes == alone.training_bytes / 2


def test_a_long_row_takes_the_memory_of_a_piece_of_it() -> None:
    """Far beyond the limit a token adds what lies between layers and in attention, no MLP."""
    limit, shape = planning.LONG_ROW_TOKENS, LLAMA_8B

    def activations(tokens: int, **changes: Any) -> float:
        work = dataclasses.replace(WORK, recompute_layers=32, micro_tokens=tokens, **changes)
        return make_plan(shape, work).activation_bytes

    # what heads keep, what q, k and v read, the second norm's input, 32 layers' inputs, A's outputs
    between = 4 * shape.query + 2 * shape.hidden + 32 * shape.hidden + 7 * WORK.rank
    gradients = shape.hidden + 2 * (shape.query + shape.key) + 2 * shape.query  # one in float32
    long = activations(4 * limit) - activations(4 * limit - 1)
    assert long == pytest.approx(2 * (between + gradients))
    short = activations(limit) - activations(limit - 1)
    inner = (3 + 1 + 4) * shape.intermediate * 2  # gate, up, product; down's input; in flight
    inner += (2 * 4 - 2) * shape.hidden  # what norms keep in float32 but for one's own input
    inner += 2 * shape.hidden  # what gate and up read
    assert short == pytest.approx(2 * between + inner)
    assert activations(limit + 1) < activations(limit)
    assert activations(4 * limit, targets=("q_proj",)) < activations(4 * limit)
    work = dataclasses.replace(WORK, micro_tokens=4 * limit)
    assert planning.piece_tokens(work) == 0, "without recomputation the row is whole"
    bare = dataclasses.replace(LLAMA_8B, linears={"c_fc": (14336, 4096, 32)})
    whole = make_plan(bare, dataclasses.replace(work, recompute_layers=32)).activation_bytes
    assert whole > activations(4 * limit), "an MLP of another build is not cut"
