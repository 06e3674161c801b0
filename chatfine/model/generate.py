"""Prompt ids → answer ids: the one source of text for chat, evaluation and demo.

Decoding is ours rather than `model.generate` for three costs that it has: finished rows stay in its
batch until the last one ends, its cache is copied whole for each new token, and a prefix that all
prompts share (system prompt, instruction) is read once a row. Greedy results are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from chatfine.errors import UsageError
from chatfine.i18n import t

OnToken = Callable[[int, int], None]
"""Called with (row, id) for every answer token as soon as it is known."""

MIN_SHARED_TOKENS = 8  # below this a common prefix is not worth a forward pass of its own
NUCLEUS_TOKENS = 256  # top-p looks among so many likeliest tokens before it sorts them all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest.

    The order is the usual one: repetition penalty, temperature, top-k, top-p.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Iterable[int],
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue every prompt; one batch, so the caller decides how many go together.

    Prompts of similar length together waste least. A row ends at a stop id (not part of the
    answer), after `max_new_tokens`, or where the model's positions end; it then leaves the batch
    and costs nothing more. Random draws depend on the seed, the row and the position, not on the
    device.

    Args:
        model: a transformers causal language model, or a peft model around one.
        prompts: token ids of each row; none may be empty.
        stop_ids: ids that end an answer.
        on_token: streaming; an exception it raises ends the generation.

    Returns:
        The new ids of each prompt, in the order of `prompts`.

    Raises:
        UsageError: a prompt is empty or fills all positions of the model.
    """
    sampling = sampling or Sampling()
    if not prompts:
        return []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = position_limit(base)
    for prompt in prompts:
        _check_prompt(len(prompt), limit)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            decoding = _Decoding(base, prompts, frozenset(stop_ids), sampling, limit)
            return decoding.run(on_token)
    finally:
        model.train(was_training)


