"""Prefix and LLaMA-Adapter: the padded loss and our decoding against PEFT's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatfine.data.batches import collate
from chatfine.errors import ModelError, UsageError
from chatfine.evaluate.loss import evaluate_loss
from chatfine.model import adapters, fast, recompute, unpacked
from chatfine.model.generate import Sampling, generate, position_limit
from chatfine.model.load import load_model
from chatfine.types import Example

METHODS = unpacked.METHODS


def examples(*lengths: int, same: int = 0) -> list[Example]:
    torch.manual_seed(7)
    begin = torch.randint(3, 300, (same,)).tolist()
    return [
        Example(begin + torch.randint(3, 300, (n,)).tolist(),
                [False] * (same + 2) + [i % 3 != 1 for i in range(n - 2)])
        for n in lengths
    ]  # fmt: skip


ROWS = examples(5, 9, 20, 12, 30, 6)


def learned(
    path: Path,
    method: str,
    dtype: torch.dtype = torch.float32,
    storage: str = "none",
    **options: Any,
) -> Any:
    model = adapters.attach(load_model(path, dtype, quantize=storage), method, **options)
    torch.manual_seed(2)
    for parameter in adapters.trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def pefts_loss(model: Any, rows: list[Example]) -> torch.Tensor:
    """The definition: each example alone through PEFT's forward with labels."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.tensor([[i if m else -100 for i, m in zip(row.ids, row.mask, strict=True)]])
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        total = total + loss * (labels[:, 1:] != -100).sum()
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in adapters.trained_parameters(model).items()}


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in a)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["none", "int8", "nf4"])
def test_loss_and_gradients_are_those_of_pefts_forward(
    tiny: Path, method: str, storage: str
) -> None:
    model = learned(tiny, method, storage=storage, virtual_tokens=5)
    ours = fast.loss_sum(model, collate(ROWS))
    theirs = pefts_loss(model, ROWS)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gap = largest_gap(gradients(model, ours), gradients(model, theirs))
    assert gap < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_beginning_changes_nothing(tiny: Path, method: str) -> None:
    rows, model = examples(5, 9, 20, same=12), learned(tiny, method)
    apart, together = collate(rows), collate(rows, share=True)
    assert together.shared > 8
    losses = [fast.loss_sum(model, batch) for batch in (apart, together)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert largest_gap(*(gradients(model, loss) for loss in losses)) < 1e-5


def test_rows_are_padded_to_twice_the_tokens_at_most() -> None:
    batch = collate(ROWS)
    groups = list(unpacked.padded(batch))
    assert [len(ids) for ids, _, _ in groups] == [2, 3, 1]  # 30 20 | 12 9 6 | 5
    assert sum(ids.numel() for ids, _, _ in groups) < 2 * batch.tokens
    assert sum(int(mask.sum()) for _, _, mask in groups) == batch.tokens
    assert sum(int((labels != -100).sum()) for _, labels, _ in groups) == batch.supervised
    for ids, labels, mask in groups:
        where = labels[:, :-1] != -100
        assert torch.equal(labels[:, :-1][where], ids[:, 1:][where])
        assert bool(mask[:, 1:][where].all())


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_16_bits_computes_nearly_the_same(tiny: Path, method: str) -> None:
    exact, half = (learned(tiny, method, dtype) for dtype in (torch.float32, torch.bfloat16))
    losses = [fast.loss_sum(model, collate(ROWS)) for model in (exact, half)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-2)
    grads = gradients(half, losses[1])
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert largest_gap(grads, gradients(exact, losses[0])) < 0.2


def test_recomputed_activations_give_llama_adapter_the_same_gradients(tiny: Path) -> None:
    model = learned(tiny, "llama-adapter").train()
    plain = gradients(model, fast.loss_sum(model, collate(ROWS)))
    recompute.install(fast.causal_model(model), 99)
    assert largest_gap(gradients(model, fast.loss_sum(model, collate(ROWS))), plain) < 1e-6


def test_heads_that_are_more_than_a_matrix(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    model = learned(tmp_path, "prefix", virtual_tokens=4)
    assert fast._plain_head(fast.causal_model(model)) is None
    wanted = pefts_loss(model, ROWS[:3]).item()
    assert fast.loss_sum(model, collate(ROWS[:3])).item() == pytest.approx(wanted, rel=1e-5)


def test_evaluation_uses_the_same_loss(tiny: Path) -> None:
    model = learned(tiny, "prefix")
    batch = collate(ROWS)
    found = evaluate_loss(model, [batch])
    assert found.nats == pytest.approx(fast.loss_sum(model, batch).item(), rel=1e-6)
    base = evaluate_loss(load_model(tiny, torch.float32), [batch])
    assert abs(found.nats - base.nats) > 0.1


def test_a_zero_gate_starts_as_the_base_model(tiny: Path) -> None:
    model = adapters.attach(load_model(tiny, torch.float32), "llama-adapter")
    base = fast.loss_sum(load_model(tiny, torch.float32), collate(ROWS)).item()
    assert fast.loss_sum(model, collate(ROWS)).item() == pytest.approx(base, rel=1e-6)


# -- what learns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        # two layers, two key heads of 16; hidden 64
        ("prefix", {"virtual_tokens": 30}, 30 * 2 * 2 * 32),
        ("llama-adapter", {"virtual_tokens": 10}, 2 * (10 * 64 + 1)),
        ("llama-adapter", {"virtual_tokens": 3, "adapter_layers": 1}, 3 * 64 + 1),
    ],
)
def test_how_many_numbers_learn(
    tiny: Path, method: str, options: dict[str, Any], wanted: int
) -> None:
    model = adapters.attach(load_model(tiny, torch.float32), method, **options)
    assert adapters.count_parameters(model)[0] == wanted
    kinds = {one.dtype for one in adapters.trained_parameters(model).values()}
    assert kinds == {torch.float32}


