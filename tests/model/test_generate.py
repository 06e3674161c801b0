"""Our decoding against transformers' own, on the tiny model in float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from chatfine.errors import UsageError
from chatfine.model import generate as generate_module
from chatfine.model.generate import Sampling, generate
from chatfine.model.sampling import pick

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 50], [1, *range(60, 90)], [1, 99, 12, 13]]


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


Ids = list[list[int]]


def theirs(model: torch.nn.Module, prompts: Ids, tokens: int, stop: int) -> Ids:
    """What transformers' generate answers to a left-padded batch, without stop and pad."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        full = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
            eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
    answers = []
    for row in full[:, width:].tolist():
        answers.append(row[: row.index(stop)] if stop in row else row)
    return answers


def common_stop(model: torch.nn.Module) -> int:
    """A token that ends some of the greedy answers early, at different places."""
    free = generate(model, PROMPTS, [], Sampling(max_new_tokens=24))
    counts = Counter(token for answer in free for token in set(answer[2:]))
    return counts.most_common(1)[0][0]


def test_greedy_equals_transformers_with_padding_and_early_ends(model: torch.nn.Module) -> None:
    stop = common_stop(model)
    ours = generate(model, PROMPTS, [stop], Sampling(max_new_tokens=24))
    assert ours == theirs(model, PROMPTS, 24, stop)
    assert len({len(answer) for answer in ours}) > 1, "rows must end at different places"


def test_a_batch_answers_as_each_prompt_alone(model: torch.nn.Module) -> None:
    batch = generate(model, PROMPTS, [], Sampling(max_new_tokens=16))
    alone = [generate(model, [prompt], [], Sampling(max_new_tokens=16))[0] for prompt in PROMPTS]
    assert batch == alone == [theirs(model, [prompt], 16, 399)[0] for prompt in PROMPTS]


def test_a_shared_prefix_changes_nothing(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = [1, *range(100, 140)]
    prompts = [prefix + rest for rest in ([5], [6, 7, 8, 9], [5, 6])]
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = generate(model, prompts, [], Sampling(max_new_tokens=16))
    hook.remove()
    assert seen[:2] == [(1, len(prefix)), (3, 4)]
    monkeypatch.setattr(generate_module, "MIN_SHARED_TOKENS", 10**9)
    assert shared == generate(model, prompts, [], Sampling(max_new_tokens=16))
    assert shared == theirs(model, prompts, 16, 399)


def test_identical_prompts_get_identical_answers(model: torch.nn.Module) -> None:
    prompt = [1, *range(100, 120)]
    first, second = generate(model, [prompt, prompt], [], Sampling(max_new_tokens=8))
    assert first == second == theirs(model, [prompt], 8, 399)[0]


def test_finished_rows_leave_the_batch(model: torch.nn.Module) -> None:
    stop = common_stop(model)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = generate(model, PROMPTS, [stop], Sampling(max_new_tokens=24))
    hook.remove()
    for step, size in enumerate(sizes[1:], start=1):
        assert size == sum(len(answer) >= step for answer in answers)


def test_the_prompt_computes_logits_for_its_last_position_only(model: torch.nn.Module) -> None:
    positions: list[int] = []
    head = model.lm_head
    hook = head.register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    generate(model, PROMPTS, [], Sampling(max_new_tokens=3))
    hook.remove()
    assert positions == [1, 1, 1]


def test_streaming_gives_the_answer_in_order(model: torch.nn.Module) -> None:
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    answers = generate(
        model, PROMPTS, [common_stop(model)], Sampling(max_new_tokens=12),
        on_token=lambda row, token: streamed[row].append(token),
    )  # fmt: skip
    assert streamed == answers


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12, temperature=0.8),
        Sampling(12, temperature=1.3, top_k=5),
        Sampling(12, temperature=1.0, top_p=0.7, repetition_penalty=1.3),
    ],
)
def test_sampling_repeats_with_its_seed_and_not_without(
    model: torch.nn.Module, sampling: Sampling
) -> None:
    torch.manual_seed(1)
    first = generate(model, PROMPTS, [], sampling)
    torch.manual_seed(2)
    assert generate(model, PROMPTS, [], sampling) == first
    other = Sampling(**{name: getattr(sampling, name) for name in sampling.__slots__} | {"seed": 7})
    assert generate(model, PROMPTS, [], other) != first


