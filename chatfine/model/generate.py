"""Prompt ids → answer ids: the one source of text for chat, evaluation and demo.

Decoding is ours rather than `model.generate` for three costs that it has: finished rows stay in its
batch until the last one ends, its cache is copied whole for each new token, and a prefix that all
prompts share (system prompt, instruction) is read once a row. Greedy results are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from chatfine.errors import UsageError
from chatfine.i18n import t
from chatfine.model.fast import causal_model
from chatfine.model.sampling import Sampling, completions_of_ngrams, forbid, penalise, pick
from chatfine.model.unpacked import cache_argument, prefix_cache, prefix_tokens

__all__ = ["OnToken", "Sampling", "generate", "position_limit"]

OnToken = Callable[[int, int], None]
"""Called with (row, id) for every answer token as soon as it is known."""

MIN_SHARED_TOKENS = 8  # below this a common prefix is not worth a forward pass of its own


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Iterable[int],
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    vocabulary: int = 0,
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
        vocabulary: size of the tokenizer; rows of the head after it are padding, and no answer. 0 =
            all rows.

    Returns:
        The new ids of each prompt, in the order of `prompts`.

    Raises:
        UsageError: a prompt is empty or fills all positions of the model.
    """
    sampling = sampling or Sampling()
    if not prompts:
        return []
    limit = position_limit(model)
    for prompt in prompts:
        _check_prompt(len(prompt), limit)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            decoding = _Decoding(model, prompts, frozenset(stop_ids), sampling, limit)
            decoding.vocabulary = vocabulary or None
            return decoding.run(on_token)
    finally:
        model.train(was_training)


def position_limit(model: Any) -> int | None:
    """How many tokens prompt and answer may have together; None where the model sets no limit.

    Args:
        model: a transformers model, or a peft model around one, whose prefix takes room too.
    """
    config = causal_model(model).config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) - prefix_tokens(model) if limit else None


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

    @classmethod
    def of(cls, layer: DynamicLayer) -> _RoomyLayer:
        """A layer that holds what `layer` holds."""
        roomy = cls()
        if layer.is_initialized:
            roomy.update(layer.keys, layer.values)
        return roomy

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
        self.model = causal_model(model)
        self.prompts = prompts
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.device = next(self.model.parameters()).device
        self.vocabulary: int | None = None
        self.rows = list(range(len(prompts)))
        self.room = [  # how many tokens each row may still get
            min(sampling.max_new_tokens, (limit or 2**62) - len(prompt)) for prompt in prompts
        ]
        self.prefix = prefix_tokens(model)
        if self.prefix:
            self.cache = prefix_cache(model, 1)
        else:
            self.cache = DynamicCache(config=self.model.config)
        for place, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[place] = _RoomyLayer.of(layer)
        self.cache_name = cache_argument(self.model)
        accepted = inspect.signature(self.model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.draws: torch.Tensor | None = None
        if sampling.temperature > 0:  # drawn on the CPU, so that every device gives the same answer
            source = torch.Generator().manual_seed(sampling.seed)
            shape = (len(prompts), sampling.max_new_tokens)
            # a hair below 1, so that rounding never pushes a draw past the last token with any mass
            self.draws = (torch.rand(shape, generator=source) * (1 - 2**-20)).to(self.device)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.seen: torch.Tensor | None = None  # (B, V) tokens the repetition penalty applies to

    def run(self, on_token: OnToken | None) -> list[list[int]]:
        """Decode until every row has ended."""
        answers = self.answers
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
        before = self.prefix + shared
        if shared:
            self.mask = None
            self.positions = torch.arange(self.prefix, before, device=self.device)[None]
            self._forward(torch.tensor([list(self.prompts[0][:shared])], device=self.device))
        if before:
            self.cache.batch_repeat_interleave(len(self.prompts))
        rests = [list(prompt[shared:]) for prompt in self.prompts]
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests])  # (B, width)
        real = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        padded = bool((real == 0).any())
        self.positions = (real.cumsum(1) - 1).clamp(min=0).to(self.device) + before
        self.mask = None
        if padded:  # the pads lie between what rows share and the rest of a row
            self.mask = torch.cat([real.new_ones(len(rests), before), real], 1).to(self.device)
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
        logits: torch.Tensor = output.logits[:, -1, : self.vocabulary].float()
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
            logits = penalise(logits, self.seen, self.sampling.repetition_penalty)
        size = self.sampling.no_repeat_ngram_size
        if size:
            said = [[*self.prompts[row], *self.answers[row]] for row in self.rows]
            spent = [completions_of_ngrams(one, size) for one in said]
            logits = torch.stack([forbid(*one) for one in zip(logits, spent, strict=True)])
        if step < self.sampling.min_new_tokens:
            logits = forbid(logits, sorted(self.stop_ids))
        draws = None if self.draws is None else self.draws[:, step]
        chosen = pick(logits, self.sampling, draws)
        if self.seen is not None:
            self.seen[torch.arange(len(chosen), device=chosen.device), chosen] = True
        return chosen