def test_more_layers_than_there_are_is_an_error(tiny: Path) -> None:
    with pytest.raises(UsageError, match="--adapter-layers is 3; the model has 2 layers"):
        adapters.attach(load_model(tiny, torch.float32), "llama-adapter", adapter_layers=3)


def test_an_architecture_that_peft_does_not_know_is_an_error(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not work with Qwen2ForCausalLM") as caught:
        adapters.attach(load_model(tmp_path, torch.float32), "llama-adapter")
    assert "qwen2" in str(caught.value.why)


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_pefts_likeliest_tokens(tiny: Path, method: str, dtype: torch.dtype) -> None:
    """PEFT's `generate` is no judge: under transformers 5.24 it leaves the prefix out."""
    model = learned(tiny, method, dtype).eval()
    prompts = [ROWS[3].ids, ROWS[2].ids, [*ROWS[3].ids, 9, 8]]  # two share a beginning
    found = generate(model, prompts, [2], Sampling(8))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                row = torch.tensor([ids])
                logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
            ids.append(int(logits[0, -1].argmax()))
        wanted = ids[len(prompt) :]
        assert answer == (wanted[: wanted.index(2)] if 2 in wanted else wanted)
    alone = [generate(model, [prompt], [2], Sampling(8))[0] for prompt in prompts]
    assert found == alone
    bare = load_model(tiny, dtype)
    assert found != generate(bare, prompts, [2], Sampling(8))
    with model.disable_adapter():
        assert generate(model, prompts, [2], Sampling(8)) == generate(
            bare, prompts, [2], Sampling(8)
        )


def test_a_shared_prompt_is_read_once_after_the_prefix(tiny: Path) -> None:
    model = learned(tiny, "prefix", virtual_tokens=4)
    long = ROWS[2].ids
    prompts = [[*long, 5], [*long, 6, 7], [*long, 8, 9, 10]]
    found = generate(model, prompts, [2], Sampling(6))
    assert found == [generate(model, [prompt], [2], Sampling(6))[0] for prompt in prompts]


def test_a_prefix_takes_room_from_the_positions(tiny: Path) -> None:
    model = learned(tiny, "prefix", virtual_tokens=30)
    assert position_limit(model) == 512 - 30
    assert position_limit(learned(tiny, "llama-adapter")) == 512
    with model.disable_adapter():
        assert position_limit(model) == 512


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_an_adapter_folder_is_pefts_and_comes_back(
    tiny: Path, method: str, storage: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = learned(tiny, method, storage=storage)
    adapters.save_adapter(model, tmp_path, {"base": str(tiny)})
    loss = fast.loss_sum(model, collate(ROWS)).item()
    for trainable in (False, True):
        again = adapters.load_adapter(
            load_model(tiny, torch.float32, quantize=storage), tmp_path, trainable
        )
        assert fast.loss_sum(again, collate(ROWS)).item() == loss
        names = adapters.trained_parameters(again).keys()
        assert names == (adapters.trained_parameters(model).keys() if trainable else set())
    if storage == "none":
        plain = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        theirs = pefts_loss(PeftModel.from_pretrained(plain, tmp_path), ROWS).item()
        assert theirs == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_learning_keeps_float32_numbers_on_a_16_bit_base(
    tiny: Path, method: str, tmp_path: Path
) -> None:
    model = learned(tiny, method, torch.bfloat16)
    adapters.save_adapter(model, tmp_path, {})
    again = adapters.load_adapter(load_model(tiny, torch.bfloat16), tmp_path, trainable=True)
    before = adapters.trained_parameters(model)
    for name, parameter in adapters.trained_parameters(again).items():
        assert torch.equal(parameter, before[name]), name


def test_an_adapter_of_another_method_is_named(tiny: Path, tmp_path: Path) -> None:
    adapters.save_adapter(learned(tiny, "prefix"), tmp_path, {})
    again = adapters.load_adapter(load_model(tiny, torch.float32), tmp_path, trainable=True)
    adapters.require_method(again, "prefix")
    for method in ("lora", "llama-adapter"):
        with pytest.raises(UsageError, match=f"not made by --method {method}") as caught:
            adapters.require_method(again, method)
        assert caught.value.fix == ("--method prefix",)


def test_a_damaged_prefix_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapters.save_adapter(learned(tiny, "prefix"), tmp_path, {})
    file = tmp_path / "adapter_model.safetensors"
    assert list(load_file(file)) == ["prompt_embeddings"]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError) as caught:
        adapters.load_adapter(load_model(tiny, torch.float32), tmp_path)
    assert caught.value.code == "adapter-unusable"
