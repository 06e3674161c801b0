"""Packed rows against single documents in transformers' own eager attention, and the fused loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from chatfine.data.batches import collate
from chatfine.errors import ModelError
from chatfine.evaluate.loss import evaluate_loss
from chatfine.model import attention, cross_entropy, documents, fast
from chatfine.types import Batch, Example

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0, "embd_pdrop": 0,
        "attn_pdrop": 0}  # fmt: skip
MODELS: dict[str, tuple[type, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)),
    "llama-tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    ),
    "mistral-window": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**SIZES, sliding_window=3),
    ),
    "qwen2-window": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
    ),
    "gemma2-capped": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            **SIZES,
            head_dim=8,
            sliding_window=3,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        ),
    ),
    "granite-scaled": (
        transformers.GraniteForCausalLM,
        transformers.GraniteConfig(**SIZES, logits_scaling=2.0),
    ),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
}
LENGTHS = (1, 2, 3, 7, 16, 5)


def build(name: str, dtype: torch.dtype = torch.float32, kind: str = "eager") -> Any:
    """A model whose random weights are large enough for attention to be far from uniform."""
    cls, config = MODELS[name]
    torch.manual_seed(3)
    model = cls._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype).eval()
    if kind != "eager":
        attention.install(model)
    return model


def examples(lengths: tuple[int, ...] = LENGTHS, beginning: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(5)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=draw).tolist()

    same = tokens(beginning)
    return [
        Example(same + tokens(n), [False] * beginning + [i % 3 != 1 for i in range(n)])
        for n in lengths
    ]


def slow_loss(model: Any, rows: list[Example]) -> torch.Tensor:
    """The definition: each document alone, all its logits, cross entropy of the trained tokens."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(
            [i if m else -100 for i, m in zip(row.ids, row.mask, strict=False)][1:]
        )
        total = total + F.cross_entropy(logits, labels.long(), reduction="sum")
    return total


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the size of each gradient."""
    assert a.keys() == b.keys()
    assert a
    return max(
        ((a[n] - b[n]).norm() / (1e-12 + torch.maximum(a[n].norm(), b[n].norm()))).item() for n in a
    )


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_single_documents(name: str) -> None:
    rows, model = examples(), build(name)
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row.ids])).logits[0] for row in rows])
        attention.install(model)
        packed = model(**fast.model_inputs(collate(rows))).logits[0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(packed, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_and_all_gradients_are_those_of_single_documents(name: str) -> None:
    rows, model = examples(), build(name)
    wanted = slow_loss(model, rows)
    wanted.backward()
    slow = gradients(model)
    attention.install(model)
    loss = fast.loss_sum(model, collate(rows))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert largest_gap(gradients(model), slow) < 1e-5


def test_in_float64_they_agree_to_ten_digits() -> None:
    """With GPT-2, because the norms of the others compute in float32 whatever they are given."""
    rows, model = examples(), build("gpt2", torch.float64)
    wanted = slow_loss(model, rows)
    wanted.backward()
    slow = gradients(model)
    attention.install(model)
    loss = fast.loss_sum(model, collate(rows))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert largest_gap(gradients(model), slow) < 1e-10


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-capped"])
def test_a_shared_beginning_changes_nothing(name: str) -> None:
    rows = examples((2, 5, 9), beginning=11)
    model = build(name, kind="fast")
    apart, together = collate(rows), collate(rows, share=True)
    assert (apart.shared, together.shared) == (0, 10)  # the eleventh predicts a trained token
    assert together.tokens == apart.tokens
    assert len(together.ids) == len(apart.ids) - 20
    losses, grads = [], []
    for batch in (apart, together):
        loss = fast.loss_sum(model, batch)
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert largest_gap(*grads) < 1e-5


def test_a_row_trains_after_an_evaluation_made_its_masks() -> None:
    model, batch = build("mistral-window", kind="fast"), collate(examples((4, 9)))
    attention._mask.cache_clear()
    evaluate_loss(model, [batch])
    fast.loss_sum(model, batch).backward()
    assert not attention._mask(9, 0, 3, torch.device("cpu")).is_inference()


def test_other_documents_of_the_row_have_no_influence() -> None:
    model = build("llama", kind="fast")
    first, second, other = examples((6, 8, 6))
    with torch.no_grad():
        one = model(**fast.model_inputs(collate([first, second]))).logits[0, 6:]
        two = model(**fast.model_inputs(collate([other, second]))).logits[0, 6:]
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-capped"])
def test_without_documents_it_is_ordinary_attention(name: str) -> None:
    """Generation: padding on the left, and a cache."""
    model = build(name)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        attention.install(model)
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[0, 2:], wanted[0, 2:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=1e-4)
        before = model(ids[1:, :5], use_cache=True)
        step = model(ids[1:, 5:], past_key_values=before.past_key_values).logits
    torch.testing.assert_close(step[0, -1], wanted[1, -1], atol=1e-5, rtol=1e-4)


def test_dropout_in_attention_is_applied_while_training() -> None:
    model = build("llama", kind="fast")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = collate(examples((9, 9)))
    still = fast.loss_sum(model, batch).item()
    assert still == fast.loss_sum(model, batch).item()
    model.train()
    assert fast.loss_sum(model, batch).item() != fast.loss_sum(model, batch).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("beginning", [0, 11])
def test_flash_attention_over_documents_agrees(
    name: str, beginning: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, torch.bfloat16, "fast").cuda()
    batch = collate(examples(beginning=beginning), share=True).to("cuda")
    flash = fast.loss_sum(model, batch).item()
    monkeypatch.setattr(attention, "_varlen", lambda: None)
    assert flash == pytest.approx(fast.loss_sum(model, batch).item(), rel=2e-2)


# -- models whose documents can't be kept apart ----------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_good_models_pass_the_check(name: str) -> None:
    documents.check(build(name, kind="fast"))


def unsuitable() -> Iterator[tuple[str, Any]]:
    yield (
        "own attention code",
        transformers.StableLmForCausalLM(transformers.StableLmConfig(**SIZES)),
    )
    yield "own attention code", transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=4, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    yield (
        "convolution along the row",
        transformers.Lfm2ForCausalLM(
            transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
        ),
    )


@pytest.mark.parametrize(("why", "model"), unsuitable())
def test_a_model_that_mixes_documents_is_refused(why: str, model: Any) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    attention.install(model.eval())
    with pytest.raises(ModelError, match="can't be trained here") as caught:
        documents.check(model)
    assert caught.value.code == "model-unsupported"
    assert type(model).__name__ in caught.value.what


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 1000])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_fused_loss_is_cross_entropy(
    chunk_rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_BYTES", {"cpu": chunk_rows * 4 * VOCAB})
    torch.manual_seed(0)
    hidden = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (count,))
    results = []
    for loss in (
        fast.linear_cross_entropy(hidden, weight, labels),
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum"),
    ):
        results.append((loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_fused_loss_skips_the_gradients_nobody_wants() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(VOCAB, 8)
    fast.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3])).backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_loss_under_autocast_is_that_of_a_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 32, requires_grad=True)
    weight = torch.randn(VOCAB, 32, requires_grad=True)
    labels = torch.randint(0, VOCAB, (9,))
    with torch.autocast("cpu", dtype):
        loss = fast.linear_cross_entropy(hidden, weight, labels)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    got = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(plain, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert ((a - b).norm() / b.norm()).item() < 1e-2


def test_the_plain_head_is_used_only_where_logits_are_plain() -> None:
    plain = {name for name in MODELS if fast._plain_head(build(name)) is not None}
    assert plain == set(MODELS) - {"gemma2-capped", "granite-scaled"}


def test_logits_are_made_only_where_a_label_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(hidden: torch.Tensor, weight: Any, labels: Any, compiled: bool) -> torch.Tensor:
        seen.append(len(hidden))
        return hidden.sum()

    monkeypatch.setattr(fast, "linear_cross_entropy", spy)
    batch: Batch = collate(examples())
    fast.loss_sum(build("llama", kind="fast"), batch)
    assert seen == [batch.supervised]
    assert 0 < batch.supervised < batch.tokens