def position_limit(model: Any) -> int | None:
    """How many tokens prompt and answer may have together; None where the model sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else None


def _check_prompt(tokens: int, limit: int | None) -> None:
    if tokens == 0:
        raise UsageError("empty-prompt", t("a prompt has no tokens"))
    if limit is not None and tokens >= limit:
        raise UsageError(
            "prompt-too-long",
            t("the prompt has {n} tokens, the model reads {limit} together with its answer",
              n=tokens, limit=limit),
            fix=t("shorten the prompt"),
        )  # fmt: skip


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # the library is not typed
    """A cache layer that writes new tokens into spare room instead of copying all old ones.

    `keys` and `values` are the used part of larger buffers, so all else of DynamicLayer holds.
    """

    keys: torch.Tensor
    values: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            capacity = end + max(64, end // 4)
            self.room = (_grown(self.keys, key_states, begin, capacity),
                         _grown(self.values, value_states, begin, capacity))  # fmt: skip
        self.room[0][:, :, begin:end] = key_states
        self.room[1][:, :, begin:end] = value_states
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None


def _grown(used: torch.Tensor, new: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    batch, heads, _, width = new.shape
    buffer = new.new_empty((batch, heads, capacity, width))
    if length:
        buffer[:, :, :length] = used
    return buffer


class _Decoding:
    """The state of one batch while it is decoded; row i of every tensor is prompt `rows[i]`."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        sampling: Sampling,
        limit: int | None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.device = model.get_input_embeddings().weight.device
        self.rows = list(range(len(prompts)))
        self.room = [  # how many tokens each row may still get
            min(sampling.max_new_tokens, (limit or 2**62) - len(prompt)) for prompt in prompts
        ]
        self.cache = DynamicCache(config=model.config)
        for place, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[place] = _RoomyLayer()
        accepted = inspect.signature(model.forward).parameters
        # transformers renamed it in 5.24 and warns at the old name
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.draws: torch.Tensor | None = None
        if sampling.temperature > 0:  # drawn on the CPU, so that every device gives the same answer
            source = torch.Generator().manual_seed(sampling.seed)
            shape = (len(prompts), sampling.max_new_tokens)
            # a hair below 1, so that rounding never pushes a draw past the last token with any mass
            self.draws = (torch.rand(shape, generator=source) * (1 - 2**-20)).to(self.device)
        self.seen: torch.Tensor | None = None  # (B, V) tokens the repetition penalty applies to

    def run(self, on_token: OnToken | None) -> list[list[int]]:
        """Decode until every row has ended."""
        answers: list[list[int]] = [[] for _ in self.prompts]
        logits = self._read_prompts()  # (B, V)
        for step in range(self.sampling.max_new_tokens):
            chosen = self._choose(logits, step)  # (B,)
            keep = []
            for place, token in enumerate(chosen.tolist()):
                row = self.rows[place]
                if token in self.stop_ids:
                    continue
                answers[row].append(token)
                if on_token:
                    on_token(row, token)
                if len(answers[row]) < self.room[row]:
                    keep.append(place)
            if not keep:
                break
            if len(keep) < len(self.rows):
                chosen = self._drop_others(keep, chosen)
            logits = self._forward(chosen[:, None])
        return answers

    def _read_prompts(self) -> torch.Tensor:
        """Fill the cache with all prompts; returns the logits after each (B, V)."""
        shared = self._shared_tokens()
        if shared:
            self.mask = None
            self.positions = torch.arange(shared, device=self.device)[None]
            self._forward(torch.tensor([list(self.prompts[0][:shared])], device=self.device))
            self.cache.batch_repeat_interleave(len(self.prompts))
        rests = [list(prompt[shared:]) for prompt in self.prompts]
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests])  # (B, width)
        real = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        padded = bool((real == 0).any())
        self.positions = (real.cumsum(1) - 1).clamp(min=0).to(self.device) + shared
        self.mask = None
        if padded:  # the pads lie between the shared prefix and the rest of a row
            self.mask = torch.cat([real.new_ones(len(rests), shared), real], 1).to(self.device)
        return self._forward(ids.to(self.device))

    def _shared_tokens(self) -> int:
        """Length of the prefix common to all prompts, 0 where it is not worth it.

        Layers with a window count slots of the cache, so pads inside a row would shift theirs.
        """
        if len(self.prompts) == 1 or any(
            type(layer) is not _RoomyLayer for layer in self.cache.layers
        ):
            return 0
        ordered = sorted(list(prompt) for prompt in self.prompts)
        low, high = ordered[0], ordered[-1]
        shared = 0
        while shared < min(len(low), len(high)) and low[shared] == high[shared]:
            shared += 1
        shared = min(shared, min(map(len, self.prompts)) - 1)  # each row needs a token of its own
        return shared if shared >= MIN_SHARED_TOKENS else 0

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the model on `ids` (B, T) after what the cache holds; logits of the last (B, V)."""
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            **{self.cache_name: self.cache},
            **self.last_only,
        )
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _drop_others(self, keep: list[int], chosen: torch.Tensor) -> torch.Tensor:
        places = torch.tensor(keep, device=self.device)
        self.cache.batch_select_indices(places)
        self.rows = [self.rows[place] for place in keep]
        self.positions = self.positions[places]
        if self.mask is not None:
            self.mask = self.mask[places]
        if self.draws is not None:
            self.draws = self.draws[places]
        if self.seen is not None:
            self.seen = self.seen[places]
        return chosen[places]

    def _choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        if self.sampling.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                for place, prompt in enumerate(self.prompts):
                    self.seen[place, list(prompt)] = True
            logits = _penalise(logits, self.seen, self.sampling.repetition_penalty)
        draws = None if self.draws is None else self.draws[:, step]
        chosen = _pick(logits, self.sampling, draws)
        if self.seen is not None:
            self.seen[torch.arange(len(chosen), device=chosen.device), chosen] = True
        return chosen


def _penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make seen tokens less likely, as in CTRL (Keskar et al. 2019, section 4.1)."""
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lowered, logits)


def _pick(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor | None) -> torch.Tensor:
    """Choose one token a row of `logits` (B, V); `draws` (B,) are uniform in [0, 1)."""
    if draws is None:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _draw(logits.softmax(-1), draws)
    weights, ids = _likeliest(logits, sampling)
    if sampling.top_p < 1:  # drop a token when those before it already have the mass
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p, 0)
    return ids.gather(-1, _draw(weights, draws)[:, None])[:, 0]


def _draw(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where each of `draws` (B,) falls among the cumulated `weights` (B, K)."""
    mass = weights.cumsum(-1)
    return (mass <= draws[:, None] * mass[:, -1:]).sum(-1).clamp(max=mass.shape[-1] - 1)


def _likeliest(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that top-k and top-p can choose from, descending, and their ids, both (B, K).

    A full sort of the vocabulary costs more than a small model's forward pass; the nucleus nearly
    always lies within a few hundred tokens, and where it does not the sort is done after all.
    """
    vocabulary = logits.shape[-1]
    if sampling.top_k:
        top, ids = logits.topk(min(sampling.top_k, vocabulary))
        return top.softmax(-1), ids
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(min(NUCLEUS_TOKENS, vocabulary))
    weights = (top - total).exp()
    if bool((weights.sum(-1) < sampling.top_p).any()):
        top, ids = logits.sort(descending=True)
        weights = (top - total).exp()
    return weights, ids