def test_a_rows_draws_do_not_depend_on_rows_that_ended(model: torch.nn.Module) -> None:
    sampling = Sampling(12, temperature=1.0)
    free = generate(model, PROMPTS, [], sampling)
    stop = free[0][1]  # row 0 ends at its second token now
    for before, after in zip(free, generate(model, PROMPTS, [stop], sampling), strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)


def test_repetition_penalty_equals_transformers(model: torch.nn.Module) -> None:
    ours = generate(model, PROMPTS[:1], [], Sampling(16, repetition_penalty=1.4))
    with torch.inference_mode():
        full = model.generate(
            input_ids=torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=16,
            repetition_penalty=1.4, eos_token_id=399, pad_token_id=0,
        )  # fmt: skip
    assert ours[0] == full[0, len(PROMPTS[0]) :].tolist()


FILTERS = [
    {}, {"top_k": 20}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.6}, {"top_p": 0.9999},
    {"min_p": 0.1}, {"typical_p": 0.7}, {"typical_p": 0.2, "top_k": 30},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(filters: dict[str, float]) -> None:
    """10,000 stratified draws against the probabilities that transformers' warpers leave."""
    from transformers import (
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    torch.manual_seed(3)
    logits = torch.randn(1, 600) * 2
    wanted = logits / 1.5
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper,
               "typical_p": TypicalLogitsWarper}  # fmt: skip
    for name, warper in warpers.items():
        if name in filters:
            wanted = warper(filters[name])(None, wanted)
    draws = (torch.arange(10_000) + 0.5) / 10_000
    chosen = pick(logits.expand(10_000, -1), Sampling(1, temperature=1.5, **filters), draws)
    shares = torch.bincount(chosen, minlength=600) / 10_000
    assert (shares - wanted.softmax(-1)[0]).abs().max() < 3e-4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_said_twice_as_in_transformers(model: torch.nn.Module, size: int) -> None:
    prompt = [1, 7, 8, 9, 7, 8]
    ours = generate(model, [prompt, [1, 2]], [], Sampling(24, no_repeat_ngram_size=size))
    with torch.inference_mode():
        full = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24,
            no_repeat_ngram_size=size, eos_token_id=399, pad_token_id=0,
        )  # fmt: skip
    assert ours[0] == full[0, len(prompt) :].tolist()
    said = [*prompt, *ours[0]]
    new = [tuple(said[i : i + size]) for i in range(len(prompt) - size + 1, len(said) - size + 1)]
    assert len(set(new)) == len(new)


def test_an_answer_does_not_end_before_its_shortest_length(model: torch.nn.Module) -> None:
    free = generate(model, PROMPTS, [], Sampling(8))
    stop = free[0][0]
    assert generate(model, PROMPTS, [stop], Sampling(8))[0] == []
    for answer in generate(model, PROMPTS, [stop], Sampling(8, min_new_tokens=5)):
        assert len(answer) >= 5
        assert stop not in answer


def test_answers_end_where_the_models_positions_end(model: torch.nn.Module) -> None:
    nearly_full = [1] + [7] * 508
    answers = generate(model, [nearly_full, [1, 2]], [], Sampling(max_new_tokens=9))
    assert [len(answer) for answer in answers] == [3, 9]
    with pytest.raises(UsageError, match="512 tokens, the model reads 512") as error:
        generate(model, [[1] * 512], [], Sampling())
    assert error.value.code == "prompt-too-long"


def test_empty_input(model: torch.nn.Module) -> None:
    assert generate(model, [], [], Sampling()) == []
    with pytest.raises(UsageError) as error:
        generate(model, [[1], []], [], Sampling())
    assert error.value.code == "empty-prompt"


def test_the_models_mode_comes_back(model: torch.nn.Module) -> None:
    model.train()
    try:
        generate(model, PROMPTS[:1], [], Sampling(2))
        assert model.training
    finally:
        model.eval()


def test_sliding_window_models_agree_too() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    prompts = [[1, *range(20, 40)], [1, *range(20, 30), 7]]
    assert generate(model, prompts, [], Sampling(12)) == theirs(model, prompts, 12, 127)


def test_peft_models_generate_with_their_adapter(tiny: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = generate(model, PROMPTS, [], Sampling(8))
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    with_adapter = generate(tuned, PROMPTS, [], Sampling(8))
    assert with_adapter != plain
    with tuned.disable_adapter():
        assert generate(tuned, PROMPTS, [], Sampling(8)) == plain
