"""Other formats → the contents of tokenizer.json and tokenizer_config.json.

`tokenizer.model` of the Llama family (SentencePiece; Llama 3's is in tiktoken.py), and the metadata
of GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.bpe import added_token, begin_with, bpe_spec, merges_by_score
from chatfine.tokenizer.tiktoken import LLAMA3_RULES, is_rank_file, read_ranks

_TEMPLATE = "tokenizer.chat_template"
_BPE = 2  # model type of SentencePiece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # piece types, in both formats
_LLAMA_CONFIG: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}


def read_sentencepiece(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer.json and the tokenizer_config.json that stand for a SentencePiece model.

    The merges are not in the file: SentencePiece joins whichever neighbours make the piece with the
    best score, so every way to cut a piece into two pieces is a merge, ranked by the whole's score.

    Raises:
        TokenizerError: not a SentencePiece file, or not a BPE model without text normalisation.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:
        raise _refusal(path, t("it is not a SentencePiece model")) from None
    if model.trainer_spec.model_type != _BPE:
        raise _refusal(path, t("only SentencePiece models of the type BPE can be converted"))
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise _refusal(path, t("it changes text before encoding it"))
    trainer = model.trainer_spec
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    spec = _from_pieces(pieces, model.normalizer_spec.add_dummy_prefix, bool(trainer.byte_fallback))
    special = {piece for piece, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)}
    named = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece}
    config = _LLAMA_CONFIG | {name: piece for name, piece in named.items() if piece in special}
    if "bos_token" in config:
        spec["post_processor"] = begin_with(config["bos_token"], trainer.bos_id)
    unknown = spec["model"]["unk_token"]
    return spec, config | ({"unk_token": unknown} if unknown else {})


def _from_pieces(
    pieces: Sequence[tuple[str, float, int]], prefix: bool, fallback: bool
) -> dict[str, Any]:
    """The tokenizer.json of SentencePiece's (piece, score, type) in the order of their ids."""
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    unknown = next((piece for piece, _, kind in pieces if kind == _UNKNOWN), None)
    added = [
        added_token(vocab[piece], piece, special=kind != _USER_DEFINED)
        for piece, _, kind in pieces
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    spec = bpe_spec(vocab, merges_by_score(vocab, scores), added) | {
        "normalizer": _normalizer(prefix),
        "decoder": _decoder(prefix),
    }
    spec["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": fallback}
    return spec


def _normalizer(prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not prefix:
        return replace
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _refusal(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "bad-tokenizer-model",
        t("can't convert {path}", path=path.name),
        where=str(path),
        why=why,
        fix=t("put the model's tokenizer.json and tokenizer_config.json into the folder"),
    )


def read_model_file(path: Path, modern: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a `tokenizer.model` of either kind.

    Args:
        modern: name the control tokens of a Llama 3 file as Llama 3.1 does.

    Raises:
        TokenizerError: as for `read_sentencepiece`.
    """
    if is_rank_file(path):
        return read_ranks(path, modern)
    return read_sentencepiece(path)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """tokenizer.json, tokenizer_config.json and chat template out of a GGUF file.

    Known are SentencePiece models (Llama 1 and 2, Mistral), whose rules the file holds whole, and
    two byte-level ones. GGUF names their pre-tokenizer only by a word; its meaning is put back
    here: "smollm" is every digit by itself and then the byte-level pattern, so "a  1" encodes as
    with the original files; "llama-bpe" is Llama 3's pattern.

    Raises:
        TokenizerError: another kind of tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(path))

    def read(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    model, pre = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    tokens: list[str] = read("tokenizer.ggml.tokens", [])
    kinds: list[int] = read("tokenizer.ggml.token_type", [])
    scores: list[float] = read("tokenizer.ggml.scores", []) if model == "llama" else []
    if scores and len(tokens) == len(scores) == len(kinds):
        pieces = list(zip(tokens, scores, kinds, strict=True))
        spec = _from_pieces(pieces, bool(read("tokenizer.ggml.add_space_prefix", True)), True)
    elif model == "gpt2" and pre in ("smollm", "llama-bpe"):
        spec = _byte_level_spec(pre, tokens, kinds, read("tokenizer.ggml.merges"))
    else:
        raise _unknown_kind(path, " / ".join(map(str, (model, pre))))
    config = _gguf_config(read, model, tokens, spec["added_tokens"])
    if config["add_bos_token"] and "bos_token" in config:
        spec["post_processor"] = begin_with(
            config["bos_token"], read("tokenizer.ggml.bos_token_id")
        )
    return spec, config, read(_TEMPLATE)


def _byte_level_spec(
    pre: str, tokens: list[str], kinds: list[int], merges: list[str]
) -> dict[str, Any]:
    added = [
        added_token(number, token, special=kind == _CONTROL)
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    spec = bpe_spec(vocab, merges, added)
    if pre == "llama-bpe":
        spec["model"]["ignore_merges"] = True
        return spec | LLAMA3_RULES
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return spec | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
    }


def _unknown_kind(path: Path, kind: str) -> TokenizerError:
    return TokenizerError(
        "gguf-tokenizer",
        t("this GGUF file has a tokenizer of an unknown kind: {kind}", kind=kind),
        where=str(path),
        why=t("GGUF names a pre-tokenizer without describing it; those of Llama and SmolLM2 are "
              "known"),
        fix=[t("name the original tokenizer: {command}",
               command=f"chatfine convert {path} -o NEW_FOLDER --tokenizer FOLDER"),
             t("or download the model from a hub instead: --source hf")],
    )  # fmt: skip


def _gguf_config(
    read: Callable[..., Any], model: str, tokens: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    default = model == "llama" or read("tokenizer.ggml.pre") == "llama-bpe"
    config: dict[str, Any] = {
        "add_bos_token": bool(read("tokenizer.ggml.add_bos_token", default)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(read("llama.context_length", 8192)),
        # the class that takes tokenizer.json as it is; GPT2Tokenizer may use its own pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(entry["id"]): {name: entry[name] for name in entry if name != "id"}
            for entry in added
        },
    }
    if model == "llama":
        config = {**_LLAMA_CONFIG, "add_bos_token": config["add_bos_token"]}
    for short, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = read(f"tokenizer.ggml.{word}_token_id")
        if number is not None:
            config[f"{short}_token"] = tokens[number]
    return config
