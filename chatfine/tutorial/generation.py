"""The further options that chat_completion.py hands to transformers' `generate` in the tutorial.

All fields of GenerationConfig up to transformers 5.24, and those that only older versions had.
"""

from __future__ import annotations

from chatfine.i18n import t
from chatfine.tutorial.fields import Field, Note, same

GENERATION = "generation"


def _beams() -> str:
    return t("only beam search reads it; here one answer is drawn token by token")


def _cache() -> str:
    return t("keys and values are always kept, and the room for them grows as needed")


def _ids() -> str:
    return t("tokenizer and chat template say which tokens begin and end an answer")


def _encoder() -> str:
    return t("only encoder-decoder models read it")


def _drafts() -> str:
    return t("no second model drafts tokens here")


def _outputs() -> str:
    return t("chat shows the text, nothing else")


def _speed() -> str:
    return t("it changes the speed only, and chatfine has its own decoding")


def _filters() -> str:
    return t("chatfine has no such filter; it has top_k, top_p, min_p and typical_p")


def _shaping() -> str:
    return t("chatfine does not change single tokens' scores")


def _length() -> str:
    return t("max_new_tokens and min_new_tokens count the answer alone")


def _time() -> str:
    return t("Ctrl-C ends an answer at any time")


WITHOUT_EFFECT: dict[Note, tuple[str, ...]] = {
    _length: ("max_length", "min_length"),
    _time: ("max_time",),
    _beams: ("num_beams", "num_beam_groups", "early_stopping", "diversity_penalty", "constraints",
             "force_words_ids", "num_return_sequences", "penalty_alpha", "dola_layers",
             "low_memory"),
    _cache: ("cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
    _ids: ("pad_token_id", "bos_token_id", "eos_token_id", "forced_bos_token_id",
           "forced_eos_token_id", "stop_strings", "token_healing"),
    _encoder: ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
               "decoder_start_token_id"),
    _drafts: ("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
              "assistant_confidence_threshold", "prompt_lookup_num_tokens",
              "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
              "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    _outputs: ("output_attentions", "output_hidden_states", "output_scores", "output_logits",
               "return_dict_in_generate", "transformers_version"),
    _speed: ("compile_config", "disable_compile", "continuous_batching_config",
             "prefill_chunk_size"),
    _filters: ("top_h", "epsilon_cutoff", "eta_cutoff", "guidance_scale", "watermarking_config"),
    _shaping: ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
               "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values"),
}  # fmt: skip

OPTIONS: tuple[Field, ...] = (
    Field(GENERATION, "min_p", 0.0, ("min_p",), same, direct=True),
    Field(GENERATION, "typical_p", 1.0, ("typical_p",), same, direct=True),
    Field(GENERATION, "no_repeat_ngram_size", 0, ("no_repeat_ngram_size",), same, direct=True),
    *(Field(GENERATION, name, "", (), note) for note, names in WITHOUT_EFFECT.items()
      for name in names),
)  # fmt: skip
"""Every further option; those without effect take any value, bare ones too."""
